"""Mixtures of experts: in float32 as recorded, and lowered in the arithmetic of the contract."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from isotherm.backends.reference import contract, float32
from isotherm.program import ops
from isotherm.quantization.layouts import Fields
from isotherm.types import Experts

F32 = NDArray[np.float32]
Ints = NDArray[np.intp]


def route(logits: F32, num_used: int) -> F32:
    """logits [tokens, num_experts] -> [tokens, 2 * num_used]: experts by rank as numbers, then their weights.

    A row with a logit that is not finite takes the first experts, with weights that are no numbers.
    """
    sound = np.isfinite(logits).all(axis=1, keepdims=True)
    logits = np.where(sound, logits, np.float32(0.0))
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :num_used]  # of equal logits the first stays first
    best = np.take_along_axis(logits, chosen, axis=1)
    shares = contract.exp(best - best[:, :1])
    total = np.zeros(len(logits), np.float32)
    for rank in range(num_used):
        total = total + shares[:, rank]
    weights = np.where(sound, shares / total[:, None], np.float32(np.nan))
    return np.concatenate([chosen.astype(np.float32), weights], axis=1)


def experts_of(routes: F32, num_used: int) -> Ints:
    """[tokens, num_used]: what `route` chose."""
    return routes[:, :num_used].astype(np.intp)


def mix(said: F32, routes: F32) -> F32:
    """The sum of what experts say: said [tokens, num_used, width], ranks rising."""
    y = np.zeros((len(said), said.shape[2]), np.float32)
    for rank in range(said.shape[1]):
        y = contract.fma(said[:, rank], routes[:, said.shape[1] + rank, None], y)
    return y


def matmul(x: F32, chosen: Ints, weight: Fields | F32, num_experts: int) -> F32:
    """x [tokens, num_used, columns] times the rows of each one's expert -> [tokens, num_used, rows].

    weight: of all experts, quantised or stored as floats.
    """
    total_rows = len(weight) if isinstance(weight, np.ndarray) else len(weight.codes)
    num_rows = total_rows // num_experts
    out = np.empty((*chosen.shape, num_rows), np.float32)
    for expert in np.unique(chosen):
        rows = slice(expert * num_rows, (expert + 1) * num_rows)
        at = chosen == expert
        if isinstance(weight, np.ndarray):
            out[at] = contract.float_matmul(x[at], weight[rows])
        else:
            out[at] = contract.quant_matmul(*contract.quantise(x[at]), _rows_of(weight, rows))
    return out


def moe_float32(x: F32, op: ops.Moe, router: F32, gate: F32, up: F32, down: F32) -> F32:
    """A recorded Moe on dequantised weights."""
    experts, width = op.experts, x.shape[1]
    logits = x @ router.T
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, : experts.num_used]
    best = np.take_along_axis(logits, chosen, axis=1)
    shares = np.exp(best - best[:, :1])
    weights = shares / shares.sum(axis=1, keepdims=True)
    gates, ups = (_by_expert(w, experts) for w in (gate, up))
    downs = _by_expert(down, experts)
    out = np.zeros((len(x), width), np.float32)
    for expert in np.unique(chosen):
        token, rank = np.nonzero(chosen == expert)
        hidden = float32.glu(x[token] @ gates[expert].T, x[token] @ ups[expert].T, op.activation)
        out[token] += weights[token, rank, None] * (hidden @ downs[expert].T)
    return out


def _by_expert(weight: F32, experts: Experts) -> F32:
    return weight.reshape(experts.num_experts, -1, weight.shape[1])


def _rows_of(fields: Fields, rows: slice) -> Fields:
    minimum = None if fields.minimum is None else fields.minimum[rows]
    return replace(fields, codes=fields.codes[rows], scale=fields.scale[rows], minimum=minimum)
