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
    assert re.search(r"weights: read at [\d.]+ GB/s where they lie", streams.out)
    step = r"of a step \d+% is reading the weights, [\d.]+% is Python"
    assert re.search(rf"tg4 @ d8: \d+% of the read bandwidth .*; {step}", streams.out)
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
    assert found["weights_bytes_per_s"] > 0
    assert found["peak_rss_bytes"] > 0
    assert found["load_s"] > 0


def test_a_profile_is_a_table_of_each_test_and_a_timeline(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    assert main(["bench", tiny, *SIZES, "-r", "1", "--trace", str(trace)]) == 0
    streams = capsys.readouterr()
    first, prefill, decode = streams.out.split("\n| test ")
    assert "t/s" in first
    kernels = ["embed", "norm, quantise", "qkv", "rope, append", "attention", "o", "glu", "down", "select rows", "head"]
    for table, test, last in ((prefill, "pp16", ["wait", "Python"]), (decode, "tg4", ["wait", "sampler", "Python"])):
        lines = table.splitlines()
        header = [cell.strip() for cell in lines[0].strip("|").split("|")]
        assert header == ["kernel", "calls", "us/call", "time", "GB/s", "GOP/s", "of limit"]
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:] if line]
        assert [row[1] for row in rows] == [*kernels, *last]
        assert {row[0] for row in rows} == {test}
        assert sum(float(row[4].removesuffix("%")) for row in rows) == pytest.approx(100, abs=1)
        assert all(re.fullmatch(r"\d+% (read|int8)", row[7]) for row in rows if row[1] in ("qkv", "glu", "head"))
    assert f"{trace}: " in streams.err
    assert "open it in ui.perfetto.dev" in streams.err
    assert len(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]) > 100


def test_the_page_explains_every_field_of_a_profile(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", tiny, *SIZES, "-r", "1", "--profile", "--json"]) == 0
    prefill, decode = json.loads(capsys.readouterr().out)["profile"]
    assert (prefill["test"], decode["test"]) == ("pp16", "tg4")
    page = (Path(__file__).parents[2] / "docs" / "bench.md").read_text(encoding="utf-8")
    documented = re.findall(r"(?m)^\| `(\w+)` \|", page[page.index("| field of `profile` |") :])
    assert documented == [*(key for key in prefill if key != "kernels"), *prefill["kernels"][0]]
    for found in (prefill, decode):
        assert sum(kernel["share"] for kernel in found["kernels"]) == pytest.approx(1)


def test_a_trace_is_refused_before_the_model_is_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "no-such-model.gguf", "--trace", str(tmp_path / "nowhere" / "x.json")]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "the trace cannot be written to" in streams.err


def test_the_reference_backend_does_not_profile(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", tiny, *SIZES, "--backend", "reference", "--profile"]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "the reference backend does not profile" in streams.err


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
