"""The search: what is measured, which rung it stops at, and what is fastest."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_tiny

import isotherm
from isotherm.evaluation.divergence import divergence
from isotherm.evaluation.perplexity import perplexity
from isotherm.evaluation.windows import cut_windows
from isotherm.load_options import Budget
from isotherm.program.ops import Trim
from isotherm.quality.calibration import SHARES, Calibrated, Ladder
from isotherm.quality.choice import Choice, LayerTrims, Measured
from isotherm.quality.rules import Rule
from isotherm.quality.search import Candidate, HeldOut, best_rung, fastest, within
from isotherm.types import QuantType

TEXT = "There is a hand on the other door, and it is in there. " * 20
KL = Budget("kl", 0.1)


def test_what_is_measured_is_what_evaluation_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path))
    path = write_tiny(tmp_path / "a.gguf", "llama", QuantType.Q4_0)
    file = tmp_path / "choice.npz"
    Choice("", "", (LayerTrims(gate=Trim(None, 0.3)),) * 2, None).save(file)
    with isotherm.load(path) as exact, isotherm.load(path, quality=str(file)) as trimmed:
        held_out = HeldOut(exact, cut_windows(exact, TEXT, 64, 3))
        found, same = held_out.measure(trimmed), held_out.measure(exact)
        held_out.close()
        expected = divergence(exact, trimmed, TEXT, window_tokens=64, num_windows=3)
        assert found.kl == pytest.approx(expected.mean_kl, rel=1e-5)
        assert found.perplexity == perplexity(trimmed, TEXT, window_tokens=64, num_windows=3).perplexity
        assert found.exact_perplexity == perplexity(exact, TEXT, window_tokens=64, num_windows=3).perplexity
    assert found.kl > 0.001
    assert same.kl == pytest.approx(0, abs=1e-7)  # log-probabilities are kept in float32
    assert same.perplexity == found.exact_perplexity


class Rated:
    """Stands for a model, a held-out text and the loading of candidates: KL is what a split says."""

    perplexity = 10.0

    def __init__(self, kl: list[float]) -> None:
        self._kl = kl
        self.tried: list[int] = []

    @contextmanager
    def load(self, layers: Any) -> Iterator[Any]:
        yield layers

    def measure(self, layers: Any) -> Measured:
        rung = int(np.frombuffer(layers[0].gate.thresholds, np.float32)[0])
        self.tried.append(rung)
        return Measured(self._kl[rung], 0.0, 10 + self._kl[rung], 10.0, 0.0)


def ladder(num_rungs: int) -> Ladder:
    trims = tuple(LayerTrims(gate=Trim(np.float32(i).tobytes())) for i in range(num_rungs))
    return Ladder(Calibrated(Rule.CATS, (trims,), ()), tuple((i,) for i in range(num_rungs)))


@given(steps=st.lists(st.floats(0, 0.05), min_size=1, max_size=len(SHARES) - 1))
def test_the_highest_rung_within_the_budget(steps: list[float]) -> None:
    kl = [0.0, *np.cumsum(steps).tolist()]
    rated: Any = Rated(kl)
    found = best_rung(ladder(len(kl)), KL, rated.load, rated, lambda *_: None)
    assert found.rung == max(i for i, value in enumerate(kl) if value <= KL.limit)
    assert len(rated.tried) <= np.ceil(np.log2(len(kl))) + 1
    assert found.measured.kl == kl[found.rung]
    assert found.layers[0] == (LayerTrims() if found.rung == 0 else ladder(len(kl)).at(found.rung)[0])


def test_budgets_of_perplexity() -> None:
    measured = Measured(kl=5, kl_error=0, perplexity=10.1, exact_perplexity=10, skipped=0)
    assert within(Budget("ppl", 0.011), measured)
    assert not within(Budget("ppl", 0.009), measured)
    assert not within(Budget("kl", 1.0), measured)


def test_the_fastest() -> None:
    nothing = Candidate(Rule.CATS, 0, (0.0,), (LayerTrims(),), Measured(0, 0, 1, 1, 0))
    slow, fast, faster = (
        replace(nothing, rung=1, measured=replace(nothing.measured, speed=speed)) for speed in (0.9, 1.1, 1.2)
    )
    assert fastest([nothing, slow]) is None
    assert fastest([slow, fast, nothing, faster]) is faster
