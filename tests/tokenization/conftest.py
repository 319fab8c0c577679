"""Material of llama.cpp for conformance tests, taken from a source distribution at run time and kept."""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

_REQUIREMENT = "llama-cpp-python==0.3.36"
_WANTED = "/vendor/llama.cpp/models/"


def _fetch(folder: Path) -> str | None:
    """Fills `folder`; None, or why that failed."""
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        run = subprocess.run(
            [*pip, "--no-binary", ":all:", "-d", scratch, _REQUIREMENT], capture_output=True, text=True, timeout=900
        )
        if run.returncode != 0:
            return f"{_REQUIREMENT} could not be fetched: {run.stderr.strip()[-300:]}"
        unpacked = Path(scratch) / "models"
        unpacked.mkdir()
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            for member in archive:
                name = member.name.partition(_WANTED)[2]
                if name and member.isfile() and name.count("/") <= 1:
                    target = unpacked / name
                    target.parent.mkdir(exist_ok=True)
                    content = archive.extractfile(member)
                    assert content is not None
                    target.write_bytes(content.read())
        unpacked.rename(folder)
    return None


@pytest.fixture(scope="session")
def llama_models() -> Path:
    """The folder with ggml-vocab-*.gguf, their .inp and .out vectors, and templates/; skips where it cannot be had."""
    home = Path(os.environ.get("ISOTHERM_TEST_MODELS") or Path.home() / ".cache" / "isotherm-test-models")
    folder = home / "llama-cpp-models"
    home.mkdir(parents=True, exist_ok=True)
    problem = None if folder.is_dir() else _fetch(folder)
    if problem:
        pytest.skip(problem)
    return folder
