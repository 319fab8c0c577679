"""What the bytes of a quantised row mean: the NumPy truth that every kernel is held against.

Source of every layout: GGUF specification and the ggml block structures. All numbers are little-endian.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isotherm.quantization import codebooks
from isotherm.types import QuantType

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
Blocks = NDArray[np.void]  # [rows, blocks] of one of the records in BLOCKS

# Fields of a block. low: low four (Q2_K, Q3_K, TQ2_0: two) bits of each code, as many to a byte as fit (Q8_0: all of
# it; TQ1_0: five digits of base 3); high: the bits above them; d, m, dmin: float16, kept as bits; scales: six-bit
# scales and minima of eight groups (Q6_K: int8, sixteen groups; Q3_K: six bits, sixteen groups; Q2_K: scale and minimum
# in a byte); e8m0, e4m3: scales of these float formats.
BLOCKS: dict[QuantType, np.dtype[np.void]] = {
    QuantType.Q4_0: np.dtype([("d", "<u2"), ("low", "u1", 16)]),
    QuantType.Q4_1: np.dtype([("d", "<u2"), ("m", "<u2"), ("low", "u1", 16)]),
    QuantType.Q5_0: np.dtype([("d", "<u2"), ("high", "u1", 4), ("low", "u1", 16)]),
    QuantType.Q5_1: np.dtype([("d", "<u2"), ("m", "<u2"), ("high", "u1", 4), ("low", "u1", 16)]),
    QuantType.Q8_0: np.dtype([("d", "<u2"), ("low", "u1", 32)]),
    QuantType.Q4_K: np.dtype([("d", "<u2"), ("dmin", "<u2"), ("scales", "u1", 12), ("low", "u1", 128)]),
    QuantType.Q5_K: np.dtype(
        [("d", "<u2"), ("dmin", "<u2"), ("scales", "u1", 12), ("high", "u1", 32), ("low", "u1", 128)]
    ),
    QuantType.Q6_K: np.dtype([("low", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), ("d", "<u2")]),
    QuantType.IQ4_NL: np.dtype([("d", "<u2"), ("low", "u1", 16)]),
    QuantType.IQ4_XS: np.dtype([("d", "<u2"), ("scales_high", "<u2"), ("scales_low", "u1", 4), ("low", "u1", 128)]),
    QuantType.MXFP4: np.dtype([("e8m0", "u1"), ("low", "u1", 16)]),
    QuantType.NVFP4: np.dtype([("e4m3", "u1", 4), ("low", "u1", 32)]),
    QuantType.Q2_K: np.dtype([("scales", "u1", 16), ("low", "u1", 64), ("d", "<u2"), ("dmin", "<u2")]),
    QuantType.Q3_K: np.dtype([("high", "u1", 32), ("low", "u1", 64), ("scales", "u1", 12), ("d", "<u2")]),
    QuantType.TQ1_0: np.dtype([("low", "u1", 52), ("d", "<u2")]),
    QuantType.TQ2_0: np.dtype([("low", "u1", 64), ("d", "<u2")]),
    **codebooks.BLOCKS,
}
FLOAT_BITS: dict[QuantType, str] = {QuantType.F32: "<u4", QuantType.F16: "<u2", QuantType.BF16: "<u2"}
CODE_BITS: dict[QuantType, int] = {
    QuantType.Q4_0: 4,
    QuantType.Q4_1: 4,
    QuantType.Q4_K: 4,
    QuantType.Q5_0: 5,
    QuantType.Q5_1: 5,
    QuantType.Q5_K: 5,
    QuantType.Q6_K: 6,
    QuantType.Q8_0: 8,
    QuantType.IQ4_NL: 4,
    QuantType.IQ4_XS: 4,
    QuantType.MXFP4: 4,
    QuantType.NVFP4: 4,
    QuantType.Q2_K: 2,
    QuantType.Q3_K: 3,
    QuantType.TQ1_0: 2,
    QuantType.TQ2_0: 2,
    **dict.fromkeys(codebooks.BLOCKS, 4),
}
ZERO_POINTS: dict[QuantType, int] = {
    QuantType.Q4_0: 8,
    QuantType.Q5_0: 16,
    QuantType.Q6_K: 32,
    QuantType.Q8_0: 128,
    QuantType.IQ4_NL: 128,
    QuantType.IQ4_XS: 128,
    QuantType.MXFP4: 16,
    QuantType.NVFP4: 32,
    QuantType.Q3_K: 4,
    QuantType.TQ1_0: 1,
    QuantType.TQ2_0: 1,
    QuantType.IQ1_S: 16,
    QuantType.IQ1_M: 32,
    QuantType.IQ2_XXS: 64,
    QuantType.IQ2_XS: 64,
    QuantType.IQ2_S: 64,
    QuantType.IQ3_XXS: 64,
    QuantType.IQ3_S: 16,
}  # all other types: 0. Of types with VALUES our choice: codes become unsigned, below 128 where they can.
_NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled; the scales are halved
_SHIFTED = (-7, 1, 9, 0, 0, 0, 0, 0, -9, -1, 7, 0, 0, 0, 0, 0)  # in eighths: -1, 0, 1, plus or minus an eighth
_THREE = (8, 25, 43, 0, 0, 0, 0, 0, -8, -25, -43, 0, 0, 0, 0, 0)
_EIGHT = (4, 12, 20, 28, 36, 44, 52, 62, -4, -12, -20, -28, -36, -44, -52, -62)
_EIGHT_ODD = (1, 3, 5, 7, 9, 11, 13, 15, -1, -3, -5, -7, -9, -11, -13, -15)
# What a stored code of four bits stands for; the kernels' copies are in native/kernels/codecs.inl.
VALUES: dict[QuantType, tuple[int, ...]] = {
    QuantType.IQ4_NL: _NONLINEAR,
    QuantType.IQ4_XS: _NONLINEAR,
    QuantType.MXFP4: _E2M1,
    QuantType.NVFP4: _E2M1,
    QuantType.IQ1_S: _SHIFTED,
    QuantType.IQ1_M: _SHIFTED,
    QuantType.IQ2_XXS: _THREE,
    QuantType.IQ2_XS: _THREE,
    QuantType.IQ2_S: _THREE,
    QuantType.IQ3_XXS: _EIGHT,
    QuantType.IQ3_S: _EIGHT_ODD,
}
_EVEN_SHIFTS = np.arange(0, 16, 2, dtype=np.uint16)


@dataclass(frozen=True)
class Fields:
    """A quantised matrix taken apart: value = scale * (code - zero_point) + minimum, per group of columns."""

    codes: U8  # [rows, columns], never negative
    scale: F32  # [rows, columns / group_size], exact product where the type multiplies two scales
    minimum: F32 | None  # the same shape
    zero_point: int
    group_size: int


def decode(raw: U8, quant_type: QuantType, num_columns: int) -> Fields:
    """Takes `raw` [rows, row_bytes] of a quantised type apart; float types have no codes (assert)."""
    blocks = view_blocks(raw, quant_type, num_columns)
    scale, minimum = base_scale(blocks, quant_type), None
    match quant_type:
        case QuantType.Q4_1 | QuantType.Q5_1:
            minimum = half_to_float(blocks["m"])
        case QuantType.Q4_K | QuantType.Q5_K:
            factors, minima = unpack_scales(blocks["scales"])
            scale = (scale[..., None] * factors).reshape(len(raw), -1)
            minimum = -(half_to_float(blocks["dmin"])[..., None] * minima).reshape(len(raw), -1)
        case QuantType.Q2_K:
            scale = (scale[..., None] * (blocks["scales"] & 0x0F)).reshape(len(raw), -1)
            minimum = -(half_to_float(blocks["dmin"])[..., None] * (blocks["scales"] >> 4)).reshape(len(raw), -1)
        case QuantType.TQ1_0 | QuantType.TQ2_0:
            scale = np.repeat(scale, 8, axis=1)
        case _ if quant_type.block_elements == 256:
            scale = (scale[..., None] * unpack_factors(blocks, quant_type)).reshape(len(raw), -1)
    codes = unpack_codes(blocks, quant_type)
    if quant_type in VALUES:
        codes = (np.array(VALUES[quant_type]) + ZERO_POINTS[quant_type]).astype(np.uint8)[codes]
    return Fields(
        codes=codes,
        scale=scale,
        minimum=minimum,
        zero_point=ZERO_POINTS.get(quant_type, 0),
        group_size=num_columns // max(scale.shape[1], 1),
    )


def dequantise(raw: U8, quant_type: QuantType, num_columns: int) -> F32:
    """Values of `raw` [rows, row_bytes] as float32 [rows, columns]; each operation rounds once, in this order."""
    if quant_type.is_float:
        return _floats(raw, quant_type, num_columns)
    fields = decode(raw, quant_type, num_columns)
    codes = fields.codes.reshape(*fields.scale.shape, fields.group_size)
    values = fields.scale[..., None] * (codes.astype(np.float32) - np.float32(fields.zero_point))
    if fields.minimum is not None:
        values += fields.minimum[..., None]
    return values.reshape(len(raw), num_columns)


def quantise_q8_0(values: F32) -> U8:
    """Rows of float32, a multiple of 32 columns, as rows of Q8_0: to nearest, halves away from zero.

    Source: quantize_row_q8_0_ref in ggml-quants.c. Packed files keep what it gives: another rounding is another
    FORMAT_VERSION of them.
    """
    x = values.reshape(len(values), values.shape[1] // 32, 32)
    scale = np.abs(x).max(axis=2, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # what is no number stays none in its scale
        scaled = x * np.where(scale == 0, np.float32(0), 1 / scale)
        whole = np.floor(np.abs(scaled))
        codes = np.copysign(whole + (np.abs(scaled) - whole >= 0.5), scaled)
        blocks = np.empty(x.shape[:2], BLOCKS[QuantType.Q8_0])
        blocks["d"] = scale[..., 0].astype("<f2").view("<u2")
        blocks["low"] = codes.astype(np.int8).view(np.uint8)
    return blocks.view(np.uint8)


def view_blocks(raw: U8, quant_type: QuantType, num_columns: int) -> Blocks:
    """`raw` [rows, row_bytes] as records [rows, blocks], without a copy where rows are contiguous."""
    assert raw.dtype == np.uint8
    assert raw.ndim == 2
    assert raw.shape[1] == quant_type.row_bytes(num_columns)
    return np.ascontiguousarray(raw).view(BLOCKS[quant_type])


def view_floats(raw: U8, quant_type: QuantType, num_columns: int) -> NDArray[np.unsignedinteger]:
    """The bits of a float type [rows, columns], without a copy where rows are contiguous."""
    assert raw.dtype == np.uint8
    assert raw.ndim == 2
    assert raw.shape[1] == quant_type.row_bytes(num_columns)
    return np.ascontiguousarray(raw).view(FLOAT_BITS[quant_type])


def half_to_float(bits: NDArray[np.uint16]) -> F32:
    return bits.view("<f2").astype(np.float32)


def base_scale(blocks: Blocks, quant_type: QuantType) -> F32:
    """What a block's scales are multiples of [rows, blocks]; where it has no such number, its scales themselves."""
    match quant_type:
        case QuantType.MXFP4:
            exponents = blocks["e8m0"].astype(np.int32)  # 2 ** (e - 128), of which the two least are subnormal
            return np.where(exponents > 1, exponents - 1 << 23, exponents + 1 << 21).view(np.float32)
        case QuantType.NVFP4:
            small = blocks["e4m3"].astype("<u2").reshape(len(blocks), -1)  # no sign, and 127 is 0; halved
            halves = np.where(small == 127, np.uint16(0), (small & 127) << 7)
            return half_to_float(halves) * np.float32(128)
        case QuantType.IQ1_M:
            d = half_to_float(codebooks.scattered_half(blocks))
        case _:
            d = half_to_float(blocks["d"])
    if quant_type not in codebooks.DIVISORS:
        return d
    with np.errstate(invalid="ignore"):  # what is not a number stays one
        return d / np.float32(codebooks.DIVISORS[quant_type])


