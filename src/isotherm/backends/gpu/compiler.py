"""Lowered ops as kernels that a GPU launches, and what crosses its border."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from isotherm.backends.cpu.buffers import BufferPlan
from isotherm.backends.cpu.limits import CpuLimits
from isotherm.backends.cpu.packing import pair_name
from isotherm.backends.gpu.device import Argument, Gpu, GpuBuffer, LaunchTuple
from isotherm.backends.gpu.sources import (
    MOST_FEW_ROWS,
    ROW_LANES,
    SLICE_LANES,
    Source,
    attention_source,
    choice_source,
    elementwise_source,
    group_heads,
    matmul_source,
)
from isotherm.backends.gpu.storage import (
    BLOCK_COLUMNS,
    MOST_KEPT,
    SHORTLIST_WORDS,
    Storage,
    Weights,
    panel_rows,
    read_shortlist,
)
from isotherm.program import flow, ops
from isotherm.program.backend import Shortlist
from isotherm.program.ops import NormWeights, Value
from isotherm.program.recorder import Program
from isotherm.quantization.p32 import PANEL_ROWS, padded_columns
from isotherm.quantization.packed_file import EntrySpec
from isotherm.types import Activation, QuantType, Rope

_FEW_ROWS = (1, 2, 4, MOST_FEW_ROWS)  # of a batch: each has a kernel; more rows have another
_MANY = 1 << 30
_ACTIVATIONS = (None, *(Activation(name) for name in ("silu", "gelu_tanh", "relu", "relu_squared", "drelu")))
_HAS_BIAS, _HAS_RESIDUAL, _IS_GLU, _ACTIVATION_STEP = 1, 2, 4, 8  # flags of finish.cl


class Blocks(Enum):
    """Of 512 positions: for which batches a kernel is launched. Numbers as in native/runtime/gpu_program.h."""

    ANY = 0
    ONE = 1  # whose tokens see one block
    MERGED = 2  # more
    SPLIT = 3  # more, with groups for each block


@dataclass(frozen=True)
class _Launch:
    """See GpuLaunch in native/runtime/gpu_program.h."""

    kernel: int
    panels: int
    rows_per_group: int = 1
    blocks: Blocks = Blocks.ANY
    lanes: int = ROW_LANES
    least_rows: int = 1
    most_rows: int = _MANY

    @property
    def is_of_one_token(self) -> bool:
        """Whether a token that is decoded by itself, in a short context, launches it."""
        return self.least_rows == 1 and self.blocks in (Blocks.ANY, Blocks.ONE)

    @property
    def plain(self) -> LaunchTuple:
        rows = (self.least_rows, self.most_rows)
        return self.kernel, self.panels, self.rows_per_group, self.blocks.value, self.lanes, *rows


class GpuCompiler:
    """Takes the placed ops of a Program, one `step` each in their order. Raises what an OpenGpu does."""

    def __init__(
        self,
        gpu: Gpu,
        program: Program,
        placed: frozenset[int],
        weights: Weights,
        limits: CpuLimits,
        plan: BufferPlan,
    ) -> None:
        """placed: indices of ops."""
        self._gpu = gpu
        self._program = program
        self._placed = placed
        self._weights = weights
        self._made = {value for i in placed for value in flow.outputs(program.ops[i])}
        readers = (op for i, op in enumerate(program.ops) if i not in placed)
        self._read_by_cpu = {value for op in readers for value in flow.inputs(op)} | {program.logits}
        self._selected = _selected(program)
        self.most_kept = 0  # of a shortlist; 0: the GPU makes none
        self.num_launches = 0  # of a decoded token, in the steps so far
        ops_here = [program.ops[i] for i in sorted(placed)]
        self._storage = storage = Storage(gpu, program, ops_here, weights, limits, plan)
        self.program = gpu.program(storage.batch, storage.head, len(program.states))
        for table in storage.ropes.values():
            self.program.rope(table)
        for (state, _), buffer in sorted(storage.pages.items()):
            self.program.pages(state, buffer)

    @property
    def num_embeddings(self) -> int:
        embeds = (op for i, op in enumerate(self._program.ops) if i in self._placed and isinstance(op, ops.Embed))
        return next((self._weights.entry(op.weight).shape[0] for op in embeds), 0)

    @property
    def rope_tables(self) -> dict[Rope, NDArray[np.float32]]:
        """float32 [context, dims], to be filled up to the last position before a batch."""
        return self._storage.ropes

    def num_layers(self, state: int) -> int:
        """How many layers of a state group are here; they have its last slots."""
        return sum(group == state for group, _ in self._storage.pages)

    def shortlist_words(self, num_rows: int) -> NDArray[np.uint32]:
        return np.empty((num_rows, SHORTLIST_WORDS), np.uint32)

    def shortlist(self, words: NDArray[np.uint32]) -> Shortlist:
        return read_shortlist(words)

    def takes(self, index: int) -> bool:
        return index in self._placed

    def step(self, index: int) -> int:
        """The index of the op's step in `program`."""
        op, storage = self._program.ops[index], self._storage
        uploads = []
        for value in flow.inputs(op):
            if value not in storage.places:
                assert value not in self._made, "a value is read before it is made"
                storage.out(value)
                uploads.append(storage.transfer(value))
        launches = list(self._launches(op))
        self.num_launches += sum(launch.is_of_one_token for launch in launches)
        outputs = [storage.transfer(value) for value in flow.outputs(op)]
        downloads = [storage.transfer(value) for value in flow.outputs(op) if value in self._read_by_cpu]
        if self._program.logits in flow.outputs(op) and self._gpu.has_double:
            self._add_choice(storage.places[self._program.logits].buffer)
        return self.program.step([launch.plain for launch in launches], uploads, outputs, downloads)

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
                x, out = self._storage.places[op.x], self._storage.out(op.out)
                assert x.offset == 0
                yield self._launch(
                    elementwise_source(),
                    "select_rows",
                    x.buffer,
                    self._storage.head,
                    out.buffer,
                    op.x.width,
                    out.stride,
                )
            case _:
                raise AssertionError(f"the GPU has no {type(op).__name__}")

    def _add_choice(self, logits: GpuBuffer) -> None:
        out, storage = self._storage.shortlists, self._storage
        arguments: list[Argument] = [logits, storage.head, out, self._program.logits.width, MOST_KEPT]
        kernel = self._kernel(choice_source(), "shortlist", arguments)
        self.most_kept = min(MOST_KEPT, self._program.logits.width)
        self.program.choice(kernel, ROW_LANES, out, SHORTLIST_WORDS, self.most_kept)

    def _launch(self, source: Source, name: str, *arguments: Argument) -> _Launch:
        """Of a kernel whose groups are rows."""
        return _Launch(self._kernel(source, name, list(arguments)), panels=1)

    def _kernel(self, source: Source, name: str, arguments: list[Argument]) -> int:
        return self._gpu.kernel(source, name, arguments)

    def _rows_of(self, value: Value) -> GpuBuffer:
        """What tells how many rows a value has."""
        return self._storage.head if value in self._selected else self._storage.batch

    def _embed(self, op: ops.Embed) -> _Launch:
        entry, out = self._weights.entry(op.weight), self._storage.out(op.out)
        source = matmul_source(entry.types[0], entry.types[0], self._gpu.tiling)
        name = "embed_floats" if entry.types[0].is_float else "embed"
        weight, num_blocks = self._storage.matrix(op.weight), padded_columns(op.out.width) // BLOCK_COLUMNS
        return self._launch(
            source, name, weight, num_blocks, self._storage.batch, out.buffer, op.out.width, out.stride, op.scale
        )

    def _quantise(self, x: Value, norm: NormWeights | None, *, keeps_values: bool) -> _Launch:
        place = self._storage.places[x]
        weight = self._storage.vector(norm.weight) if norm else self._storage.nothing
        return self._launch(
            elementwise_source(),
            "quantise_normed" if norm else "quantise",
            *(place.buffer, place.offset, place.stride, x.width, padded_columns(x.width) // BLOCK_COLUMNS),
            *(int(keeps_values), weight, norm.eps if norm else 0.0),
            *(self._storage.codes, self._storage.scales, self._storage.sums, self._storage.values),
        )

    def _linear(self, op: ops.QuantLinear) -> Iterator[_Launch]:
        """Neighbours of one type are one matmul, of concatenated weights."""
        entries = {p: self._weights.entry(p.weight) for p in op.projections}
        any_float = any(entry.types[0].is_float for entry in entries.values())
        yield self._quantise(op.x, op.norm, keeps_values=any_float)
        for _, group in groupby(op.projections, key=lambda p: (entries[p].types, p.bias is not None)):
            projections = list(group)
            out, stride = self._storage.outs(projections)
            flags = _ACTIVATION_STEP * _ACTIVATIONS.index(op.activation)
            bias, residual, residual_stride = self._storage.nothing, self._storage.nothing, 0
            if projections[0].bias is not None:
                flags |= _HAS_BIAS
                bias = self._storage.vector(*(p.bias for p in projections if p.bias is not None))
            if op.residual is not None:
                flags |= _HAS_RESIDUAL
                place = self._storage.places[op.residual]
                assert place.offset == 0
                residual, residual_stride = place.buffer, place.stride
            width = projections[0].out.width if len(projections) == 1 else stride
            finish: list[Argument] = [flags, bias, residual, residual_stride, out, width, 0, stride]
            weight = self._storage.matrix(*(p.weight for p in projections))
            panels = sum(panel_rows(p.out.width) for p in projections) // PANEL_ROWS
            yield from self._multiply(entries[projections[0]], op.x, weight, panels, finish)

    def _glu(self, op: ops.QuantGlu) -> Iterator[_Launch]:
        name = pair_name(op.gate, op.up)
        entry, out = self._weights.entry(name), self._storage.out(op.out)
        yield self._quantise(op.x, op.norm, keeps_values=entry.types[0].is_float)
        flags = _IS_GLU | _ACTIVATION_STEP * _ACTIVATIONS.index(op.activation)
        finish: list[Argument] = [
            flags,
            self._storage.nothing,
            self._storage.nothing,
            0,
            out.buffer,
            op.out.width,
            out.offset,
            out.stride,
        ]
        panels = -(-op.out.width // (PANEL_ROWS // 2))
        yield from self._multiply(entry, op.x, self._storage.matrix(name), panels, finish)

    def _multiply(
        self, entry: EntrySpec, x: Value, weight: GpuBuffer, panels: int, finish: list[Argument]
    ) -> Iterator[_Launch]:
        tiling = self._gpu.tiling.for_panels(panels, self._gpu.num_units)
        source = matmul_source(entry.types[0], entry.types[-1], tiling)
        rows, num_blocks = self._rows_of(x), padded_columns(x.width) // BLOCK_COLUMNS
        is_float = entry.types[0].is_float
        quantised: list[Argument] = (
            [self._storage.values] if is_float else [self._storage.codes, self._storage.scales, self._storage.sums]
        )
        arguments = [weight, num_blocks, *quantised, rows, *finish]
        most = MOST_FEW_ROWS
        many_lanes, many_rows = SLICE_LANES * tiling.many_slices, tiling.many_slices * tiling.many_tokens
        if is_float:
            kernel = self._kernel(source, "multiply_floats_few", arguments)
            yield _Launch(kernel, panels, tiling.many_slices, lanes=many_lanes, most_rows=most)
        else:
            for below, few in zip((0, *_FEW_ROWS), _FEW_ROWS, strict=False):
                kernel = self._kernel(source, f"multiply_{few}", arguments)
                lanes = SLICE_LANES * tiling.slices_of(few)
                yield _Launch(kernel, panels, few, lanes=lanes, least_rows=below + 1, most_rows=few)
        kernel = self._kernel(source, "multiply_floats_many" if is_float else "multiply_many", arguments)
        yield _Launch(kernel, panels, many_rows, lanes=many_lanes, least_rows=most + 1)

    def _attention(self, op: ops.RopeAttention) -> Iterator[_Launch]:
        shape, state = op.shape, self._program.states[op.state]
        source = attention_source(shape, state.kv_type)
        q, k, v = (self._storage.places[value] for value in (op.q, op.k, op.v))
        out = self._storage.out(op.out)
        pages = self._storage.pages[op.state, op.slot]
        norms: list[Argument] = []
        for norm in (op.q_norm, op.k_norm):
            norms += [self._storage.vector(norm.weight), norm.eps] if norm else [self._storage.nothing, 0.0]
        flags = (1 if op.q_norm else 0) | (2 if op.k_norm else 0)
        before, dims = self._rope_place(op.rope)
        yield _Launch(
            self._kernel(
                source,
                "rotate_append",
                [
                    *(x for place in (q, k, v) for x in (place.buffer, place.offset, place.stride)),
                    *(flags, *norms, self._storage.batch, len(self._program.states), op.state, before, dims, pages),
                ],
            ),
            panels=shape.num_heads + shape.num_kv_heads,
        )
        arguments: list[Argument] = [
            *(q.buffer, q.offset, q.stride, pages, self._storage.batch, op.state, shape.scale, shape.window or 0),
            *(out.buffer, out.stride, self._storage.partials, self._storage.num_blocks),
        ]
        groups, most = shape.num_heads // group_heads(shape), MOST_FEW_ROWS
        blocks, merge = (self._kernel(source, name, arguments) for name in ("attend_blocks", "merge_blocks"))
        yield _Launch(blocks, groups, blocks=Blocks.SPLIT, most_rows=most)
        yield _Launch(merge, shape.num_heads, blocks=Blocks.MERGED, most_rows=most)
        few, many = (self._kernel(source, name, arguments) for name in ("attend_few", "attend_many"))
        yield _Launch(few, groups, blocks=Blocks.ONE, most_rows=most)
        yield _Launch(many, groups, least_rows=most + 1)

    def _rope_place(self, rope: Rope | None) -> tuple[int, int]:
        """Columns of the tables before it in what a batch is told, and its own."""
        if rope is None:
            return 0, 0
        tables = list(self._storage.ropes)
        return sum(before.dims for before in tables[: tables.index(rope)]), rope.dims

    def _add(self, op: ops.AddNorm | ops.Add) -> _Launch:
        a, b = self._storage.places[op.a], self._storage.places[op.b]
        out = self._storage.out(op.out)
        assert a.offset == b.offset == 0
        assert a.stride == b.stride == out.stride
        source, written = elementwise_source(), (out.buffer, op.out.width, out.stride)
        if isinstance(op, ops.Add):
            return self._launch(source, "add", a.buffer, b.buffer, *written)
        norm = self._storage.vector(op.norm.weight), op.norm.eps
        return self._launch(source, "add_norm", a.buffer, b.buffer, *norm, *written)


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
