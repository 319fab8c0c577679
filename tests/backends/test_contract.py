"""The contract's arithmetic against something stricter than itself: rationals, float64, NumPy's own float16."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sketch import F32, ISAS, Sketch, StoredTensor, assert_equal, chain
from tolerances import EXP_RELATIVE

from isotherm.backends.reference import contract, float32
from isotherm.program import ops
from isotherm.program.ops import AttentionShape
from isotherm.program.recorder import StateKind, StateSpec
from isotherm.types import Activation, KvType, QuantType, Rope

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
FLOAT32_MAX = Fraction(float(np.finfo(np.float32).max))


def to_float32(exact: Fraction) -> float:
    """The float32 nearest to `exact`, ties to even, by integers alone."""
    if exact == 0:
        return 0.0
    magnitude, sign = abs(exact), -1 if exact < 0 else 1
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(magnitude / unit) * unit  # round() of a Fraction is ties to even
    return sign * (float("inf") if rounded > FLOAT32_MAX else float(rounded))


@settings(max_examples=2000, deadline=None)
@given(a=finite, b=finite, c=finite)
@example(a=1 + 2.0**-23, b=1 - 2.0**-23, c=-1.0)  # what is left is below the last bit of the product
@example(a=2.0**-75, b=2.0**-75, c=1.0)
@example(a=2.0**-75, b=-(2.0**-75), c=1.0)
@example(a=1 + 2.0**-12, b=1 + 2.0**-12, c=2.0**-60)  # the product is a tie of float32, broken by what float64 drops
@example(a=1 + 2.0**-12, b=1 + 2.0**-12, c=-(2.0**-60))
@example(a=3 * 2.0**-75, b=2.0**-75, c=2.0**-149)  # subnormal, a tie
@example(a=2.0**-100, b=2.0**-100, c=2.0**-149)
@example(a=3.4e38, b=3.4e38, c=-3.4e38)  # too large
def test_fma_rounds_once(a: float, b: float, c: float) -> None:
    with np.errstate(over="ignore"):
        actual = contract.fma(*(np.array([x], np.float32) for x in (a, b, c)))[0]
    assert actual == to_float32(Fraction(a) * Fraction(b) + Fraction(c))


@settings(max_examples=500, deadline=None)
@given(a=finite, b=finite, shift=st.integers(-30, 30), bit=st.sampled_from((-1, 1)))
def test_fma_after_cancellation(a: float, b: float, shift: int, bit: int) -> None:
    """c is about -a * b, so that only the end of the product is left, with a grain of sand beside it."""
    with np.errstate(over="ignore"):
        near = np.float32(-a * b)
    if not np.isfinite(near):
        return
    c = float(near) + bit * 2.0 ** (shift - 100)
    with np.errstate(over="ignore"):
        c32 = np.float32(c)
    actual = contract.fma(np.array([a], np.float32), np.array([b], np.float32), np.array([c32], np.float32))[0]
    assert actual == to_float32(Fraction(a) * Fraction(b) + Fraction(float(c32)))


def test_exp_is_as_close_as_stated() -> None:
    x = np.concatenate([np.linspace(-87, 88, 400_001), np.linspace(-1, 1, 100_001), [0.0]]).astype(np.float32)
    truth = np.exp(x.astype(np.float64))
    assert np.abs(contract.exp(x) / truth - 1).max() < EXP_RELATIVE
    assert contract.exp(np.zeros(1, np.float32))[0] == 1


def test_exp_holds_its_ends_beyond_the_range() -> None:
    x = np.array([-87, -88, -1e30, -np.inf, 88, 89, np.inf], np.float32)
    assert (contract.exp(x)[:4] == contract.exp(x)[0]).all()
    assert (contract.exp(x)[4:] == contract.exp(x)[4]).all()


@pytest.mark.parametrize("activation", list(Activation))
def test_activations_are_those_of_float32(activation: Activation) -> None:
    x = np.linspace(-30, 30, 10_001).astype(np.float32)
    np.testing.assert_allclose(contract.activate(x, activation), float32.activate(x, activation), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("quant_type", [QuantType.F16, QuantType.BF16])
def test_every_half_is_read_as_numpy_reads_it(quant_type: QuantType) -> None:
    """All finite float16 and bfloat16 bit patterns, subnormals too, through the native embedding."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    infinite = 0x7C00 if quant_type is QuantType.F16 else 0x7F80
    patterns[patterns & infinite == infinite] = 0
    if quant_type is QuantType.F16:
        expected = patterns.view(np.float16).astype(np.float32)
    else:
        expected = (patterns.astype(np.uint32) << 16).view(np.float32)
    sketch = Sketch()
    y = sketch.value(64)
    weight = sketch.stored("embed", StoredTensor(quant_type, (1024, 64), patterns.reshape(1024, 64).view(np.uint8)))
    sketch.add(ops.Embed(y, weight, 1.0))
    finished = sketch.finish(y)
    for isa in ISAS:
        actual = finished.native(chain(1024, num_states=0), isa)
        assert_equal(actual, expected.reshape(1024, 64), f"{quant_type.value} on {isa}")


