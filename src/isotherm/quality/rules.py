"""Lossy rules that need no training, and what each would leave out of a layer.

    rule    what is compared with a threshold                          of the paper
    cats    |activated gate|                                           Lee et al. 2024, "CATS"
    chess   |activated gate| * mean |up| of the neuron                 He et al. 2024, "CHESS"
    impact  |activated gate| * mean |up| * norm of the down column     the two above and WINA
    topk    |activated gate|, against mean and spread of the token     You et al. 2025, "Spark Transformer"
    teal    |hidden value|                                             Liu et al. 2024, "TEAL"
    wina    |hidden value| * norm of the down column                   Chen et al. 2025, "WINA"

The first four leave out rows of up and columns of down, the last two columns of down. An FFN without a gate has these
alone. Inputs of the other matmuls are left as they are: their columns would have to be kept a second time, and read
at half the bandwidth, for shares that are far above a half (ARCHITECTURE.md, "Quality").
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isotherm.program.ops import Trim
from isotherm.quality.choice import LayerTrims

F32 = NDArray[np.float32]


class Rule(Enum):
    CATS = "cats"
    CHESS = "chess"
    IMPACT = "impact"
    TOPK = "topk"
    TEAL = "teal"
    WINA = "wina"

    @property
    def is_of_gate(self) -> bool:
        return self not in (Rule.TEAL, Rule.WINA)


@dataclass(frozen=True)
class LayerSamples:
    """One FFN's values for some tokens of a text; float16, to be widened where they are computed with."""

    gate: NDArray[Any] | None  # activated, [tokens, ffn_size]
    hidden: NDArray[Any]  # [tokens, ffn_size]
    output_norm: F32  # L2 norm of what the FFN's op writes, residual included, [tokens]

    def widened(self) -> "LayerSamples":
        """In float32."""
        gate = None if self.gate is None else self.gate.astype(np.float32)
        return LayerSamples(gate, self.hidden.astype(np.float32), self.output_norm)

    def chosen(self, stride: int) -> "LayerSamples":
        """Every so manieth token."""
        gate = None if self.gate is None else self.gate[::stride]
        return LayerSamples(gate, self.hidden[::stride], self.output_norm[::stride])


def rules_for(samples: LayerSamples) -> tuple[Rule, ...]:
    return tuple(rule for rule in Rule if samples.gate is not None or not rule.is_of_gate)


class LayerRule:
    """One rule on one layer: for each share of neurons to leave out, the Trim that does, and whom it leaves out."""

    def __init__(self, rule: Rule, samples: LayerSamples, down_norm: F32) -> None:
        """down_norm: L2 norm of each neuron's column of down, [ffn_size]."""
        self._rule = rule
        values = samples.gate if rule.is_of_gate else samples.hidden
        assert values is not None
        self._weight = self._importance(samples, down_norm)
        self._scores = self._score(values)

    def trims(self, shares: Iterable[float]) -> list[LayerTrims]:
        """One for each share of neurons that are to be left out, over the samples."""
        levels = np.quantile(self._scores, list(shares)).astype(np.float32)
        return [self._trim(level) for level in levels]

    def neutral(self) -> LayerTrims:
        """Leaves nothing out."""
        return self._placed(Trim(np.zeros(len(self._weight), np.float32).tobytes()))

    def left_out(self, samples: LayerSamples, trims: LayerTrims) -> NDArray[np.bool_]:
        """[tokens, ffn_size]"""
        trim = trims.gate or trims.hidden
        assert trim is not None
        values = samples.gate if self._rule.is_of_gate else samples.hidden
        assert values is not None
        if trim.thresholds is None:
            below: NDArray[np.bool_] = _standardised(values) < trim.deviations
        else:
            below = np.abs(values) < np.frombuffer(trim.thresholds, np.float32)
        return below

    def _importance(self, samples: LayerSamples, down_norm: F32) -> F32:
        ones = np.ones_like(down_norm)
        if self._rule in (Rule.CHESS, Rule.IMPACT):
            assert samples.gate is not None
            # of the tokens that count: |up| weighted by |gate|
            up = np.abs(samples.hidden).sum(axis=0) / np.maximum(np.abs(samples.gate).sum(axis=0), np.float32(1e-20))
            weight: F32 = (up * (down_norm if self._rule is Rule.IMPACT else ones)).astype(np.float32)
            return weight
        return down_norm if self._rule is Rule.WINA else ones

    def _score(self, values: F32) -> F32:
        if self._rule is Rule.TOPK:
            return _standardised(values)
        scores: F32 = np.abs(values) * self._weight
        return scores

    def _trim(self, level: np.float32) -> LayerTrims:
        if self._rule is Rule.TOPK:
            return self._placed(Trim(None, float(level)))
        highest = np.finfo(np.float32).max
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            thresholds = np.where(level > 0, np.minimum(level / self._weight, highest), 0).astype(np.float32)
        return self._placed(Trim(thresholds.tobytes()))

    def _placed(self, trim: Trim) -> LayerTrims:
        return LayerTrims(gate=trim) if self._rule.is_of_gate else LayerTrims(hidden=trim)


def _standardised(values: F32) -> F32:
    """How many standard deviations each magnitude lies above the mean of its token's."""
    magnitude = np.abs(values)
    spread = magnitude.std(axis=1, keepdims=True)
    deviations: F32 = (magnitude - magnitude.mean(axis=1, keepdims=True)) / np.maximum(spread, np.float32(1e-20))
    return deviations
