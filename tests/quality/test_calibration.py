"""Samples, thresholds, errors and ladders, against slow twins."""

from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_tiny

import isotherm
from isotherm.backends.reference import contract
from isotherm.formats.checkpoint import open_checkpoint
from isotherm.models import FAMILIES
from isotherm.program import flow, ops
from isotherm.quality.calibration import SHARES, calibrate, climb, collect, neutral_trims
from isotherm.quality.choice import Choice, LayerTrims
from isotherm.quality.rules import LayerRule, LayerSamples, Rule, rules_for
from isotherm.quantization.layouts import dequantise
from isotherm.types import Activation, QuantType

RNG = np.random.default_rng(0)
SAMPLES = LayerSamples(
    RNG.standard_normal((200, 96)).astype(np.float32),
    (RNG.standard_normal((200, 96)) ** 3).astype(np.float32),
    np.ones(200, np.float32),
)
DOWN_NORM = RNG.uniform(0.1, 2, 96).astype(np.float32)


@pytest.mark.parametrize("rule", list(Rule))
def test_as_many_neurons_are_left_out_as_was_asked_for(rule: Rule) -> None:
    one = LayerRule(rule, SAMPLES, DOWN_NORM)
    for share, trims in zip(SHARES[1:], one.trims(SHARES[1:]), strict=True):
        assert one.left_out(SAMPLES, trims).mean() == pytest.approx(share, abs=0.01)
    assert not one.left_out(SAMPLES, one.neutral()).any()


@pytest.mark.parametrize("rule", list(Rule))
def test_a_rule_leaves_out_what_its_trim_makes_zero(rule: Rule) -> None:
    """What the errors are computed from is what the engine does."""
    one = LayerRule(rule, SAMPLES, DOWN_NORM)
    trims = one.trims([0.4])[0]
    trim = trims.gate if rule.is_of_gate else trims.hidden
    values = SAMPLES.gate if rule.is_of_gate else SAMPLES.hidden
    assert trim is not None
    assert values is not None
    thresholds = None if trim.thresholds is None else np.frombuffer(trim.thresholds, np.float32)
    kept = contract.trim(values.astype(np.float32), None, thresholds, trim.deviations) != 0
    assert (kept == one.left_out(SAMPLES, trims)).mean() < 0.001


def test_weights_of_rules() -> None:
    """Neurons of a large up or down are left out later."""
    hidden = SAMPLES.hidden.copy()
    hidden[:, :48] *= 100
    lopsided = LayerSamples(SAMPLES.gate, hidden, SAMPLES.output_norm)
    flat = np.ones(96, np.float32)

    def left_out(rule: Rule, down_norm: np.ndarray) -> np.ndarray:
        one = LayerRule(rule, lopsided, down_norm)
        return one.left_out(lopsided, one.trims([0.5])[0]).mean(axis=0)

    assert left_out(Rule.CHESS, flat)[:48].mean() < 0.2 < 0.8 < left_out(Rule.CHESS, flat)[48:].mean()
    assert abs(left_out(Rule.CATS, flat)[:48].mean() - 0.5) < 0.1
    leaning = np.where(np.arange(96) % 2, 100, 1).astype(np.float32)
    for rule in (Rule.WINA, Rule.IMPACT):
        assert left_out(rule, leaning)[1::2].mean() < left_out(rule, leaning)[0::2].mean()


def test_ungated_ffns_have_rules_of_hidden_values_alone() -> None:
    assert rules_for(SAMPLES) == tuple(Rule)
    assert rules_for(LayerSamples(None, SAMPLES.hidden, SAMPLES.output_norm)) == (Rule.TEAL, Rule.WINA)


