"""`isotherm eval` on a tiny model: result, JSON, progress, refusals, Ctrl-C."""

import json
import os
import re
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
from tiny_models import write_tiny

import isotherm
from isotherm.cli import main
from isotherm.evaluation.multiple_choice import multiple_choice, read_items
from isotherm.types import QuantType

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path))
    return str(write_tiny(tmp_path / "tiny.gguf", "qwen2", QuantType.Q8_0))


@pytest.fixture
def items_file(tmp_path: Path) -> str:
    path = tmp_path / "items.jsonl"
    choices = [" on the door", " in the sand", " there", " and the other", "!"]
    items = [
        {"context": f"the rain {index} is", "choices": choices[index % 3 :], "answer": index % 2} for index in range(12)
    ]
    path.write_text("".join(f"{json.dumps(item)}\n" for item in items), encoding="utf-8")
    return str(path)


def test_json_holds_what_python_gives(tiny: str, items_file: str, capsys: Capture) -> None:
    assert main(["eval", tiny, "-f", items_file, "--items", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    with isotherm.load(tiny) as model:
        expected = multiple_choice(model, read_items(Path(items_file)), num_items=5)
    assert found == {"model": tiny, "backend": "cpu", **json.loads(json.dumps(asdict(expected)))}
    assert found["num_items"] == len(found["items"]) == 5


def test_one_line_on_stdout_and_progress_on_stderr(tiny: str, items_file: str, capsys: Capture) -> None:
    assert main(["eval", tiny, "--file", items_file, "--threads", "1", "--ctx", "64"]) == 0
    streams = capsys.readouterr()
    assert re.fullmatch(
        r"accuracy \d+\.\d % ± \d+\.\d \(12 items; per character\), \d+\.\d % by plain sum\n", streams.out
    )
    progress = [line for line in streams.err.splitlines() if line.startswith("item ")]
    assert [line.partition(":")[0] for line in progress] == ["item 10 of 12", "item 12 of 12"]
    assert streams.out.startswith(f"accuracy {progress[-1].partition(': ')[2]} (")


def test_a_short_file_is_told(tiny: str, items_file: str, capsys: Capture) -> None:
    assert main(["eval", tiny, "-f", items_file, "--items", "99"]) == 0
    assert "items.jsonl holds 12 items, not 99" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "arguments", "code", "message"),
    [
        (None, (), 2, "cannot be read: No such file"),
        (b"", (), 2, "holds no items"),
        (b"\xff", (), 2, "line 1: is not UTF-8 text"),
        (b'{"context": "a", "choices": ["b", "c"], "answer": "\x1b[2J"}', (), 2, "line 1: is no JSON"),
        (b'{"context": "a", "choices": ["b", "c"], "answer": 2}', (), 2, "the answer is 2"),
        (b'{"context": "", "choices": ["b", "c"], "answer": 0}', (), 2, "no token comes before choice 0"),
        (b'{"context": "a", "choices": ["b", "c"], "answer": 0}', ("--items", "0"), 2, "must be at least 1"),
        (
            b'{"context": "xyzxyz", "choices": ["zyxzyx", "c"], "answer": 0}',
            ("--ctx", "8"),
            1,
            "items.jsonl, line 1: context and choice 0 need 11 positions, the context of the model has 8",
        ),
    ],
)
def test_wrong_input_ends_with_one_line(
    tiny: str,
    tmp_path: Path,
    capsys: Capture,
    content: bytes | None,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    path = tmp_path / "items.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert main(["eval", tiny, "-f", str(path), *arguments]) == code
    streams = capsys.readouterr()
    assert streams.out == ""
    assert message in streams.err
    assert sum(line.startswith("error: ") for line in streams.err.splitlines()) == 1


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_quietly(tiny: str, items_file: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isotherm.cli.eval._tell", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert main(["eval", tiny, "-f", items_file]) == 130
    streams = capsys.readouterr()
    assert (streams.out, "error" in streams.err) == ("", False)
