"""Each lowered op, native against the contract in NumPy: equal, on every instruction set."""

import numpy as np
import pytest
from sketch import (
    ISAS,
    MAX_TOKENS,
    Sketch,
    StoredTensor,
    assert_equal,
    assert_equal_on_every_isa,
    chain,
    extreme_blocks,
    random_inputs,
)

from isotherm.program import ops
from isotherm.program.batch import Batch, Sequence
from isotherm.program.ops import NormWeights, Projection
from isotherm.types import Activation, QuantType

FLOATS = tuple(t for t in QuantType if t.is_float)
QUANTISED = tuple(t for t in QuantType if not t.is_float)
# Columns: one line, not a multiple of 256, more than three chunks with a rest; K-quants come in 256 only.
SHORT = {32: (64, 96, 576, 896), 64: (64, 576, 896), 256: (256, 768)}
LINEAR_CASES = [(t, columns) for t in QUANTISED for columns in SHORT[t.block_elements]]
LINEAR_CASES += [(t, columns) for t in FLOATS for columns in (16, 40, 100, 576)]
PAIRS = [(t, t) for t in QuantType]
PAIRS += [
    (QuantType.Q4_K, QuantType.Q6_K),
    (QuantType.Q6_K, QuantType.Q5_K),
    (QuantType.Q5_0, QuantType.Q8_0),
    (QuantType.Q4_1, QuantType.Q4_0),
    (QuantType.Q6_K, QuantType.Q4_0),
    (QuantType.F16, QuantType.Q4_0),
    (QuantType.Q8_0, QuantType.BF16),
    (QuantType.BF16, QuantType.F32),
    (QuantType.IQ4_XS, QuantType.Q2_K),
    (QuantType.IQ2_XXS, QuantType.IQ2_XS),
    (QuantType.IQ3_XXS, QuantType.IQ3_S),
    (QuantType.NVFP4, QuantType.MXFP4),
    (QuantType.Q3_K, QuantType.TQ2_0),
]


@pytest.mark.parametrize(("quant_type", "columns"), LINEAR_CASES)
def test_quant_linear(quant_type: QuantType, columns: int) -> None:
    rows = 70  # two panels and a rest that ends inside a vector
    sketch = Sketch()
    x = sketch.input(random_inputs(MAX_TOKENS, columns))
    y = sketch.value(rows)
    projection = Projection(y, sketch.matrix("w", quant_type, rows, columns), None)
    sketch.add(ops.QuantLinear(x, None, (projection,), None))
    assert_equal_on_every_isa(sketch.finish(y))


@pytest.mark.parametrize("quant_type", QUANTISED)
def test_quant_linear_with_codes_and_scales_at_their_ends(quant_type: QuantType) -> None:
    """All codes 0 or all bits set, against activations that are all 127 or all -127: sums must not saturate."""
    rows, columns = 40, 512
    inputs = random_inputs(MAX_TOKENS, columns)
    inputs[::4], inputs[1::4] = 3.0, -3.0
    sketch = Sketch()
    x = sketch.input(inputs)
    y = sketch.value(rows)
    weight = sketch.stored("w", extreme_blocks(quant_type, rows, columns))
    sketch.add(ops.QuantLinear(x, None, (Projection(y, weight, None),), None))
    assert_equal_on_every_isa(sketch.finish(y))


@pytest.mark.parametrize("quant_type", QUANTISED)
def test_weights_of_a_hostile_file(quant_type: QuantType) -> None:
    """Any bytes, scales that are no numbers among them: what is finite is right, and what is not shows."""
    rows, columns, num_tokens = 70, 256, 16
    raw = np.random.default_rng(7).integers(0, 256, (rows, quant_type.row_bytes(columns)), np.uint8)
    weight = StoredTensor(quant_type, (rows, columns), raw)
    product, gathered = Sketch(), Sketch()
    x = product.input(random_inputs(num_tokens, columns)[:3].repeat(num_tokens, axis=0)[:num_tokens])
    selected, logits = product.value(columns), product.value(rows)
    product.add(ops.SelectRows(selected, x))
    projection = Projection(logits, product.stored("w", weight), None)
    product.add(ops.QuantLinear(selected, None, (projection,), None))
    embedded = gathered.value(columns)
    gathered.add(ops.Embed(embedded, gathered.stored("w", weight), 1.0))
    for finished, count in ((product.finish_after_head(logits), num_tokens), (gathered.finish(embedded), rows)):
        with np.errstate(all="ignore"):
            expected = finished.reference(chain(count, num_states=0))
        finite = np.isfinite(expected)
        assert finite.mean() > 0.2
        for isa in ISAS:
            with np.errstate(all="ignore"):
                actual = finished.native(chain(count, num_states=0), isa)
            np.testing.assert_array_equal(np.isfinite(actual), finite)
            assert_equal(actual[finite], expected[finite], f"{quant_type.value} on {isa}")


