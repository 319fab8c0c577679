"""Small lowered Programs, one op at a time, run by the native backend and by its slow twin.

    sketch = Sketch()
    x = sketch.input(random_inputs(7, 64))
    y = sketch.value(30)
    sketch.add(ops.QuantLinear(x, None, (Projection(y, sketch.matrix("w", QuantType.Q4_0, 30, 64), None),), None))
    assert_equal_on_every_isa(sketch.finish(y), 7)

`finish` makes the logits a copy of the value, through an identity matrix stored as float32: exact for finite numbers.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny_models import random_blocks

from isotherm import _native
from isotherm.backends.cpu.backend import CompiledCpu, CpuBackend
from isotherm.backends.cpu.limits import CpuLimits
from isotherm.backends.cpu.packing import pack_program
from isotherm.backends.reference.backend import CompiledReference, ReferenceBackend
from isotherm.program import ops
from isotherm.program.batch import Batch, Sequence
from isotherm.program.ops import Op, Projection, Value
from isotherm.program.recorder import PAGE_TOKENS, Program, StateSpec
from isotherm.quantization.layouts import BLOCKS
from isotherm.quantization.packed_file import PackedMemory
from isotherm.types import QuantType

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

ISAS = tuple(_native.available_isas())
# One token, few (they share registers), many (they share an unpacked chunk), panels shared out as threads come (16 on).
TOKEN_COUNTS = (1, 2, 3, 4, 5, 6, 7, 13, 15, 16, 37)
MAX_TOKENS = TOKEN_COUNTS[-1]


@dataclass(frozen=True)
class StoredTensor:
    """A WeightTensor in memory."""

    quant_type: QuantType
    shape: tuple[int, int]
    raw: U8

    def read(self, row_start: int = 0, row_end: int | None = None) -> U8:
        return self.raw[row_start:row_end]


@dataclass(frozen=True)
class Finished:
    """A Program with its weights."""

    program: Program
    tensors: dict[str, StoredTensor]

    def reference(self, batch: Batch) -> F32:
        """Logits of the batch's logit rows."""
        compiled = self.compile_reference(self._num_pages(batch))
        compiled.forward(batch)
        return compiled.logits(0, len(batch.logit_rows))

    def compile_reference(self, num_pages: tuple[int, ...]) -> CompiledReference:
        return ReferenceBackend(self.tensors).compile(self.program, num_pages=num_pages)

    def native(self, batch: Batch, isa: str, num_threads: int = 2) -> F32:
        compiled = self.compile(isa, num_threads, self._num_pages(batch))
        compiled.forward(batch)
        return compiled.logits(0, len(batch.logit_rows))

    def compile(
        self, isa: str, num_threads: int = 2, num_pages: tuple[int, ...] = (), most_active: float = 1.0
    ) -> CompiledCpu:
        """For batches of up to 2048 tokens and positions. most_active: see CpuBackend."""
        memory = PackedMemory()
        pack_program(self.program, self.tensors, memory)
        backend = CpuBackend(memory, isa=isa, num_threads=num_threads, most_active=most_active)
        return backend.compile(self.program, CpuLimits(2048, num_pages, max_tokens=2048, max_head_rows=2048))

    def _num_pages(self, batch: Batch) -> tuple[int, ...]:
        states = range(len(self.program.states))
        return tuple(1 + max(int(s.page_tables[i].max()) for s in batch.sequences) for i in states)


class Sketch:
    """Writes a Finished."""

    def __init__(self, *states: StateSpec) -> None:
        self._states = states
        self._ops: list[Op] = []
        self._num_values = 0
        self.tensors: dict[str, StoredTensor] = {}

    def value(self, width: int) -> Value:
        self._num_values += 1
        return Value(self._num_values - 1, width)

    def add(self, op: Op) -> None:
        self._ops.append(op)

    def input(self, rows: F32) -> Value:
        """Token id i reads row i."""
        out = self.value(rows.shape[1])
        self.add(ops.Embed(out, self.floats(f"input{out.index}", rows), 1.0))
        return out

    def floats(self, name: str, values: NDArray[Any]) -> str:
        """A float32 weight; a vector where `values` has one row."""
        values = np.ascontiguousarray(np.atleast_2d(values), np.float32)
        self.tensors[name] = StoredTensor(QuantType.F32, (values.shape[0], values.shape[1]), values.view(np.uint8))
        return name

    def vector(self, name: str, width: int) -> str:
        return self.floats(name, 1 + 0.3 * np.random.default_rng(width).standard_normal((1, width)))

    def matrix(self, name: str, quant_type: QuantType, rows: int, columns: int) -> str:
        self.tensors[name] = StoredTensor(quant_type, (rows, columns), random_blocks(quant_type, (rows, columns), name))
        return name

    def stored(self, name: str, tensor: StoredTensor) -> str:
        self.tensors[name] = tensor
        return name

    def join(self, values: tuple[Value, ...]) -> Value:
        """The values side by side."""
        width = sum(value.width for value in values)
        joined, start = None, 0
        for value in values:
            place = np.eye(width, dtype=np.float32)[:, start : start + value.width]
            out = self.value(width)
            weight = self.floats(f"place{out.index}", place)
            self.add(ops.QuantLinear(value, None, (Projection(out, weight, None),), joined))
            joined, start = out, start + value.width
        assert joined is not None
        return joined

    def finish(self, out: Value) -> Finished:
        """Logits = `out`."""
        selected = self.value(out.width)
        self.add(ops.SelectRows(selected, out))
        return self.finish_after_head(self.join((selected,)))

    def finish_after_head(self, logits: Value) -> Finished:
        """`logits` comes from an op after SelectRows that is a QuantLinear."""
        return Finished(Program("sketch", tuple(self._ops), self._states, logits), self.tensors)