def test_the_cache_rounds_to_float16_as_numpy_does() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << 32, 64 * 400, np.uint32).view(np.float32)
    halves = np.arange(1 << 15, dtype=np.uint16)[: 64 * 496].view(np.float16).astype(np.float32)  # all finite ones
    ties = (halves[:-1] + halves[1:]) / 2
    beside = np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))
    all_values = np.concatenate([values, halves, ties, *beside, [65519.0, 65520.0, 7e4, 3e38], -ties])
    rows = np.resize(all_values, (-(-len(all_values) // 64), 64)).astype(np.float32)
    expected = contract.to_cache(rows, KvType.F16)
    with np.errstate(over="ignore"):
        as_numpy = np.clip(np.nan_to_num(rows.astype(np.float16).astype(np.float32), nan=-65504), -65504, 65504)
    assert_equal(expected, as_numpy, "contract.to_cache")
    check_cache(rows, expected, KvType.F16)


def test_the_cache_quantises_to_eight_bits_as_the_contract_does() -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((3000, 64)) * np.exp2(rng.integers(-40, 20, (3000, 2)).repeat(32, 1))
    rows = rows.astype(np.float32)
    rows[:40] = rng.integers(0, 1 << 32, (40, 64), np.uint32).view(np.float32)  # any bits: infinities, not a number
    rows[50] = 0
    rows[51, :32], rows[52] = 3e38, 2.0**-149
    expected = contract.to_cache(rows, KvType.Q8_0)
    assert np.isfinite(expected).all()
    blocks = rows[60:].reshape(-1, 32)
    step = np.abs(blocks).max(axis=1, keepdims=True) / 127
    error = np.abs(expected[60:].reshape(-1, 32) - blocks)
    usual = (step[:, 0] > 2.0**-12) & (step[:, 0] < 65504 / 127)  # scales that float16 holds with all its bits
    assert usual.sum() > 1000
    assert (error[usual] <= 0.57 * step[usual]).all()  # half a step, and 127 / 2048 of one for the rounded scale
    check_cache(rows, expected, KvType.Q8_0)


def check_cache(rows: F32, expected: F32, kv_type: KvType) -> None:
    """A token alone attends to itself with weight 1, so that what comes out is what the cache made of its value."""
    sketch = Sketch(StateSpec(StateKind.KV_WINDOW, 1, 1, 64, 1, kv_type))
    q, k, v = sketch.input(np.zeros_like(rows)), sketch.input(np.zeros_like(rows)), sketch.input(rows)
    out = sketch.value(64)
    shape = AttentionShape(1, 1, 64, 1.0, window=1)
    sketch.add(ops.RopeAttention(out, q, k, v, None, None, Rope(10000.0, 64), shape, 0, 0))
    finished = sketch.finish(out)
    for isa in ISAS:
        for start in range(0, len(rows), 2048):
            ids = np.arange(start, min(len(rows), start + 2048), dtype=np.int32)
            actual = finished.native(replace(chain(len(ids)), token_ids=ids), isa)
            assert_equal(actual, expected[ids], f"{isa}, rows from {start}")