@pytest.mark.parametrize("rows", [2, 15, 16, 31, 32, 33, 64])
def test_quant_linear_of_any_number_of_rows(rows: int) -> None:
    sketch = Sketch()
    x = sketch.input(random_inputs(MAX_TOKENS, 64))
    y = sketch.value(rows)
    sketch.add(ops.QuantLinear(x, None, (Projection(y, sketch.matrix("w", QuantType.Q5_1, rows, 64), None),), None))
    assert_equal_on_every_isa(sketch.finish(y), 17)


@pytest.mark.parametrize(
    "types",
    [
        (QuantType.Q4_K, QuantType.Q4_K, QuantType.Q6_K),
        (QuantType.Q5_0, QuantType.Q8_0, QuantType.F16),
        (QuantType.F32, QuantType.Q4_1, QuantType.BF16),
        (QuantType.Q2_K, QuantType.Q3_K, QuantType.IQ4_XS),
        (QuantType.MXFP4, QuantType.NVFP4, QuantType.IQ2_XXS),
        (QuantType.Q2_K, QuantType.Q4_K, QuantType.TQ1_0),
    ],
)
def test_quant_linear_of_three_with_norm_and_bias(types: tuple[QuantType, ...]) -> None:
    """As Q, K and V of a layer: one input, quantised once, read by weights of several types."""
    columns, widths = 256, (48, 16, 33)
    sketch = Sketch()
    x = sketch.input(random_inputs(MAX_TOKENS, columns))
    projections = tuple(
        Projection(sketch.value(rows), sketch.matrix(f"w{i}", quant_type, rows, columns), sketch.vector(f"b{i}", rows))
        for i, (quant_type, rows) in enumerate(zip(types, widths, strict=True))
    )
    norm = NormWeights(sketch.vector("norm", columns), 1e-5)
    sketch.add(ops.QuantLinear(x, norm, projections, None))
    joined = sketch.join(tuple(projection.out for projection in projections))
    assert_equal_on_every_isa(sketch.finish(joined), 17)


@pytest.mark.parametrize("columns", [40, 64, 96, 576])
@pytest.mark.parametrize("quant_type", [QuantType.F16, QuantType.Q4_0])
def test_norm_before_quant_linear(quant_type: QuantType, columns: int) -> None:
    if columns % quant_type.block_elements:
        columns = 32
    sketch = Sketch()
    x = sketch.input(random_inputs(MAX_TOKENS, columns))
    y = sketch.value(33)
    norm = NormWeights(sketch.vector("norm", columns), 1e-6)
    projection = Projection(y, sketch.matrix("w", quant_type, 33, columns), None)
    sketch.add(ops.QuantLinear(x, norm, (projection,), None))
    assert_equal_on_every_isa(sketch.finish(y))


