"""Plants neurons that fire by a power law into the random weights of synthetic.py."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Q4_0_SCALE = 1 / 4.6  # of weights of deviation 1: codes are uniform, of deviation 2**4 / sqrt(12)


@dataclass(frozen=True)
class Planted:
    """Neurons that fire by a power law, of weights in Q4_0.

    With a gate: one channel of the residual is the same for all tokens and layers; each gate's weight on it sets how
    often the neuron fires. Such a weight has 16 values, so that there are 16 rates. In opt the bias of up sets it.

    active: mean share of neurons that fire for a token. common: share of the variance of embeddings that all tokens
    have in common, so that neighbours fire the same neurons beyond what the rates give.
    """

    activation: str
    active: float
    common: float = 0.3

    @property
    def bias_step(self) -> float:
        """Between two neighbouring weights, in deviations of the gate."""
        return 0.455

    def codes(self, num_neurons: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        """The 4-bit code of each neuron's weight on the constant channel."""
        levels = np.array([0.5 * math.erfc((8 - code) * self.bias_step / math.sqrt(2)) for code in range(16)])
        rates = self._rates(num_neurons, levels[0], levels[-1])
        nearest = np.abs(np.log(rates[:, None]) - np.log(levels)).argmin(axis=1)
        return rng.permutation(nearest).astype(np.uint8)

    def biases(self, num_neurons: int, rng: np.random.Generator) -> NDArray[np.float32]:
        """Of each neuron, in deviations of what it is added to."""
        inverse = NormalDist().inv_cdf
        return rng.permutation([inverse(rate) for rate in self._rates(num_neurons, 1e-4, 0.999)]).astype(np.float32)

    def _rates(self, num_neurons: int, least: float, most: float) -> NDArray[np.float64]:
        """How often neurons fire, a power of the rank."""
        ranks = np.arange(1, num_neurons + 1) / num_neurons
        low, high = 0.0, 1e3
        for _ in range(60):  # the factor that gives the mean, each rate cut at what there is
            factor = (low + high) / 2
            rates = np.clip(factor * self.active * ranks**-0.8, least, most)
            low, high = (factor, high) if rates.mean() < self.active else (low, factor)
        return rates


def planted_vector(name: str, size: int, planted: Planted) -> NDArray[np.float32]:
    """Norms keep attention small, and channel 0 as large before the gates as `Planted.bias_step` says; biases are 0,
    but those of an up without a gate.
    """
    if name.endswith("ffn_up.bias"):
        return planted.biases(size, np.random.default_rng(hash_of(name)))
    values = np.full(size, 0 if name.endswith(".bias") else 1, np.float32)
    if name.endswith("attn_norm.weight"):
        values *= 0.1
    if name.endswith("ffn_norm.weight"):
        # in units of a gate's deviation, a code more on channel 0 counts as much as the scale of weights of deviation 1
        values[0] = planted.bias_step / Q4_0_SCALE
    return values


def planted_embedding(
    planted: Planted, dims: tuple[int, ...], rng: np.random.Generator, *, is_gated: bool
) -> Iterator[NDArray[np.float16]]:
    """Rows of deviation 1, of which tokens have `common` in common; channel 0 is the constant one of gates."""
    shared = rng.standard_normal(dims[1], np.float32)
    for start in range(0, dims[0], 1024):
        own = rng.standard_normal((min(1024, dims[0] - start), dims[1]), np.float32)
        rows = math.sqrt(planted.common) * shared + math.sqrt(1 - planted.common) * own
        if is_gated:
            rows[:, 0] = math.sqrt(dims[1])
        yield rows.astype(np.float16)


def plant(name: str, dims: tuple[int, ...], blocks: NDArray[np.uint8], start: int, planted: Planted) -> None:
    """Blocks of Q4_0 from `start` on: the gates' weights on channel 0; what is added to the residual is little, and
    nothing on channel 0. Half of the scales are negative: codes have a mean, which would add up where neurons only add.
    """
    row_blocks, num_rows = dims[-1] // 32, dims[-2]  # of one expert, where there are some
    of_matrix = np.arange(start, start + len(blocks)) // row_blocks % num_rows
    rng = np.random.default_rng((hash_of(name), start))
    if name.endswith(("attn_output.weight", "ffn_down.weight", "ffn_down_exps.weight")):
        put_half(blocks, 0, 0.1 * Q4_0_SCALE / math.sqrt(dims[-1]))
        blocks[of_matrix == 0, 0:2] = 0
    blocks[:, 1] ^= (rng.random(len(blocks)) < 0.5).astype(np.uint8) << 7
    if name.endswith(("ffn_gate.weight", "ffn_gate_exps.weight")):
        planting, num_all = np.random.default_rng(hash_of(name)), math.prod(dims[:-1])
        codes = np.concatenate([planted.codes(num_rows, planting) for _ in range(num_all // num_rows)])
        first = -(-start // row_blocks)
        rows = np.arange(first, min(num_all, -(-(start + len(blocks)) // row_blocks)))
        at = rows * row_blocks - start
        blocks[at, 1] &= 0x7F
        blocks[at, 2] = (blocks[at, 2] & 0xF0) | codes[rows]


def hash_of(name: str) -> int:
    return int.from_bytes(name.encode()[-16:], "little") % (2**63)


def put_half(blocks: NDArray[np.uint8], offset: int, value: float) -> None:
    blocks[:, offset : offset + 2] = np.array([value], np.float16).view(np.uint8)
