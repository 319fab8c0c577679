"""Which packed entries a lowered Program needs, and how they are made from stored tensors."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isotherm.program import ops
from isotherm.program.backend import WeightTensor
from isotherm.program.lowering import lower
from isotherm.program.recorder import Program
from isotherm.quantization.layouts import dequantise
from isotherm.quantization.neurons import neuron_form, pack_neurons, pack_rows
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

BY_NEURON = (EntryKind.ROWS, EntryKind.NEURONS)  # beside a dense form of the same weights

_READ_BYTES = 8 << 20  # of a source tensor at once: source and packed form never stand in memory together


def pair_name(gate: str, up: str) -> str:
    return f"{gate}+{up}"


def rows_name(up: str) -> str:
    return f"{up}.rows"


def neurons_name(down: str) -> str:
    return f"{down}.neurons"


def lower_by_neuron(program: Program, tensors: Mapping[str, WeightTensor]) -> Program:
    """Lowered, with each FFN whose neurons do not all fire, and whose down can be kept so, computed by neuron."""

    def is_sparse(op: ops.Ffn) -> bool:
        has_zeros = op.activation.has_zeros or op.trim_gate is not None or op.trim_hidden is not None
        return has_zeros and neuron_form(tensors[op.down].quant_type) is not None

    return lower(program, is_sparse)


def token_bytes(entries: Sequence[EntrySpec], *, is_head_tied: bool) -> int:
    """Bytes of weights that a token reads where every neuron fires."""
    gathered = {"positions"} if is_head_tied else {"positions", "embed"}  # one row of each is nothing beside the rest
    return sum(spec.num_bytes for spec in entries if spec.name not in gathered and spec.kind not in BY_NEURON)


def token_ops(entries: Sequence[EntrySpec]) -> int:
    """Operations of a token in the layers' matrices, where every neuron fires; a multiply-add is two."""
    unread = {EntryKind.VECTOR, *BY_NEURON}
    in_layers = [spec for spec in entries if spec.kind not in unread and "." in spec.name]
    return sum(2 * spec.shape[0] * spec.shape[1] * len(spec.types) for spec in in_layers)


def packed_entries(program: Program, tensors: Mapping[str, WeightTensor]) -> list[tuple[EntrySpec, list[WeightTensor]]]:
    """Every weight of a lowered Program in the order in which ops read them, with the tensors that it is made of."""
    entries: dict[str, tuple[EntrySpec, list[WeightTensor]]] = {}
    for name, parts, kind in _weights(program):
        if name in entries:
            continue
        sources = [tensors[part] for part in parts]
        rows, columns = sources[0].shape
        if rows == 1:
            spec = EntrySpec(name, EntryKind.VECTOR, (QuantType.F32,), (columns,))
        else:
            spec = EntrySpec(name, kind, tuple(source.quant_type for source in sources), (rows, columns))
        entries[name] = spec, sources
    return list(entries.values())


def pack_program(program: Program, tensors: Mapping[str, WeightTensor], sink: PackedSink) -> None:
    """Adds every weight of a lowered Program to `sink`."""
    for spec, sources in packed_entries(program, tensors):
        if spec.kind is EntryKind.VECTOR:
            vector = dequantise(sources[0].read(), sources[0].quant_type, spec.shape[0])[0]
            sink.add(spec, [vector.view(np.uint8)])
        elif spec.kind is EntryKind.NEURONS:
            sink.add(spec, [pack_neurons(sources[0].read(), sources[0].quant_type, spec.shape[1])])
        else:
            sink.add(spec, _pieces(spec.kind, sources))


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


def _weights(program: Program) -> Iterator[tuple[str, tuple[str, ...], EntryKind]]:
    """Entry names with the tensors that each is made of; kind: where they are matrices."""
    for op in program.ops:
        match op:
            case ops.Embed() | ops.EmbedPositions():
                yield op.weight, (op.weight,), EntryKind.MATRIX
            case ops.QuantLinear():
                for projection in op.projections:
                    yield from _matrix(projection.weight, projection.bias)
            case ops.QuantGlu():
                yield pair_name(op.gate, op.up), (op.gate, op.up), EntryKind.PAIR
            case ops.PredictedLinear():
                yield from _matrix(op.weight, op.bias)
                if op.by_rows:
                    yield rows_name(op.weight), (op.weight,), EntryKind.ROWS
            case ops.SparseUp():
                yield op.weight, (op.weight,), EntryKind.MATRIX
                if op.by_rows:
                    yield rows_name(op.weight), (op.weight,), EntryKind.ROWS
            case ops.SparseDown():
                yield from _matrix(op.weight, op.bias)
                yield neurons_name(op.weight), (op.weight,), EntryKind.NEURONS
        norms = (getattr(op, field, None) for field in ("norm", "q_norm", "k_norm"))
        vectors = (name for norm in norms if norm is not None for name in (norm.weight, norm.bias) if name is not None)
        yield from ((name, (name,), EntryKind.VECTOR) for name in vectors)


def _matrix(weight: str, bias: str | None) -> Iterator[tuple[str, tuple[str, ...], EntryKind]]:
    yield weight, (weight,), EntryKind.MATRIX
    if bias:
        yield bias, (bias,), EntryKind.VECTOR


def _pieces(kind: EntryKind, sources: list[WeightTensor]) -> Iterator[NDArray[np.uint8]]:
    rows, columns = sources[0].shape
    row_bytes = sum(source.quant_type.row_bytes(columns) for source in sources)
    step = max(1, _READ_BYTES // row_bytes // PANEL_ROWS) * PANEL_ROWS
    for start in range(0, rows, step):
        raw = [source.read(start, min(rows, start + step)) for source in sources]
        types = [source.quant_type for source in sources]
        match kind:
            case EntryKind.PAIR:
                yield from pair_pieces(raw[0], types[0], raw[1], types[1], columns)
            case EntryKind.ROWS:
                yield pack_rows(raw[0], types[0], columns).reshape(-1)
            case _:
                yield from matrix_pieces(raw[0], types[0], columns)
