"""Which ops of a Program a GPU takes: whole layers from the last one down, as many as its memory holds."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from isotherm import _native
from isotherm.backends.cpu.buffers import plan_buffers
from isotherm.backends.cpu.limits import CpuLimits
from isotherm.backends.cpu.step_facts import weight_names
from isotherm.backends.gpu.compiler import GpuCompiler, can_take
from isotherm.backends.gpu.device import Argument, GpuBuffer, LaunchTuple, OpenGpu, RowsTuple
from isotherm.backends.gpu.sources import Source, Tiling
from isotherm.backends.gpu.storage import Weights
from isotherm.program import ops
from isotherm.program.flow import layer_of
from isotherm.program.recorder import Program
from isotherm.quantization.packed_file import EntrySpec

_ALIGNMENT = 4096  # of a buffer, in any driver
_MEMORY_SHARE = 0.9
EVERYTHING = -1


@dataclass(frozen=True)
class Placement:
    """Layers from `first_layer` on, and the head, are the GPU's; with EVERYTHING the embedding too."""

    first_layer: int
    num_layers: int  # that it has
    num_bytes: int  # what they take there: weights, KV pages, work buffers


@dataclass(frozen=True)
class Room:
    """What a device may be filled with."""

    num_bytes: int
    largest_buffer_bytes: int
    tiling: Tiling
    num_units: int = 1
    has_double: bool = True
    least_layers: int = 0  # fewer are not worth it


def room_of(gpu: OpenGpu, num_bytes: int | None, least_layers: int = 0) -> Room:
    """num_bytes: that may be used; None: nine tenths of its memory, as a driver does not tell what others took."""
    facts = gpu.facts
    most = facts.memory_bytes if num_bytes is not None else int(_MEMORY_SHARE * facts.memory_bytes)
    return Room(
        min(num_bytes or most, most),
        facts.largest_buffer_bytes,
        gpu.tiling,
        gpu.num_units,
        gpu.has_double,
        least_layers,
    )


def compile_placed(
    gpu: OpenGpu, program: Program, placement: Placement, weights: Weights, limits: CpuLimits
) -> GpuCompiler:
    """What the CPU backend takes as its device part. Raises what an OpenGpu does."""
    return GpuCompiler(gpu, program, placed_ops(program, placement.first_layer), weights, limits, plan_buffers(program))


def place(program: Program, entry: Callable[[str], EntrySpec], limits: CpuLimits, room: Room) -> Placement | None:
    """The most that fits, counted to the byte. None: not even the head, or there are no kernels for it.

    program: lowered, no FFN of it by neurons.
    """
    layers = layer_of_ops(program)
    num_layers = layers[-1]
    refused = [
        layer for op, layer in zip(program.ops, layers, strict=True) if not can_take(op, lambda n: entry(n).types)
    ]
    low, high = max(refused, default=EVERYTHING - 1) + 1, num_layers - room.least_layers
    found = None
    while low <= high:  # fewer layers never take more
        middle = (low + high) // 2
        taken = _count(program, entry, limits, middle, room)
        if taken.num_bytes <= room.num_bytes and taken.largest_bytes <= room.largest_buffer_bytes:
            found, high = Placement(middle, num_layers - max(middle, 0), taken.num_bytes), middle - 1
        else:
            low = middle + 1
    return found


def placed_ops(program: Program, first_layer: int) -> frozenset[int]:
    """Indices of the ops that a Placement names, in any lowering of its Program."""
    return frozenset(i for i, layer in enumerate(layer_of_ops(program)) if layer >= first_layer)


def cpu_part(program: Program, placement: Placement | None) -> Program:
    """What is left to the CPU: ops, and layers of each state group."""
    if placement is None:
        return program
    layers = layer_of_ops(program)
    kept = [(op, layer) for op, layer in zip(program.ops, layers, strict=True) if layer < placement.first_layer]
    num_layers = [0] * len(program.states)
    for op, _ in kept:
        if isinstance(op, ops.RopeAttention):
            num_layers[op.state] += 1
    states = tuple(replace(state, num_layers=n) for state, n in zip(program.states, num_layers, strict=True))
    return replace(program, ops=tuple(op for op, _ in kept), states=states)


def layer_of_ops(program: Program) -> list[int]:
    """By op: its layer; EVERYTHING before the first one, the number of layers behind the last."""
    layers: list[int] = []
    current, num_layers = EVERYTHING, sum(state.num_layers for state in program.states)
    for op in program.ops:
        if names := weight_names(op):
            layer = layer_of(names[0])
            current = num_layers if layer is None else layer
        layers.append(current)
    return layers


def _count(
    program: Program, entry: Callable[[str], EntrySpec], limits: CpuLimits, first_layer: int, room: Room
) -> "_Count":
    """What the compiler asks for, from a device that has no end."""
    count, placed = _Count(room), placed_ops(program, first_layer)
    compiler = GpuCompiler(count, program, placed, _Entries(entry), limits, plan_buffers(program))
    for index in sorted(placed):
        compiler.step(index)
    return count


@dataclass(frozen=True)
class _Entries:
    """Weights of which nothing but the size is known."""

    entry: Callable[[str], EntrySpec]

    def array(self, name: str) -> NDArray[np.generic]:
        raise AssertionError(f"{name} is read, but was only to be counted")


class _Count:
    """A Gpu that only counts the bytes that it is asked for."""

    def __init__(self, room: Room) -> None:
        self.tiling = room.tiling
        self.num_units = room.num_units
        self.has_double = room.has_double
        self.num_bytes = self.largest_bytes = 0

    def allocate(self, num_bytes: int) -> GpuBuffer:
        self.num_bytes += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        self.largest_bytes = max(self.largest_bytes, num_bytes)
        return _native.GpuBuffer(0)

    def upload(self, num_bytes: int, parts: Iterable[NDArray[np.uint8]]) -> GpuBuffer:
        return self.allocate(num_bytes)

    def kernel(self, source: Source, name: str, arguments: list[Argument]) -> int:
        return 0

    def program(self, batch: GpuBuffer, head: GpuBuffer, num_states: int) -> "_NoProgram":
        return _NoProgram()


class _NoProgram:
    def rope(self, table: NDArray[np.float32]) -> None: ...

    def pages(self, state: int, buffer: GpuBuffer) -> None: ...

    def choice(self, kernel: int, lanes: int, out: GpuBuffer, row_words: int, most_kept: int) -> None: ...

    def step(self, launches: list[LaunchTuple], uploads: list[RowsTuple], *outputs: list[RowsTuple]) -> int:
        return 0
