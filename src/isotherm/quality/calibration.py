"""What a text's hidden values are, layer by layer, and what error leaving out more and more of a layer's neurons makes.

The error is that of the FFN's output, relative to what its op writes, for every rule, layer and share. A ladder then
raises the share of that layer which saves most time for its error, again and again: each rung is a split over the
layers (the greedy of TEAL, Liu et al. 2024, over layers instead of matrices, by time instead of share: leaving out a
few neurons of a layer saves nothing).
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isotherm.backends.reference import contract
from isotherm.program import flow, ops
from isotherm.program.backend import WeightTensor
from isotherm.program.ops import Value
from isotherm.program.recorder import Program
from isotherm.quality.choice import LayerTrims
from isotherm.quality.rules import LayerRule, LayerSamples, Rule
from isotherm.sparsity.stored_weights import float_slabs
from isotherm.text import TextGenerator
from isotherm.types import Activation

F32 = NDArray[np.float32]

SHARES = tuple(np.arange(20) / 20)  # of neurons left out: rung by rung
_SAMPLE_TOKENS = 256
_ERROR_STRIDE = 4  # every so manieth sample tells the error, which takes a matmul


@dataclass(frozen=True)
class _Layer:
    """The Values of one FFN in a lowered Program that is trimmed."""

    trimmed: Value  # what its first TrimOp reads
    activation: Activation | None
    hidden: Value
    out: Value
    down: str


def neutral_trims(program: Program) -> tuple[LayerTrims, ...]:
    """For a recorded Program: nothing is left out, but gates are Values of their own."""

    def neutral(op: ops.Ffn) -> LayerTrims:
        trim = ops.Trim(np.zeros(op.ffn_size, np.float32).tobytes())
        return LayerTrims(hidden=trim) if op.gate is None else LayerTrims(gate=trim)

    return tuple(neutral(op) for op in program.ffns)


@dataclass(frozen=True)
class Calibrated:
    """One rule: by layer, for each of SHARES, the trims that leave as many neurons out, and the error of that."""

    rule: Rule
    trims: tuple[tuple[LayerTrims, ...], ...]
    errors: tuple[tuple[float, ...], ...]

    def uniform(self, step: int) -> tuple[LayerTrims, ...]:
        """The same share of every layer."""
        return tuple(layer[step] for layer in self.trims)


@dataclass(frozen=True)
class Ladder:
    """Splits of one rule over the layers, rung by rung: rung 0 leaves nothing out."""

    calibrated: Calibrated
    rungs: tuple[tuple[int, ...], ...]  # of each rung the index into SHARES by layer

    def at(self, rung: int) -> tuple[LayerTrims, ...]:
        """Layers that leave nothing out have no trims."""
        chosen = zip(self.calibrated.trims, self.rungs[rung], strict=True)
        return tuple(LayerTrims() if i == 0 else trims[i] for trims, i in chosen)

    def with_neutral(self, rung: int) -> tuple[LayerTrims, ...]:
        """The same answers from packed weights that all rungs share: trims that leave nothing out are there too."""
        return tuple(trims[i] for trims, i in zip(self.calibrated.trims, self.rungs[rung], strict=True))

    def shares(self, rung: int) -> tuple[float, ...]:
        """Of neurons left out over the samples, by layer."""
        return tuple(float(SHARES[i]) for i in self.rungs[rung])


def collect(model: TextGenerator, windows: Sequence[Sequence[int]]) -> list[LayerSamples]:
    """Samples of a model that was loaded with `neutral_trims`, layer by layer. Raises OptionError."""
    layers = _layers(model.program)
    num_tokens = sum(map(len, windows))
    stride = max(1, num_tokens // _SAMPLE_TOKENS)
    kept: dict[Value, list[NDArray[Any]]] = {}
    activations = {layer.trimmed: layer.activation for layer in layers}
    outs = {layer.out for layer in layers}
    seen: dict[Value, int] = {}

    def look(value: Value, rows: F32) -> None:
        chosen = rows[-seen.get(value, 0) % stride :: stride]
        seen[value] = seen.get(value, 0) + len(rows)
        if value in outs:
            kept.setdefault(value, []).append(np.sqrt(np.square(chosen, dtype=np.float64).sum(axis=1)))
            return
        if activation := activations.get(value):
            chosen = contract.activate(chosen, activation)
        kept.setdefault(value, []).append(np.clip(chosen, -65504, 65504).astype(np.float16))

    wanted = {value for layer in layers for value in (layer.trimmed, layer.hidden, layer.out)}
    for window in windows:
        model.observe(window, wanted, look)

    def samples(layer: _Layer) -> LayerSamples:
        hidden, norm = np.concatenate(kept[layer.hidden]), np.concatenate(kept[layer.out])
        gate = None if layer.activation is None else np.concatenate(kept[layer.trimmed])
        return LayerSamples(gate, hidden, norm.astype(np.float32))

    return [samples(layer) for layer in layers]


def _layers(program: Program) -> list[_Layer]:
    makers = {value: op for op in program.ops for value in flow.outputs(op)}
    found = []
    for op in program.ops:
        if isinstance(op, ops.SparseDown):
            x, out, down = op.x, op.out, op.weight
        elif isinstance(op, ops.QuantLinear):
            x, out, down = op.x, op.projections[0].out, op.projections[0].weight
        else:
            continue
        match makers.get(x):
            case ops.SparseUp() as up if isinstance(trim := makers[up.gated], ops.TrimOp):
                found.append(_Layer(trim.x, trim.activation, x, out, down))
            case ops.TrimOp() as trim:
                found.append(_Layer(trim.x, None, trim.x, out, down))
    return found


def calibrate(
    model: TextGenerator,
    tensors: Mapping[str, WeightTensor],
    samples: Sequence[LayerSamples],
    rules: Sequence[Rule],
    on_layer: Callable[[int], None],
) -> list[Calibrated]:
    """One for each rule, of `rules_for`. on_layer hears the index of each layer that is done."""
    trims: dict[Rule, list[tuple[LayerTrims, ...]]] = {rule: [] for rule in rules}
    errors: dict[Rule, list[tuple[float, ...]]] = {rule: [] for rule in rules}
    for index, (layer, kept) in enumerate(zip(_layers(model.program), samples, strict=True)):
        sample = kept.widened()
        down = np.concatenate(list(float_slabs(tensors[layer.down])))
        down_norm = np.sqrt(np.square(down).sum(axis=0))
        few = sample.chosen(_ERROR_STRIDE)
        for rule in rules:
            one = LayerRule(rule, sample, down_norm)
            choices = (one.neutral(), *one.trims(SHARES[1:]))
            trims[rule].append(choices)
            steps = (_error(few, one.left_out(few, choice), down) for choice in choices[1:])
            errors[rule].append((0.0, *steps))
        on_layer(index)
    return [Calibrated(rule, tuple(trims[rule]), tuple(errors[rule])) for rule in rules]


def build_ladder(calibrated: Calibrated, gains: Sequence[float]) -> Ladder:
    """gains: time that one layer saves at each of SHARES, in any unit."""
    return Ladder(calibrated, climb(calibrated.errors, gains))


def climb(errors: Sequence[Sequence[float]], gains: Sequence[float]) -> tuple[tuple[int, ...], ...]:
    """Rungs, from all layers at share 0, each of which raises the layer that gains most for its error [layers][shares].

    A layer goes along the upper hull of its gains over its errors: shares that gain less than a mixture of a lower and
    a higher one are skipped, and those that gain nothing are never taken.
    """
    hulls = [_hull(row, gains) for row in errors]
    at = [0] * len(errors)  # on the hull
    heap: list[tuple[float, int]] = []

    def push(layer: int) -> None:
        hull = hulls[layer][at[layer] :]
        if len(hull) > 1:
            error = errors[layer][hull[1]] - errors[layer][hull[0]]
            heapq.heappush(heap, (-(gains[hull[1]] - gains[hull[0]]) / max(error, 1e-30), layer))

    for layer in range(len(errors)):
        push(layer)
    rungs = [(0,) * len(errors)]
    while heap:
        _, layer = heapq.heappop(heap)
        at[layer] += 1
        rungs.append(tuple(hull[i] for hull, i in zip(hulls, at, strict=True)))
        push(layer)
    return tuple(rungs)


def _hull(errors: Sequence[float], gains: Sequence[float]) -> list[int]:
    """Indices from 0 on, errors and gains rising, gain by error falling."""
    hull = [0]
    for i in range(1, len(errors)):
        if gains[i] <= gains[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(errors, gains, hull[-2], hull[-1]) <= _slope(errors, gains, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _slope(errors: Sequence[float], gains: Sequence[float], low: int, high: int) -> float:
    return (gains[high] - gains[low]) / max(errors[high] - errors[low], 1e-30)


def _error(samples: LayerSamples, left_out: NDArray[np.bool_], down: F32) -> float:
    """Mean squared norm of what is missing from the output, relative to that of the output."""
    missing = np.where(left_out, samples.hidden, 0) @ down.T
    relative = np.square(missing).sum(axis=1) / np.maximum(np.square(samples.output_norm), np.float32(1e-20))
    return float(relative.mean())
