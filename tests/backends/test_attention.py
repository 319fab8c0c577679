"""Attention, native against the contract in NumPy: equal on every instruction set, however the work is cut."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from sketch import F32, ISAS, Finished, Sketch, assert_equal

from isotherm.backends.reference import contract
from isotherm.program import ops
from isotherm.program.batch import FREED_PAGE, Batch, Sequence
from isotherm.program.ops import AttentionShape, NormWeights
from isotherm.program.recorder import PAGE_TOKENS, StateKind, StateSpec
from isotherm.program.rope import rope_table
from isotherm.types import KvType, Rope

LONG = 1100  # positions: past the second border of attention blocks


@dataclass(frozen=True)
class Case:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_dims: int
    window: int | None = None
    qk_norm: bool = False
    kv_type: KvType = KvType.F16

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(self.num_heads, self.num_kv_heads, self.head_dim, self.head_dim**-0.5, self.window)

    @property
    def rope(self) -> Rope:
        return Rope(10000.0, self.rope_dims)

    def __str__(self) -> str:
        norm = "-norm" if self.qk_norm else ""
        heads = f"{self.num_heads}x{self.num_kv_heads}x{self.head_dim}"
        return f"{heads}-rope{self.rope_dims}-window{self.window}{norm}-{self.kv_type.name}"


CASES = [
    Case(1, 1, 16, 16),
    Case(4, 2, 64, 64),
    Case(9, 3, 64, 64, window=7),
    Case(4, 4, 32, 16),  # the upper half of a head does not turn
    Case(8, 1, 32, 32, window=1),
    Case(30, 1, 16, 16),  # more heads in a group than a tile of query rows
    Case(2, 2, 80, 80),  # 64 + 16 columns; rope halves of 40
    Case(3, 1, 48, 22, window=16, qk_norm=True),  # rope halves of 11
    Case(2, 1, 112, 2, qk_norm=True),
    Case(4, 1, 256, 256, window=16, qk_norm=True),
    Case(4, 2, 64, 64, kv_type=KvType.Q8_0),
    Case(1, 1, 16, 16, kv_type=KvType.Q8_0),  # half a block of columns
    Case(30, 1, 48, 16, kv_type=KvType.Q8_0),
    Case(2, 2, 80, 80, window=7, kv_type=KvType.Q8_0),
    Case(6, 1, 128, 128, window=16, qk_norm=True, kv_type=KvType.Q8_0),
]
LONG_CASES = [
    Case(2, 1, 64, 64),
    Case(3, 3, 16, 16, qk_norm=True),
    Case(2, 1, 32, 32, window=100),
    Case(2, 2, 16, 16, window=513),
    Case(4, 2, 16, 8, window=600),
    Case(2, 1, 64, 64, kv_type=KvType.Q8_0),
    Case(3, 3, 48, 16, window=513, kv_type=KvType.Q8_0),
]


def tables(case: Case, num_rows: int) -> tuple[F32, F32, F32]:
    """q, k and v of every token id."""
    widths = (case.num_heads, case.num_kv_heads, case.num_kv_heads)
    q, k, v = (
        np.random.default_rng(i).standard_normal((num_rows, n * case.head_dim)).astype(np.float32)
        for i, n in enumerate(widths)
    )
    q[::5] *= 8  # some rows that look at few positions
    return q, k, v


def attention(case: Case, num_rows: int) -> Finished:
    """Token id i has row i of `tables` as its q, k and v; logits are what attention gives."""
    kind = StateKind.KV_WINDOW if case.window else StateKind.KV
    sketch = Sketch(StateSpec(kind, 1, case.num_kv_heads, case.head_dim, case.window, case.kv_type))
    q, k, v = (sketch.input(rows) for rows in tables(case, num_rows))
    q_norm = k_norm = None
    if case.qk_norm:
        q_norm, k_norm = (NormWeights(sketch.vector(name, case.head_dim), 1e-6) for name in ("q_norm", "k_norm"))
    out = sketch.value(q.width)
    sketch.add(ops.RopeAttention(out, q, k, v, q_norm, k_norm, case.rope, case.shape, 0, 0))
    return sketch.finish(out)


def contract_rows(case: Case, finished: Finished, num_rows: int, wanted: list[int]) -> F32:
    """What ids 0, 1, .. at positions 0, 1, .. give at the wanted ones, straight from the contract."""
    q, k, v = (rows.reshape(num_rows, -1, case.head_dim) for rows in tables(case, num_rows))
    if case.qk_norm:
        q, k = (
            contract.rms_norm(x, finished.tensors[name].raw.view(np.float32)[0], 1e-6)
            for x, name in ((q, "q_norm"), (k, "k_norm"))
        )
    turns = rope_table(case.rope, 0, num_rows)
    q = contract.rotate(q, turns)
    k, v = (contract.to_cache(x, case.kv_type) for x in (contract.rotate(k, turns), v))
    group = case.num_heads // case.num_kv_heads
    out = [
        contract.attend(q[i, h], k[: i + 1, h // group], v[: i + 1, h // group], i, case.shape.scale, case.window)
        for i in wanted
        for h in range(case.num_heads)
    ]
    return np.reshape(out, (len(wanted), -1))


def growing_batches() -> tuple[Batch, ...]:
    """Three sequences in six pages: prefill, then a longer prompt beside a decode step and a newcomer, then decode."""
    a, b, c = np.array([5, 0], np.int32), np.array([3], np.int32), np.array([1, 4], np.int32)
    ids = np.random.default_rng(0).permutation(64).astype(np.int32)
    return (
        Batch(ids[:14], (Sequence(13, 0, (a,)), Sequence(1, 0, (b,))), np.arange(14, dtype=np.int32)),
        Batch(
            ids[14:22],
            (Sequence(1, 13, (a,)), Sequence(4, 1, (b,)), Sequence(3, 0, (c,))),
            np.arange(8, dtype=np.int32),
        ),
        Batch(
            ids[22:25], tuple(Sequence(1, n, (t,)) for n, t in ((14, a), (5, b), (3, c))), np.arange(3, dtype=np.int32)
        ),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefill_decode_and_batches(case: Case) -> None:
    finished, steps = attention(case, 64), growing_batches()
    compiled = [finished.compile(isa, 2, num_pages=(6,)) for isa in ISAS]
    reference = finished.compile_reference((6,))
    for number, batch in enumerate(steps):
        reference.forward(batch)
        expected = reference.logits(0, len(batch.logit_rows))
        for isa, native in zip(ISAS, compiled, strict=True):
            native.forward(batch)
            assert_equal(native.logits(0, len(expected)), expected, f"{isa}, step {number}")


@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_long_contexts(case: Case) -> None:
    """Rows at the borders of blocks and windows, by one prefill, against the contract."""
    finished = attention(case, LONG)
    wanted = [0, 63, 64, 511, 512, 513, 1023, 1024, LONG - 1]
    expected = contract_rows(case, finished, LONG, wanted)
    for isa in ISAS:
        assert_equal(prefill(finished, isa, 2)[wanted], expected, isa)


@pytest.mark.parametrize("num_threads", [1, 3, 8])
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_decode_split_by_blocks_is_prefill(case: Case, num_threads: int) -> None:
    """Few query rows over several blocks go to threads block by block; many rows do not. Freed pages are never read."""
    finished = attention(case, LONG)
    for isa in ISAS:
        expected = prefill(finished, isa, 2)
        compiled = finished.compile(isa, num_threads, num_pages=(-(-LONG // PAGE_TOKENS),))
        start = 0
        for end in (500, 511, 512, 513, 1020, 1021, 1022, 1023, 1024, 1025, LONG - 1, LONG):
            compiled.forward(step(start, end, case.window))
            actual = compiled.logits(0, end - start)
            assert_equal(actual, expected[start:end], f"{isa}, positions {start} to {end}")
            start = end


def prefill(finished: Finished, isa: str, num_threads: int) -> F32:
    return finished.native(step(0, LONG, None), isa, num_threads)


def step(start: int, end: int, window: int | None) -> Batch:
    """Positions [start, end) of the long sequence, pages in falling order, those a window has passed freed."""
    pages = np.arange(-(-LONG // PAGE_TOKENS), dtype=np.int32)[::-1].copy()
    if window is not None:
        pages[: max(0, start + 1 - window) // PAGE_TOKENS] = FREED_PAGE
    ids = np.arange(start, end, dtype=np.int32)
    return Batch(ids, (Sequence(end - start, start, (pages,)),), np.arange(end - start, dtype=np.int32))


@pytest.mark.parametrize("kv_type", KvType)
def test_stale_pages_do_not_show(kv_type: KvType) -> None:
    """Pages that another sequence filled, with the largest numbers of float16, give the bits of fresh ones."""
    finished = attention(Case(4, 2, 32, 32, kv_type=kv_type), 192)
    for name in ("input0", "input1", "input2"):
        rows = finished.tensors[name].raw.view(np.float32).copy()
        rows[64:] *= 1e6
        finished.tensors[name] = replace(finished.tensors[name], raw=rows.view(np.uint8))
    for isa in ISAS:
        fresh, used = (finished.compile(isa, 2, num_pages=(3,)) for _ in range(2))
        used.forward(in_pages([0, 1, 2], range(191, -1, -1)))
        for pages, length in (([2], 40), ([1], 5), ([0], 64)):
            batch = in_pages(pages, range(length))
            fresh.forward(batch)
            used.forward(batch)
            assert_equal(used.logits(0, length), fresh.logits(0, length), f"{isa}, {length} tokens")


def in_pages(pages: list[int], ids: range) -> Batch:
    """One new sequence of these ids."""
    rows = np.arange(len(ids), dtype=np.int32)
    return Batch(np.array(ids, np.int32), (Sequence(len(ids), 0, (np.array(pages, np.int32),)),), rows)