@pytest.mark.parametrize("columns", [32, 40, 64, 96, 576])
def test_layer_norm_before_quant_linear(columns: int) -> None:
    """Rows around a mean that is large beside them, ends inside a vector."""
    sketch = Sketch()
    x = sketch.input(random_inputs(MAX_TOKENS, columns) + np.float32(100.0))
    y = sketch.value(33)
    norm = NormWeights(sketch.vector("norm", columns), 1e-5, sketch.vector("norm_bias", columns))
    projection = Projection(y, sketch.matrix("w", QuantType.F16, 33, columns), None)
    sketch.add(ops.QuantLinear(x, norm, (projection,), None))
    assert_equal_on_every_isa(sketch.finish(y))


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("rows", [33, 64])
def test_activation_of_a_quant_linear(rows: int, activation: Activation) -> None:
    sketch = Sketch()
    x = sketch.input(random_inputs(MAX_TOKENS, 96))
    y = sketch.value(rows)
    projection = Projection(y, sketch.matrix("w", QuantType.Q4_0, rows, 96), sketch.vector("b", rows))
    sketch.add(ops.QuantLinear(x, None, (projection,), None, activation))
    assert_equal_on_every_isa(sketch.finish(y))


@pytest.mark.parametrize("quant_type", [QuantType.F16, QuantType.Q8_0])
def test_embed_positions(quant_type: QuantType) -> None:
    sketch = Sketch()
    x = sketch.input(random_inputs(MAX_TOKENS, 96))
    y = sketch.value(96)
    sketch.add(ops.EmbedPositions(y, x, sketch.matrix("positions", quant_type, MAX_TOKENS + 2, 96), 2))
    finished = sketch.finish(y)
    assert_equal_on_every_isa(finished)
    expected = finished.reference(chain(MAX_TOKENS, num_states=0))
    late = Batch(np.array([7, 8], np.int32), (Sequence(2, 7, ()),), np.array([0, 1], np.int32))
    two = Batch(np.array([3, 0], np.int32), (Sequence(1, 3, ()), Sequence(1, 0, ())), np.array([0, 1], np.int32))
    for isa in ISAS:
        assert_equal(finished.native(late, isa), expected[7:9], f"{isa}, later tokens of a sequence")
        assert_equal(finished.native(two, isa), expected[[3, 0]], f"{isa}, two sequences")
        with pytest.raises(ValueError, match="length of a sequence"):
            finished.native(Batch(late.token_ids, (Sequence(2, MAX_TOKENS - 1, ()),), late.logit_rows), isa)


@pytest.mark.parametrize("activation", [Activation.RELU, Activation.RELU_SQUARED, Activation.DRELU])
def test_a_neuron_that_does_not_fire_is_zero(activation: Activation) -> None:
    """Also where its up overflows, so that nobody needs to compute it."""
    sketch = Sketch()
    x = sketch.input(np.ones((MAX_TOKENS, 1), np.float32))
    y = sketch.value(4)
    gate = sketch.floats("gate", np.array([[-1.0], [0.0], [2.0], [-3.0]]))
    with np.errstate(over="ignore"):
        up = sketch.floats("up", np.array([[1e39], [-1e39], [3.0], [np.nan]]))
    sketch.add(ops.QuantGlu(y, x, None, gate, up, activation))
    finished = sketch.finish(y)
    expected = 12.0 if activation is Activation.RELU_SQUARED else 6.0
    assert finished.reference(chain(1, num_states=0)).tolist() == [[0.0, 0.0, expected, 0.0]]
    assert_equal_on_every_isa(finished, 3)


@pytest.mark.parametrize("rows", [33, 64])
def test_quant_linear_with_residual(rows: int) -> None:
    sketch = Sketch()
    x = sketch.input(random_inputs(MAX_TOKENS, 96))
    residual = sketch.input(random_inputs(MAX_TOKENS, rows, seed=1))
    y = sketch.value(rows)
    projection = Projection(y, sketch.matrix("w", QuantType.Q4_1, rows, 96), sketch.vector("b", rows))
    sketch.add(ops.QuantLinear(x, None, (projection,), residual))
    assert_equal_on_every_isa(sketch.finish(y))


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize(("gate", "up"), PAIRS)
def test_quant_glu(gate: QuantType, up: QuantType, activation: Activation) -> None:
    columns = {32: 96, 64: 192, 256: 512}.get(max(gate.block_elements, up.block_elements), 96)
    rows = 40  # ends inside a tile of the pair
    sketch = Sketch()
    x = sketch.input(random_inputs(MAX_TOKENS, columns))
    y = sketch.value(rows)
    norm = NormWeights(sketch.vector("norm", columns), 1e-5)
    weights = (sketch.matrix("gate", gate, rows, columns), sketch.matrix("up", up, rows, columns))
    sketch.add(ops.QuantGlu(y, x, norm, *weights, activation))
    assert_equal_on_every_isa(sketch.finish(y))


