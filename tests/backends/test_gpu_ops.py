"""Each op on a GPU against the contract in NumPy: equal, for every number of rows that has a kernel of its own.

Those marked slow are all types and shapes that the CPU's kernels are tested with.
"""

import numpy as np
import pytest
import test_attention
import test_ops
from on_gpu import compile_sketch
from sketch import Finished, Sketch, assert_equal, chain, extreme_blocks, random_inputs
from slow_cases import with_slow

from isotherm.backends.gpu.compiler import can_take
from isotherm.backends.gpu.sources import Tiling
from isotherm.program import ops
from isotherm.program.ops import NormWeights, Projection
from isotherm.types import Activation, KvType, QuantType

ROWS = (1, 2, 3, 4, 7, 8, 9, 70)  # each kernel full, with a rest, and more than one group of rows
MOST = ROWS[-1]
TYPES = (QuantType.F16, QuantType.Q4_0, QuantType.Q4_K, QuantType.Q6_K)  # floats, and the usual ways to keep scales


def assert_equal_on_gpu(finished: Finished, most: int = MOST, tiling: Tiling | None = None) -> None:
    num_states = len(finished.program.states)
    expected = finished.reference(chain(most, num_states=num_states))
    compiled = compile_sketch(finished, (-(-most // 64),) * num_states, tiling)
    for num_rows in (*(n for n in ROWS if n < most), most):
        compiled.forward(chain(num_rows, num_states=num_states))
        assert_equal(compiled.logits(0, num_rows), expected[:num_rows], f"{num_rows} rows")


def layer_like(quant_type: QuantType, columns: int) -> Finished:
    """Three projections of one input with norm and bias, codes at their ends, a GLU, a residual, an embedding."""
    sketch = Sketch()
    table = sketch.matrix("table", quant_type, MOST, columns)
    x = sketch.value(columns)
    sketch.add(ops.Embed(x, table, 1.5))
    norm = NormWeights(sketch.vector("norm", columns), 1e-5)
    projections = tuple(
        Projection(
            sketch.value(rows), sketch.matrix(f"w{rows}", quant_type, rows, columns), bias and sketch.vector(bias, rows)
        )
        for rows, bias in ((48, "a"), (33, "b"), (70, None))
    )
    sketch.add(ops.QuantLinear(x, norm, projections, None))
    extreme = sketch.value(40)
    far = sketch.matrix("far", quant_type, 40, columns)
    if not quant_type.is_float:
        far = sketch.stored("far", extreme_blocks(quant_type, 40, columns))
    sketch.add(ops.QuantLinear(x, None, (Projection(extreme, far, None),), None))
    hidden, out = sketch.value(256), sketch.value(columns)
    gate, up = (sketch.matrix(name, quant_type, 256, columns) for name in ("gate", "up"))
    sketch.add(ops.QuantGlu(hidden, x, norm, gate, up, Activation.SILU))
    down = Projection(out, sketch.matrix("down", quant_type, columns, 256), None)
    sketch.add(ops.QuantLinear(hidden, None, (down,), x))
    return sketch.finish(sketch.join((*(p.out for p in projections), extreme, out)))


@pytest.mark.parametrize("quant_type", with_slow(TYPES, QuantType))
def test_weights_of_each_type(quant_type: QuantType) -> None:
    assert_equal_on_gpu(layer_like(quant_type, 256))


@pytest.mark.parametrize("columns", [40, 576])
def test_columns_that_fill_no_chunk(columns: int) -> None:
    """The last chunk of a panel is shorter; floats may end inside a block of 32."""
    for quant_type in (QuantType.F32, QuantType.Q4_0, QuantType.MXFP4):
        width = columns if quant_type.is_float else columns // 32 * 32
        sketch = Sketch()
        x = sketch.input(random_inputs(MOST, width))
        y = sketch.value(33)
        norm = NormWeights(sketch.vector("norm", width), 1e-5)
        weight = sketch.matrix("w", quant_type, 33, width)
        sketch.add(ops.QuantLinear(x, norm, (Projection(y, weight, None),), None))
        assert_equal_on_gpu(sketch.finish(y), 9)


@pytest.mark.parametrize(
    "activation", with_slow((Activation.SILU, Activation.GELU_TANH, Activation.DRELU), (*Activation, None))
)
def test_activations(activation: Activation | None) -> None:
    sketch = Sketch()
    x = sketch.input(random_inputs(11, 64))  # the twelfth row's squares are no numbers
    y, hidden = sketch.value(33), sketch.value(48)
    weight = sketch.matrix("w", QuantType.Q4_0, 33, 64)
    sketch.add(ops.QuantLinear(x, None, (Projection(y, weight, sketch.vector("b", 33)),), None, activation))
    gate, up = (sketch.matrix(name, QuantType.Q4_0, 48, 64) for name in ("gate", "up"))
    sketch.add(ops.QuantGlu(hidden, x, None, gate, up, activation or Activation.SILU))
    assert_equal_on_gpu(sketch.finish(sketch.join((y, hidden))), 11)


def test_pairs_of_two_types() -> None:
    assert_equal_on_gpu(pair(QuantType.Q4_K, QuantType.Q6_K), 9)


def pair(gate: QuantType, up: QuantType) -> Finished:
    sketch = Sketch()
    x = sketch.input(random_inputs(9, 256))
    hidden = sketch.value(40)
    names = (sketch.matrix(name, t, 40, 256) for name, t in (("gate", gate), ("up", up)))
    sketch.add(ops.QuantGlu(hidden, x, None, *names, Activation.GELU_TANH))
    return sketch.finish(hidden)


@pytest.mark.slow
@pytest.mark.parametrize("types", test_ops.PAIRS, ids=str)
def test_pairs_of_all_types(types: tuple[QuantType, QuantType]) -> None:
    finished = pair(*types)
    glu = next(op for op in finished.program.ops if isinstance(op, ops.QuantGlu))
    if can_take(glu, lambda _: types):
        assert_equal_on_gpu(finished, 9)
    else:
        assert types[0] is not types[1]
        assert any(t.is_float for t in types)


def test_sums_with_and_without_norm() -> None:
    sketch = Sketch()
    a, b = (sketch.input(random_inputs(20, 100, seed)) for seed in (1, 2))
    plain, normed = sketch.value(100), sketch.value(100)
    sketch.add(ops.Add(plain, a, b))
    sketch.add(ops.AddNorm(normed, plain, b, NormWeights(sketch.vector("norm", 100), 1e-6)))
    assert_equal_on_gpu(sketch.finish(normed), 20)


def test_what_is_no_number_shows_in_its_row_alone() -> None:
    inputs = random_inputs(12, 96)
    inputs[1, 40], inputs[4, 0], inputs[11, 95] = np.nan, np.inf, -np.inf
    sketch = Sketch()
    x = sketch.input(inputs)
    selected, y = sketch.value(96), sketch.value(33)
    sketch.add(ops.SelectRows(selected, x))
    sketch.add(
        ops.QuantLinear(selected, None, (Projection(y, sketch.matrix("w", QuantType.Q4_0, 33, 96), None),), None)
    )
    finished = sketch.finish_after_head(y)
    expected, compiled = finished.reference(chain(12, num_states=0)), compile_sketch(finished)
    for num_rows in (12, 2):
        compiled.forward(chain(num_rows, num_states=0))
        np.testing.assert_array_equal(compiled.logits(0, num_rows), expected[:num_rows])
    assert np.isnan(expected[[1, 4, 11]]).all()
    assert np.isfinite(np.delete(expected, [1, 4, 11], axis=0)).all()


@pytest.mark.parametrize("tiling", with_slow((Tiling(16, 2, 8, 4, 4),), (Tiling(8, 1, 16, 16, 16),)), ids=str)
def test_tilings_give_the_same_bits(tiling: Tiling) -> None:
    assert_equal_on_gpu(layer_like(QuantType.Q4_0, 256), tiling=tiling)


def test_slices_that_take_two_blocks() -> None:
    """Rounds of 16: one that is not full, one that is, one with two blocks in the next."""
    for num_blocks in (6, 16, 18):
        sketch = Sketch()
        x = sketch.input(random_inputs(2, 32 * num_blocks))
        y = sketch.value(33)
        weight = sketch.matrix("w", QuantType.Q4_0, 33, 32 * num_blocks)
        sketch.add(ops.QuantLinear(x, None, (Projection(y, weight, None),), None))
        assert_equal_on_gpu(sketch.finish(y), 2, Tiling(few_slices=8, few_depth=2))


# --- attention ------------------------------------------------------------------------------------------------------

CASES = [
    test_attention.Case(3, 1, 48, 22, window=16, qk_norm=True),
    test_attention.Case(30, 1, 48, 16, kv_type=KvType.Q8_0),
]
LONG_CASES = [test_attention.Case(3, 3, 48, 16, window=513, kv_type=KvType.Q8_0)]


@pytest.mark.parametrize("case", with_slow(CASES, test_attention.CASES), ids=str)
def test_attention_of_batches(case: test_attention.Case) -> None:
    finished = test_attention.attention(case, 64)
    compiled, reference = compile_sketch(finished, (6,)), finished.compile_reference((6,))
    for number, batch in enumerate(test_attention.growing_batches()):
        reference.forward(batch)
        compiled.forward(batch)
        count = len(batch.logit_rows)
        assert_equal(compiled.logits(0, count), reference.logits(0, count), f"step {number}")


@pytest.mark.parametrize("case", with_slow(LONG_CASES, test_attention.LONG_CASES), ids=str)
def test_attention_over_several_blocks(case: test_attention.Case) -> None:
    """By one prefill, and by few tokens at the borders of blocks; freed pages are never read."""
    length = test_attention.LONG
    finished = test_attention.attention(case, length)
    wanted = [0, 63, 64, 511, 512, 513, 1023, 1024, length - 1]
    expected = test_attention.contract_rows(case, finished, length, wanted)
    compiled = compile_sketch(finished, (-(-length // 64),))
    compiled.forward(test_attention.step(0, length, None))
    whole = compiled.logits(0, length)
    assert_equal(whole[wanted], expected, "prefill")
    start = 0
    for end in (500, 511, 512, 513, 1020, 1023, 1024, 1025, length - 1, length):
        compiled.forward(test_attention.step(start, end, case.window))
        assert_equal(compiled.logits(0, end - start), whole[start:end], f"positions {start} to {end}")
        start = end
