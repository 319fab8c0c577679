"""Lowered ops as kernels that a GPU launches: where its weights, values and pages lie, and what crosses its border."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from isotherm.backends.cpu.buffers import BufferPlan
from isotherm.backends.cpu.limits import CpuLimits
from isotherm.backends.cpu.packing import pair_name
from isotherm.backends.gpu.device import Argument, Gpu, GpuBuffer
from isotherm.backends.gpu.sources import (
    ROW_LANES,
    Source,
    attention_source,
    elementwise_source,
    group_heads,
    matmul_source,
)
from isotherm.program import flow, ops
from isotherm.program.ops import NormWeights, Projection, Value
from isotherm.program.recorder import PAGE_TOKENS, Program
from isotherm.quantization.p32 import PANEL_ROWS, padded_columns
from isotherm.quantization.packed_file import EntrySpec
from isotherm.types import Activation, QuantType, Rope

FEW_ROWS = (1, 2, 4, 8)  # of a batch: each has a kernel; more rows have another
_ATTENTION_BLOCK = 512
_BLOCK_COLUMNS = 32
_SLICE_LANES = 32
_MANY = 1 << 30
_ACTIVATIONS = (None, *(Activation(name) for name in ("silu", "gelu_tanh", "relu", "relu_squared", "drelu")))
_HAS_BIAS, _HAS_RESIDUAL, _IS_GLU, _ACTIVATION_STEP = 1, 2, 4, 8  # flags of finish.cl
_IS_NORMED, _KEEPS_VALUES = 1, 2  # of elementwise.cl


@dataclass(frozen=True)
class _Place:
    """Where the rows of a value lie, in floats."""

    buffer: GpuBuffer
    offset: int
    stride: int


@dataclass(frozen=True)
class _Launch:
    """See GpuLaunch in native/gpu/gpu_program.h."""

    kernel: int
    panels: int
    rows_per_group: int = 1
    is_by_block: bool = False
    lanes: int = ROW_LANES
    least_rows: int = 1
    most_rows: int = _MANY


class Weights(Protocol):
    """Packed weights, of which `array` is read when they go to the device."""

    def entry(self, name: str) -> EntrySpec: ...

    def array(self, name: str) -> NDArray[np.generic]: ...


class GpuCompiler:
    """Takes the placed ops of a Program, one `step` each in their order. Raises what an OpenGpu does."""

    def __init__(
        self,
        gpu: Gpu,
        program: Program,
        placed: frozenset[int],
        weights: Weights,
        limits: CpuLimits,
        buffers: BufferPlan,
    ) -> None:
        """placed: indices of ops."""
        self._gpu = gpu
        self._program = program
        self._placed = placed
        self._weights = weights
        self._limits = limits
        self._buffers = buffers
        self._rows = max(limits.max_tokens, limits.max_head_rows)
        self._made = {value for i in placed for value in flow.outputs(program.ops[i])}
        self._read_by_cpu = {
            value for i, op in enumerate(program.ops) if i not in placed for value in flow.inputs(op)
        } | {program.logits}
        self._selected = _selected(program)
        self._places: dict[Value, _Place] = {}
        self._shared: dict[tuple[int, ...], GpuBuffer] = {}
        self._matrices: dict[tuple[str, ...], GpuBuffer] = {}
        self._vectors: dict[tuple[str, ...], GpuBuffer] = {}
        self._ropes: dict[Rope, NDArray[np.float32]] = {}
        self._pages: dict[tuple[int, int], GpuBuffer] = {}
        self._nothing = self._gpu.allocate(64)
        self._allocate()
        num_states = len(program.states)
        self.program = gpu.program(self._batch, self._head, num_states)
        for rope, table in self._ropes.items():
            self.program.rope(table)
        for (state, _), buffer in sorted(self._pages.items()):
            self.program.pages(state, buffer)

    @property
    def num_embeddings(self) -> int:
        embeds = (op for i, op in enumerate(self._program.ops) if i in self._placed and isinstance(op, ops.Embed))
        return next((self._weights.entry(op.weight).shape[0] for op in embeds), 0)

    @property
    def rope_tables(self) -> dict[Rope, NDArray[np.float32]]:
        """float32 [context, dims], to be filled up to the last position before a batch."""
        return self._ropes

    def num_layers(self, state: int) -> int:
        """How many layers of a state group are here; they have its last slots."""
        return sum(group == state for group, _ in self._pages)

    def takes(self, index: int) -> bool:
        return index in self._placed

    def step(self, index: int) -> int:
        """The index of the op's step in `program`."""
        op = self._program.ops[index]
        uploads = [self._upload(value) for value in flow.inputs(op) if value not in self._places]
        launches = list(self._launches(op))
        outputs = [self._transfer(value) for value in flow.outputs(op)]
        downloads = [self._transfer(value) for value in flow.outputs(op) if value in self._read_by_cpu]
        return int(
            self.program.step([tuple(vars(launch).values()) for launch in launches], uploads, outputs, downloads)
        )

    # --- memory -----------------------------------------------------------------------------------------------------

    def _allocate(self) -> None:
        """What several ops share: quantised rows, pages, partial results of attention, what a batch is told."""
        placed = [self._program.ops[i] for i in sorted(self._placed)]
        columns = max(
            [64, *(padded_columns(op.x.width) for op in placed if isinstance(op, ops.QuantLinear | ops.QuantGlu))]
        )
        elements = self._rows * columns
        self._codes = self._gpu.allocate(elements)
        self._scales = self._gpu.allocate(4 * elements // _BLOCK_COLUMNS)
        self._sums = self._gpu.allocate(8 * elements // _BLOCK_COLUMNS)
        is_float = any(name for name in self._matrix_names(placed) if self._weights.entry(name).types[0].is_float)
        self._values = self._gpu.allocate(4 * elements if is_float else 64)
        partial_floats = 0
        self._num_blocks = -(-self._limits.context_tokens // _ATTENTION_BLOCK)
        for op in placed:
            if not isinstance(op, ops.RopeAttention):
                continue
            heads, width = op.shape.num_heads, 2 + op.shape.head_dim
            partial_floats = max(partial_floats, FEW_ROWS[-1] * heads * self._num_blocks * width)
            state = self._program.states[op.state]
            bytes_of_layer = state.page_bytes // state.num_layers * self._limits.num_pages[op.state]
            self._pages[op.state, op.slot] = self._gpu.allocate(bytes_of_layer)
            if op.rope is not None and op.rope not in self._ropes:
                self._ropes[op.rope] = np.zeros((self._limits.context_tokens, op.rope.dims), np.float32)
        self._partials = self._gpu.allocate(4 * partial_floats)
        self._batch = self._gpu.allocate(4 * self._batch_ints())
        self._head = self._gpu.allocate(4 * (1 + self._limits.max_head_rows))

    def _batch_ints(self) -> int:
        """See GpuProgram in native/gpu/gpu_program.h; at worst each token is a sequence of its own."""
        num_states = len(self._program.states)
        pages = -(-self._limits.context_tokens // PAGE_TOKENS)
        row_ints = 2 + num_states * (1 + pages) + sum(rope.dims for rope in self._ropes)
        return 1 + self._limits.max_tokens * row_ints

    @staticmethod
    def _matrix_names(placed: list[ops.Op]) -> Iterator[str]:
        for op in placed:
            if isinstance(op, ops.QuantLinear):
                yield from (projection.weight for projection in op.projections)
            elif isinstance(op, ops.QuantGlu):
                yield pair_name(op.gate, op.up)

    def _buffer(self, values: tuple[Value, ...], stride: int) -> GpuBuffer:
        """One for values that the CPU's plan keeps apart: it is free where all of theirs are."""
        key = tuple(self._buffers.at[value] for value in values)
        if key not in self._shared:
            rows = self._limits.max_head_rows if values == (self._program.logits,) else self._rows
            self._shared[key] = self._gpu.allocate(4 * rows * stride)
        return self._shared[key]

    def _out(self, value: Value) -> _Place:
        stride = value.width if value == self._program.logits else padded_columns(value.width)
        place = _Place(self._buffer((value,), stride), 0, stride)
        self._places[value] = place
        return place

    def _outs(self, projections: list[Projection]) -> tuple[GpuBuffer, int]:
        """One buffer for what several projections of one matmul give, side by side."""
        if len(projections) == 1:
            place = self._out(projections[0].out)
            return place.buffer, place.stride
        widths = [_panel_rows(p.out.width) for p in projections]
        buffer = self._buffer(tuple(p.out for p in projections), sum(widths))
        offsets = np.cumsum([0, *widths])
        for p, offset in zip(projections, offsets, strict=False):
            self._places[p.out] = _Place(buffer, int(offset), sum(widths))
        return buffer, sum(widths)

    def _upload(self, value: Value) -> tuple[int, GpuBuffer, int, int, int]:
        assert value not in self._made, "a value is read before it is made"
        self._out(value)
        return self._transfer(value)

    def _transfer(self, value: Value) -> tuple[int, GpuBuffer, int, int, int]:
        """See GpuRows in native/gpu/gpu_program.h."""
        place = self._places[value]
        return self._buffers.at[value], place.buffer, place.offset, place.stride, value.width

    def _matrix(self, *names: str) -> GpuBuffer:
        """Packed matrices of one type, one after the other."""
        if names not in self._matrices:
            num_bytes = sum(self._weights.entry(name).num_bytes for name in names)
            arrays = (self._weights.array(name).view(np.uint8).reshape(-1) for name in names)
            self._matrices[names] = self._gpu.upload(num_bytes, arrays)
        return self._matrices[names]

    def _vector(self, *names: str) -> GpuBuffer:
        """Vectors one after the other, padded to panels."""
        if names not in self._vectors:
            num_bytes = sum(4 * _panel_rows(self._weights.entry(name).shape[0]) for name in names)
            vectors = (self._weights.array(name).view(np.float32).reshape(-1) for name in names)
            padded = (np.pad(vector, (0, -len(vector) % PANEL_ROWS)).view(np.uint8) for vector in vectors)
            self._vectors[names] = self._gpu.upload(num_bytes, padded)
        return self._vectors[names]

    # --- ops --------------------------------------------------------------------------------------------------------

    def _launches(self, op: ops.Op) -> Iterator[_Launch]:
        match op:
            case ops.Embed():
                yield self._embed(op)
            case ops.QuantLinear():
                yield from self._linear(op)
            case ops.QuantGlu():
                yield from self._glu(op)
            case ops.RopeAttention():
                yield from self._attention(op)
            case ops.AddNorm() | ops.Add():
                yield self._add(op)
            case ops.SelectRows():
                x, out = self._places[op.x], self._out(op.out)
                assert x.offset == 0
                yield self._launch(
                    elementwise_source(), "select_rows", x.buffer, self._head, out.buffer, op.x.width, out.stride
                )
            case _:
                raise AssertionError(f"the GPU has no {type(op).__name__}")

    def _launch(self, source: Source, name: str, *arguments: Argument) -> _Launch:
        """Of a kernel whose groups are rows."""
        return _Launch(self._kernel(source, name, list(arguments)), panels=1)

    def _kernel(self, source: Source, name: str, arguments: list[Argument]) -> int:
        return self._gpu.kernel(source, name, arguments)

    def _rows_of(self, value: Value) -> GpuBuffer:
        """What tells how many rows a value has."""
        return self._head if value in self._selected else self._batch

    def _embed(self, op: ops.Embed) -> _Launch:
        entry, out = self._weights.entry(op.weight), self._out(op.out)
        source = self._matmul_source(entry)
        name = "embed_floats" if entry.types[0].is_float else "embed"
        weight, num_blocks = self._matrix(op.weight), padded_columns(op.out.width) // _BLOCK_COLUMNS
        return self._launch(
            source, name, weight, num_blocks, self._batch, out.buffer, op.out.width, out.stride, op.scale
        )

    def _matmul_source(self, entry: EntrySpec) -> Source:
        return matmul_source(entry.types[0], entry.types[-1], self._gpu.tiling)

    def _quantise(self, x: Value, norm: NormWeights | None, *, keeps_values: bool) -> _Launch:
        place = self._places[x]
        flags = (_IS_NORMED if norm else 0) | (_KEEPS_VALUES if keeps_values else 0)
        weight = self._vector(norm.weight) if norm else self._nothing
        return self._launch(
            elementwise_source(),
            "quantise",
            *(place.buffer, place.offset, place.stride, x.width, padded_columns(x.width) // _BLOCK_COLUMNS, flags),
            *(weight, norm.eps if norm else 0.0, self._codes, self._scales, self._sums, self._values),
        )

    def _linear(self, op: ops.QuantLinear) -> Iterator[_Launch]:
        """Neighbours of one type are one matmul, of concatenated weights."""
        entries = {p: self._weights.entry(p.weight) for p in op.projections}
        any_float = any(entry.types[0].is_float for entry in entries.values())
        yield self._quantise(op.x, op.norm, keeps_values=any_float)
        for _, group in groupby(op.projections, key=lambda p: (entries[p].types, p.bias is not None)):
            projections = list(group)
            out, stride = self._outs(projections)
            flags = _ACTIVATION_STEP * _ACTIVATIONS.index(op.activation)
            bias, residual, residual_stride = self._nothing, self._nothing, 0
            if projections[0].bias is not None:
                flags |= _HAS_BIAS
                bias = self._vector(*(p.bias for p in projections if p.bias is not None))
            if op.residual is not None:
                flags |= _HAS_RESIDUAL
                place = self._places[op.residual]
                assert place.offset == 0
                residual, residual_stride = place.buffer, place.stride
            width = projections[0].out.width if len(projections) == 1 else stride
            finish = [flags, bias, residual, residual_stride, out, width, 0, stride]
            weight = self._matrix(*(p.weight for p in projections))
            panels = sum(_panel_rows(p.out.width) for p in projections) // PANEL_ROWS
            yield from self._multiply(entries[projections[0]], op.x, weight, panels, finish)

    def _glu(self, op: ops.QuantGlu) -> Iterator[_Launch]:
        name = pair_name(op.gate, op.up)
        entry, out = self._weights.entry(name), self._out(op.out)
        yield self._quantise(op.x, op.norm, keeps_values=entry.types[0].is_float)
        flags = _IS_GLU | _ACTIVATION_STEP * _ACTIVATIONS.index(op.activation)
        finish = [flags, self._nothing, self._nothing, 0, out.buffer, op.out.width, out.offset, out.stride]
        panels = -(-op.out.width // (PANEL_ROWS // 2))
        yield from self._multiply(entry, op.x, self._matrix(name), panels, finish)

    def _multiply(
        self, entry: EntrySpec, x: Value, weight: GpuBuffer, panels: int, finish: list[Argument]
    ) -> Iterator[_Launch]:
        source, tiling = self._matmul_source(entry), self._gpu.tiling
        rows, num_blocks = self._rows_of(x), padded_columns(x.width) // _BLOCK_COLUMNS
        is_float = entry.types[0].is_float
        quantised: list[Argument] = [self._values] if is_float else [self._codes, self._scales, self._sums]
        arguments = [weight, num_blocks, *quantised, rows, *finish]
        most = FEW_ROWS[-1]
        many_lanes, many_rows = _SLICE_LANES * tiling.many_slices, tiling.many_slices * tiling.many_tokens
        if is_float:
            kernel = self._kernel(source, "multiply_floats_few", arguments)
            yield _Launch(kernel, panels, tiling.many_slices, lanes=many_lanes, most_rows=most)
        else:
            for below, few in zip((0, *FEW_ROWS), FEW_ROWS, strict=False):
                kernel = self._kernel(source, f"multiply_{few}", arguments)
                lanes = _SLICE_LANES * tiling.few_slices
                yield _Launch(kernel, panels, few, lanes=lanes, least_rows=below + 1, most_rows=few)
        kernel = self._kernel(source, "multiply_floats_many" if is_float else "multiply_many", arguments)
        yield _Launch(kernel, panels, many_rows, lanes=many_lanes, least_rows=most + 1)

    def _attention(self, op: ops.RopeAttention) -> Iterator[_Launch]:
        shape, state = op.shape, self._program.states[op.state]
        source = attention_source(shape, state.kv_type)
        q, k, v = (self._places[value] for value in (op.q, op.k, op.v))
        out = self._out(op.out)
        pages = self._pages[op.state, op.slot]
        norms: list[Argument] = []
        for norm in (op.q_norm, op.k_norm):
            norms += [self._vector(norm.weight), norm.eps] if norm else [self._nothing, 0.0]
        flags = (1 if op.q_norm else 0) | (2 if op.k_norm else 0)
        before, dims = self._rope_place(op.rope)
        yield _Launch(
            self._kernel(
                source,
                "rotate_append",
                [
                    *(x for place in (q, k, v) for x in (place.buffer, place.offset, place.stride)),
                    *(flags, *norms, self._batch, len(self._program.states), op.state, before, dims, pages),
                ],
            ),
            panels=shape.num_heads + shape.num_kv_heads,
        )
        arguments = [
            *(q.buffer, q.offset, q.stride, pages, self._batch, op.state, shape.scale, shape.window or 0),
            *(out.buffer, out.stride, self._partials, self._num_blocks),
        ]
        groups, most = shape.num_heads // group_heads(shape), FEW_ROWS[-1]
        blocks = self._kernel(source, "attend_blocks", arguments)
        yield _Launch(blocks, groups, is_by_block=True, most_rows=most)
        yield _Launch(self._kernel(source, "merge_blocks", arguments), shape.num_heads, most_rows=most)
        yield _Launch(self._kernel(source, "attend", arguments), groups, least_rows=most + 1)

    def _rope_place(self, rope: Rope | None) -> tuple[int, int]:
        """Columns of the tables before it in what a batch is told, and its own."""
        if rope is None:
            return 0, 0
        tables = list(self._ropes)
        return sum(before.dims for before in tables[: tables.index(rope)]), rope.dims

    def _add(self, op: ops.AddNorm | ops.Add) -> _Launch:
        a, b = self._places[op.a], self._places[op.b]
        out = self._out(op.out)
        assert a.offset == b.offset == 0
        assert a.stride == b.stride == out.stride
        norm = op.norm if isinstance(op, ops.AddNorm) else None
        weight = self._vector(norm.weight) if norm else self._nothing
        arguments = (a.buffer, b.buffer, _IS_NORMED if norm else 0, weight, norm.eps if norm else 0.0)
        return self._launch(elementwise_source(), "add_norm", *arguments, out.buffer, op.out.width, out.stride)


def can_take(op: ops.Op, types: Callable[[str], tuple[QuantType, ...]]) -> bool:
    """Whether there are kernels for an op; `types` gives those of a packed weight."""
    match op:
        case ops.QuantGlu():
            pair = types(pair_name(op.gate, op.up))
            is_had = pair[0] is pair[1] or not (pair[0].is_float or pair[1].is_float)
            return is_had and (op.norm is None or op.norm.bias is None)
        case ops.QuantLinear():
            return op.norm is None or op.norm.bias is None
        case ops.Embed() | ops.RopeAttention() | ops.AddNorm() | ops.Add() | ops.SelectRows():
            return True
        case _:
            return False


def _selected(program: Program) -> frozenset[Value]:
    """Values behind the selection of rows."""
    found: set[Value] = set()
    for op in program.ops:
        if isinstance(op, ops.SelectRows) or found.intersection(flow.inputs(op)):
            found.update(flow.outputs(op))
    return frozenset(found)


def _panel_rows(num_rows: int) -> int:
    return -(-num_rows // PANEL_ROWS) * PANEL_ROWS