@pytest.mark.parametrize("activation", list(Activation))
def test_activations_far_from_zero(activation: Activation) -> None:
    """Gates from 1e-9 to 1e4 of either sign: exp runs into both of its ends."""
    gates = np.concatenate([10.0 ** np.arange(-9, 5), -(10.0 ** np.arange(-9, 5)), np.linspace(-100, 100, 36)])
    sketch = Sketch()
    x = sketch.input(np.ones((MAX_TOKENS, 1), np.float32))
    y = sketch.value(64)
    weights = (sketch.floats("gate", gates[:, None]), sketch.floats("up", np.ones((64, 1))))
    sketch.add(ops.QuantGlu(y, x, None, *weights, activation))
    assert_equal_on_every_isa(sketch.finish(y), 3)


@pytest.mark.parametrize("width", [16, 40, 64, 100])
@pytest.mark.parametrize("with_norm", [True, False])
def test_add_norm_and_add(width: int, with_norm: bool) -> None:
    sketch = Sketch()
    a, b = (sketch.input(random_inputs(MAX_TOKENS, width, seed)) for seed in (1, 2))
    y = sketch.value(width)
    norm = NormWeights(sketch.vector("norm", width), 1e-6)
    sketch.add(ops.AddNorm(y, a, b, norm) if with_norm else ops.Add(y, a, b))
    assert_equal_on_every_isa(sketch.finish(y))


@pytest.mark.parametrize("quant_type", list(QuantType))
def test_embed(quant_type: QuantType) -> None:
    """Every row of two panels and a rest, each type decoded to the last bit and scaled."""
    rows, columns = 70, {64: 192, 256: 256}.get(quant_type.block_elements, 96)
    sketch = Sketch()
    y = sketch.value(columns)
    sketch.add(ops.Embed(y, sketch.matrix("embed", quant_type, rows, columns), 0.0625 * np.sqrt(columns)))
    assert_equal_on_every_isa(sketch.finish(y), rows)


def test_head_in_blocks_over_chosen_rows() -> None:
    """The head reads the rows that the batch asks for, in blocks of any size, also twice."""
    sketch = Sketch()
    x = sketch.input(random_inputs(MAX_TOKENS, 96))
    selected, logits = sketch.value(96), sketch.value(75)
    sketch.add(ops.SelectRows(selected, x))
    projection = Projection(logits, sketch.matrix("head", QuantType.Q5_0, 75, 96), None)
    sketch.add(ops.QuantLinear(selected, NormWeights(sketch.vector("norm", 96), 1e-5), (projection,), None))
    finished = sketch.finish_after_head(logits)
    rows = np.array([0, 2, 3, 7, 20, 21, 22, 36], np.int32)
    batch = Batch(np.arange(37, dtype=np.int32), (Sequence(37, 0, ()),), rows)
    expected = finished.reference(batch)
    assert_equal(expected, finished.reference(chain(37, num_states=0))[rows], "reference")
    for isa in ISAS:
        compiled = finished.compile(isa)
        compiled.forward(batch)
        for first, count in ((0, 8), (0, 1), (3, 2), (7, 1), (1, 7), (0, 8)):
            assert_equal(compiled.logits(first, count), expected[first : first + count], f"{isa}, {first}, {count}")


def test_buffers_are_reused_only_when_nothing_reads_them() -> None:
    """A value that is read much later than it was made: several others of its width come and go between."""
    sketch = Sketch()
    first = sketch.input(random_inputs(MAX_TOKENS, 64))
    last = first
    for i in range(6):
        out = sketch.value(64)
        projection = Projection(out, sketch.matrix(f"w{i}", QuantType.Q8_0, 64, 64), None)
        sketch.add(ops.QuantLinear(last, None, (projection,), None))
        last = out
    y = sketch.value(64)
    sketch.add(ops.Add(y, last, first))
    assert_equal_on_every_isa(sketch.finish(y), 17)
