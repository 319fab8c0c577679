"""One answer: the logits of a token are the same bits for any threads, chunks, batch, pages and instruction set."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sketch import F32, ISAS, assert_equal
from tiny import Ints, TinyModel, make_tiny, run, text_ids

from isotherm.backends.cpu.backend import CompiledCpu
from isotherm.program.batch import Batch
from isotherm.types import QuantType

LENGTH = 600  # past the first border of attention blocks
LONG = 1100  # past the second
SMALL = {"hidden_size": 64, "ffn_size": 96, "num_heads": 6, "head_dim": 16}
THREADS = (1, 2, 3, 5, 11)  # 11: two groups of the barrier
NUM_PAGES = 14  # ten for the sequence, four for strangers


class Twins:
    """A tiny model, its answer by the plainest way, and compiled objects that tests share."""

    def __init__(self, model: TinyModel) -> None:
        self.model = model
        self.expected = run(model.native("scalar", 1), model.batch(text_ids(LENGTH)))
        self._compiled: dict[tuple[str, int], CompiledCpu] = {}

    def compiled(self, isa: str, num_threads: int) -> CompiledCpu:
        if (isa, num_threads) not in self._compiled:
            self._compiled[isa, num_threads] = self.model.native(isa, num_threads, num_pages=NUM_PAGES)
        return self._compiled[isa, num_threads]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Twins]:
    folder = tmp_path_factory.mktemp("tiny")
    return {
        "llama": Twins(make_tiny(folder, "llama", QuantType.Q4_K, num_layers=1, num_kv_heads=1)),
        "qwen2": Twins(make_tiny(folder, "qwen2", QuantType.Q5_0, num_kv_heads=1, **SMALL)),
        "gemma3": Twins(make_tiny(folder, "gemma3", QuantType.Q8_0, sliding_window=70, num_kv_heads=2, **SMALL)),
    }


@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_threads_and_instruction_sets(twins: dict[str, Twins], family: str, isa: str, num_threads: int) -> None:
    twin = twins[family]
    actual = run(twin.compiled(isa, num_threads), twin.model.batch(text_ids(LENGTH)))
    assert_equal(actual, twin.expected, f"{isa} on {num_threads} threads")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_decode_is_prefill(twins: dict[str, Twins], family: str) -> None:
    """Token by token from the start, over the first border of attention blocks."""
    twin = twins[family]
    compiled = twin.compiled(ISAS[-1], 2)
    pages = np.arange(10, dtype=np.int32)
    for i in range(LENGTH):
        actual = run(compiled, twin.model.batch(text_ids(LENGTH)[i : i + 1], i, pages))
        assert_equal(actual, twin.expected[i : i + 1], f"position {i}")


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(("llama", "qwen2", "gemma3")),
    isa=st.sampled_from(ISAS),
    num_threads=st.sampled_from(THREADS),
    pages=st.permutations(range(NUM_PAGES)),
    cuts=st.sets(st.one_of(st.integers(1, LENGTH - 1), st.integers(508, 516)), max_size=12),
    strangers=st.tuples(st.integers(0, 20), st.integers(0, 20)),
)
def test_any_chunks_any_pages_any_company(
    twins: dict[str, Twins],
    family: str,
    isa: str,
    num_threads: int,
    pages: list[int],
    cuts: set[int],
    strangers: tuple[int, int],
) -> None:
    """The prompt cut anywhere, its pages anywhere, among strangers, on any instruction set and number of threads."""
    twin = twins[family]
    compiled = twin.compiled(isa, num_threads)
    for start, end in pairwise([0, *sorted(cuts), LENGTH]):
        actual = run(compiled, among_strangers(twin.model, start, end, np.array(pages, np.int32), strangers))
        assert_equal(actual, twin.expected[start:end], f"positions {start} to {end}")


def among_strangers(model: TinyModel, start: int, end: int, pages: Ints, strangers: tuple[int, int]) -> Batch:
    """Positions [start, end) of the text, between two new sequences of `strangers` tokens; only our rows are wanted."""
    before, after = strangers
    sequences = [model.sequence(end - start, start, pages[:10])]
    if before:
        sequences.insert(0, model.sequence(before, 0, pages[10:12]))
    if after:
        sequences.append(model.sequence(after, 0, pages[12:]))
    others = text_ids(20, seed=9)
    ids = np.concatenate([others[:before], text_ids(LENGTH)[start:end], others[:after]])
    return Batch(ids, tuple(sequences), np.arange(before, before + end - start, dtype=np.int32))


@pytest.mark.parametrize("num_threads", [1, 5])
def test_contexts_of_several_blocks(tmp_path: Path, num_threads: int) -> None:
    """Past 1024 positions, in windows as well: by one prefill, by uneven chunks, by single tokens at the borders."""
    for family, quant_type in (("llama", QuantType.Q4_0), ("gemma3", QuantType.Q4_1)):
        model = make_tiny(tmp_path, family, quant_type, sliding_window=530, num_kv_heads=2, **SMALL)
        ids = text_ids(LONG)
        expected = run(model.native("scalar", 1), model.batch(ids))
        pages = np.arange(18, dtype=np.int32)[::-1]
        for isa in ISAS:
            compiled = model.native(isa, num_threads, num_pages=18)
            cuts = [0, 300, 510, 511, 512, 513, 514, 700, 1022, 1023, 1024, 1025, 1026, LONG - 1, LONG]
            for start, end in pairwise(cuts):
                actual = run(compiled, model.batch(ids[start:end], start, pages))
                assert_equal(actual, expected[start:end], f"{family} on {isa}, positions {start} to {end}")


def test_float_logits_differ_between_tokens(twins: dict[str, Twins]) -> None:
    """The answers that the tests above compare are worth comparing."""
    for twin in twins.values():
        expected: F32 = twin.expected
        assert np.isfinite(expected).all()
        assert len(np.unique(expected[:, 7])) > LENGTH / 2
