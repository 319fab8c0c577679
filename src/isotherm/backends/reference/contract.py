"""The arithmetic contract in NumPy, to the bit. ARCHITECTURE.md, "The arithmetic contract", is the text of it.

Slow by design: every float32 operation stands here once, in the order that the kernels must keep.
"""

import numpy as np
from numpy.typing import NDArray

from isotherm.quantization.layouts import Fields
from isotherm.types import Activation, KvType

F32 = NDArray[np.float32]

ARITHMETIC_VERSION = 1  # of this contract: a change that gives other bits makes the KV pages of all disks stale
LANES = 16
BLOCK_COLUMNS = 32  # columns that share one activation scale
ATTENTION_BLOCK = 512  # positions of one softmax block
_TOO_LARGE = np.float32(2.0**105)  # weight scales of this magnitude, or not finite, make what they touch no number
KV_SCALE_COLUMNS = 32  # of a head, that share a scale in a Q8_0 cache
_TINY = np.float32(2.0**-100)  # a block whose largest magnitude is below this is all zero
_F16_MAX = np.float32(65504.0)

_EXP_LOW, _EXP_HIGH = np.float32(-87.0), np.float32(88.0)
_LOG2E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693145752), np.float32(1.42860677e-6)
# exp on [-ln 2 / 2, ln 2 / 2], highest power first: Chebyshev interpolant of degree 6, relative error 2.1e-8
_EXP_POLYNOMIAL = tuple(np.float32(c) for c in (0.00139411189, 0.00837513477, 0.0416663528, 0.166664154, 0.5, 1.0, 1.0))


def fma(a: F32, b: F32 | np.float32, c: F32) -> F32:
    """a * b + c, rounded once. The product is exact in float64; the sum is rounded to odd, so that the second
    rounding cannot err (Boldo and Melquiond, 2008)."""
    product = np.multiply(a, b, dtype=np.float64)
    addend = np.asarray(c, dtype=np.float64)
    total = product + addend
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)
    bits = total.view(np.int64)
    inexact_even = (error != 0) & (bits & 1 == 0) & np.isfinite(total)
    away = np.where((error > 0) == (total > 0), 1, -1)
    return (bits + np.where(inexact_even, away, 0)).view(np.float64).astype(np.float32)


def exp(x: F32) -> F32:
    x = np.minimum(np.maximum(x, _EXP_LOW), _EXP_HIGH)
    n = np.rint(x * _LOG2E)
    r = fma(n, -_LN2_HIGH, x)
    r = fma(n, -_LN2_LOW, r)
    p = np.full_like(r, _EXP_POLYNOMIAL[0])
    for coefficient in _EXP_POLYNOMIAL[1:]:
        p = fma(p, r, np.full_like(r, coefficient))
    scaled: F32 = np.ldexp(p, n.astype(np.int32)).astype(np.float32)
    return scaled


