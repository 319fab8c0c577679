"""Values of an FFN that a lossy rule takes as 0: the same bits by neuron and whole, for sequences that are trimmed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sketch import ISAS, Finished, Sketch, assert_equal, assert_equal_on_every_isa, chain, random_inputs
from tiny import TinyModel, make_tiny, run, text_ids

from isotherm.backends.cpu.packing import pack_program
from isotherm.backends.reference import contract, float32
from isotherm.program import ops
from isotherm.program.batch import Batch, Sequence
from isotherm.program.lowering import lower
from isotherm.program.ops import Trim
from isotherm.program.recorder import Program
from isotherm.quantization.packed_file import PackedMemory
from isotherm.types import Activation, QuantType

WIDTH = 200
BY_COLUMN = Trim(np.linspace(0, 1.5, WIDTH, dtype=np.float32).tobytes())
BY_TOKEN = Trim(None, 0.5)
NEVER = Trim(None, -100.0)


def sketch_trim(trim: Trim, activation: Activation | None) -> Finished:
    sketch = Sketch()
    x, y = sketch.input(random_inputs(37, WIDTH)), sketch.value(WIDTH)
    sketch.add(ops.TrimOp(y, x, activation, trim))
    return sketch.finish(y)


@pytest.mark.parametrize("trim", [BY_COLUMN, BY_TOKEN, NEVER], ids=["by column", "by token", "never"])
@pytest.mark.parametrize("activation", [None, *Activation])
def test_every_isa_gives_the_bits_of_the_reference(activation: Activation | None, trim: Trim) -> None:
    assert_equal_on_every_isa(sketch_trim(trim, activation))


@pytest.mark.parametrize("activation", [None, Activation.SILU, Activation.RELU])
def test_what_is_below_the_threshold_is_zero(activation: Activation | None) -> None:
    x = random_inputs(37, WIDTH)
    value = float32.activate(x, activation) if activation else x
    thresholds = np.frombuffer(BY_COLUMN.thresholds or b"", np.float32)
    border = np.abs(np.abs(value) - thresholds) < 1e-5  # where the two kinds of exp may fall on either side
    expected = np.where(np.abs(value) < thresholds, 0, x)
    assert np.where(border, expected, contract.trim(x, activation, thresholds, 0.0)) == pytest.approx(expected, abs=0)
    assert np.where(border, expected, float32.trim(x, activation, thresholds, 0.0)) == pytest.approx(expected, abs=0)


def test_a_token_by_its_own_magnitudes() -> None:
    """Of a normal distribution the magnitudes above mean + deviation are 2 * (1 - Phi(sqrt(2 / pi) + 0.6028))."""
    x = np.random.default_rng(0).standard_normal((4, 100_000)).astype(np.float32)
    share = (contract.trim(x, None, None, 1.0) != 0).mean(axis=1)
    assert share == pytest.approx(0.1613, abs=0.005)
    assert np.array_equal(contract.trim(x, None, None, -100.0), x)


def test_what_is_not_a_number_stays() -> None:
    finished = sketch_trim(BY_COLUMN, Activation.SILU)
    values = finished.tensors["input0"].raw.view(np.float32).copy()
    values[0, 100] = np.nan
    finished.tensors["input0"] = replace(finished.tensors["input0"], raw=values.view(np.uint8))
    for isa in ISAS:
        assert np.isnan(finished.native(chain(1, num_states=0), isa)).any()


def trimmed(program: Program, gate: Trim | None, hidden: Trim | None) -> Program:
    changed = [replace(op, trim_gate=gate, trim_hidden=hidden) if isinstance(op, ops.Ffn) else op for op in program.ops]
    return replace(program, ops=tuple(changed))


def with_trims(model: TinyModel, gate: Trim | None, hidden: Trim | None, *, is_sparse: bool) -> TinyModel:
    recorded = trimmed(model.recorded, gate, hidden)
    lowered, packed = lower(recorded, lambda _: is_sparse), PackedMemory()
    pack_program(lowered, model.checkpoint.tensors, packed)
    return replace(model, recorded=recorded, lowered=lowered, packed=packed)


GATED = [("llama", ""), ("llama", "relu"), ("gemma3", "")]
PLACES = [(*model, place) for model in GATED for place in ("gate", "hidden", "both")]


@pytest.mark.parametrize(("family", "activation", "place"), [*PLACES, ("opt", "", "hidden")])
def test_whole_models(family: str, activation: str, place: str, tmp_path: Path) -> None:
    """Reference, whole and by neuron; batches in which one sequence is trimmed and one is not."""
    model = make_tiny(tmp_path, family, QuantType.Q4_0, activation)
    gate = BY_TOKEN if place in ("gate", "both") else None
    hidden = Trim(None, -0.2) if place in ("hidden", "both") else None
    dense = with_trims(model, gate, hidden, is_sparse=False)
    sparse = with_trims(model, gate, hidden, is_sparse=True)
    kinds = {type(op) for op in sparse.lowered.ops}
    assert {ops.TrimOp, ops.SparseDown} <= kinds
    ids = text_ids(9)
    expected = run(dense.reference(), dense.batch(ids))
    exact = run(model.reference(), model.batch(ids))
    assert (expected != exact).any()
    for isa in ISAS:
        plain = model.native(isa)
        for trims in (dense, sparse):
            compiled = trims.native(isa)
            assert_equal(run(compiled, trims.batch(ids)), expected, f"{family} on {isa}")
            alone = trims.batch(ids)
            untouched = replace(alone, sequences=(replace(alone.sequences[0], is_trimmed=False),))
            assert_equal(run(compiled, untouched), run(plain, model.batch(ids)), f"{family} on {isa}, exact")
            assert_equal(run(compiled, both(trims)), np.concatenate([expected, exact]), f"{family} on {isa}, both")
            steps = [run(compiled, trims.batch(ids[i : i + 1], i))[0] for i in range(len(ids))]
            assert_equal(np.stack(steps), expected, f"{family} on {isa}, token by token")


def both(model: TinyModel) -> Batch:
    """The same text twice: trimmed, and exact."""
    ids = text_ids(9)
    tables = [np.array([page], np.int32) for page in (0, 1)]
    first, second = (model.sequence(len(ids), 0, table) for table in tables)
    rows = np.arange(2 * len(ids), dtype=np.int32)
    sequences: tuple[Sequence, ...] = (first, replace(second, is_trimmed=False))
    return Batch(np.concatenate([ids, ids]), sequences, rows)


def test_float32_and_the_contract_trim_alike(tmp_path: Path) -> None:
    model = with_trims(make_tiny(tmp_path, "llama", QuantType.Q8_0), BY_TOKEN, None, is_sparse=False)
    batch = model.batch(text_ids(9))
    float_logits, logits = run(model.reference(lowered=False), batch), run(model.reference(), batch)
    assert np.abs(float_logits - logits).mean() < 0.1 * np.abs(float_logits).mean()
