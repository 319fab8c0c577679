"""Profiles and traces: sums by hand on an invented recording, then what the native backend records of tiny models."""

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_tiny

import isotherm
from isotherm.engine.solo import RecordedRun
from isotherm.errors import OptionError
from isotherm.evaluation import trace as trace_module
from isotherm.evaluation.bench import BenchOptions, BenchResult, bench
from isotherm.evaluation.profile import KernelTime, lanes, profile
from isotherm.evaluation.trace import TraceFile, TraceSummary
from isotherm.facts import DeviceFacts
from isotherm.program.ops import AttentionShape
from isotherm.program.recording import MARK, Phase, Recording, StepFacts, Walk
from isotherm.text import TextGenerator
from isotherm.types import QuantType

START, PREPARE, WORK, WAIT = Phase
DEVICE = DeviceFacts("invented", 2, 10**9, "avx2", read_bytes_per_s=1e9, int8_ops_per_s=100e9)

STEPS = (
    StepFacts("embed", row_bytes=10),
    StepFacts("glu", 0, "norm, quantise", weight_bytes=3000, row_ops=6000, is_int8=True),
    StepFacts("select rows"),
    StepFacts("head", None, "norm, quantise", weight_bytes=400, row_ops=800, is_int8=True),
)
# Two threads: a walk over embed and glu from 1000 to 9000 ns, and the head's from 10000 to 12000.
FIRST = (
    *((1000, 0, START), (1500, 0, WORK), (2000, 0, WAIT), (3000, 1, PREPARE), (3500, 1, WAIT), (7500, 1, WORK)),
    *((8000, 1, WAIT), (9000, 1, WAIT)),
    *((10000, 2, START), (10100, 2, WORK), (10200, 2, WAIT), (10400, 3, PREPARE), (11400, 3, WORK), (11900, 3, WAIT)),
    (12000, 3, WAIT),
)
SECOND = (
    *((1400, 0, START), (1900, 0, WORK), (2100, 0, WAIT), (2600, 1, PREPARE), (3600, 1, WAIT), (7600, 1, WORK)),
    (8100, 1, WAIT),
    *((10000, 2, START), (10050, 2, WORK), (10150, 2, WAIT), (10550, 3, PREPARE), (11850, 3, WORK), (11950, 3, WAIT)),
)


def as_marks(*marks: tuple[int, int, Phase]) -> Any:
    return np.array([tuple(mark) for mark in marks], MARK)


BY_HAND = Recording(STEPS, (Walk(5, ((5, 0),)), Walk(1, ())), (as_marks(*FIRST), as_marks(*SECOND)))


def spans_ns(recording: Recording) -> Iterator[list[tuple[int, int, int]]]:
    """By thread: walk, begin and end of each span."""
    for lane in lanes(recording):
        yield list(zip(lane.walk.tolist(), lane.begin_ns.tolist(), lane.end_ns.tolist(), strict=True))