def unpack_factors(blocks: Blocks, quant_type: QuantType) -> NDArray[np.integer]:
    """Integers within int8 that `base_scale` is multiplied by [rows, blocks, groups]; not for types with minima."""
    match quant_type:
        case QuantType.Q6_K:
            factors: NDArray[np.integer] = blocks["scales"]
        case QuantType.Q3_K:
            low, high = blocks["scales"][..., :8], blocks["scales"][..., 8:]
            top = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
            factors = (np.concatenate([low & 0x0F, low >> 4], axis=-1) | top << 4).astype(np.int8) - np.int8(32)
        case QuantType.IQ4_XS:
            low = np.stack([blocks["scales_low"] & 0x0F, blocks["scales_low"] >> 4], axis=-1).reshape(*blocks.shape, 8)
            top = blocks["scales_high"][..., None] >> _EVEN_SHIFTS & np.uint16(3)
            factors = (low | top << 4).astype(np.int8) - np.int8(32)
        case _:
            factors = codebooks.pattern_factors(blocks, quant_type)
    return factors


def repack_factors(blocks: Blocks, factors: NDArray[np.integer], quant_type: QuantType) -> None:
    """Writes `factors` [rows, blocks, groups] into `blocks`: the inverse of `unpack_factors`, IQ1 to IQ3 left out."""
    six_bits = (factors + 32).astype(np.uint8)
    match quant_type:
        case QuantType.Q6_K:
            blocks["scales"] = factors
        case QuantType.Q3_K:
            top = (six_bits >> 4).reshape(*blocks.shape, 4, 4) << np.array([[0], [2], [4], [6]], np.uint8)
            low = (six_bits[..., :8] & 0x0F) | six_bits[..., 8:] << 4
            blocks["scales"] = np.concatenate([low, np.bitwise_or.reduce(top, axis=-2)], axis=-1)
        case _:
            assert quant_type is QuantType.IQ4_XS
            blocks["scales_low"] = (six_bits[..., 0::2] & 0x0F) | six_bits[..., 1::2] << 4
            wide = (six_bits >> 4).astype(np.uint16) << _EVEN_SHIFTS
            blocks["scales_high"] = np.bitwise_or.reduce(wide, axis=-1)


