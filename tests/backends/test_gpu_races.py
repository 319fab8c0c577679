"""The smallest runs of every GPU kernel, for a simulator that looks for races and for what lies out of bounds: .ci/full
runs them on oclgrind. Their answers are checked too.
"""

import numpy as np
import pytest
import test_attention
from on_gpu import compile_sketch
from sketch import Finished, Sketch, assert_equal, chain, random_inputs
from test_gpu_choice import assert_chosen_alike

from isotherm.program import ops
from isotherm.program.batch import Batch, Sequence
from isotherm.program.ops import NormWeights, Projection
from isotherm.types import Activation, KvType, QuantType, SamplingParams

pytestmark = pytest.mark.simulated
NUM_ROWS = 10  # the kernels of 1, 8 and many rows; of the last group not all


def check(finished: Finished, counts: tuple[int, ...] = (1, 5, NUM_ROWS)) -> None:
    expected, compiled = finished.reference(chain(NUM_ROWS, num_states=0)), compile_sketch(finished)
    for count in counts:
        compiled.forward(chain(count, num_states=0))
        assert_equal(compiled.logits(0, count), expected[:count], f"{count} rows")


@pytest.mark.parametrize("quant_type", [QuantType.Q4_0, QuantType.Q2_K, QuantType.F16])
def test_matmuls(quant_type: QuantType) -> None:
    columns = max(64, quant_type.block_elements)
    sketch = Sketch()
    x, y, hidden = sketch.value(columns), sketch.value(33), sketch.value(20)
    sketch.add(ops.Embed(x, sketch.matrix("table", quant_type, NUM_ROWS, columns), 1.0))
    norm = NormWeights(sketch.vector("norm", columns), 1e-5)
    projection = Projection(y, sketch.matrix("w", quant_type, 33, columns), sketch.vector("b", 33))
    sketch.add(ops.QuantLinear(x, norm, (projection,), None))
    pair = (sketch.matrix(name, quant_type, 20, columns) for name in ("gate", "up"))
    sketch.add(ops.QuantGlu(hidden, x, norm, *pair, Activation.SILU))
    check(sketch.finish(sketch.join((y, hidden))))


def test_sums() -> None:
    sketch = Sketch()
    a, b = (sketch.input(random_inputs(NUM_ROWS, 40, seed)) for seed in (1, 2))
    out = sketch.value(40)
    sketch.add(ops.AddNorm(out, a, b, NormWeights(sketch.vector("norm", 40), 1e-6)))
    check(sketch.finish(out), (3,))


@pytest.mark.parametrize("kv_type", KvType)
def test_attention_of_few_and_many_tokens(kv_type: KvType) -> None:
    case = test_attention.Case(2, 1, 16, 16, window=7, qk_norm=True, kv_type=kv_type)
    finished = test_attention.attention(case, 20)
    compiled = compile_sketch(finished, (1,))
    table = np.zeros(1, np.int32)
    for start, end in ((0, 12), (12, 14)):
        ids = np.arange(start, end, dtype=np.int32)
        batch = Batch(ids, (Sequence(len(ids), start, (table,)),), np.arange(len(ids), dtype=np.int32))
        compiled.forward(batch)
        expected = test_attention.contract_rows(case, finished, 20, list(range(start, end)))
        assert_equal(compiled.logits(0, len(ids)), expected, f"positions {start} to {end}")


def test_shortlists() -> None:
    logits = random_inputs(2, 2100)
    for params in (SamplingParams(), SamplingParams(temperature=1.0, top_k=9, seed=1)):
        assert_chosen_alike(params, logits)
