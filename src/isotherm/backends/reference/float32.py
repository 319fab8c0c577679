"""The recorded ops in plain float32 on dequantised weights: the truth that quantised arithmetic is measured against."""

import numpy as np
from numpy.typing import NDArray

from isotherm.types import Activation

F32 = NDArray[np.float32]


def rms_norm(x: F32, weight: F32, eps: float) -> F32:
    """Over the last axis."""
    mean = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32)
    return (x / np.sqrt(mean + np.float32(eps)) * weight).astype(np.float32)


def layer_norm(x: F32, weight: F32, bias: F32, eps: float) -> F32:
    """Over the last axis."""
    centred = x - np.mean(x, axis=-1, keepdims=True, dtype=np.float32)
    variance = np.mean(np.square(centred), axis=-1, keepdims=True, dtype=np.float32)
    return (centred / np.sqrt(variance + np.float32(eps)) * weight + bias).astype(np.float32)


def glu(gate: F32, up: F32, activation: Activation) -> F32:
    """The hidden values of a gated FFN."""
    return activate(gate, activation) * (np.maximum(up, 0) if activation is Activation.DRELU else up)


def trim(x: F32, activation: Activation | None, thresholds: F32 | None, deviations: float) -> F32:
    """x [tokens, n] with 0 where the magnitude of activation(x) is below the threshold of its column or token."""
    magnitude = np.abs(activate(x, activation) if activation else x)
    if thresholds is None:
        spread = magnitude.std(axis=1, keepdims=True, dtype=np.float32)
        thresholds = magnitude.mean(axis=1, keepdims=True, dtype=np.float32) + np.float32(deviations) * spread
    return np.where(magnitude < thresholds, np.float32(0.0), x)


def activate(x: F32, activation: Activation) -> F32:
    if activation.has_zeros:
        positive: F32 = np.maximum(x, 0)
        return np.square(positive) if activation is Activation.RELU_SQUARED else positive
    slope = x if activation is Activation.SILU else 1.5957691216 * (x + 0.044715 * x**3)
    with np.errstate(over="ignore"):  # exp of a large -x is infinite, and 1 / inf is the 0 that is meant
        out: F32 = x / (1 + np.exp(-slope))
    return out


def rotate(x: F32, table: F32) -> F32:
    """x [tokens, heads, head_dim], table [tokens, dims]: see program/rope.py."""
    half = table.shape[1] // 2
    cos, sin = table[:, None, :half], table[:, None, half:]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def attend(q: F32, k: F32, v: F32, num_cached: int, scale: float, window: int | None) -> F32:
    """q [tokens, heads, head_dim] at positions num_cached.., k and v [positions, kv_heads, head_dim]."""
    num_new, num_heads, head_dim = q.shape
    group = num_heads // k.shape[1]
    queries = q.reshape(num_new, -1, group, head_dim).transpose(1, 2, 0, 3)  # [kv_heads, group, tokens, head_dim]
    scores = queries @ k.transpose(1, 2, 0)[:, None] * np.float32(scale)
    at = np.arange(num_cached, num_cached + num_new)[:, None]
    seen = np.arange(len(k))[None, :]
    visible = seen <= at if window is None else (seen <= at) & (seen > at - window)
    scores = np.where(visible, scores, np.float32(-np.inf))
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out: F32 = (p / p.sum(axis=-1, keepdims=True)) @ v.transpose(1, 0, 2)[:, None]
    return out.transpose(2, 0, 1, 3).reshape(num_new, num_heads, head_dim)
