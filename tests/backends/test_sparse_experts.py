"""Neurons within experts that fire, and those alone: the bits of the dense experts, on every instruction set."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sketch import ISAS, Finished, Sketch, assert_by_neuron, assert_equal, chain, random_inputs
from tiny_models import write_tiny

import isotherm
from isotherm.backends.cpu.packing import expert_weights, packed_entries
from isotherm.program import ops
from isotherm.program.ops import NormWeights
from isotherm.types import Activation, Experts, QuantType

NUM_TOKENS = 21
FIVE = Experts(5, 2)
OUTPUTS, NEURONS = 256, 256
SHARES = (0.0, 0.02, 0.1, 0.5, 1.0)
ZEROS = [activation for activation in Activation if activation.has_zeros]
# One of each form; test_sparse.py has every type of the same kernels.
FORMS = [QuantType.Q8_0, QuantType.Q4_0, QuantType.Q5_1, QuantType.Q4_K, QuantType.Q6_K, QuantType.Q2_K]


def sketch_experts(
    types: tuple[QuantType, QuantType], share: float, activation: Activation, experts: Experts, *, is_sparse: bool
) -> Finished:
    """types: of up and down. share: of the neurons that fire, other ones in each expert; gates are floats."""
    rng = np.random.default_rng(int(100 * share))
    columns, rows = 256, experts.num_experts * NEURONS
    inputs = random_inputs(NUM_TOKENS, columns)
    inputs[np.isin(np.arange(NUM_TOKENS), (5, 8, 9, 11))] = 0.25
    inputs[:, 0] = 1
    gates = 0.02 * rng.standard_normal((rows, columns))
    gates[:, 0] = np.where(rng.uniform(size=rows) < share, 50.0, -50.0) * np.abs(inputs).max()
    sketch = Sketch()
    x = sketch.input(inputs)
    logits = sketch.input(rng.standard_normal((NUM_TOKENS, experts.num_experts)).astype(np.float32))
    residual = sketch.input(random_inputs(NUM_TOKENS, OUTPUTS, seed=1))
    norm = NormWeights(sketch.vector("norm", columns), 1e-5)
    gate, up = sketch.floats("gate", gates), sketch.matrix("up", types[0], rows, columns)
    down = sketch.matrix("down", types[1], experts.num_experts * OUTPUTS, NEURONS)
    routes, hidden, y = (sketch.value(n) for n in (2 * experts.num_used, experts.num_used * NEURONS, OUTPUTS))
    sketch.add(ops.Route(routes, logits, experts))
    if is_sparse:
        gated = sketch.value(hidden.width)
        sketch.add(ops.ExpertGate(gated, x, norm, routes, gate, experts))
        sketch.add(ops.SparseExpertUp(hidden, gated, x, norm, routes, up, experts, activation))
    else:
        sketch.add(ops.ExpertGlu(hidden, x, norm, routes, gate, up, experts, activation))
    sketch.add(ops.ExpertDown(y, hidden, routes, down, experts, residual, by_neuron=is_sparse))
    return sketch.finish(y)


def check(
    types: tuple[QuantType, QuantType],
    share: float,
    activation: Activation = Activation.RELU,
    experts: Experts = FIVE,
    most_active: tuple[float, ...] = (1.0,),
) -> None:
    dense, sparse = (
        sketch_experts(types, share, activation, experts, is_sparse=is_sparse) for is_sparse in (False, True)
    )
    assert_by_neuron(dense, sparse, NUM_TOKENS, most_active)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("activation", ZEROS)
def test_any_share(activation: Activation, share: float) -> None:
    check((QuantType.Q4_0, QuantType.Q4_0), share, activation, most_active=(1.0, 0.2, 0.0))


@pytest.mark.parametrize("down", FORMS)
def test_types_of_down(down: QuantType) -> None:
    check((QuantType.Q8_0, down), 0.1)


@pytest.mark.parametrize("up", [QuantType.F16, *FORMS])
def test_types_of_up(up: QuantType) -> None:
    check((up, QuantType.Q8_0), 0.1)


@pytest.mark.parametrize(("num_experts", "num_used"), [(2, 1), (2, 2), (3, 2), (16, 16), (60, 4)])
def test_any_number_of_experts(num_experts: int, num_used: int) -> None:
    """From all rows at one expert to a row for each, and experts that nobody chooses."""
    check((QuantType.Q4_0, QuantType.Q4_0), 0.1, experts=Experts(num_experts, num_used))


@settings(max_examples=30, deadline=None)
@given(
    isa=st.sampled_from(ISAS),
    num_threads=st.integers(1, 7),
    num_tokens=st.integers(1, 12),
    share=st.floats(0.0, 1.0),
    num_experts=st.integers(1, 12),
    used=st.floats(0.0, 1.0),
)
def test_any_of_all(isa: str, num_threads: int, num_tokens: int, share: float, num_experts: int, used: float) -> None:
    experts = Experts(num_experts, max(1, round(used * num_experts)))
    types = (QuantType.Q8_0, QuantType.Q4_1)
    batch = chain(num_tokens, num_states=0)
    dense, sparse = (
        sketch_experts(types, share, Activation.RELU, experts, is_sparse=is_sparse) for is_sparse in (False, True)
    )
    assert_equal(sparse.native(batch, isa, num_threads), dense.native(batch, isa, num_threads), "by neuron")


@pytest.mark.parametrize("position", [0, 40])
def test_what_is_not_a_number_reaches_every_output(position: int) -> None:
    """As it does in the dense kernels: a fault is seen, not skipped."""
    types = (QuantType.Q4_0, QuantType.Q4_0)
    finished = sketch_experts(types, 0.1, Activation.RELU, FIVE, is_sparse=True)
    values = finished.tensors["input0"].raw.view(np.float32).copy()
    values[0, position] = np.nan
    finished.tensors["input0"] = replace(finished.tensors["input0"], raw=values.view(np.uint8))
    for isa in ISAS:
        assert np.isnan(finished.native(chain(1, num_states=0), isa)).all()


def test_neurons_take_the_place_that_is_forecast() -> None:
    finished = sketch_experts((QuantType.Q4_0, QuantType.Q6_K), 0.1, Activation.RELU, FIVE, is_sparse=True)
    sizes = {spec.name: spec.num_bytes for spec, _ in packed_entries(finished.program, finished.tensors)}
    compiled = finished.compile(ISAS[-1])
    assert {name: len(compiled._weights.array(name).view(np.uint8)) for name in sizes} == sizes
    assert set(expert_weights(finished.program)) == {"gate", "up", "down", "down.neurons"}


@pytest.mark.parametrize("quant_type", [QuantType.Q4_0, QuantType.Q6_K])
def test_through_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant_type: QuantType) -> None:
    """A Mixtral with ReLU: by neuron, whole, and from the packed file."""
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path / "cache"))
    path = write_tiny(
        tmp_path / "tiny.gguf", "llama", quant_type, num_experts=8, metadata={"isotherm.activation": "relu"}
    )
    answers = []
    for sparse in (False, True, True):
        with isotherm.load(path, threads=2, sparse=sparse) as model:
            kinds = {type(op).__name__ for op in model.program.ops}
            assert ("SparseExpertUp" in kinds) == sparse
            answers.append((model.generate("the rain", max_tokens=40).token_ids, model.logits(list(range(30)))))
    for token_ids, logits in answers[1:]:
        assert token_ids == answers[0][0]
        assert np.array_equal(np.asarray(logits), np.asarray(answers[0][1]))