def unpack_codes(blocks: Blocks, quant_type: QuantType) -> U8:
    """Unsigned codes [rows, columns] of `blocks` [rows, blocks], below 2 ** CODE_BITS; Q8_0 is moved up by 128."""
    if quant_type in codebooks.BLOCKS:
        return codebooks.pattern_codes(blocks, quant_type)
    if quant_type is QuantType.TQ1_0:
        return _ternary_digits(blocks)
    codes = np.empty((*blocks.shape, quant_type.block_elements), np.uint8)
    if quant_type is QuantType.Q8_0:
        np.bitwise_xor(blocks["low"], 0x80, out=codes)
        return codes.reshape(len(blocks), -1)
    shape = _low_shape(quant_type)
    spans, low_bits = codes.reshape(*blocks.shape, *shape), 8 // shape[1]
    low = blocks["low"].reshape(*blocks.shape, shape[0], shape[2])
    np.bitwise_and(low, (1 << low_bits) - 1, out=spans[..., 0, :])
    for i in range(1, shape[1] - 1):
        np.bitwise_and(low >> i * low_bits, (1 << low_bits) - 1, out=spans[..., i, :])
    np.right_shift(low, 8 - low_bits, out=spans[..., shape[1] - 1, :])
    match quant_type:
        case QuantType.Q5_0 | QuantType.Q5_1:
            codes |= np.unpackbits(blocks["high"], axis=-1, bitorder="little") << 4
        case QuantType.Q3_K | QuantType.Q5_K | QuantType.Q6_K:
            planes = codes.reshape(*blocks.shape, *_plane_shape(quant_type))
            high = blocks["high"].reshape(*planes.shape[:3], 32)
            bits = CODE_BITS[quant_type] - low_bits
            for plane in range(planes.shape[3]):
                planes[..., plane, :] |= ((high >> plane * bits) & ((1 << bits) - 1)) << low_bits
    return codes.reshape(len(blocks), -1)


