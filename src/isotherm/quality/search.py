"""Looks for the fastest lossy rule within a budget: the highest rung of each rule's ladder that keeps it, timed."""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from statistics import fmean, median

import numpy as np
from numpy.typing import NDArray

from isotherm.evaluation.divergence import kl_divergence
from isotherm.evaluation.windows import Window, log_softmax, scored_rows
from isotherm.load_options import Budget
from isotherm.quality.calibration import SHARES, Calibrated, Ladder
from isotherm.quality.choice import LayerTrims, Measured
from isotherm.quality.rules import Rule
from isotherm.text import TextGenerator

Layers = Sequence[LayerTrims]
Load = Callable[[Layers | None], AbstractContextManager[TextGenerator]]  # None: exact

_NUM_ROUNDS = 5
_PROMPT_TOKENS = 64  # of the text that is timed: read at once before the others
_TIMED_STEPS = (0, 6, 10, 14, 18)  # of SHARES


class HeldOut:
    """Predictions of the exact model for a text that nothing was calibrated on, to compare others with."""

    def __init__(self, model: TextGenerator, windows: Sequence[Window]) -> None:
        """Keeps float32 log-probabilities of every scored token in a temporary file."""
        self.windows = tuple(windows)
        num_rows, vocab_size = sum(len(window.rows) for window in windows), model.facts.config.vocab_size
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by `close`
        self._log_p = np.memmap(self._file, np.float32, "w+", shape=(num_rows, vocab_size))
        losses = []
        for index, (log_p, target) in enumerate(self._predictions(model)):
            self._log_p[index] = log_p
            losses.append(-float(log_p[target]))
        self.perplexity = math.exp(math.fsum(losses) / len(losses))

    def measure(self, model: TextGenerator) -> Measured:
        """KL(exact || model) and perplexity."""
        kl, losses = [], []
        for index, (log_p, target) in enumerate(self._predictions(model)):
            kl.append(kl_divergence(self._log_p[index].astype(np.float64), log_p))
            losses.append(-float(log_p[target]))
        return Measured(
            kl=float(np.mean(kl)),
            kl_error=float(np.std(kl) / math.sqrt(len(kl))),
            perplexity=math.exp(math.fsum(losses) / len(losses)),
            exact_perplexity=self.perplexity,
            skipped=0.0,
        )

    def close(self) -> None:
        del self._log_p
        self._file.close()

    def _predictions(self, model: TextGenerator) -> Iterator[tuple[NDArray[np.float64], int]]:
        """Log-probabilities [vocab_size] and the token that came, for each scored token."""
        for index, window in enumerate(self.windows):
            for logits, target in zip(scored_rows(model, window, index), window.targets, strict=True):
                yield log_softmax(logits), target


def within(budget: Budget, measured: Measured) -> bool:
    if budget.metric == "kl":
        return measured.kl <= budget.limit
    return measured.perplexity <= measured.exact_perplexity * (1 + budget.limit)


@dataclass(frozen=True)
class Candidate:
    """What one rule can do within the budget. rung 0: nothing."""

    rule: Rule
    rung: int
    shares: tuple[float, ...]  # of neurons left out, over the samples, by layer
    layers: tuple[LayerTrims, ...]
    measured: Measured

    @property
    def share(self) -> float:
        return fmean(self.shares)


def gains(calibrated: Calibrated, load: Load, token_ids: Sequence[int]) -> tuple[float, ...]:
    """Share of a token's time that leaving out each of SHARES in every layer saves here, never below 0.

    Some shares are timed; between them it is interpolated.
    """
    with load(None) as model:
        exact_s = median(decode_times_s(model, token_ids))
    saved = [0.0]
    for step in _TIMED_STEPS[1:]:
        with load(calibrated.uniform(step)) as model:
            saved.append(1 - median(decode_times_s(model, token_ids)) / exact_s)
    shares = [SHARES[step] for step in _TIMED_STEPS]
    return tuple(max(0.0, float(np.interp(share, shares, saved))) for share in SHARES)


def best_rung(
    ladder: Ladder, budget: Budget, load: Load, held_out: HeldOut, on_try: Callable[[Rule, float, Measured], None]
) -> Candidate:
    """The highest rung within the budget, found by halves: errors rise with rungs, but for noise."""
    low, high = 0, len(ladder.rungs) - 1
    nothing = Measured(0, 0, held_out.perplexity, held_out.perplexity, 0)
    rule = ladder.calibrated.rule
    found = Candidate(rule, 0, ladder.shares(0), ladder.at(0), nothing)
    while low < high:
        rung = (low + high + 1) // 2
        with load(ladder.with_neutral(rung)) as model:
            candidate = Candidate(rule, rung, ladder.shares(rung), ladder.at(rung), held_out.measure(model))
        on_try(candidate.rule, candidate.share, candidate.measured)
        if within(budget, candidate.measured):
            low, found = rung, candidate
        else:
            high = rung - 1
    return found


def decode_times_s(model: TextGenerator, token_ids: Sequence[int]) -> list[float]:
    """Seconds that the end of a text takes token by token, in each of some rounds after one that is not counted."""
    return [model.read_s(token_ids, first=_PROMPT_TOKENS) for _ in range(_NUM_ROUNDS + 1)][1:]


def timed(
    candidates: Sequence[Candidate], load: Load, token_ids: Sequence[int], on_rate: Callable[[Rule | None, float], None]
) -> list[Candidate]:
    """The candidates with their speed over the exact model's, which is measured before and after them."""

    def times_s(rule: Rule | None, layers: Layers | None) -> list[float]:
        with load(layers) as model:
            found = decode_times_s(model, token_ids)
        on_rate(rule, (len(token_ids) - _PROMPT_TOKENS) / median(found))
        return found

    exact = times_s(None, None)
    ours = {candidate.rule: times_s(candidate.rule, candidate.layers) for candidate in candidates if candidate.rung}
    exact += times_s(None, None)
    return [
        replace(candidate, measured=replace(candidate.measured, speed=median(exact) / median(ours[candidate.rule])))
        if candidate.rung
        else candidate
        for candidate in candidates
    ]


def fastest(candidates: Sequence[Candidate]) -> Candidate | None:
    """None where nothing is faster than the exact model."""
    faster = [candidate for candidate in candidates if (candidate.measured.speed or 0) > 1]
    return max(faster, key=lambda candidate: candidate.measured.speed or 0, default=None)
