"""Neurons that a predictor takes to fire: the same bits by rows and whole, also beside exact sequences."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sketch import ISAS, Finished, Sketch, StoredTensor, assert_equal, random_inputs
from test_trim import BY_TOKEN, both
from tiny import TinyModel, make_tiny, run, text_ids
from tiny_models import random_blocks

from isotherm.backends.cpu.packing import lower_by_neuron, pack_program, packed_entries
from isotherm.backends.cpu.step_facts import describe_steps
from isotherm.backends.reference import contract
from isotherm.program import ops
from isotherm.program.backend import WeightTensor
from isotherm.program.batch import Batch, Sequence
from isotherm.program.lowering import lower
from isotherm.program.ops import NormWeights, Predictor, Trim
from isotherm.program.recorder import Program
from isotherm.quantization.packed_file import EntryKind, PackedMemory
from isotherm.types import Activation, QuantType

NUM_TOKENS = 12
COLUMNS, NEURONS = 256, 500
SHARES = (0.0, 0.01, 0.1, 0.3, 0.6, 1.0)


def sketch_predicted(
    quant_type: QuantType, share: float, activation: Activation | None, *, has_bias: bool, by_rows: bool = True
) -> Finished:
    """Scores are uniform in 0..1 and the threshold is such that about `share` of them reach it."""
    rng = np.random.default_rng(5)
    sketch = Sketch()
    x = sketch.input(random_inputs(NUM_TOKENS, COLUMNS))
    scores = sketch.input(rng.uniform(size=(NUM_TOKENS, NEURONS)).astype(np.float32))
    norm = NormWeights(sketch.vector("norm", COLUMNS), 1e-5)
    weight = sketch.matrix("gate", quant_type, NEURONS, COLUMNS)
    bias = sketch.vector("bias", NEURONS) if has_bias else None
    y = sketch.value(NEURONS)
    threshold = float(np.float32(1 - share))
    sketch.add(ops.PredictedLinear(y, scores, x, norm, weight, bias, threshold, activation, by_rows=by_rows))
    return sketch.finish(y)


def mixed(trims: tuple[bool, ...], num_new: int = 1) -> Batch:
    """Sequences of `num_new` tokens each, trimmed or not."""
    sequences = tuple(Sequence(num_new, 0, (), is_trimmed=is_trimmed) for is_trimmed in trims)
    ids = np.arange(num_new * len(trims), dtype=np.int32)
    return Batch(ids, sequences, ids)


BATCHES = [
    *(mixed(trims) for trims in ((True,), (False,), (True, True), (True, False), (False, True), (True, False, True))),
    *(mixed((True,) * count) for count in (5, 8)),
    mixed((True, False) * 3),
    *(mixed(trims, NUM_TOKENS // 2) for trims in ((True, True), (True, False), (False, True))),
]


def check(finished: Finished, *, against: Finished | None = None) -> None:
    expected = [(against or finished).reference(batch) for batch in BATCHES]
    for isa in ISAS:
        for num_threads, most_active in ((1, 1.0), (2, 1.0), (3, 1.0), (2, 0.2)):
            compiled = finished.compile(isa, num_threads, most_active=most_active)
            for batch, logits in zip(BATCHES, expected, strict=True):
                what = [(sequence.num_new, sequence.is_trimmed) for sequence in batch.sequences]
                assert_equal(run(compiled, batch), logits, f"{isa}, {num_threads} threads, up to {most_active}, {what}")


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_any_share(share: float, has_bias: bool) -> None:
    activation = Activation.RELU if has_bias else None
    rows = sketch_predicted(QuantType.Q4_0, share, activation, has_bias=has_bias)
    check(rows)
    whole = sketch_predicted(QuantType.Q4_0, share, activation, has_bias=has_bias, by_rows=False)
    check(whole, against=rows)


@pytest.mark.parametrize("quant_type", list(QuantType))
def test_every_type(quant_type: QuantType) -> None:
    check(sketch_predicted(quant_type, 0.1, Activation.RELU_SQUARED, has_bias=True))


def test_what_it_is() -> None:
    """Against the op without a predictor: the same where it is predicted or exact, zero elsewhere."""
    finished = sketch_predicted(QuantType.Q8_0, 0.3, None, has_bias=False)
    batch = mixed((True, False), NUM_TOKENS // 2)
    everything = finished.reference(mixed((False,), NUM_TOKENS))
    scores = finished.tensors["input1"].raw.view(np.float32)
    keeps = scores >= np.float32(0.7)
    keeps[NUM_TOKENS // 2 :] = True
    assert 0.2 < keeps[: NUM_TOKENS // 2].mean() < 0.4
    assert_equal(finished.native(batch, ISAS[-1]), np.where(keeps, everything, 0), "predicted")


def test_a_score_that_is_not_a_number_counts_as_predicted() -> None:
    finished = sketch_predicted(QuantType.Q4_0, 0.0, None, has_bias=False)
    exact = finished.reference(mixed((False,)))
    values = finished.tensors["input1"].raw.view(np.float32).copy()
    values[0, [7, 499]] = np.nan
    finished.tensors["input1"] = replace(finished.tensors["input1"], raw=values.view(np.uint8))
    expected = np.zeros_like(exact)
    expected[0, [7, 499]] = exact[0, [7, 499]]
    assert_equal(finished.reference(mixed((True,))), expected, "reference")
    for isa in ISAS:
        assert_equal(finished.native(mixed((True,)), isa), expected, isa)
    assert contract.is_predicted(np.array([np.nan, 1, 2, 3], np.float32), 2.0).tolist() == [True, False, True, True]


# --- whole models


def with_predictors(
    model: TinyModel, *, by_neuron: bool, gate: Trim | None = None, threshold: float = 0.05, rank: int = 32
) -> tuple[TinyModel, Mapping[str, WeightTensor]]:
    """A model whose predictors are random: about half of the neurons are predicted."""
    tensors: dict[str, WeightTensor] = dict(model.checkpoint.tensors)
    changed: list[ops.Op] = []
    for op in model.recorded.ops:
        if isinstance(op, ops.Ffn):
            first, second = (f"{op.up}.{name}" for name in ("predictor_first", "predictor_second"))
            for name, shape in ((first, (rank, op.x.width)), (second, (op.ffn_size, rank))):
                tensors[name] = StoredTensor(QuantType.Q8_0, shape, random_blocks(QuantType.Q8_0, shape, name))
            predictor = Predictor(first, second, rank, float(np.float32(threshold)))
            op = replace(op, predictor=predictor, trim_gate=gate)
        changed.append(op)
    recorded = replace(model.recorded, ops=tuple(changed))
    lowered = lower_by_neuron(recorded, tensors) if by_neuron else lower(recorded)
    packed = PackedMemory()
    pack_program(lowered, tensors, packed)
    checkpoint = replace(model.checkpoint, tensors=tensors)  # type: ignore[arg-type]
    return replace(model, checkpoint=checkpoint, recorded=recorded, lowered=lowered, packed=packed), tensors


MODELS = [("llama", "relu"), ("llama", "relu_squared"), ("llama", "drelu"), ("opt", "")]


@pytest.mark.parametrize("threshold", [0.05, 0.4], ids=["half", "few"])
@pytest.mark.parametrize(("family", "activation"), MODELS)
def test_whole_models(family: str, activation: str, threshold: float, tmp_path: Path) -> None:
    """Reference, whole and by neuron; batches in which one sequence is exact and one is not."""
    model = make_tiny(tmp_path, family, QuantType.Q4_0, activation)
    dense, _ = with_predictors(model, by_neuron=False, threshold=threshold)
    sparse, _ = with_predictors(model, by_neuron=True, threshold=threshold)
    assert dense.lowered.is_trimmed
    assert not model.lowered.is_trimmed
    found = [op for op in sparse.lowered.ops if isinstance(op, ops.PredictedLinear | ops.SparseUp)]
    assert len(found) == (2 if family == "opt" else 4)
    assert all(op.by_rows for op in found)
    ids = text_ids(9)
    expected = run(dense.reference(), dense.batch(ids))
    exact = run(model.reference(), model.batch(ids))
    assert (expected != exact).any()
    for isa in ISAS:
        for predicted in (dense, sparse):
            compiled = predicted.native(isa)
            assert_equal(run(compiled, predicted.batch(ids)), expected, f"{family} on {isa}")
            assert_equal(run(compiled, both(predicted)), np.concatenate([expected, exact]), f"{family} on {isa}, both")
            steps = [run(compiled, predicted.batch(ids[i : i + 1], i))[0] for i in range(len(ids))]
            assert_equal(np.stack(steps), expected, f"{family} on {isa}, token by token")
            assert_equal(two_at_once(predicted, isa), np.stack([expected[-1], exact[-1]]), f"{family} on {isa}, pairs")


def two_at_once(model: TinyModel, isa: str) -> np.ndarray:
    """The last token of the same text in two sequences, of which the second is exact, in one batch of two rows."""
    compiled, ids = model.native(isa), text_ids(9)
    tables = [np.array([page], np.int32) for page in (0, 1)]
    for i in range(len(ids)):
        first, second = (model.sequence(1, i, table) for table in tables)
        token = ids[i : i + 1]
        batch = Batch(
            np.concatenate([token, token]), (first, replace(second, is_trimmed=False)), np.arange(2, dtype=np.int32)
        )
        logits = run(compiled, batch)
    return logits


def test_beside_a_trim(tmp_path: Path) -> None:
    model = make_tiny(tmp_path, "llama", QuantType.Q4_0, "relu")
    dense, _ = with_predictors(model, by_neuron=False, gate=BY_TOKEN)
    sparse, _ = with_predictors(model, by_neuron=True, gate=BY_TOKEN)
    kinds = [type(op) for op in sparse.lowered.ops]
    assert kinds.index(ops.TrimOp) == kinds.index(ops.PredictedLinear) + 1
    batch = dense.batch(text_ids(9))
    expected = run(dense.reference(), batch)
    for isa in ISAS:
        assert_equal(run(dense.native(isa), batch), expected, f"whole on {isa}")
        assert_equal(run(sparse.native(isa), batch), expected, f"by neuron on {isa}")


@pytest.mark.parametrize(("family", "activation"), [("llama", "relu"), ("opt", "")])
def test_float32_and_the_contract_predict_alike(family: str, activation: str, tmp_path: Path) -> None:
    model, _ = with_predictors(make_tiny(tmp_path, family, QuantType.Q8_0, activation), by_neuron=False, threshold=0.4)
    batch = model.batch(text_ids(9))
    float_logits, logits = run(model.reference(lowered=False), batch), run(model.reference(), batch)
    assert np.abs(float_logits - logits).mean() < 0.1 * np.abs(float_logits).mean()
    exact = replace(batch, sequences=(replace(batch.sequences[0], is_trimmed=False),))
    assert (run(model.reference(lowered=False), exact) != float_logits).any()


def test_what_is_packed_and_said_of_it(tmp_path: Path) -> None:
    for family, weight in (("llama", "gate"), ("opt", "up")):
        model = make_tiny(tmp_path, family, QuantType.Q4_0, "relu" if family == "llama" else "")
        sparse, tensors = with_predictors(model, by_neuron=True)
        kinds = {spec.name: spec.kind for spec, _ in packed_entries(sparse.lowered, tensors)}
        assert kinds[f"layers.0.{weight}"] is EntryKind.MATRIX
        assert kinds[f"layers.1.{weight}.rows"] is EntryKind.ROWS
        assert kinds["layers.0.up.predictor_first"] is kinds["layers.0.up.predictor_second"] is EntryKind.MATRIX
        steps = [facts.kind for facts in describe_steps(sparse.lowered, sparse.packed.entry) if facts.layer == 1]
        at = steps.index("predictor_first")
        assert steps[at : at + 3] == ["predictor_first", "predictor_second", f"{weight}, those predicted"]


def test_only_activations_with_zeros_are_predicted(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="none to predict"):
        with_predictors(make_tiny(tmp_path, "llama", QuantType.Q4_0), by_neuron=False)


def test_the_dump_names_the_predictor(tmp_path: Path) -> None:
    model, _ = with_predictors(make_tiny(tmp_path, "llama", QuantType.Q4_0, "relu"), by_neuron=True)
    line = "predictor=Predictor(first=layers.0.up.predictor_first, second=layers.0.up.predictor_second, rank=32, thres"
    assert line in model.recorded.dump()
    assert "PredictedLinear(scores=%" in model.lowered.dump()
    assert isinstance(model.recorded, Program)
