"""IQ1, IQ2 and IQ3: patterns of a grid, signs and small scales, taken apart into four-bit codes and integer factors.

A code is the index of a magnitude, with the sign (IQ1: the direction of the shift) in bit 3; `layouts.VALUES` has what
it stands for. Source of every layout: the ggml block structures.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from isotherm.quantization.iq_grids import grid
from isotherm.types import QuantType

U8 = NDArray[np.uint8]
Blocks = NDArray[np.void]

# Seven bits of signs, and the eighth that makes the number of ones even.
_SEVEN_BITS = np.arange(128, dtype=np.uint8)
_EVEN_SIGNS: U8 = _SEVEN_BITS | (np.unpackbits(_SEVEN_BITS[:, None], axis=1).sum(axis=1) % 2 << 7).astype(np.uint8)

BLOCKS: dict[QuantType, np.dtype[np.void]] = {
    # high: per 32 columns four times three bits of pattern number, three bits of scale, the direction of the shift
    QuantType.IQ1_S: np.dtype([("d", "<u2"), ("patterns", "u1", 32), ("high", "<u2", 8)]),
    # high: a nibble per pattern, as above; scales: per 64 columns four times three bits, above them a nibble of d
    QuantType.IQ1_M: np.dtype([("patterns", "u1", 32), ("high", "u1", 16), ("scales", "<u2", 4)]),
    # per 32 columns four pattern numbers, then four times seven bits of signs and the scale
    QuantType.IQ2_XXS: np.dtype([("d", "<u2"), ("groups", [("patterns", "u1", 4), ("signs", "<u4")], 8)]),
    QuantType.IQ2_XS: np.dtype([("d", "<u2"), ("patterns", "<u2", 32), ("scales", "u1", 8)]),
    QuantType.IQ2_S: np.dtype(
        [("d", "<u2"), ("patterns", "u1", 32), ("signs", "u1", 32), ("high", "u1", 8), ("scales", "u1", 8)]
    ),
    QuantType.IQ3_XXS: np.dtype([("d", "<u2"), ("patterns", "u1", 64), ("signs", "<u4", 8)]),
    QuantType.IQ3_S: np.dtype(
        [("d", "<u2"), ("patterns", "u1", 64), ("high", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4)]
    ),
}
# What d is divided by, so that values and factors are integers: d * (scale + 1/2) / 4 is (d / 8) * (2 * scale + 1).
DIVISORS: dict[QuantType, int] = {
    QuantType.IQ1_S: 8,  # value: -1, 0, 1, shifted by an eighth
    QuantType.IQ1_M: 8,
    QuantType.IQ2_XXS: 8,
    QuantType.IQ2_XS: 8,
    QuantType.IQ2_S: 8,
    QuantType.IQ3_XXS: 4,
    QuantType.IQ3_S: 1,
}


def pattern_codes(blocks: Blocks, quant_type: QuantType) -> U8:
    """Four-bit codes [rows, columns] of `blocks` [rows, blocks]."""
    numbers, signs = _patterns_and_signs(blocks, quant_type)
    magnitudes = grid(quant_type)[numbers].reshape(*blocks.shape, 32, 8)
    codes: U8 = magnitudes | signs << 3
    return codes.reshape(len(blocks), -1)


def pattern_factors(blocks: Blocks, quant_type: QuantType) -> U8:
    """Odd factors of the scale, [rows, blocks, groups]: 8 groups of 32 columns or 16 of 16."""
    match quant_type:
        case QuantType.IQ1_S:
            scales = blocks["high"] >> 12 & 7
        case QuantType.IQ1_M:
            scales = _spread(blocks["scales"], 3, 4)
        case QuantType.IQ2_XXS:
            scales = blocks["groups"]["signs"] >> 28
        case QuantType.IQ3_XXS:
            scales = blocks["signs"] >> 28
        case _:
            scales = _spread(blocks["scales"], 4, 2)
    return (2 * scales + 1).astype(np.uint8)


def scattered_half(blocks: Blocks) -> NDArray[np.uint16]:
    """The float16 bits of an IQ1_M block's d, which lie in the top nibbles of its scales."""
    nibbles = (blocks["scales"] >> 12) << np.array([0, 4, 8, 12], np.uint16)
    bits: NDArray[np.uint16] = np.bitwise_or.reduce(nibbles, axis=-1)
    return bits


def _patterns_and_signs(blocks: Blocks, quant_type: QuantType) -> tuple[NDArray[Any], U8]:
    """Pattern numbers [rows, blocks, patterns] and sign bits that broadcast to [rows, blocks, 32, 8]."""
    match quant_type:
        case QuantType.IQ1_S:
            shifts: U8 = np.repeat(blocks["high"] >> 15, 4, axis=-1)[..., None].astype(np.uint8)
            return blocks["patterns"] | _spread(blocks["high"], 3, 4) << 8, shifts
        case QuantType.IQ1_M:
            nibbles = _spread(blocks["high"], 4, 2)
            return blocks["patterns"] | (nibbles & 7).astype(np.uint16) << 8, (nibbles >> 3)[..., None].astype(np.uint8)
        case QuantType.IQ2_XXS:
            signs = _EVEN_SIGNS[_spread(blocks["groups"]["signs"], 7, 4)]
            return blocks["groups"]["patterns"].reshape(*blocks.shape, 32), _bits(signs)
        case QuantType.IQ2_XS:
            return blocks["patterns"] & 511, _bits(_EVEN_SIGNS[blocks["patterns"] >> 9])
        case QuantType.IQ3_XXS:
            return blocks["patterns"], _bits(_EVEN_SIGNS[_spread(blocks["signs"], 7, 4)])
        case QuantType.IQ2_S:
            high = _spread(blocks["high"], 2, 4)
        case _:
            high = _bits(blocks["high"]).reshape(*blocks.shape, 64)
    return blocks["patterns"] | high.astype(np.uint16) << 8, _bits(blocks["signs"])


def _spread(words: NDArray[Any], bits: int, count: int) -> NDArray[Any]:
    """The `count` lowest fields of so many bits of each word: [..., words] to [..., words * count]."""
    shifts = (np.arange(count) * bits).astype(words.dtype)
    fields: NDArray[Any] = words[..., None] >> shifts & words.dtype.type((1 << bits) - 1)
    return fields.reshape(*words.shape[:-1], -1)


def _bits(signs: U8) -> U8:
    """The eight bits of each byte, lowest first: [..., bytes, 8]."""
    return np.unpackbits(np.ascontiguousarray(signs)[..., None], axis=-1, bitorder="little")