def test_sums_by_hand() -> None:
    found = profile("pp5", [RecordedRun(12e-6, 0.5e-6, BY_HAND)], DEVICE, is_decode=False)
    assert (found.test, found.num_runs, found.total_s) == ("pp5", 1, 12e-6)
    expected = [  # kernel, calls, mean ns of both threads, bytes, operations
        ("embed", 1, (500 + 500) / 2, 50, 0),
        ("norm, quantise", 2, (1000 + 500 + 200 + 400) / 2, 0, 0),
        ("glu", 1, (4000 + 4000) / 2, 3000, 30000),
        ("select rows", 1, (100 + 50) / 2, 0, 0),
        ("head", 1, (1000 + 1300) / 2, 400, 800),
        # of the second thread also: until it has woken up, and from its last mark to the end of the walk
        (
            "wait",
            5,
            (500 + 500 + 500 + 1000 + 100 + 500 + 100 + 400 + 200 + 1000 + 500 + 900 + 100 + 100 + 50) / 2,
            0,
            0,
        ),
        ("sampler", 1, 500, 0, 0),
        ("Python", 2, 12000 - 500 - 8000 - 2000, 0, 0),
    ]
    rows = [(k.kernel, k.calls, k.time_s * 1e9, k.num_bytes, k.num_ops) for k in found.kernels]
    assert [row[0] for row in rows] == [row[0] for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        assert row[1:] == pytest.approx(wanted[1:]), row[0]
    assert sum(kernel.time_s for kernel in found.kernels) == pytest.approx(found.total_s)
    assert sum(kernel.share for kernel in found.kernels) == pytest.approx(1)


def kernel_of(found: Any, name: str) -> KernelTime:
    (kernel,) = (kernel for kernel in found.kernels if kernel.kernel == name)
    assert isinstance(kernel, KernelTime)
    return kernel


def test_the_limit_is_what_takes_longer() -> None:
    def row(device: DeviceFacts, steps: tuple[StepFacts, ...], *, is_decode: bool) -> KernelTime:
        run = RecordedRun(12e-6, 0.0, replace(BY_HAND, steps=steps))
        return kernel_of(profile("x", [run], device, is_decode=is_decode), "glu")

    read = row(DEVICE, STEPS, is_decode=False)  # 3000 bytes: 3 us; 30000 operations: 0.3 us; it took 4 us
    assert read.limit == "read bandwidth"
    assert [read.limit_share, read.bytes_per_s, read.ops_per_s] == pytest.approx([0.75, 0.75e9, 7.5e9])
    slow = replace(DEVICE, int8_ops_per_s=10e9)
    assert row(slow, STEPS, is_decode=True).limit == "read bandwidth"  # 3 us both: reading is named
    slow = replace(DEVICE, int8_ops_per_s=9e9)
    computed = row(slow, STEPS, is_decode=False)
    assert computed.limit == "int8 rate"
    assert computed.limit_share == pytest.approx(30000 / 9e9 / 4e-6)
    floats = (STEPS[0], replace(STEPS[1], is_int8=False), *STEPS[2:])
    assert row(slow, floats, is_decode=True).limit == "read bandwidth"
    assert row(slow, floats, is_decode=False).limit is None
    embed = kernel_of(profile("x", [RecordedRun(12e-6, 0.0, BY_HAND)], DEVICE, is_decode=True), "embed")
    assert (embed.limit, embed.limit_share, embed.ops_per_s) == (None, None, None)


@st.composite
def recordings(draw: st.DrawFn) -> Recording:
    """Threads that wake and meet at any time; every walk goes through all steps."""
    num_threads, num_walks = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    gaps = st.integers(0, 50)
    marks: list[list[tuple[int, int, Phase]]] = [[] for _ in range(num_threads)]
    clock = 1000
    for _ in range(num_walks):
        begin = clock + draw(gaps)
        ends = []
        for thread, own in enumerate(marks):
            now = begin + (draw(gaps) if thread else 0)
            own.append((now, 0, START))
            for step in range(len(STEPS)):
                for phase in (PREPARE, WORK, WAIT) if STEPS[step].prepares else (WORK, WAIT):
                    now += draw(gaps)
                    own.append((now, step, phase))
            ends.append(now)
        clock = max(ends) + draw(gaps)
        marks[0].append((clock, len(STEPS) - 1, WAIT))
    walks = tuple(Walk(1, ((1, cached),)) for cached in range(num_walks))
    return Recording(STEPS, walks, tuple(as_marks(*own) for own in marks))


@given(recordings())
def test_the_parts_are_the_whole(recording: Recording) -> None:
    first = recording.marks[0]
    starts = np.flatnonzero(first["phase"] == START)
    begins, ends = first["ns"][starts].tolist(), first["ns"][[*(starts[1:] - 1), -1]].tolist()
    for spans in spans_ns(recording):
        for walk, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            mine = [span for span in spans if span[0] == walk]
            assert (mine[0][1], mine[-1][2]) == (begin, end)
            assert all(before[2] == after[1] for before, after in pairwise(mine)), "a gap"
            assert all(span[2] >= span[1] for span in mine)
    walls_s = (sum(ends) - sum(begins)) * 1e-9
    found = profile("x", [RecordedRun(walls_s + 1e-6, 0.0, recording)], DEVICE, is_decode=True)
    assert sum(k.time_s for k in found.kernels if k.kernel != "Python") == pytest.approx(walls_s)
    assert kernel_of(found, "Python").time_s == pytest.approx(1e-6)


@given(
    sequences=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), min_size=1, max_size=3),
    window=st.sampled_from([None, 1, 4, 16]),
)
def test_costs_of_attention_position_by_position(sequences: list[tuple[int, int]], window: int | None) -> None:
    shape = AttentionShape(6, 2, 16, 1.0, window)
    step, walk = (
        StepFacts("attention", 3, attention=shape, position_bytes=7),
        Walk(sum(new for new, _ in sequences), tuple(sequences)),
    )
    num_pairs = num_positions = 0
    for num_new, num_cached in sequences:
        seen_of = [
            [p for p in range(own + 1) if window is None or p > own - window]
            for own in range(num_cached, num_cached + num_new)
        ]
        num_pairs += sum(map(len, seen_of))
        num_positions += len({p for seen in seen_of for p in seen})
    assert step.num_ops(walk) == num_pairs * 6 * 16 * 4  # a multiply-add for the score, one for the sum
    assert step.num_bytes(walk) == num_positions * 7
    assert step.name == "layer 3 attention"


# --- a real backend ---


@pytest.fixture(params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TextGenerator]:
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path))
    monkeypatch.setattr("isotherm.evaluation.bench.measure", lambda *_: DEVICE)
    path = write_tiny(tmp_path / "tiny.gguf", request.param, QuantType.Q8_0, context_tokens=1536)
    with isotherm.load(path, threads=2) as generator:
        yield generator


def test_costs_add_up_to_those_of_the_model(model: TextGenerator) -> None:
    steps = model.record_prefill(3).recording.steps
    assert sum(step.row_ops for step in steps if step.kind != "head") == model.facts.token_ops
    one_row = Walk(1, ())  # no sequence: no keys and values
    embed = next(step for step in steps if step.kind == "embed")
    read = sum(step.num_bytes(one_row) for step in steps)
    assert read - embed.row_bytes == pytest.approx(model.facts.token_bytes, rel=0.02)  # norms are not counted


@pytest.mark.parametrize(("kv", "head_bytes"), [("f16", 2 * 64), ("q8_0", 64 + 2 * 2)])
def test_keys_and_values_cost_what_they_are_kept_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv: str, head_bytes: int
) -> None:
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path))
    path = write_tiny(tmp_path / "tiny.gguf", "llama", QuantType.Q8_0, num_kv_heads=2, head_dim=64)
    with isotherm.load(path, threads=1, kv=kv) as generator:
        steps = generator.record_prefill(1).recording.steps
    attention = next(step for step in steps if step.kind == "attention")
    assert attention.num_bytes(Walk(1, ((1, 9),))) == 10 * 2 * 2 * head_bytes  # positions, heads, keys and values


def test_what_is_recorded(model: TextGenerator) -> None:
    recording = model.record_decode(2, depth=600).recording  # two blocks of positions: attention may be split
    layers = model.facts.config.num_layers
    assert recording.walks == (Walk(1, ((1, 600),)), Walk(1, ()), Walk(1, ((1, 601),)), Walk(1, ()))
    assert [step.layer for step in recording.steps if step.kind == "attention"] == list(range(layers))
    assert [step.name for step in recording.steps][:3] == ["embed", "layer 0 qkv", "layer 0 attention"]
    assert recording.steps[-1].name == "head"
    assert len(recording.marks) == 2
    for thread, marks in enumerate(recording.marks):
        assert (np.diff(marks["ns"]) >= 0).all()
        assert (marks["phase"] == START).sum() == 4
        passed = marks["step"][marks["phase"] == WORK]
        split = {step for step in range(len(recording.steps)) if (passed == step).sum() > 2}
        assert split <= {step for step, facts in enumerate(recording.steps) if facts.kind == "attention"}
        assert list(dict.fromkeys(passed.tolist())) == list(range(len(recording.steps))), f"thread {thread}"
        prepared = set(marks["step"][marks["phase"] == PREPARE].tolist())
        assert prepared == {step for step, facts in enumerate(recording.steps) if facts.prepares}


def test_nothing_is_recorded_where_nobody_asks(model: TextGenerator) -> None:
    compiled = model._open_engine()._compiled
    asked, recording = compiled.record(lambda: model.prefill_s(3), 1)
    assert asked > 0
    assert len(recording.walks) == 2
    model.prefill_s(3)
    nothing, empty = compiled.record(lambda: None, 1)
    assert nothing is None
    assert (empty.walks, [len(marks) for marks in empty.marks]) == ((), [0, 0])


def test_a_run_that_fails_ends_the_recording(model: TextGenerator) -> None:
    def fail() -> None:
        model.prefill_s(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model._open_engine()._compiled.record(fail, 1)
    assert len(model.record_prefill(3).recording.walks) == 2


def profiled(model: TextGenerator, **sizes: int) -> BenchResult:
    return bench(
        model, BenchOptions(**{"prompt_tokens": 40, "decode_tokens": 3, "repetitions": 2, **sizes}, profile=True)
    )


def test_a_profile_has_every_kind_of_step(model: TextGenerator) -> None:
    prefill, decode = profiled(model, depth=8).profiles
    is_gemma = model.facts.config.family == "gemma3"
    kinds = ["embed", "norm, quantise", "qkv", "rope, append", "attention", "o", *["add, norm"] * is_gemma, "glu"]
    rest = ["down", "select rows", "head", "wait"]
    assert [kernel.kernel for kernel in prefill.kernels] == [*kinds, *rest, "Python"]
    assert [kernel.kernel for kernel in decode.kernels] == [*kinds, *rest, "sampler", "Python"]
    assert (prefill.test, decode.test, decode.num_runs) == ("pp40", "tg3 @ d8", 2)
    layers = model.facts.config.num_layers
    assert kernel_of(prefill, "glu").calls == 2 * layers
    assert kernel_of(decode, "glu").calls == 2 * 3 * layers
    assert kernel_of(decode, "norm, quantise").calls == 2 * 3 * (4 * layers + 1)
    assert kernel_of(decode, "attention").limit == "read bandwidth"
    assert kernel_of(prefill, "attention").limit is None
    for found in (prefill, decode):
        assert sum(kernel.time_s for kernel in found.kernels) == pytest.approx(found.total_s)
        assert all(kernel.time_s > 0 for kernel in found.kernels)


def test_few_steps_of_decode_are_profiled(model: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isotherm.evaluation.bench.MAX_PROFILED_STEPS", 2)
    result = profiled(model, prompt_tokens=0, decode_tokens=5)
    assert [speed.test for speed in result.tests] == ["tg5"]
    assert [found.test for found in result.profiles] == ["tg2"]


def test_the_reference_backend_says_that_it_cannot(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "llama", QuantType.Q8_0)
    told: list[str] = []
    with (
        isotherm.load(path, backend="reference") as model,
        pytest.raises(OptionError, match="the reference backend does not profile"),
    ):
        bench(model, BenchOptions(4, 2, 1, profile=True), told.append)
    assert not told, "something was measured before"


# --- traces ---


def read_trace(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Metadata and complete events, checked: per thread they come in order, one after the other or one in another."""
    found = json.loads(path.read_text(encoding="utf-8"))
    events = found["traceEvents"]
    metadata, spans = ([event for event in events if event["ph"] == kind] for kind in "MX")
    assert len(metadata) + len(spans) == len(events)
    assert [span["ts"] for span in spans] == sorted(span["ts"] for span in spans)
    assert spans[0]["ts"] == 0
    open_ends: dict[int, list[int]] = {}
    for span in spans:
        assert set(span) == {"name", "ph", "pid", "tid", "ts", "dur"}
        begin, length = round(span["ts"] * 1000), round(span["dur"] * 1000)
        assert length >= 0
        ends = open_ends.setdefault(span["tid"], [])
        while ends and ends[-1] <= begin:
            ends.pop()
        assert not ends or begin + length <= ends[-1], f"{span} begins in another and ends outside"
        ends.append(begin + length)
    return metadata, spans


def test_a_trace_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with TraceFile(path) as file:
        assert file.write("tiny", [RecordedRun(12e-6, 0.0, BY_HAND)]) == TraceSummary(
            2 * 16, True
        )  # 13 spans, 2 walks, Python; 14 and 2
    metadata, spans = read_trace(path)
    names = {(event["name"], event["tid"]): event["args"] for event in metadata}
    assert names["process_name", 0] == {"name": "tiny"}
    assert [names["thread_name", tid]["name"] for tid in (0, 1)] == ["thread 0 (Python's)", "thread 1"]
    of_first = [(span["name"], span["ts"], span["dur"]) for span in spans if span["tid"] == 0]
    assert of_first[:5] == [
        ("5 tokens", 0.0, 8.0),
        ("embed", 0.0, 0.5),
        ("wait", 0.5, 0.5),
        ("layer 0 glu: norm, quantise", 1.0, 1.0),
        ("wait", 2.0, 0.5),
    ]
    assert ("layer 0 glu", 2.5, 4.0) in of_first
    assert ("Python, sampler", 8.0, 1.0) in of_first
    assert ("logits of 1", 9.0, 2.0) in of_first
    assert ("wait", 0.0, 0.4) in [(span["name"], span["ts"], span["dur"]) for span in spans if span["tid"] == 1]


@given(recordings())
def test_any_trace_nests(tmp_path_factory: pytest.TempPathFactory, recording: Recording) -> None:
    path = tmp_path_factory.mktemp("traces") / "trace.json"
    with TraceFile(path) as file:
        file.write("any", [RecordedRun(1.0, 0.0, recording)])
    _, spans = read_trace(path)
    assert {span["tid"] for span in spans} == set(range(len(recording.marks)))


def test_a_trace_of_a_model(model: TextGenerator, tmp_path: Path) -> None:
    result = profiled(model, prompt_tokens=600, repetitions=1)  # two batches
    with TraceFile(tmp_path / "trace.json") as file:
        file.write("tiny", result.recorded)
    _, spans = read_trace(tmp_path / "trace.json")
    names = [span["name"] for span in spans if span["tid"] == 0]
    assert [name for name in names if "token" in name or "logits of" in name] == [
        *("512 tokens", "88 tokens", "logits of 1"),
        *(name for position in (1, 2, 3) for name in (f"token at {position}", "logits of 1")),
    ]
    assert {"layer 1 glu", "layer 1 glu: norm, quantise", "layer 0 attention: rope, append", "head"} <= set(names)


def test_a_long_trace_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "MAX_TRACE_EVENTS", 41)
    path = tmp_path / "trace.json"
    with TraceFile(path) as file:
        summary = file.write("long", [RecordedRun(12e-6, 0.0, BY_HAND)] * 2)
    assert summary == TraceSummary(41, False)
    assert len(json.loads(path.read_text(encoding="utf-8"))["traceEvents"]) == 41 + 5


def test_a_trace_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere" / "trace.json", tmp_path, Path("/dev/null"), tmp_path / ("x" * 300)):
        with pytest.raises(OptionError, match="the trace cannot be written to"):
            TraceFile(path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with TraceFile(tmp_path / "trace.json") as file, pytest.raises(OptionError, match="No space left"):
        file.write("tiny", [RecordedRun(12e-6, 0.0, BY_HAND)])
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_was_not_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("older")

    def interrupted() -> None:
        with TraceFile(path):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]
    with TraceFile(path) as file:
        file.write("newer", [RecordedRun(12e-6, 0.0, BY_HAND)])
    read_trace(path)
    assert list(tmp_path.iterdir()) == [path]