def random_inputs(num_rows: int, width: int, seed: int = 0) -> F32:
    """Activations as they are in models: mostly small, some columns large, a row of zeros, rows at the edge of zero."""
    rng = np.random.default_rng(seed + 1000 * width)
    rows = rng.standard_normal((num_rows, width)) * np.exp(rng.uniform(-3, 3, (num_rows, 1)))
    rows[:, rng.integers(0, width, 1 + width // 100)] *= 40
    scales = {3: 0.0, 5: 1e-33, 8: 2.0**-100, 9: 1e-20, 11: 1e15}
    for row in set(scales) & set(range(num_rows)):
        rows[row] *= scales[row]
    return rows.astype(np.float32)


def extreme_blocks(quant_type: QuantType, num_rows: int, num_columns: int) -> StoredTensor:
    """Random bytes, all ones and all zeros, under float16 scales of every magnitude: the far ends of every codec."""
    rng = np.random.default_rng(num_columns)
    raw = rng.integers(0, 256, (num_rows, quant_type.row_bytes(num_columns)), np.uint8)
    raw[::3], raw[1::3] = 0xFF, 0x00
    blocks = raw.view(BLOCKS[quant_type])
    halves = rng.uniform(-5e4, 5e4, blocks.shape).astype("<f2").view("<u2") >> rng.integers(0, 2) * 5
    for name in {"d", "m", "dmin"} & set(blocks.dtype.names or ()):
        blocks[name] = halves
    if quant_type is QuantType.IQ1_M:  # a nibble of d above each of its scales
        blocks["scales"] = (blocks["scales"] & 0x0FFF) | (halves[..., None] >> np.arange(0, 16, 4) & 15) << 12
    if quant_type is QuantType.MXFP4:
        blocks["e8m0"] = rng.integers(0, 150, blocks.shape) * rng.integers(0, 2, blocks.shape)  # 0 is subnormal
    return StoredTensor(quant_type, (num_rows, num_columns), raw)


def chain(num_tokens: int, num_cached: int = 0, *, num_states: int = 1) -> Batch:
    """One sequence with ids 0, 1, .., its pages in order, all rows wanted."""
    table = np.arange(-(-(num_cached + num_tokens) // PAGE_TOKENS), dtype=np.int32)
    ids = np.arange(num_tokens, dtype=np.int32)
    return Batch(ids, (Sequence(num_tokens, num_cached, (table,) * num_states),), ids)


def assert_equal(actual: F32, expected: F32, what: str) -> None:
    """Equal as numbers, of which none is a NaN."""
    assert actual.shape == expected.shape, what
    different = np.argwhere(~(actual == expected))
    if len(different):
        at = tuple(int(i) for i in different[0])
        raise AssertionError(f"{what}: {len(different)} differ, first at {at}: {actual[at]!r}, not {expected[at]!r}")


def assert_by_neuron(dense: Finished, sparse: Finished, num_tokens: int, most_active: tuple[float, ...]) -> None:
    """`sparse` = the reference of `dense`, in either backend, for any batch, any threads and each bound of a share."""
    batch = chain(num_tokens, num_states=0)
    expected = dense.reference(batch)
    assert_equal(sparse.reference(batch), expected, "reference")
    for isa in ISAS:
        for num_threads, most in product((1, 2, 3), most_active):
            compiled = sparse.compile(isa, num_threads, most_active=most)
            for count in (1, 2, 3, 5, 8, num_tokens):
                compiled.forward(chain(count, num_states=0))
                what = f"{isa}, {num_threads} threads, {count} tokens, up to {most}"
                assert_equal(compiled.logits(0, count), expected[:count], what)


def assert_equal_on_every_isa(finished: Finished, max_tokens: int = MAX_TOKENS) -> None:
    """Native = reference, for every number of tokens up to `max_tokens` that TOKEN_COUNTS names, on two threads."""
    expected = finished.reference(chain(max_tokens, num_states=len(finished.program.states)))
    for isa in ISAS:
        pages = (-(-max_tokens // PAGE_TOKENS),) * len(finished.program.states)
        compiled = finished.compile(isa, 2, pages)
        for num_tokens in (*(n for n in TOKEN_COUNTS if n < max_tokens), max_tokens):
            compiled.forward(chain(num_tokens, num_states=len(pages)))
            actual = compiled.logits(0, num_tokens)
            assert_equal(actual, expected[:num_tokens], f"{isa}, {num_tokens} tokens")