def repack_codes(blocks: Blocks, codes: U8, quant_type: QuantType) -> None:
    """Writes `codes` [rows, columns] into `blocks`: the inverse of `unpack_codes`.

    There is none for TQ1_0 and IQ1 to IQ3 (assert).
    """
    assert quant_type is not QuantType.TQ1_0
    assert quant_type not in codebooks.BLOCKS
    if quant_type is QuantType.Q8_0:
        blocks["low"] = codes.reshape(blocks["low"].shape) ^ 0x80
        return
    shape = _low_shape(quant_type)
    low_bits = 8 // shape[1]
    spans = codes.reshape(*blocks.shape, *shape) & ((1 << low_bits) - 1)
    low = np.bitwise_or.reduce(spans << _shifts(shape[1], low_bits), axis=3)
    blocks["low"] = low.reshape(blocks["low"].shape)
    match quant_type:
        case QuantType.Q5_0 | QuantType.Q5_1:
            blocks["high"] = np.packbits(codes.reshape(*blocks.shape, 32) >> 4, axis=-1, bitorder="little")
        case QuantType.Q3_K | QuantType.Q5_K | QuantType.Q6_K:
            planes = codes.reshape(*blocks.shape, *_plane_shape(quant_type)) >> low_bits
            shifts = _shifts(planes.shape[3], CODE_BITS[quant_type] - low_bits)
            high = np.bitwise_or.reduce(planes << shifts, axis=3)
            blocks["high"] = high.reshape(blocks["high"].shape)