def sum_lanes(lanes: F32) -> F32:
    """Sum over the last axis of 16: halves are added until one is left."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def _padded(x: F32, multiple: int) -> F32:
    rest = -x.shape[-1] % multiple
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rest)]) if rest else x


def rms_norm(x: F32, weight: F32, eps: float) -> F32:
    """x [..., n], weight [n]."""
    n = x.shape[-1]
    vectors = _padded(x, LANES).reshape(*x.shape[:-1], -1, LANES)
    acc = np.zeros((*x.shape[:-1], LANES), np.float32)
    for i in range(vectors.shape[-2]):
        acc = fma(vectors[..., i, :], vectors[..., i, :], acc)
    mean = sum_lanes(acc) / np.float32(n)
    factor = np.float32(1.0) / np.sqrt(mean + np.float32(eps))
    normed: F32 = (x * factor[..., None]) * weight
    return normed


def layer_norm(x: F32, weight: F32, bias: F32, eps: float) -> F32:
    """x [..., n], weight and bias [n]."""
    n = np.float32(x.shape[-1])
    acc = np.zeros((*x.shape[:-1], LANES), np.float32)
    for vector in np.moveaxis(_padded(x, LANES).reshape(*x.shape[:-1], -1, LANES), -2, 0):
        acc = acc + vector
    centred = x - (sum_lanes(acc) / n)[..., None]
    return rms_norm(centred, weight, eps) + bias


def quantise(x: F32) -> tuple[F32, F32]:
    """x [tokens, K] -> codes as float32 [tokens, K padded to 64], scales [tokens, blocks]."""
    sound = np.isfinite(x).all(axis=1, keepdims=True)
    blocks = _padded(np.where(sound, x, np.float32(0.0)), 64).reshape(len(x), -1, BLOCK_COLUMNS)
    largest = np.abs(blocks).max(axis=2)
    live = largest >= _TINY
    inverse = np.divide(np.float32(127.0), largest, out=np.zeros_like(largest), where=live)
    scales = np.where(live, largest / np.float32(127.0), np.float32(0.0))
    scales = np.where(sound, scales, np.float32(np.nan))
    return np.rint(blocks * inverse[..., None]).reshape(len(x), -1), scales


def quant_matmul(codes: F32, scales: F32, weight: Fields) -> F32:
    """[tokens, N]: the groups of a block fma-ed in rising order, blocks fma-ed into the sum in rising order."""
    size, num_groups = weight.group_size, weight.scale.shape[1]
    groups = codes[:, : num_groups * size].reshape(len(codes), num_groups, size).transpose(1, 0, 2)
    quads = weight.codes.reshape(len(weight.codes), num_groups, size).transpose(1, 2, 0).astype(np.float32)
    sums = groups.sum(axis=2, dtype=np.float32)  # [groups, tokens], exact: below 2 ** 24
    integers = groups @ quads - weight.zero_point * sums[..., None]  # [groups, tokens, N], exact
    weight_scale = np.where(np.abs(weight.scale) < _TOO_LARGE, weight.scale, np.float32(np.nan))
    y = np.zeros(integers.shape[1:], np.float32)
    per_block = BLOCK_COLUMNS // size
    for first in range(0, num_groups, per_block):
        block = np.zeros_like(y)
        for g in range(first, first + per_block):
            block = fma(integers[g], weight_scale[None, :, g], block)
            if weight.minimum is not None:
                block = fma(sums[g][:, None], weight.minimum[None, :, g], block)
        y = fma(block, scales[:, first // per_block][:, None], y)
    return y


def float_matmul(x: F32, weight: F32) -> F32:
    """[tokens, N] for weights stored as floats: one fma per column, in rising order, nothing quantised."""
    y = np.zeros((len(x), len(weight)), np.float32)
    for column in range(weight.shape[1]):
        y = fma(x[:, column][:, None], weight[None, :, column], y)
    return y


def glu(gate: F32, up: F32, activation: Activation) -> F32:
    """The hidden values of a gated FFN; a neuron that does not fire is 0, whatever its up is."""
    activated = activate(gate, activation)
    if activation is Activation.DRELU:
        up = np.maximum(up, np.float32(0.0))
    return activated * np.where(activated == 0, np.float32(0.0), up)


def trim(x: F32, activation: Activation | None, thresholds: F32 | None, deviations: float) -> F32:
    """x [tokens, n] with 0 where the magnitude of activation(x) is below the threshold of its column or token."""
    magnitude = np.abs(activate(x, activation) if activation else x)
    if thresholds is None:
        n = np.float32(x.shape[1])
        sums, squares = (np.zeros((len(x), LANES), np.float32) for _ in range(2))
        for vector in np.moveaxis(_padded(magnitude, LANES).reshape(len(x), -1, LANES), 1, 0):
            sums = sums + vector
            squares = fma(vector, vector, squares)
        mean = sum_lanes(sums) / n
        with np.errstate(over="ignore", invalid="ignore"):  # what is too large to square trims nothing
            variance = np.maximum(np.float32(0), sum_lanes(squares) / n - mean * mean)
            thresholds = fma(np.sqrt(variance), np.float32(deviations), mean)[:, None]
    return np.where(magnitude < thresholds, np.float32(0.0), x)


def is_predicted(scores: F32, threshold: float) -> NDArray[np.bool_]:
    """Which neurons a predictor takes to fire: those whose score is not below the threshold, or is not a number."""
    with np.errstate(invalid="ignore"):
        return ~(scores < np.float32(threshold))


def activate(x: F32, activation: Activation) -> F32:
    if activation.has_zeros:
        positive: F32 = np.maximum(x, np.float32(0.0))
        return positive * positive if activation is Activation.RELU_SQUARED else positive
    one = np.float32(1.0)
    if activation is Activation.SILU:
        return x / (one + exp(-x))
    bend = fma(x * x, np.full_like(x, 0.044715), np.full_like(x, 1.0))
    return x - x / (exp((x * np.float32(1.5957691216)) * bend) + one)


def rotate(x: F32, table: F32) -> F32:
    """x [tokens, heads, head_dim], table [tokens, dims]: see program/rope.py."""
    half = table.shape[1] // 2
    cos, sin = table[:, None, :half], table[:, None, half:]
    first, second = x[..., :half], x[..., half : 2 * half]
    out = x.copy()
    out[..., :half] = fma(first, cos, -(second * sin))
    out[..., half : 2 * half] = fma(second, cos, first * sin)
    return out


def to_cache(x: F32, kv_type: KvType) -> F32:
    """What the KV cache gives back for x [..., head_dim]: finite, whatever x is."""
    x = np.clip(np.where(np.isnan(x), -_F16_MAX, x), -_F16_MAX, _F16_MAX)
    if kv_type is KvType.F16:
        return x.astype(np.float16).astype(np.float32)
    blocks = _padded(x, KV_SCALE_COLUMNS).reshape(*x.shape[:-1], -1, KV_SCALE_COLUMNS)
    scale = (np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)).astype(np.float16).astype(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    values: F32 = np.clip(np.rint(blocks * inverse), -127, 127) * scale
    return values.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]


def attend(q: F32, k: F32, v: F32, position: int, scale: float, window: int | None) -> F32:
    """One query head over positions 0..position: q [head_dim], k and v [position + 1, head_dim] -> [head_dim]."""
    first = 0 if window is None else max(0, position + 1 - window)
    best, total = np.float32(-np.inf), np.zeros((), np.float32)
    out = np.zeros_like(q)
    for start in range(first // ATTENTION_BLOCK * ATTENTION_BLOCK, position + 1, ATTENTION_BLOCK):
        seen = np.arange(max(start, first), min(start + ATTENTION_BLOCK, position + 1))
        scores = np.zeros(len(seen), np.float32)
        for d in range(len(q)):
            scores = fma(k[seen, d], q[d], scores)
        scores = scores * np.float32(scale)
        block_best = scores.max()
        p = np.zeros(ATTENTION_BLOCK, np.float32)
        p[seen - start] = exp(scores - block_best)
        lanes = np.zeros(LANES, np.float32)
        for vector in p.reshape(-1, LANES):
            lanes = lanes + vector
        block_out = np.zeros_like(q)
        for t in seen:
            block_out = fma(p[t - start], v[t], block_out)
        new_best = np.maximum(best, block_best)
        old, new = exp(best - new_best), exp(block_best - new_best)
        total = fma(total, old, sum_lanes(lanes) * new)
        out = fma(out, old, block_out * new)
        best = new_best
    return out / total
