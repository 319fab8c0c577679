"""P32: weights in the order in which the native kernels read them, one sequential stream per thread.

    matrix = panel, panel, ...        a panel gives 32 outputs: tile A (16 rows) and tile B (the next 16 rows),
                                      or, for a pair (gate, up): tile A 16 rows of gate, tile B the same rows of up
    panel  = for each chunk of 256 columns: [tile A][tile B]          the last chunk may be shorter
    tile   = units; a unit (32, 64, 128 or 256 columns by type) is [scales][group][group]...
    group  = 32 columns x 16 rows, one 64-byte line per code bit

A *quad* is 4 consecutive columns; its line is [16 rows][4 columns], the operand of one dot-product instruction.

    2-bit line j = 0, 1        bits 2i..2i+1 of byte b: quad 4j + i at byte b
    3-bit codes, line 2        bit j of byte b: top bit of quad j at byte b
    nibble line j = 0..3       low nibbles: quad 2j, high nibbles: quad 2j + 1
    5-bit codes, line 4        bit j of byte b: top bit of quad j at byte b
    6-bit codes, lines 4, 5    line 4 + p, bits 2i..2i+1 of byte b: top two bits of quad 4p + i at byte b
    8-bit codes, line j        quad j, one byte per code (q + 128)
    floats                     no groups: per column, 16 rows as stored

Rows are padded to whole tiles (a matrix: to whole panels), columns to a multiple of 64; padding is zero bytes, so its
scale is 0 (MXFP4: its codes). Scales keep the bits of the file: packing loses nothing, and `unpack_*` gives the source
bytes back. The types in TRANSCODED are packed as other codes of the same values, and their bytes do not come back:
IQ1 to IQ3 as four bits that index the type's VALUES, with a factor of d per group; TQ1_0 as TQ2_0.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isotherm.quantization import codebooks
from isotherm.quantization.layouts import (
    BLOCKS,
    CODE_BITS,
    U8,
    base_scale,
    repack_codes,
    repack_factors,
    repack_scales,
    unpack_codes,
    unpack_factors,
    unpack_scales,
    view_blocks,
    view_floats,
)
from isotherm.types import QuantType

TILE_ROWS = 16
PANEL_ROWS = 2 * TILE_ROWS
CHUNK_COLUMNS = 256
COLUMN_ALIGNMENT = 64
GROUP_COLUMNS = 32
NUM_QUADS = 8  # in a group

# Source bytes worked on at once: with codes and lines beside them they stay in a second-level cache.
_STEP_BYTES = 1 << 19

TRANSCODED = frozenset({QuantType.TQ1_0, *codebooks.BLOCKS})


@dataclass(frozen=True)
class Unit:
    """The smallest piece that repeats along the columns of a tile; the last axis of every field is the row."""

    columns: int
    record: np.dtype[np.void]


def _factored(bits: int, num_groups: int) -> Unit:
    """d_float: float32, since 16 halves would leave the record no multiple of a 64-byte line."""
    factors = [("factors", "i1", (num_groups, 16))] if num_groups else []
    return Unit(256, np.dtype([("d_float", "<f4", 16), *factors, ("lines", "<u4", (8, bits, 16))]))


# In every record: d, m, dmin are float16 bits; lines are [groups][bits][16 rows] words of a quad; factors: integers
# that d_float is multiplied by.
UNITS: dict[QuantType, Unit] = {
    QuantType.F32: Unit(1, np.dtype([("lines", "<u4", 16)])),
    QuantType.F16: Unit(1, np.dtype([("lines", "<u2", 16)])),
    QuantType.BF16: Unit(1, np.dtype([("lines", "<u2", 16)])),
    QuantType.Q4_0: Unit(64, np.dtype([("d", "<u2", (2, 16)), ("lines", "<u4", (2, 4, 16))])),
    QuantType.Q5_0: Unit(64, np.dtype([("d", "<u2", (2, 16)), ("lines", "<u4", (2, 5, 16))])),
    QuantType.Q8_0: Unit(64, np.dtype([("d", "<u2", (2, 16)), ("lines", "<u4", (2, 8, 16))])),
    QuantType.Q4_1: Unit(32, np.dtype([("d", "<u2", 16), ("m", "<u2", 16), ("lines", "<u4", (1, 4, 16))])),
    QuantType.Q5_1: Unit(32, np.dtype([("d", "<u2", 16), ("m", "<u2", 16), ("lines", "<u4", (1, 5, 16))])),
    # scales_low: [8 groups] scale & 15 | (minimum & 15) << 4; scales_high: [4 pairs of groups], the even group in the
    # low nibble, the odd one in the high: scale >> 4 | (minimum >> 4) << 2
    QuantType.Q4_K: Unit(
        256,
        np.dtype(
            [
                ("d", "<u2", 16),
                ("dmin", "<u2", 16),
                ("scales_low", "u1", (8, 16)),
                ("scales_high", "u1", (4, 16)),
                ("lines", "<u4", (8, 4, 16)),
            ]
        ),
    ),
    QuantType.Q5_K: Unit(
        256,
        np.dtype(
            [
                ("d", "<u2", 16),
                ("dmin", "<u2", 16),
                ("scales_low", "u1", (8, 16)),
                ("scales_high", "u1", (4, 16)),
                ("lines", "<u4", (8, 5, 16)),
            ]
        ),
    ),
    QuantType.Q6_K: _factored(6, 16),
    QuantType.IQ4_NL: Unit(64, np.dtype([("d", "<u2", (2, 16)), ("lines", "<u4", (2, 4, 16))])),
    QuantType.IQ4_XS: _factored(4, 8),
    QuantType.MXFP4: Unit(128, np.dtype([("e8m0", "u1", (4, 16)), ("lines", "<u4", (4, 4, 16))])),
    QuantType.NVFP4: Unit(64, np.dtype([("e4m3", "u1", (4, 16)), ("lines", "<u4", (2, 4, 16))])),
    # scales: [16 groups] scale | minimum << 4
    QuantType.Q2_K: Unit(
        256,
        np.dtype([("d", "<u2", 16), ("dmin", "<u2", 16), ("scales", "u1", (16, 16)), ("lines", "<u4", (8, 2, 16))]),
    ),
    QuantType.Q3_K: _factored(3, 16),
    QuantType.TQ1_0: _factored(2, 0),
    QuantType.TQ2_0: _factored(2, 0),
    QuantType.IQ1_S: _factored(4, 8),
    QuantType.IQ1_M: _factored(4, 16),
    QuantType.IQ2_XXS: _factored(4, 8),
    QuantType.IQ2_XS: _factored(4, 16),
    QuantType.IQ2_S: _factored(4, 16),
    QuantType.IQ3_XXS: _factored(4, 8),
    QuantType.IQ3_S: _factored(4, 8),
}


def padded_columns(num_columns: int) -> int:
    return -(-num_columns // COLUMN_ALIGNMENT) * COLUMN_ALIGNMENT


def tile_chunk_bytes(quant_type: QuantType, chunk_columns: int) -> int:
    """Bytes of one tile over `chunk_columns`, a multiple of 64 (of 256 for types with such blocks); units are whole."""
    assert chunk_columns % COLUMN_ALIGNMENT == 0
    assert quant_type.block_elements != 256 or chunk_columns % 256 == 0
    return _num_units(quant_type, chunk_columns) * UNITS[quant_type].record.itemsize


def _num_units(quant_type: QuantType, num_columns: int) -> int:
    return -(-num_columns // UNITS[quant_type].columns)


def panel_bytes(types: tuple[QuantType, QuantType], num_columns: int) -> int:
    """Bytes of one panel whose tiles A and B are of these types."""
    return sum(tile_chunk_bytes(quant_type, padded_columns(num_columns)) for quant_type in types)


def num_panels(num_rows: int, *, pair: bool) -> int:
    """Panels of a matrix of `num_rows`, or of a pair of matrices of `num_rows` each."""
    return -(-num_rows // (TILE_ROWS if pair else PANEL_ROWS))


def packed_bytes(types: tuple[QuantType, QuantType], num_rows: int, num_columns: int, *, pair: bool) -> int:
    """Bytes of a packed matrix (both types the same) or pair."""
    assert pair or types[0] is types[1]
    return num_panels(num_rows, pair=pair) * panel_bytes(types, num_columns)


def pack_matrix(raw: U8, quant_type: QuantType, num_columns: int) -> U8:
    """`raw` [rows, row_bytes] as P32 [packed_bytes]. Slices of rows that start at a panel's border pack alike."""
    return np.concatenate([np.empty(0, np.uint8), *matrix_pieces(raw, quant_type, num_columns)])


