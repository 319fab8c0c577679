"""Material of llama.cpp for conformance tests, taken from a source distribution at run time and kept."""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

_REQUIREMENT = "llama-cpp-python==0.3.36"
_SOURCES = "/vendor/llama.cpp/"
_CHAT_CASES = "tests/test-chat-template.cpp"


def _fetch(folder: Path) -> str | None:
    """Fills `folder`; None, or why that failed."""
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        run = subprocess.run(
            [*pip, "--no-binary", "llama-cpp-python", "-d", scratch, _REQUIREMENT],
            capture_output=True,
            text=True,
            timeout=900,
        )
        if run.returncode != 0:
            return f"{_REQUIREMENT} could not be fetched: {run.stderr.strip()[-300:]}"
        unpacked = Path(scratch) / "models"
        unpacked.mkdir()
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            for member in archive:
                name = member.name.partition(_SOURCES)[2]
                if member.isfile() and (name.startswith("models/") or name == _CHAT_CASES):
                    target = unpacked / name.removeprefix("models/")
                    target.parent.mkdir(exist_ok=True)
                    content = archive.extractfile(member)
                    assert content is not None
                    target.write_bytes(content.read())
        unpacked.rename(folder)
    return None


@pytest.fixture(scope="session")
def chat_cases(llama_models: Path) -> str:
    """The C++ source of llama.cpp's tests of chat templates."""
    return (llama_models / _CHAT_CASES).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def llama_models() -> Path:
    """ggml-vocab-*.gguf, their .inp and .out vectors, templates/*.jinja and the chat cases; skips without them."""
    home = Path(os.environ.get("ISOTHERM_TEST_MODELS") or Path.home() / ".cache" / "isotherm-test-models")
    folder = home / "llama-cpp-0.3.36"
    home.mkdir(parents=True, exist_ok=True)
    problem = None if folder.is_dir() else _fetch(folder)
    if problem:
        pytest.skip(problem)
    return folder
