"""What the bytes of a quantised row mean: the NumPy truth that every kernel is held against.

Source of every layout: GGUF specification and the ggml block structures. All numbers are little-endian.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isotherm.types import QuantType

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
Blocks = NDArray[np.void]  # [rows, blocks] of one of the records in BLOCKS

# Fields of a block. low: low four bits of each code, two to a byte (all of it for Q8_0); high: the bits above them;
# d, m, dmin: float16, kept as bits; scales: six-bit scales and minima of eight groups (Q6_K: int8, sixteen groups).
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
}
ZERO_POINTS: dict[QuantType, int] = {
    QuantType.Q4_0: 8,
    QuantType.Q5_0: 16,
    QuantType.Q6_K: 32,
    QuantType.Q8_0: 128,
}  # all other types: 0


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
    scale, minimum = half_to_float(blocks["d"]), None
    match quant_type:
        case QuantType.Q4_1 | QuantType.Q5_1:
            minimum = half_to_float(blocks["m"])
        case QuantType.Q4_K | QuantType.Q5_K:
            factors, minima = unpack_scales(blocks["scales"])
            scale = (scale[..., None] * factors).reshape(len(raw), -1)
            minimum = -(half_to_float(blocks["dmin"])[..., None] * minima).reshape(len(raw), -1)
        case QuantType.Q6_K:
            scale = (scale[..., None] * blocks["scales"]).reshape(len(raw), -1)
    return Fields(
        codes=unpack_codes(blocks, quant_type),
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


def unpack_codes(blocks: Blocks, quant_type: QuantType) -> U8:
    """Unsigned codes [rows, columns] of `blocks` [rows, blocks]; Q8_0 is moved up by 128."""
    codes = np.empty((*blocks.shape, quant_type.block_elements), np.uint8)
    if quant_type is QuantType.Q8_0:
        np.bitwise_xor(blocks["low"], 0x80, out=codes)
    else:
        nibbles = codes.reshape(*blocks.shape, *_nibble_shape(quant_type))
        low = blocks["low"].reshape(*blocks.shape, nibbles.shape[2], nibbles.shape[4])
        np.bitwise_and(low, 0x0F, out=nibbles[..., 0, :])
        np.right_shift(low, 4, out=nibbles[..., 1, :])
    match quant_type:
        case QuantType.Q5_0 | QuantType.Q5_1:
            codes |= np.unpackbits(blocks["high"], axis=-1, bitorder="little") << 4
        case QuantType.Q5_K | QuantType.Q6_K:
            planes = codes.reshape(*blocks.shape, *_plane_shape(quant_type))
            high = blocks["high"].reshape(*planes.shape[:3], 32)
            bits = CODE_BITS[quant_type] - 4
            for plane in range(planes.shape[3]):
                planes[..., plane, :] |= ((high >> plane * bits) & ((1 << bits) - 1)) << 4
    return codes.reshape(len(blocks), -1)


def repack_codes(blocks: Blocks, codes: U8, quant_type: QuantType) -> None:
    """Writes `codes` [rows, columns] into `blocks`: the inverse of `unpack_codes`."""
    if quant_type is QuantType.Q8_0:
        blocks["low"] = codes.reshape(blocks["low"].shape) ^ 0x80
        return
    nibbles = codes.reshape(*blocks.shape, *_nibble_shape(quant_type)) & 0x0F
    blocks["low"] = (nibbles[..., 0, :] | nibbles[..., 1, :] << 4).reshape(blocks["low"].shape)
    match quant_type:
        case QuantType.Q5_0 | QuantType.Q5_1:
            blocks["high"] = np.packbits(codes.reshape(*blocks.shape, 32) >> 4, axis=-1, bitorder="little")
        case QuantType.Q5_K | QuantType.Q6_K:
            planes = codes.reshape(*blocks.shape, *_plane_shape(quant_type)) >> 4
            shifts = (np.arange(planes.shape[3]) * (CODE_BITS[quant_type] - 4)).astype(np.uint8)
            high = np.bitwise_or.reduce(planes << shifts[:, None], axis=3)
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


def _nibble_shape(quant_type: QuantType) -> tuple[int, int, int]:
    """(spans, 2, bytes): a span's low nibbles come first, then its high ones."""
    match quant_type:
        case QuantType.Q6_K:
            return 2, 2, 64
        case QuantType.Q4_K | QuantType.Q5_K:
            return 4, 2, 32
        case _:
            return 1, 2, 16


def _plane_shape(quant_type: QuantType) -> tuple[int, int, int]:
    """(spans, planes, 32): one byte of `high` serves the same column of each plane."""
    return (2, 4, 32) if quant_type is QuantType.Q6_K else (1, 8, 32)


def _floats(raw: U8, quant_type: QuantType, num_columns: int) -> F32:
    bits = view_floats(raw, quant_type, num_columns)
    match quant_type:
        case QuantType.F32:
            return bits.view("<f4").astype(np.float32)
        case QuantType.F16:
            return bits.view("<f2").astype(np.float32)
        case _:
            return (bits.astype(np.uint32) << 16).view(np.float32)