def pack_pair(raw_a: U8, type_a: QuantType, raw_b: U8, type_b: QuantType, num_columns: int) -> U8:
    """Two matrices of equal shape as P32 [packed_bytes]; slices may start at each sixteenth row."""
    return np.concatenate([np.empty(0, np.uint8), *pair_pieces(raw_a, type_a, raw_b, type_b, num_columns)])


def matrix_pieces(raw: U8, quant_type: QuantType, num_columns: int) -> Iterator[U8]:
    """What `pack_matrix` returns, a few panels at a time, in order."""
    for rows in _steps(raw, PANEL_ROWS):
        tiles = pack_tiles(raw[rows], quant_type, num_columns)
        if len(tiles) % 2:
            tiles = _zero_padded(tiles, len(tiles) + 1, tiles.shape[1])
        yield _interleave(tiles[0::2], quant_type, tiles[1::2], quant_type, num_columns)


def pair_pieces(raw_a: U8, type_a: QuantType, raw_b: U8, type_b: QuantType, num_columns: int) -> Iterator[U8]:
    """What `pack_pair` returns, a few panels at a time, in order."""
    assert len(raw_a) == len(raw_b)
    for rows in _steps(raw_a, TILE_ROWS):
        tiles_a = pack_tiles(raw_a[rows], type_a, num_columns)
        tiles_b = pack_tiles(raw_b[rows], type_b, num_columns)
        yield _interleave(tiles_a, type_a, tiles_b, type_b, num_columns)