def unpack_scales(packed: U8) -> tuple[U8, U8]:
    """Six-bit (scales, minima), each [..., 8], of a Q4_K or Q5_K block's twelve bytes `packed` [..., 12]."""
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 0x3F, (third & 0x0F) | (first >> 6) << 4], axis=-1)
    minima = np.concatenate([second & 0x3F, third >> 4 | (second >> 6) << 4], axis=-1)
    return scales, minima


def repack_scales(scales: U8, minima: U8) -> U8:
    """The inverse of `unpack_scales`."""
    first = scales[..., :4] | (scales[..., 4:] >> 4) << 6
    second = minima[..., :4] | (minima[..., 4:] >> 4) << 6
    third = (scales[..., 4:] & 0x0F) | (minima[..., 4:] & 0x0F) << 4
    return np.concatenate([first, second, third], axis=-1)


def _low_shape(quant_type: QuantType) -> tuple[int, int, int]:
    """(spans, codes in a byte, bytes): the lowest codes of a span's bytes come first, then those above them."""
    match quant_type:
        case QuantType.Q6_K:
            return 2, 2, 64
        case QuantType.Q4_K | QuantType.Q5_K:
            return 4, 2, 32
        case QuantType.Q2_K | QuantType.Q3_K | QuantType.TQ2_0:
            return 2, 4, 32
        case QuantType.IQ4_XS:
            return 8, 2, 16
        case QuantType.NVFP4:
            return 4, 2, 8
        case _:
            return 1, 2, 16


def _plane_shape(quant_type: QuantType) -> tuple[int, int, int]:
    """(spans, planes, 32): one byte of `high` serves the same column of each plane."""
    return (2, 4, 32) if quant_type is QuantType.Q6_K else (1, 8, 32)


def _shifts(count: int, bits: int) -> U8:
    return (np.arange(count) * bits).astype(np.uint8)[:, None]


def _ternary_digits(blocks: Blocks) -> U8:
    """TQ1_0: a byte is a fraction of 256, whose first five digits in base 3 (of the last four bytes: four) are codes of
    the same place in as many runs of columns."""
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
    runs = ((0, 32, 5), (32, 48, 5), (48, 52, 4))
    digits = [(blocks["low"][..., None, a:b] * powers[:count]).reshape(*blocks.shape, -1) for a, b, count in runs]
    fractions = np.concatenate(digits, axis=-1).astype(np.uint16)  # each times 3 ** place, modulo 256
    return (fractions * 3 >> 8).astype(np.uint8).reshape(len(blocks), -1)


def _floats(raw: U8, quant_type: QuantType, num_columns: int) -> F32:
    bits = view_floats(raw, quant_type, num_columns)
    match quant_type:
        case QuantType.F32:
            return bits.view("<f4").astype(np.float32)
        case QuantType.F16:
            return bits.view("<f2").astype(np.float32)
        case _:
            return (bits.astype(np.uint32) << 16).view(np.float32)
