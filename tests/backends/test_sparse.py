"""Only the neurons that fire: the bits of the dense kernels, for every weight type, instruction set and share."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sketch import ISAS, Finished, Sketch, assert_by_neuron, assert_equal, chain, random_inputs
from tiny import make_tiny, run, text_ids
from tiny_models import random_blocks

from isotherm.errors import ModelFileError
from isotherm.program import ops
from isotherm.program.ops import NormWeights, Projection
from isotherm.quantization.layouts import decode
from isotherm.quantization.neurons import neuron_bytes, neuron_form, pack_neurons, pack_rows, row_bytes
from isotherm.types import Activation, QuantType

NEURON_TYPES = [quant_type for quant_type in QuantType if neuron_form(quant_type)]
ZEROS = [activation for activation in Activation if activation.has_zeros]
SHARES = (0.0, 0.01, 0.1, 0.3, 0.6, 1.0)
NUM_TOKENS = 12


def sketch_ffn(up: QuantType, down: QuantType, share: float, activation: Activation, is_sparse: bool) -> Finished:
    """An FFN of 512 neurons of which about a share fires: the first column of x is 1, and biases the gates."""
    columns, neurons, outputs = 256, 512, 200
    rng = np.random.default_rng(3)
    inputs = random_inputs(NUM_TOKENS, columns)
    inputs[np.isin(np.arange(NUM_TOKENS), (5, 8, 9, 11))] = 0.25  # what is too small for a scale tells nothing here
    inputs[:, 0] = 1
    gates = 0.02 * rng.standard_normal((neurons, columns))
    gates[:, 0] = np.where(rng.uniform(size=neurons) < share, 50.0, -50.0) * np.abs(inputs).max()
    sketch = Sketch()
    x = sketch.input(inputs.astype(np.float32))
    gate = sketch.floats("gate", gates)
    norm = NormWeights(sketch.vector("norm", columns), 1e-5)
    names = (gate, sketch.matrix("up", up, neurons, columns))
    hidden, y = sketch.value(neurons), sketch.value(outputs)
    weight, bias = sketch.matrix("down", down, outputs, neurons), sketch.vector("bias", outputs)
    residual = sketch.input(random_inputs(NUM_TOKENS, outputs, seed=1))
    if is_sparse:
        gated = sketch.value(neurons)
        sketch.add(ops.QuantLinear(x, norm, (Projection(gated, gate, None),), None))
        sketch.add(ops.SparseUp(hidden, gated, x, norm, names[1], activation))
        sketch.add(ops.SparseDown(y, hidden, weight, bias, residual))
    else:
        sketch.add(ops.QuantGlu(hidden, x, norm, *names, activation))
        sketch.add(ops.QuantLinear(hidden, None, (Projection(y, weight, bias),), residual))
    return sketch.finish(y)


def check(
    up: QuantType, down: QuantType, share: float, activation: Activation, most_active: tuple[float, ...] = (1.0,)
) -> None:
    dense, sparse = (sketch_ffn(up, down, share, activation, is_sparse=is_sparse) for is_sparse in (False, True))
    assert_by_neuron(dense, sparse, NUM_TOKENS, most_active)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("activation", ZEROS)
def test_any_share(activation: Activation, share: float) -> None:
    check(QuantType.Q4_0, QuantType.Q4_0, share, activation, (1.0, 0.2, 0.0))


@pytest.mark.parametrize("down", NEURON_TYPES)
def test_every_type_of_down(down: QuantType) -> None:
    check(QuantType.Q8_0, down, 0.1, Activation.RELU)


@pytest.mark.parametrize("up", list(QuantType))
def test_every_type_of_up(up: QuantType) -> None:
    check(up, QuantType.Q8_0, 0.1, Activation.RELU)


@pytest.mark.parametrize("quant_type", NEURON_TYPES)
def test_neurons_hold_the_codes_and_scales(quant_type: QuantType) -> None:
    """Read back as neurons.py says they lie."""
    outputs, neurons = 200, 512
    raw = random_blocks(quant_type, (outputs, neurons))
    packed, form, fields = (
        pack_neurons(raw, quant_type, neurons),
        neuron_form(quant_type),
        decode(raw, quant_type, neurons),
    )
    assert form is not None
    assert len(packed) == neuron_bytes(quant_type, outputs, neurons)
    num_code_bytes = neurons * 256 // (2 if form.is_nibble else 1)
    lines = packed[:num_code_bytes].reshape(neurons, -1, 64)
    for output in (0, 1, 15, 16, 63, 64, 127, 128, 199):
        at = output % 64
        byte = 16 * (at % 16 // 4) + 4 * (at // 16) + at % 4
        if form.is_nibble:
            codes = lines[:, output // 128, byte] >> (4 if output % 128 >= 64 else 0) & 15
        else:
            codes = lines[:, output // 64, byte]
        assert codes.tolist() == fields.codes[output].tolist()
    planes = (
        packed[num_code_bytes:].view(np.float16 if form.is_half else np.float32).reshape(-1, fields.scale.shape[1], 256)
    )
    assert np.array_equal(planes[0, :, :outputs].T.astype(np.float32), fields.scale)
    assert (len(planes) == 2) == form.has_minimum == (fields.minimum is not None)
    if fields.minimum is not None:
        assert np.array_equal(planes[1, :, :outputs].T.astype(np.float32), fields.minimum)


@pytest.mark.parametrize("quant_type", list(QuantType))
def test_rows_are_as_large_as_their_tiles(quant_type: QuantType) -> None:
    raw = random_blocks(quant_type, (20, 512))
    rows = pack_rows(raw, quant_type, 512)
    assert rows.shape == (20, row_bytes(quant_type, 512))
    assert np.array_equal(rows[7:9], pack_rows(raw[7:9], quant_type, 512))


def test_scales_that_are_no_numbers_are_refused() -> None:
    raw = random_blocks(QuantType.Q8_0, (4, 64))
    raw.view("<u2")[2, 0] = 0x7E00
    with pytest.raises(ModelFileError, match="no finite numbers"):
        pack_neurons(raw, QuantType.Q8_0, 64)


@pytest.mark.parametrize("position", [0, 40])
def test_what_is_not_a_number_reaches_every_output(position: int) -> None:
    """As it does in the dense kernels: a fault is seen, not skipped."""
    finished = sketch_ffn(QuantType.Q4_0, QuantType.Q4_0, 0.1, Activation.RELU, is_sparse=True)
    values = finished.tensors["input0"].raw.view(np.float32).copy()
    values[0, position] = np.nan
    finished.tensors["input0"] = replace(finished.tensors["input0"], raw=values.view(np.uint8))
    for isa in ISAS:
        assert np.isnan(finished.native(chain(1, num_states=0), isa)).all()


# --- whole models


@pytest.mark.parametrize(
    ("family", "activation"), [("llama", "relu"), ("llama", "drelu"), ("opt", ""), ("falcon", "relu"), ("bamboo", "")]
)
def test_whole_models(family: str, activation: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path, family, QuantType.Q4_0, activation)
    by_neurons = model.by_neurons()
    kinds = {type(op) for op in by_neurons.lowered.ops}
    assert ops.SparseDown in kinds
    assert (ops.SparseUp in kinds) == (family in ("llama", "bamboo"))
    steps = [model.batch(text_ids(18)), *(model.batch(text_ids(1, seed=i), 18 + i) for i in range(20))]
    for isa in ISAS:
        dense, sparse = model.native(isa), by_neurons.native(isa, num_threads=1)
        for step in steps:
            assert_equal(run(sparse, step), run(dense, step), f"{family} on {isa}")


def test_only_activations_with_zeros_are_lowered_so(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        make_tiny(tmp_path, "llama", QuantType.Q4_0).by_neurons()