def pack_tiles(raw: U8, quant_type: QuantType, num_columns: int) -> U8:
    """`raw` [rows, row_bytes] as tiles [tiles, tile_bytes], not yet interleaved."""
    num_tiles, num_units = -(-len(raw) // TILE_ROWS), _num_units(quant_type, padded_columns(num_columns))
    tiles = np.empty((num_tiles, num_units), UNITS[quant_type].record)
    for name, values in tile_fields(raw, quant_type, num_columns).items():
        field = tiles[name]  # [tiles, units, ..., 16]
        padded = _zero_padded(values, num_tiles * TILE_ROWS, field.size // (num_tiles * TILE_ROWS))
        field[...] = np.moveaxis(padded.reshape(num_tiles, TILE_ROWS, *field.shape[1:-1]), 1, -1)
    return tiles.view(np.uint8).reshape(num_tiles, -1)


def unpack_matrix(packed: U8, quant_type: QuantType, num_rows: int, num_columns: int) -> U8:
    """The inverse of `pack_matrix`: source bytes [rows, row_bytes], equal but for the payload of a NaN in `d_float`.

    Not for types in TRANSCODED (assert).
    """
    tiles_a, tiles_b = _deinterleave(packed, quant_type, quant_type, num_columns)
    tiles = np.stack([tiles_a, tiles_b], axis=1).reshape(-1, tiles_a.shape[1])
    return unpack_tiles(tiles, quant_type, num_rows, num_columns)


def unpack_pair(packed: U8, type_a: QuantType, type_b: QuantType, num_rows: int, num_columns: int) -> tuple[U8, U8]:
    """The inverse of `pack_pair`, with the same exception."""
    tiles_a, tiles_b = _deinterleave(packed, type_a, type_b, num_columns)
    return (
        unpack_tiles(tiles_a, type_a, num_rows, num_columns),
        unpack_tiles(tiles_b, type_b, num_rows, num_columns),
    )


def unpack_tiles(tiles: U8, quant_type: QuantType, num_rows: int, num_columns: int) -> U8:
    """The inverse of `pack_tiles`; padding is dropped unread."""
    units = np.ascontiguousarray(tiles).view(UNITS[quant_type].record)
    fields = {}
    for name in UNITS[quant_type].record.names or ():
        values = np.moveaxis(units[name], -1, 1)  # [tiles, 16, units, ...]
        fields[name] = values.reshape(len(tiles) * TILE_ROWS, -1)[:num_rows]
    if quant_type.is_float:
        return np.ascontiguousarray(fields["lines"][:, :num_columns]).view(np.uint8)
    return _source_blocks(fields, quant_type, num_columns).view(np.uint8).reshape(num_rows, -1)


def _steps(raw: U8, row_alignment: int) -> Iterator[slice]:
    step_rows = max(_STEP_BYTES // (raw.shape[1] * row_alignment), 1) * row_alignment
    return (slice(start, start + step_rows) for start in range(0, len(raw), step_rows))


def tile_fields(raw: U8, quant_type: QuantType, num_columns: int) -> dict[str, NDArray[Any]]:
    """The fields of the type's unit, each [rows, values along the columns], before padding and transposition."""
    if quant_type.is_float:
        return {"lines": view_floats(raw, quant_type, num_columns)}
    blocks = view_blocks(raw, quant_type, num_columns)
    fields: dict[str, NDArray[Any]] = {}
    for name in UNITS[quant_type].record.names or ():
        match name:
            case "lines":
                values: NDArray[Any] = _code_lines(unpack_codes(blocks, quant_type), CODE_BITS[quant_type])
            case "d_float":
                values = base_scale(blocks, quant_type)
            case "factors":
                values = unpack_factors(blocks, quant_type).astype(np.int8)
            case "scales_low":
                values = _scale_planes(*unpack_scales(blocks["scales"]))[0]
            case "scales_high":
                values = _scale_planes(*unpack_scales(blocks["scales"]))[1]
            case _:
                values = blocks[name]
        fields[name] = values.reshape(len(raw), -1)
    return fields


def _source_blocks(fields: dict[str, NDArray[Any]], quant_type: QuantType, num_columns: int) -> NDArray[np.void]:
    """The inverse of `tile_fields`: source blocks [rows, blocks]."""
    assert quant_type not in TRANSCODED
    rows, num_blocks = len(fields["lines"]), num_columns // quant_type.block_elements
    blocks = np.empty((rows, num_blocks), BLOCKS[quant_type])
    codes = _line_codes(fields["lines"], CODE_BITS[quant_type])
    repack_codes(blocks, np.ascontiguousarray(codes[:, :num_columns]), quant_type)
    for name, values in fields.items():
        match name:
            case "lines" | "scales_high":
                continue
            case "d_float":
                blocks["d"] = values.astype("<f2").view("<u2")
            case "factors":
                repack_factors(blocks, values.reshape(rows, num_blocks, -1).astype(np.int16), quant_type)
            case "scales_low":
                low, high = values.reshape(rows, num_blocks, 8), fields["scales_high"].reshape(rows, num_blocks, 4)
                blocks["scales"] = repack_scales(*_plane_scales(low, high))
            case _:
                blocks[name] = values[:, : blocks[name].size // rows].reshape(blocks[name].shape)
    return blocks


def _scale_planes(scales: U8, minima: U8) -> tuple[NDArray[Any], NDArray[Any]]:
    """Six-bit scales and minima [..., 8] as the bytes of scales_low [..., 8] and scales_high [..., 4]."""
    low = (scales & 0x0F) | (minima & 0x0F) << 4
    high = scales >> 4 | (minima >> 4) << 2
    return low, high[..., 0::2] | high[..., 1::2] << 4


def _plane_scales(low: U8, pairs: U8) -> tuple[NDArray[Any], NDArray[Any]]:
    """The inverse of `_scale_planes`."""
    high = np.stack([pairs & 0x0F, pairs >> 4], axis=-1).reshape(low.shape)
    return (low & 0x0F) | (high & 3) << 4, low >> 4 | (high >> 2) << 4


def _code_lines(codes: U8, bits: int) -> NDArray[np.uint32]:
    """Codes [rows, columns], whole groups, as the words of their lines [rows, groups * bits]."""
    quads = codes.view("<u4").reshape(len(codes), -1, NUM_QUADS)
    if bits == 8:
        return quads.reshape(len(codes), -1)
    base = _line_bits(bits)
    lines = np.zeros((*quads.shape[:2], bits), "<u4")
    low = quads & _each_byte(base)
    np.left_shift(low[..., 1 :: 8 // base], base, out=lines[..., :base])
    for i in (0, *range(2, 8 // base)):
        lines[..., :base] |= low[..., i :: 8 // base] << i * base
    top = quads >> base & _each_byte(bits - base)
    for quad, line, shift in _plane_places(bits):
        lines[..., line] |= top[..., quad] << shift
    return lines.reshape(len(codes), -1)


def _line_codes(lines: NDArray[np.uint32], bits: int) -> U8:
    """The inverse of `_code_lines`."""
    groups = lines.reshape(len(lines), -1, bits)
    quads = np.empty((*groups.shape[:2], NUM_QUADS), "<u4")
    if bits == 8:
        quads[...] = groups
    else:
        base = _line_bits(bits)
        for i in range(8 // base):
            quads[..., i :: 8 // base] = groups[..., :base] >> i * base & _each_byte(base)
        for quad, line, shift in _plane_places(bits):
            quads[..., quad] |= (groups[..., line] >> shift & _each_byte(bits - base)) << base
    return quads.view(np.uint8).reshape(len(lines), -1)


def _line_bits(bits: int) -> int:
    """How many of a code's bits lie in its own line; those above them lie in planes."""
    return 4 if bits >= 4 else 2


def _each_byte(bits: int) -> np.uint32:
    """A mask of the lowest bits of each byte of a word."""
    return np.uint32(0x01010101 * ((1 << bits) - 1))


def _plane_places(bits: int) -> Iterator[tuple[int, int, np.uint32]]:
    """Where the bits above those of the line lie, of each quad: (quad, line, shift)."""
    base = _line_bits(bits)
    for quad in range(NUM_QUADS if bits > base else 0):
        bit = quad * (bits - base)
        yield quad, base + bit // 8, np.uint32(bit % 8)


def _chunks(type_a: QuantType, type_b: QuantType, num_columns: int) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Per chunk: where tile A and tile B lie in the panel, and in the tiles themselves."""
    panel_at = a_at = b_at = 0
    for start in range(0, padded_columns(num_columns), CHUNK_COLUMNS):
        columns = min(CHUNK_COLUMNS, padded_columns(num_columns) - start)
        a_bytes, b_bytes = tile_chunk_bytes(type_a, columns), tile_chunk_bytes(type_b, columns)
        middle, end = panel_at + a_bytes, panel_at + a_bytes + b_bytes
        yield slice(panel_at, middle), slice(middle, end), slice(a_at, a_at + a_bytes), slice(b_at, b_at + b_bytes)
        panel_at, a_at, b_at = end, a_at + a_bytes, b_at + b_bytes


def _interleave(tiles_a: U8, type_a: QuantType, tiles_b: U8, type_b: QuantType, num_columns: int) -> U8:
    """Tiles A and B, each [panels, tile_bytes], as panels, flat."""
    panels = np.empty((len(tiles_a), panel_bytes((type_a, type_b), num_columns)), np.uint8)
    for in_panel_a, in_panel_b, in_a, in_b in _chunks(type_a, type_b, num_columns):
        panels[:, in_panel_a] = tiles_a[:, in_a]
        panels[:, in_panel_b] = tiles_b[:, in_b]
    return panels.reshape(-1)


def _deinterleave(packed: U8, type_a: QuantType, type_b: QuantType, num_columns: int) -> tuple[U8, U8]:
    panels = packed.reshape(-1, panel_bytes((type_a, type_b), num_columns))
    chunks = list(_chunks(type_a, type_b, num_columns))
    tiles_a = np.concatenate([panels[:, in_panel_a] for in_panel_a, _, _, _ in chunks], axis=1)
    tiles_b = np.concatenate([panels[:, in_panel_b] for _, in_panel_b, _, _ in chunks], axis=1)
    return tiles_a, tiles_b


def _zero_padded(values: NDArray[Any], num_rows: int, num_values: int) -> NDArray[Any]:
    """`values` [rows, n] grown with zeros; the same array where nothing is missing."""
    if values.shape == (num_rows, num_values):
        return values
    padded = np.zeros((num_rows, num_values), values.dtype)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded
