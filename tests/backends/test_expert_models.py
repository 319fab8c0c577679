"""Whole models of experts: one answer for any threads, chunks, batch, pages and instruction set; through the door."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sketch import ISAS, assert_equal
from test_one_answer import LENGTH, NUM_PAGES, THREADS, Twins, among_strangers
from tiny import make_tiny, run, text_ids
from tiny_models import write_tiny
from tolerances import QUANTISED_SHARE

import isotherm
from isotherm.backends.reference.backend import ReferenceBackend
from isotherm.formats.checkpoint import open_checkpoint
from isotherm.models import FAMILIES
from isotherm.program.batch import Batch, Sequence
from isotherm.program.lowering import lower
from isotherm.types import QuantType

SMALL = {"hidden_size": 64, "ffn_size": 96, "num_heads": 6, "head_dim": 16}
KINDS = ("mixtral", "qwen3moe")


def family_of(kind: str) -> str:
    return "llama" if kind == "mixtral" else kind


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Twins]:
    folder = tmp_path_factory.mktemp("tiny")
    many = {"num_experts": 20, "num_experts_used": 6}
    return {
        "mixtral": Twins(make_tiny(folder, "llama", QuantType.Q4_K, num_layers=1, num_kv_heads=1, num_experts=8)),
        "qwen3moe": Twins(make_tiny(folder, "qwen3moe", QuantType.Q5_0, num_kv_heads=1, **SMALL, **many)),
    }


@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_instruction_sets(twins: dict[str, Twins], kind: str, isa: str, num_threads: int) -> None:
    twin = twins[kind]
    actual = run(twin.compiled(isa, num_threads), twin.model.batch(text_ids(LENGTH)))
    assert_equal(actual, twin.expected, f"{isa} on {num_threads} threads")


@pytest.mark.parametrize("kind", KINDS)
def test_decode_is_prefill(twins: dict[str, Twins], kind: str) -> None:
    twin = twins[kind]
    compiled = twin.compiled(ISAS[-1], 2)
    pages = np.arange(10, dtype=np.int32)
    for i in range(LENGTH // 2):
        actual = run(compiled, twin.model.batch(text_ids(LENGTH)[i : i + 1], i, pages))
        assert_equal(actual, twin.expected[i : i + 1], f"position {i}")


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    isa=st.sampled_from(ISAS),
    num_threads=st.sampled_from(THREADS),
    pages=st.permutations(range(NUM_PAGES)),
    cuts=st.sets(st.integers(1, LENGTH - 1), max_size=12),
    strangers=st.tuples(st.integers(0, 20), st.integers(0, 20)),
)
def test_any_chunks_any_pages_any_company(
    twins: dict[str, Twins],
    kind: str,
    isa: str,
    num_threads: int,
    pages: list[int],
    cuts: set[int],
    strangers: tuple[int, int],
) -> None:
    """Other tokens of a batch change which rows an expert computes together, and no answer."""
    twin = twins[kind]
    compiled = twin.compiled(isa, num_threads)
    for start, end in pairwise([0, *sorted(cuts), LENGTH]):
        actual = run(compiled, among_strangers(twin.model, start, end, np.array(pages, np.int32), strangers))
        assert_equal(actual, twin.expected[start:end], f"positions {start} to {end}")


@pytest.mark.parametrize("quant_type", [QuantType.Q4_0, QuantType.Q4_K, QuantType.Q6_K, QuantType.Q8_0, QuantType.F16])
def test_mixtral_is_the_contract(tmp_path: Path, quant_type: QuantType) -> None:
    model = make_tiny(tmp_path, "llama", quant_type, num_experts=8, tied_head=False)
    pages = np.array([3, 1], np.int32)
    steps = (model.batch(text_ids(18), 0, pages), model.batch(text_ids(3, seed=1), 18, pages))
    reference = model.reference()
    expected = [run(reference, step) for step in steps]
    for isa in ISAS:
        native = model.native(isa)
        for i, step in enumerate(steps):
            assert_equal(run(native, step), expected[i], f"{isa}, step {i}")
    truth = run(model.reference(lowered=False), steps[0])
    off = np.abs(expected[0] - truth).max(axis=1) / np.abs(truth).max()
    assert np.median(off) < QUANTISED_SHARE  # what is rounded otherwise chooses, here and there, another expert


@pytest.mark.parametrize("kind", KINDS)
def test_through_the_door(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path / "cache"))
    num_experts = 8 if kind == "mixtral" else 0
    path = write_tiny(tmp_path / "tiny.gguf", family_of(kind), QuantType.Q4_K, num_experts=num_experts)
    with open_checkpoint(path) as checkpoint:
        program = lower(FAMILIES[checkpoint.config.family](checkpoint.config))
        reference = ReferenceBackend(checkpoint.tensors).compile(program, num_pages=(1,))
        ids = text_ids(30)
        rows = np.arange(len(ids), dtype=np.int32)
        expected = run(reference, Batch(ids, (Sequence(len(ids), 0, (rows[:1],)),), rows))
    for options in ({}, {}, {"sparse": False, "cache_bytes": 0}):  # the second time from the packed file
        with isotherm.load(path, threads=2, **options) as model:
            assert_equal(np.asarray(model.logits(ids.tolist())), expected, "logits")
            assert model.generate("the rain", max_tokens=5).text
    with isotherm.load(path, backend="reference") as model:
        assert model.generate("the rain", max_tokens=5).text


@pytest.mark.parametrize("kind", KINDS)
def test_facts_count_the_experts_that_are_used(tmp_path: Path, kind: str) -> None:
    """Twice the experts take twice the memory, and cost a token no more than the larger router."""
    few, many = (
        write_tiny(tmp_path / f"{n}.gguf", family_of(kind), QuantType.Q4_0, num_experts=n, num_layers=1) for n in (4, 8)
    )
    hidden_size, expert_bytes = 256, 3 * 512 * 256 * 18 // 32
    with isotherm.load(few, cache_bytes=0) as a, isotherm.load(many, cache_bytes=0) as b:
        assert a.facts.token_bytes == b.facts.token_bytes  # both routers fill a panel
        assert b.facts.token_ops - a.facts.token_ops == 2 * 4 * hidden_size
        assert b.facts.memory.weights_bytes - a.facts.memory.weights_bytes == 4 * expert_bytes
        assert a.facts.memory.weights_bytes - a.facts.token_bytes == 2 * expert_bytes  # all else is read


def test_recorded_steps_say_what_experts_cost(tmp_path: Path) -> None:
    model = make_tiny(tmp_path, "llama", QuantType.Q4_0, num_experts=8, num_layers=1)
    compiled = model.native(ISAS[-1])
    _, recording = compiled.record(lambda: [run(compiled, model.batch(text_ids(n))) for n in (1, 3, 40)], 6)
    expert_bytes = 512 * 256 * 18 // 32
    by_kind = {step.kind: step for step in recording.steps}
    glu, down = by_kind["glu of experts"], by_kind["down of experts"]
    forward = [walk for walk in recording.walks if walk.sequences]
    for walk, num_experts in zip(forward, (2, 6, 8), strict=True):
        assert glu.num_bytes(walk) == num_experts * 2 * expert_bytes
        assert down.num_bytes(walk) == num_experts * expert_bytes
        assert down.num_ops(walk) == walk.num_rows * 2 * 2 * 512 * 256
    assert by_kind["route"].layer == 0
