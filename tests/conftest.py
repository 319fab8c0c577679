"""Fixtures for all tests: the folder of shared material beside the checkout, and the real models it can fetch."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from llama_material import chat_cases, llama_models

__all__ = ["chat_cases", "llama_models"]


def _shared() -> Path:
    return Path(os.environ.get("ISOTHERM_SHARED") or Path(__file__).parents[2] / "shared")


@cache
def _fetch(name: str) -> Path | str:
    """The path of a real model, or why there is none."""
    script = _shared() / "models" / "get.py"
    if not script.is_file():
        return f"no shared material: {script} is missing (ISOTHERM_SHARED names its folder)"
    run = subprocess.run([sys.executable, script, name], capture_output=True, text=True, timeout=600)
    if run.returncode != 0:
        return f"{name} could not be fetched: {run.stderr.strip()[-300:]}"
    return Path(run.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The shared folder (golden answers, texts, models); skips where it is missing."""
    if not _shared().is_dir():
        pytest.skip(f"no shared material at {_shared()} (ISOTHERM_SHARED names its folder)")
    return _shared()


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """`real_model("smollm2-135m")`: the path of a model by its name in get.py; skips where it cannot be had."""

    def path_of(name: str) -> Path:
        found = _fetch(name)
        if isinstance(found, str):
            pytest.skip(found)
        return found

    return path_of


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT as at a terminal, for children too; a shell that runs us in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
