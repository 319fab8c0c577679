"""`isotherm perplexity` on a tiny model: result, JSON, progress, refusals."""

import json
import re
from pathlib import Path

import pytest
from tiny_models import write_tiny

import isotherm
from isotherm.cli import main
from isotherm.evaluation.perplexity import perplexity
from isotherm.types import QuantType

TEXT = "There is a hand on the other door, and it is in there. " * 20


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path))
    return str(write_tiny(tmp_path / "tiny.gguf", "gemma3", QuantType.Q8_0))


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def test_json_holds_what_python_gives(tiny: str, text_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["perplexity", tiny, "-f", text_file, "--ctx", "64", "--chunks", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    with isotherm.load(tiny) as model:
        expected = perplexity(model, TEXT, window_tokens=64, num_windows=3)
    assert found["perplexity"] == expected.perplexity  # one answer for any number of threads
    assert (found["num_windows"], found["window_tokens"], found["num_tokens"]) == (3, 64, 93)
    assert found["standard_error"] > 0


def test_one_line_on_stdout_and_progress_on_stderr(
    tiny: str, text_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["perplexity", tiny, "-f", text_file, "--ctx", "64", "--chunks", "2"]) == 0
    streams = capsys.readouterr()
    assert re.fullmatch(r"perplexity [\d.]+ ± [\d.]+ \(62 tokens in 2 windows\)\n", streams.out)
    assert [line for line in streams.err.splitlines() if line.startswith("window 1 of 2: ")]


def test_a_short_text_is_told(tiny: str, text_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["perplexity", tiny, "-f", text_file, "--ctx", "128", "--chunks", "999"]) == 0
    assert re.search(r"the text holds \d windows of 128 tokens, not 999", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"short", (), "fewer than one window of 512"),
        (b"\xff\xfe text", (), "is not UTF-8 text (byte 0)"),
        (None, (), "cannot be read: No such file"),
        (TEXT.encode(), ("--ctx", "100000"), "context"),
        (TEXT.encode(), ("--ctx", "64", "--chunks", "0"), "at least one"),
    ],
)
def test_wrong_input_ends_with_one_line(
    tiny: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    path = tmp_path / "input.txt"
    if content is not None:
        path.write_bytes(content)
    assert main(["perplexity", tiny, "-f", str(path), *arguments]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert message in streams.err
    assert sum(line.startswith("error: ") for line in streams.err.splitlines()) == 1