@pytest.mark.parametrize(
    ("family", "activation"), [("llama", Activation.SILU), ("gemma3", Activation.GELU_TANH), ("opt", None)]
)
def test_what_is_collected(
    family: str, activation: Activation | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All values of a short text, by a walk of the reference over the same program; errors by hand."""
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path))
    path = write_tiny(tmp_path / "a.gguf", family, QuantType.Q8_0)
    windows = [list(range(1, 30)), list(range(100, 140))]
    with open_checkpoint(path) as checkpoint:
        recorded = FAMILIES[checkpoint.config.family](checkpoint.config)
        file = tmp_path / "neutral.npz"
        Choice("", "", neutral_trims(recorded), None).save(file)
        with isotherm.load(path, quality=str(file), sparse=False) as model, isotherm.load(path) as exact:
            assert np.array_equal(model.logits(windows[0]), exact.logits(windows[0]))
            samples = collect(model, windows)
            values: dict[ops.Value, list[np.ndarray]] = {}
            wanted = {value for op in model.program.ops for value in flow.outputs(op)} - {model.program.logits}
            for window in windows:
                model.observe(window, wanted, lambda value, rows: values.setdefault(value, []).append(rows))
            program = model.program
            calibrated = calibrate(model, checkpoint.tensors, samples, rules_for(samples[0]), lambda _: None)
        down = {
            op.down: dequantise(checkpoint.tensors[op.down].read(), QuantType.Q8_0, op.ffn_size) for op in recorded.ffns
        }
    trims = [op for op in program.ops if isinstance(op, ops.TrimOp)]
    writes = [op for op in program.ops if flow.inputs(op) and "down" in str(op)]
    assert len(samples) == len(trims) == len(writes) == 2
    for sample, trim, write in zip(samples, trims, writes, strict=True):
        gate = np.concatenate(values[trim.x])
        if activation is None:
            assert sample.gate is None
            assert np.array_equal(sample.hidden, gate.astype(np.float16))
        else:
            assert sample.gate is not None
            assert np.array_equal(sample.gate, contract.activate(gate, activation).astype(np.float16))
            assert np.array_equal(sample.hidden, np.concatenate(values[flow.inputs(write)[0]]).astype(np.float16))
        norms = np.linalg.norm(np.concatenate(values[flow.outputs(write)[0]]).astype(np.float64), axis=1)
        assert np.allclose(sample.output_norm, norms, rtol=1e-6)
    for one in calibrated:
        for layer, op in enumerate(recorded.ffns):
            few = samples[layer].widened().chosen(4)
            rule = LayerRule(one.rule, samples[layer].widened(), np.linalg.norm(down[op.down], axis=0))
            missing = np.where(rule.left_out(few, one.trims[layer][12]), few.hidden, 0) @ down[op.down].T
            expected = np.mean((np.linalg.norm(missing, axis=1) / few.output_norm) ** 2)
            assert one.errors[layer][12] == pytest.approx(expected, rel=1e-3)
            assert one.errors[layer][0] == 0
    assert {one.rule for one in calibrated} == set(rules_for(samples[0]))


rising = st.lists(st.floats(0.001, 1), min_size=3, max_size=3).map(lambda steps: [0.0, *np.cumsum(steps).tolist()])


@given(errors=st.lists(rising, min_size=1, max_size=3), gains=st.lists(st.floats(0, 1), min_size=3, max_size=3))
@settings(max_examples=200)
def test_no_split_saves_more_for_as_little_error(errors: list[list[float]], gains: list[float]) -> None:
    """Rungs lie on the hull of all splits: none of them, nor a mixture, is better."""
    saved = [0.0, *gains]
    rungs = climb(errors, saved)
    assert rungs[0] == (0,) * len(errors)

    def total(split: tuple[int, ...]) -> tuple[float, float]:
        return sum(row[i] for row, i in zip(errors, split, strict=True)), sum(saved[i] for i in split)

    points = [total(rung) for rung in rungs]
    assert all(before[1] < after[1] for before, after in pairwise(points))
    for split in product(range(4), repeat=len(errors)):
        error, gain = total(split)
        best = np.interp(error, [point[0] for point in points], [point[1] for point in points])
        assert gain <= best + 1e-9


def test_shares_that_save_nothing_are_never_taken() -> None:
    assert climb([[0.0, 1.0, 2.0]] * 2, [0.0, 0.0, 0.0]) == ((0, 0),)
    assert climb([[0.0, 1.0, 2.0], [0.0, 2.0, 5.0]], [0.0, 0.0, 1.0]) == ((0, 0), (2, 0), (2, 2))
    assert LayerTrims() == LayerTrims(None, None)
