"""Which packed entries a lowered Program needs, and how they are made from stored tensors."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isotherm.program import ops
from isotherm.program.backend import WeightTensor
from isotherm.program.recorder import Program
from isotherm.quantization.layouts import dequantise
from isotherm.quantization.p32 import PANEL_ROWS, matrix_pieces, pair_pieces
from isotherm.quantization.packed_cache import open_or_build
from isotherm.quantization.packed_file import (
    CacheUnavailable,
    EntryKind,
    EntrySpec,
    PackedMemory,
    PackedSink,
    PackedWeights,
)
from isotherm.types import QuantType

_READ_BYTES = 8 << 20  # of a source tensor at once: source and packed form never stand in memory together


def pair_name(gate: str, up: str) -> str:
    return f"{gate}+{up}"


def packed_entries(program: Program, tensors: Mapping[str, WeightTensor]) -> list[tuple[EntrySpec, list[WeightTensor]]]:
    """Every weight of a lowered Program in the order in which ops read them, with the tensors that it is made of."""
    entries: dict[str, tuple[EntrySpec, list[WeightTensor]]] = {}
    for name, parts in _weights(program):
        if name in entries:
            continue
        sources = [tensors[part] for part in parts]
        rows, columns = sources[0].shape
        if rows == 1:
            spec = EntrySpec(name, EntryKind.VECTOR, (QuantType.F32,), (columns,))
        else:
            kind = EntryKind.PAIR if len(sources) == 2 else EntryKind.MATRIX
            spec = EntrySpec(name, kind, tuple(source.quant_type for source in sources), (rows, columns))
        entries[name] = spec, sources
    return list(entries.values())


def pack_program(program: Program, tensors: Mapping[str, WeightTensor], sink: PackedSink) -> None:
    """Adds every weight of a lowered Program to `sink`."""
    for spec, sources in packed_entries(program, tensors):
        if spec.kind is EntryKind.VECTOR:
            vector = dequantise(sources[0].read(), sources[0].quant_type, spec.shape[0])[0]
            sink.add(spec, [vector.view(np.uint8)])
        else:
            sink.add(spec, _pieces(sources))


def pack_in_memory(program: Program, tensors: Mapping[str, WeightTensor]) -> PackedMemory:
    """The packed weights of a lowered Program, kept nowhere."""
    memory = PackedMemory()
    pack_program(program, tensors, memory)
    return memory


def open_packed(
    program: Program, tensors: Mapping[str, WeightTensor], path: Path, identity: str, notify: Callable[[str], None]
) -> PackedWeights:
    """The packed weights of a lowered Program from the file `path`, which is made where it is missing or stale.

    identity: of the source file. Where the file cannot be written, `notify` hears why, and memory is used.
    """

    def build(sink: PackedSink) -> None:
        notify("packing the weights for this engine, once")
        pack_program(program, tensors, sink)

    key = f"{identity} {hashlib.sha256(program.dump().encode()).hexdigest()}"
    try:
        return open_or_build(path, key, build, notify)
    except CacheUnavailable as error:
        notify(f"running without the cache of packed models: {error.strerror} ({error.filename})")
        return pack_in_memory(program, tensors)


def _weights(program: Program) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Entry names with the tensors that each is made of."""
    for op in program.ops:
        match op:
            case ops.Embed():
                yield op.weight, (op.weight,)
            case ops.QuantLinear():
                for projection in op.projections:
                    yield projection.weight, (projection.weight,)
                    if projection.bias:
                        yield projection.bias, (projection.bias,)
            case ops.QuantGlu():
                yield pair_name(op.gate, op.up), (op.gate, op.up)
        norms = (getattr(op, field, None) for field in ("norm", "q_norm", "k_norm"))
        yield from ((norm.weight, (norm.weight,)) for norm in norms if norm is not None)


def _pieces(sources: list[WeightTensor]) -> Iterator[NDArray[np.uint8]]:
    rows, columns = sources[0].shape
    row_bytes = sum(source.quant_type.row_bytes(columns) for source in sources)
    step = max(1, _READ_BYTES // row_bytes // PANEL_ROWS) * PANEL_ROWS
    for start in range(0, rows, step):
        raw = [source.read(start, min(rows, start + step)) for source in sources]
        if len(raw) == 1:
            yield from matrix_pieces(raw[0], sources[0].quant_type, columns)
        else:
            yield from pair_pieces(raw[0], sources[0].quant_type, raw[1], sources[1].quant_type, columns)
