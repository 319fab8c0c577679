"""Where a program's weights, values and KV pages lie on a GPU."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from isotherm.backends.cpu.buffers import BufferPlan
from isotherm.backends.cpu.limits import CpuLimits
from isotherm.backends.cpu.packing import pair_name
from isotherm.backends.gpu.device import Gpu, GpuBuffer, RowsTuple
from isotherm.backends.gpu.sources import MOST_FEW_ROWS
from isotherm.program import ops
from isotherm.program.backend import Shortlist
from isotherm.program.ops import Projection, Value
from isotherm.program.recorder import PAGE_TOKENS, Program
from isotherm.quantization.p32 import PANEL_ROWS, padded_columns
from isotherm.quantization.packed_file import EntrySpec
from isotherm.types import Rope

BLOCK_COLUMNS = 32
MOST_KEPT = 256  # of a row's logits, in a shortlist; no more than its kernel has lanes
_SHORTLIST_HEADER = 8  # words; as in choice.cl
SHORTLIST_WORDS = _SHORTLIST_HEADER + 2 * MOST_KEPT
_ATTENTION_BLOCK = 512


@dataclass(frozen=True)
class Place:
    """Where the rows of a value lie, in floats."""

    buffer: GpuBuffer
    offset: int
    stride: int


class Weights(Protocol):
    """Packed weights, of which `array` is read when they go to the device."""

    def entry(self, name: str) -> EntrySpec: ...

    def array(self, name: str) -> NDArray[np.generic]: ...


class Storage:
    """Buffers are shared as the CPU's plan shares them. What raises does so as an OpenGpu."""

    def __init__(
        self, gpu: Gpu, program: Program, placed: list[ops.Op], weights: Weights, limits: CpuLimits, plan: BufferPlan
    ) -> None:
        """placed: the ops that run there."""
        self._gpu = gpu
        self._program = program
        self._weights = weights
        self._limits = limits
        self._plan = plan
        self._rows = max(limits.max_tokens, limits.max_head_rows)
        self._shared: dict[tuple[int, ...], GpuBuffer] = {}
        self._matrices: dict[tuple[str, ...], GpuBuffer] = {}
        self._vectors: dict[tuple[str, ...], GpuBuffer] = {}
        self.places: dict[Value, Place] = {}
        self.ropes: dict[Rope, NDArray[np.float32]] = {}  # of positions [context, dims], on the CPU
        self.pages: dict[tuple[int, int], GpuBuffer] = {}  # by state group and slot
        self.nothing = gpu.allocate(64)  # where a kernel takes a buffer that it does not read
        self._allocate_input(placed)
        self._allocate_attention([op for op in placed if isinstance(op, ops.RopeAttention)])
        self.batch = gpu.allocate(4 * self._batch_ints())
        self.head = gpu.allocate(4 * (1 + 2 * limits.max_head_rows))
        self.shortlists = gpu.allocate(4 * limits.max_head_rows * SHORTLIST_WORDS)

    def _allocate_input(self, placed: list[ops.Op]) -> None:
        """Rows as matmuls read them."""
        widths = [op.x.width for op in placed if isinstance(op, ops.QuantLinear | ops.QuantGlu)]
        elements = self._rows * max([64, *map(padded_columns, widths)])
        self.codes = self._gpu.allocate(elements)
        self.scales = self._gpu.allocate(4 * elements // BLOCK_COLUMNS)
        self.sums = self._gpu.allocate(8 * elements // BLOCK_COLUMNS)
        is_float = any(self._weights.entry(name).types[0].is_float for name in _matrix_names(placed))
        self.values = self._gpu.allocate(4 * elements) if is_float else self.nothing

    def _allocate_attention(self, placed: list[ops.RopeAttention]) -> None:
        """Pages, and what few rows leave of each block."""
        self.num_blocks = -(-self._limits.context_tokens // _ATTENTION_BLOCK)
        partials = [1]
        for op in placed:
            partials.append(MOST_FEW_ROWS * op.shape.num_heads * self.num_blocks * (2 + op.shape.head_dim))
            state = self._program.states[op.state]
            layer_bytes = state.page_bytes // state.num_layers * self._limits.num_pages[op.state]
            self.pages[op.state, op.slot] = self._gpu.allocate(layer_bytes)
            if op.rope is not None and op.rope not in self.ropes:
                self.ropes[op.rope] = np.zeros((self._limits.context_tokens, op.rope.dims), np.float32)
        self.partials = self._gpu.allocate(4 * max(partials))

    def _batch_ints(self) -> int:
        """See GpuProgram in native/runtime/gpu_program.h; at worst each token is a sequence of its own."""
        num_states = len(self._program.states)
        pages = -(-self._limits.context_tokens // PAGE_TOKENS)
        row_ints = 2 + num_states * (1 + pages) + sum(rope.dims for rope in self.ropes)
        return 1 + self._limits.max_tokens * row_ints

    def _buffer(self, values: tuple[Value, ...], stride: int) -> GpuBuffer:
        """One for values that the CPU's plan keeps apart: it is free where all of theirs are."""
        key = tuple(self._plan.at[value] for value in values)
        if key not in self._shared:
            rows = self._limits.max_head_rows if values == (self._program.logits,) else self._rows
            self._shared[key] = self._gpu.allocate(4 * rows * stride)
        return self._shared[key]

    def out(self, value: Value) -> Place:
        stride = value.width if value == self._program.logits else padded_columns(value.width)
        place = Place(self._buffer((value,), stride), 0, stride)
        self.places[value] = place
        return place

    def outs(self, projections: list[Projection]) -> tuple[GpuBuffer, int]:
        """One buffer for what several projections of one matmul give, side by side."""
        if len(projections) == 1:
            place = self.out(projections[0].out)
            return place.buffer, place.stride
        widths = [panel_rows(p.out.width) for p in projections]
        buffer = self._buffer(tuple(p.out for p in projections), sum(widths))
        offsets = np.cumsum([0, *widths])
        for p, offset in zip(projections, offsets, strict=False):
            self.places[p.out] = Place(buffer, int(offset), sum(widths))
        return buffer, sum(widths)

    def transfer(self, value: Value) -> RowsTuple:
        """See GpuRows in native/runtime/gpu_program.h."""
        place = self.places[value]
        return self._plan.at[value], place.buffer, place.offset, place.stride, value.width

    def matrix(self, *names: str) -> GpuBuffer:
        """Packed matrices of one type, one after the other."""
        if names not in self._matrices:
            num_bytes = sum(self._weights.entry(name).num_bytes for name in names)
            arrays = (self._weights.array(name).view(np.uint8).reshape(-1) for name in names)
            self._matrices[names] = self._gpu.upload(num_bytes, arrays)
        return self._matrices[names]

    def vector(self, *names: str) -> GpuBuffer:
        """Vectors one after the other, padded to panels."""
        if names not in self._vectors:
            num_bytes = sum(4 * panel_rows(self._weights.entry(name).shape[0]) for name in names)
            vectors = (self._weights.array(name).view(np.float32).reshape(-1) for name in names)
            padded = (np.pad(vector, (0, -len(vector) % PANEL_ROWS)).view(np.uint8) for vector in vectors)
            self._vectors[names] = self._gpu.upload(num_bytes, padded)
        return self._vectors[names]


def panel_rows(num_rows: int) -> int:
    """Rows of whole panels."""
    return -(-num_rows // PANEL_ROWS) * PANEL_ROWS


def read_shortlist(words: NDArray[np.uint32]) -> Shortlist:
    """One row's [SHORTLIST_WORDS], as choice.cl writes it."""
    is_unsound, count = bool(words[0]), int(words[1])
    ids, logits = words[_SHORTLIST_HEADER:].reshape(2, MOST_KEPT)[:, :count]
    peak, total = float(words[2:3].view(np.float32)[0]), float(words[4:6].view(np.float64)[0])
    return Shortlist(not is_unsound, peak, total, ids.view(np.int32), logits.view(np.float32))


def _matrix_names(placed: list[ops.Op]) -> Iterator[str]:
    for op in placed:
        if isinstance(op, ops.QuantLinear):
            yield from (projection.weight for projection in op.projections)
        elif isinstance(op, ops.QuantGlu):
            yield pair_name(op.gate, op.up)
