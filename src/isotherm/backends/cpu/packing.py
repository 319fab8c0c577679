"""Which packed entries a lowered Program needs, and how they are made from stored tensors."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isotherm.program import ops
from isotherm.program.backend import WeightTensor
from isotherm.program.flow import layer_of
from isotherm.program.lowering import lower
from isotherm.program.recorder import Program
from isotherm.quantization.layouts import dequantise
from isotherm.quantization.neurons import OUTPUT_ALIGNMENT, neuron_form, pack_neurons, pack_rows
from isotherm.quantization.p32 import PANEL_ROWS, matrix_pieces, pair_pieces
from isotherm.quantization.packed_cache import enforce_cap, open_or_build
from isotherm.quantization.packed_file import (
    SUFFIX,
    CacheUnavailable,
    EntryKind,
    EntrySpec,
    PackedMemory,
    PackedSink,
    PackedWeights,
)
from isotherm.types import Experts, QuantType

BY_NEURON = (EntryKind.ROWS, EntryKind.NEURONS)  # beside a dense form of the same weights

_READ_BYTES = 8 << 20  # of a source tensor at once: source and packed form never stand in memory together


def pair_name(gate: str, up: str) -> str:
    return f"{gate}+{up}"


def rows_name(up: str) -> str:
    return f"{up}.rows"


def neurons_name(down: str) -> str:
    return f"{down}.neurons"


def lower_by_neuron(program: Program, tensors: Mapping[str, WeightTensor], num_layers: int | None = None) -> Program:
    """Lowered, with each FFN whose neurons do not all fire, and whose down can be kept so, computed by neuron.

    num_layers: only in so many first ones; None: in all.
    """

    def is_sparse(op: ops.Ffn | ops.Moe) -> bool:
        if num_layers is not None and (layer_of(op.down) or 0) >= num_layers:
            return False
        if isinstance(op, ops.Moe):
            is_kept = neuron_form(tensors[op.down].quant_type) is not None and op.out.width % OUTPUT_ALIGNMENT == 0
            return is_kept and op.activation.has_zeros
        has_zeros = op.activation.has_zeros or op.trim_gate is not None or op.trim_hidden is not None
        return has_zeros and neuron_form(tensors[op.down].quant_type) is not None

    return lower(program, is_sparse)


def token_bytes(program: Program, entries: Sequence[EntrySpec], *, is_head_tied: bool) -> int:
    """Bytes of weights that a token reads where every neuron fires: of experts those that it uses."""
    gathered = {"positions"} if is_head_tied else {"positions", "embed"}  # one row of each is nothing beside the rest
    read = (spec for spec in entries if spec.name not in gathered and spec.kind not in BY_NEURON)
    experts = expert_weights(program)
    return sum(_used(spec.num_bytes, experts.get(spec.name)) for spec in read)


def token_ops(program: Program, entries: Sequence[EntrySpec]) -> int:
    """Operations of a token in the layers' matrices, where every neuron fires; a multiply-add is two."""
    unread = {EntryKind.VECTOR, *BY_NEURON}
    in_layers = [spec for spec in entries if spec.kind not in unread and "." in spec.name]
    experts = expert_weights(program)
    return sum(_used(2 * spec.shape[0] * spec.shape[1] * len(spec.types), experts.get(spec.name)) for spec in in_layers)


def expert_weights(program: Program) -> dict[str, Experts]:
    """The entries of a lowered Program that hold the matrices of all experts of a layer."""
    found = {}
    for op in program.ops:
        if isinstance(op, ops.ExpertGlu):
            found[pair_name(op.gate, op.up)] = op.experts
        elif isinstance(op, ops.ExpertGate | ops.SparseExpertUp | ops.ExpertDown):
            found[op.weight] = op.experts
            if isinstance(op, ops.ExpertDown):
                found[neurons_name(op.weight)] = op.experts
    return found


def _used(amount: int, experts: Experts | None) -> int:
    return amount if experts is None else amount // experts.num_experts * experts.num_used


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
    experts = expert_weights(program)
    for spec, sources in packed_entries(program, tensors):
        if spec.kind is EntryKind.VECTOR:
            vector = dequantise(sources[0].read(), sources[0].quant_type, spec.shape[0])[0]
            sink.add(spec, [vector.view(np.uint8)])
        elif spec.kind is EntryKind.NEURONS:
            sink.add(spec, _neurons(sources[0], experts.get(spec.name)))
        else:
            sink.add(spec, _pieces(spec.kind, sources))


def pack_in_memory(program: Program, tensors: Mapping[str, WeightTensor]) -> PackedMemory:
    """The packed weights of a lowered Program, kept nowhere."""
    memory = PackedMemory()
    pack_program(program, tensors, memory)
    return memory


@dataclass(frozen=True)
class PackedCache:
    """Where packed weights of a model file are kept, and how much of the disk all of them may take."""

    folder: Path
    cap_bytes: int
    model: str  # a name for the file
    identity: str  # of the model file


def open_packed(
    program: Program, tensors: Mapping[str, WeightTensor], cache: PackedCache, notify: Callable[[str], None]
) -> PackedWeights:
    """The packed weights of a lowered Program from their file, which is made where it is missing or stale.

    Programs that need other forms of the weights have files of their own. Where the file cannot be written, `notify`
    hears why, and memory is used.
    """
    entries = packed_entries(program, tensors)
    forms = hashlib.sha256(repr([spec for spec, _ in entries]).encode()).hexdigest()
    path = cache.folder / f"{cache.model}-{cache.identity[:16]}-{forms[:8]}{SUFFIX}"

    def build(sink: PackedSink) -> None:
        notify("packing the weights for this engine, once")
        pack_program(program, tensors, sink)

    try:
        weights = open_or_build(path, f"{cache.identity} {forms}", build, notify)
        for evicted in enforce_cap(cache.folder, cache.cap_bytes, keep=path):
            notify(f"removed {evicted.path.name} from the cache of packed models: it is full")
        return weights
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
            case ops.QuantGlu() | ops.ExpertGlu():
                yield pair_name(op.gate, op.up), (op.gate, op.up), EntryKind.PAIR
            case ops.PredictedLinear():
                yield from _matrix(op.weight, op.bias)
                if op.by_rows:
                    yield rows_name(op.weight), (op.weight,), EntryKind.ROWS
            case ops.SparseUp():
                yield op.weight, (op.weight,), EntryKind.MATRIX
                if op.by_rows:
                    yield rows_name(op.weight), (op.weight,), EntryKind.ROWS
            case ops.ExpertGate():
                yield op.weight, (op.weight,), EntryKind.MATRIX
            case ops.SparseExpertUp():
                yield op.weight, (op.weight,), EntryKind.MATRIX
                yield rows_name(op.weight), (op.weight,), EntryKind.ROWS
            case ops.ExpertDown():
                yield op.weight, (op.weight,), EntryKind.MATRIX
                if op.by_neuron:
                    yield neurons_name(op.weight), (op.weight,), EntryKind.NEURONS
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


def _neurons(down: WeightTensor, experts: Experts | None) -> Iterator[NDArray[np.uint8]]:
    """Those of each expert by itself."""
    rows, num_neurons = down.shape
    step = rows if experts is None else rows // experts.num_experts
    for start in range(0, rows, step):
        yield pack_neurons(down.read(start, start + step), down.quant_type, num_neurons)


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
