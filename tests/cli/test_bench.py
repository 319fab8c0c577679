"""`isotherm bench` on a tiny model: the table, the JSON, what is refused."""

import json
import re
from pathlib import Path

import pytest
from tiny_models import write_tiny

from isotherm.cli import main
from isotherm.types import QuantType

SIZES = ("-p", "16", "-n", "4", "-r", "2", "--threads", "1")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path))
    return str(write_tiny(tmp_path / "tiny.gguf", "qwen2", QuantType.Q8_0))


def test_the_table_has_the_columns_of_llama_bench(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", tiny, *SIZES, "--depth", "8"]) == 0
    streams = capsys.readouterr()
    lines = streams.out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4]]
    assert cells[0] == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    assert re.fullmatch(r"[- |:]+", lines[1])
    assert [row[5] for row in cells[2:]] == ["pp16", "tg4 @ d8"]
    for row in cells[2:]:
        assert row[0] == "qwen2 Q8_0"
        assert re.fullmatch(r"[\d.]+ MiB", row[1])
        assert re.fullmatch(r"[\d.]+ ± [\d.]+", row[6])
    assert len({len(line) for line in lines[:4]}) == 1  # aligned
    assert re.search(r"load [\d.]+ s, peak memory \d+ MB", streams.out)
    assert re.search(r"machine: reads [\d.]+ GB/s, int8 \d+ GOPS", streams.out)
    assert re.search(r"pp16: \d+% of the int8 rate", streams.out)
    assert re.search(r"tg4 @ d8: \d+% of the read bandwidth .*, [\d.]+% of a step in Python", streams.out)
    assert "repetition 2 of 2" in streams.err


def test_json_on_stdout_and_nothing_else(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", tiny, *SIZES, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [test["test"] for test in found["tests"]] == ["pp16", "tg4"]
    for test in found["tests"]:
        assert test["tokens_per_second"] == pytest.approx(sum(test["samples"]) / 2)  # the median of two
        assert test["stddev"] >= 0
        assert test["limit_share"] > 0
    assert found["num_threads"] == 1
    assert found["device"]["read_bytes_per_s"] > 0
    assert found["peak_rss_bytes"] > 0
    assert found["load_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", "0", "-n", "0"), "nothing to measure"),
        (("-r", "0"), "at least one repetition"),
        (("-p", "100000"), "context"),  # longer than the model's
        (("-d", "-1"), "cannot be negative"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tiny: str, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert main(["bench", tiny, *arguments]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert message in streams.err
    assert len(streams.err.splitlines()) == 1
