"""Runs a text through a model and counts which neurons fire."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from isotherm.backends.reference import contract, float32
from isotherm.errors import OptionError
from isotherm.program import ops
from isotherm.program.backend import WeightTensor
from isotherm.program.ops import NormWeights, Value
from isotherm.program.recorder import Program
from isotherm.sparsity.neuron_stats import LayerStats, NeuronStats, Profiled, empty_layer, histogram
from isotherm.sparsity.stored_weights import float_slabs, float_vector
from isotherm.text import TextGenerator
from isotherm.types import Activation

F32 = NDArray[np.float32]

_MAX_SAMPLES = 2048  # tokens whose firing is kept neuron by neuron


@dataclass(frozen=True)
class _Watched:
    """What one op of a layer reads: `place` is its row of LayerStats.inputs."""

    layer: int
    place: int
    norm: NormWeights | None


@dataclass(frozen=True)
class FfnLayer:
    """One FFN of a lowered Program: what it reads, its hidden values, what makes them, and what reads those."""

    x: Value
    norm: NormWeights | None  # of x
    hidden: Value
    activation: Activation
    down: str


def ffn_layers(program: Program) -> tuple[FfnLayer, ...]:
    """The FFNs of a lowered Program without lossy rules, in order. Raises OptionError where it has some."""
    if program.is_trimmed:
        raise OptionError("which neurons fire is asked of the exact model; load it without quality and predictor")
    down = {op.x: op.projections[0].weight for op in program.ops if isinstance(op, ops.QuantLinear)}
    down |= {op.x: op.weight for op in program.ops if isinstance(op, ops.SparseDown)}
    found = []
    for op in program.ops:
        if isinstance(op, ops.QuantGlu | ops.SparseUp):
            found.append(FfnLayer(op.x, op.norm, op.out, op.activation, down[op.out]))
        elif isinstance(op, ops.QuantLinear) and op.activation is not None:
            hidden = op.projections[0].out
            found.append(FfnLayer(op.x, op.norm, hidden, op.activation, down[hidden]))
    return tuple(found)


class Profiler:
    """Counts the windows of one model."""

    def __init__(self, model: TextGenerator, tensors: Mapping[str, WeightTensor], identity: str) -> None:
        """tensors and identity: of the model's file. Raises OptionError for the reference backend, and for experts."""
        if model.facts.backend != "cpu":
            raise OptionError(f"the {model.facts.backend} backend does not profile; leave --backend out")
        if model.facts.config.experts:
            raise OptionError(
                f"{model.facts.name} is a mixture of experts, whose neurons are not counted; profile takes models with "
                "one FFN a layer"
            )
        self._model = model
        self._tensors = tensors
        self._identity = identity
        self._layers = ffn_layers(model.program)
        self._watched = self._inputs()
        self._vectors: dict[str, F32] = {}

    def start(self, windows: Sequence[Sequence[int]]) -> NeuronStats:
        """Nothing counted of these windows, all of one length."""
        window_tokens = len(windows[0])
        text = np.array(windows, np.int32).tobytes()
        profiled = Profiled(
            identity=self._identity,
            model=self._model.facts.name,
            activation=self._layers[0].activation,
            ffn_size=self._layers[0].hidden.width,
            text_sha256=hashlib.sha256(text).hexdigest(),
            window_tokens=window_tokens,
            num_windows=0,
            sample_stride=-(-len(windows) * window_tokens // _MAX_SAMPLES),
        )
        norms = [self._down_norm(layer.down) for layer in self._layers]
        return NeuronStats(profiled, tuple(empty_layer(norm, len(norm)) for norm in norms))

    def add(self, stats: NeuronStats, window: Sequence[int]) -> NeuronStats:
        """`stats` and one window more; those passed in are spent."""
        hidden = {layer.hidden: index for index, layer in enumerate(self._layers)}
        before, stride = stats.profiled.num_tokens, stats.profiled.sample_stride
        num_seen = [0] * len(self._layers)  # tokens of this window

        def look(value: Value, rows: F32) -> None:
            if value in hidden:
                index = hidden[value]
                layer, first = stats.layers[index], -(before + num_seen[index]) % stride
                _count(layer, rows, rows[first::stride], has_zeros=stats.profiled.activation.has_zeros)
                num_seen[index] += len(rows)
            for watched in self._watched.get(value, ()):
                stats.layers[watched.layer].inputs[watched.place] += histogram(self._normed(rows, watched.norm))

        self._model.observe(window, {*hidden, *self._watched}, look)
        return replace(stats, profiled=replace(stats.profiled, num_windows=stats.profiled.num_windows + 1))

    def _inputs(self) -> dict[Value, list[_Watched]]:
        """Which Values the matmuls of each layer read, and through which norm."""
        found: dict[Value, list[_Watched]] = {}
        layer = 0
        hidden = {ffn.hidden for ffn in self._layers}
        gates = {op.gated for op in self._model.program.ops if isinstance(op, ops.SparseUp)}  # read what up reads
        for op in self._model.program.ops:
            if isinstance(op, ops.QuantGlu | ops.SparseUp):
                found.setdefault(op.x, []).append(_Watched(layer, 2, op.norm))
            elif isinstance(op, ops.SparseDown):
                found.setdefault(op.x, []).append(_Watched(layer, 3, None))
                layer += 1
            elif isinstance(op, ops.QuantLinear) and layer < len(self._layers) and op.projections[0].out not in gates:
                is_down, is_up = op.x in hidden, op.activation is not None
                place = 3 if is_down else 2 if is_up else 0 if len(op.projections) > 1 else 1
                found.setdefault(op.x, []).append(_Watched(layer, place, op.norm))
                layer += is_down
        return found

    def _normed(self, rows: F32, norm: NormWeights | None) -> F32:
        if norm is None:
            return rows
        if norm.bias is not None:
            return float32.layer_norm(rows, self._vector(norm.weight), self._vector(norm.bias), norm.eps)
        return float32.rms_norm(rows, self._vector(norm.weight), norm.eps)

    def _vector(self, name: str) -> F32:
        if name not in self._vectors:
            self._vectors[name] = float_vector(self._tensors[name])
        return self._vectors[name]

    def _down_norm(self, name: str) -> F32:
        tensor = self._tensors[name]
        total = np.zeros(tensor.shape[1], np.float64)
        for slab in float_slabs(tensor):
            total += np.square(slab, dtype=np.float64).sum(axis=0)
        return np.sqrt(total).astype(np.float32)


def profile(
    profiler: Profiler,
    stats: NeuronStats,
    windows: Sequence[Sequence[int]],
    on_window: Callable[[NeuronStats], None],
) -> NeuronStats:
    """Goes on from `stats` to the end of `windows`; on_window hears after each."""
    for window in windows[stats.profiled.num_windows :]:
        stats = profiler.add(stats, window)
        on_window(stats)
    return stats


def _count(layer: LayerStats, hidden: F32, sampled: F32, *, has_zeros: bool) -> None:
    """sampled: rows of `hidden` whose firing is kept."""
    layer.num_fired += np.count_nonzero(hidden, axis=0)
    layer.num_coded += np.count_nonzero(_has_code(hidden), axis=0)
    layer.magnitude += np.abs(hidden).sum(axis=0, dtype=np.float64)
    fires = sampled != 0 if has_zeros else _has_code(sampled)
    layer.fired = np.concatenate([layer.fired, np.packbits(fires, axis=1)])


def _has_code(hidden: F32) -> NDArray[np.bool_]:
    """Whether the int8 code of each hidden value is not zero."""
    codes, _ = contract.quantise(hidden)
    has_code: NDArray[np.bool_] = codes[:, : hidden.shape[1]] != 0
    return has_code
