"""The packed form against a scalar twin that follows its description byte by byte, and against its own inverse."""

import struct
from collections.abc import Sequence

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_blocks

from isotherm.quantization import p32
from isotherm.quantization.layouts import BLOCKS, CODE_BITS, U8, VALUES
from isotherm.types import QuantType

Q = QuantType
ALL = tuple(QuantType)
REVERSIBLE = tuple(t for t in QuantType if t not in p32.TRANSCODED)
types = st.sampled_from(ALL)
reversible = st.sampled_from(REVERSIBLE)
seeds = st.integers(0, 2**32 - 1)


def random_rows(quant_type: QuantType, num_rows: int, num_columns: int, seed: int) -> U8:
    raw = np.random.default_rng(seed).integers(0, 256, (num_rows, quant_type.row_bytes(num_columns)), np.uint8)
    if quant_type in (
        Q.Q6_K,
        Q.Q3_K,
        Q.IQ4_XS,
        Q.TQ2_0,
    ):  # its scale is stored as float32, which may lose the payload of a NaN
        blocks = raw.view(BLOCKS[quant_type])
        blocks["d"] &= np.where((blocks["d"] & 0x7C00) == 0x7C00, 0xFC00, 0xFFFF).astype("<u2")
    return raw


def columns_of(quant_type: QuantType, blocks: int) -> int:
    return blocks * quant_type.block_elements


# --- the twin: pure Python over bytes -------------------------------------------------------------------------------


def twin_code(row: bytes, quant_type: QuantType, column: int) -> int:
    """Unsigned code of one column."""
    at = column // quant_type.block_elements * quant_type.block_bytes
    i = column % quant_type.block_elements
    block = row[at : at + quant_type.block_bytes]
    if quant_type is Q.Q8_0:
        return (block[2 + i] + 128) % 256
    if quant_type is Q.Q6_K:
        half, j = divmod(i, 128)
        low = block[half * 64 + j % 64]
        high = block[128 + half * 32 + j % 32]
        return (low >> 4 if j >= 64 else low & 15) | (high >> j // 32 * 2 & 3) << 4
    if quant_type in (Q.Q4_K, Q.Q5_K):
        low = block[(16 if quant_type is Q.Q4_K else 48) + i // 64 * 32 + i % 32]
        code = low >> 4 if i % 64 >= 32 else low & 15
        return code if quant_type is Q.Q4_K else code | (block[16 + i % 32] >> i // 32 & 1) << 4
    if quant_type in (Q.Q2_K, Q.Q3_K, Q.TQ2_0):
        low = block[{Q.Q2_K: 16, Q.Q3_K: 32, Q.TQ2_0: 0}[quant_type] + i // 128 * 32 + i % 32] >> i % 128 // 32 * 2 & 3
        return low if quant_type is not Q.Q3_K else low | (block[i % 32] >> i // 32 & 1) << 2
    if quant_type is Q.IQ4_XS:
        return block[8 + i // 32 * 16 + i % 16] >> i % 32 // 16 * 4 & 15
    if quant_type is Q.NVFP4:
        return block[4 + i // 16 * 8 + i % 8] >> i % 16 // 8 * 4 & 15
    head = {Q.Q4_0: 2, Q.Q5_0: 2, Q.IQ4_NL: 2, Q.MXFP4: 1}.get(quant_type, 4)
    five_bits = quant_type in (Q.Q5_0, Q.Q5_1)
    low = block[head + (4 if five_bits else 0) + i % 16]
    code = low >> 4 if i >= 16 else low & 15
    return code | (block[head + i // 8] >> i % 8 & 1) << 4 if five_bits else code


def twin_six_bits(packed: bytes, group: int) -> tuple[int, int]:
    if group < 4:
        return packed[group] & 63, packed[group + 4] & 63
    return (
        packed[group + 4] & 15 | packed[group - 4] >> 6 << 4,
        packed[group + 4] >> 4 | packed[group] >> 6 << 4,
    )


def twin_factors(block: bytes, quant_type: QuantType) -> list[int]:
    """The integers that d is multiplied by."""
    if quant_type is Q.Q6_K:
        return [(byte ^ 128) - 128 for byte in block[192:208]]
    if quant_type is Q.Q3_K:
        packed = block[96:108]
        lows = [packed[j] & 15 if j < 8 else packed[j - 8] >> 4 for j in range(16)]
        return [low + 16 * (packed[8 + j % 4] >> j // 4 * 2 & 3) - 32 for j, low in enumerate(lows)]
    if quant_type is Q.IQ4_XS:
        high = int.from_bytes(block[2:4], "little")
        return [(block[4 + g // 2] >> g % 2 * 4 & 15) + 16 * (high >> 2 * g & 3) - 32 for g in range(8)]
    assert quant_type is Q.TQ2_0
    return []


class TwinTile:
    """Sixteen rows (None: padding) of one matrix; everything outside the matrix is zero."""

    def __init__(self, rows: Sequence[bytes | None], quant_type: QuantType, num_columns: int) -> None:
        assert len(rows) == 16
        self.rows, self.type, self.num_columns = rows, quant_type, num_columns

    def block(self, row: int, column: int) -> bytes:
        data = self.rows[row]
        if data is None or column >= self.num_columns:
            return bytes(self.type.block_bytes)
        at = column // self.type.block_elements * self.type.block_bytes
        return data[at : at + self.type.block_bytes]

    def code(self, row: int, column: int) -> int:
        data = self.rows[row]
        return 0 if data is None or column >= self.num_columns else twin_code(data, self.type, column)

    def each_row(self, column: int, first: int, num_bytes: int) -> bytes:
        return b"".join(self.block(row, column)[first : first + num_bytes] for row in range(16))

    def factors(self, row: int, column: int) -> list[int]:
        own = twin_factors(self.block(row, column), self.type)
        return own if self.rows[row] is not None else [0] * len(own)

    def quad(self, column: int) -> list[int]:
        """[16 rows][4 columns] codes."""
        return [self.code(row, column + i) for row in range(16) for i in range(4)]

    def group(self, column: int) -> bytes:
        out = bytearray()
        if CODE_BITS[self.type] < 4:
            quads = [self.quad(column + 4 * j) for j in range(8)]
            for p in range(2):
                out += bytes(sum((quads[4 * p + i][b] & 3) << 2 * i for i in range(4)) for b in range(64))
            if CODE_BITS[self.type] == 3:
                out += bytes(sum((quads[j][b] >> 2) << j for j in range(8)) for b in range(64))
            return bytes(out)
        for j in range(4):
            low, high = self.quad(column + 8 * j), self.quad(column + 8 * j + 4)
            out += bytes(a & 15 | (b & 15) << 4 for a, b in zip(low, high, strict=True))
        quads = [self.quad(column + 4 * j) for j in range(8)]
        if CODE_BITS[self.type] == 5:
            out += bytes(sum((quads[j][b] >> 4) << j for j in range(8)) for b in range(64))
        if CODE_BITS[self.type] == 6:
            for p in range(2):
                out += bytes(sum((quads[4 * p + i][b] >> 4) << 2 * i for i in range(4)) for b in range(64))
        return bytes(out)

    def chunk(self, start: int, num_columns: int) -> bytes:
        step = 256 if self.type.block_elements == 256 else {Q.Q4_1: 32, Q.Q5_1: 32, Q.MXFP4: 128}.get(self.type, 64)
        return b"".join(self.unit(column) for column in range(start, start + num_columns, step))

    def unit(self, at: int) -> bytes:
        match self.type:
            case Q.F32 | Q.F16 | Q.BF16:
                return b"".join(self.each_row(at + i, 0, self.type.block_bytes) for i in range(64))
            case Q.Q4_0 | Q.Q5_0 | Q.IQ4_NL:
                halves = self.each_row(at, 0, 2) + self.each_row(at + 32, 0, 2)
                return halves + self.group(at) + self.group(at + 32)
            case Q.Q8_0:
                halves = self.each_row(at, 0, 2) + self.each_row(at + 32, 0, 2)
                return halves + b"".join(bytes(self.quad(at + 4 * j)) for j in range(16))
            case Q.Q4_1 | Q.Q5_1:
                return self.each_row(at, 0, 2) + self.each_row(at, 2, 2) + self.group(at)
            case Q.Q4_K | Q.Q5_K:
                groups = b"".join(self.group(at + 32 * g) for g in range(8))
                return self.each_row(at, 0, 2) + self.each_row(at, 2, 2) + self.six_bit_planes(at) + groups
            case Q.MXFP4:
                scales = b"".join(self.each_row(at + 32 * g, 0, 1) for g in range(4))
                return scales + b"".join(self.group(at + 32 * g) for g in range(4))
            case Q.NVFP4:
                scales = b"".join(self.each_row(at, g, 1) for g in range(4))
                return scales + self.group(at) + self.group(at + 32)
            case Q.Q2_K:
                scales = b"".join(self.each_row(at, g, 1) for g in range(16))
                groups = b"".join(self.group(at + 32 * g) for g in range(8))
                return self.each_row(at, 80, 2) + self.each_row(at, 82, 2) + scales + groups
            case Q.Q6_K | Q.Q3_K | Q.IQ4_XS | Q.TQ2_0:
                start = {Q.Q6_K: 208, Q.Q3_K: 108, Q.IQ4_XS: 0, Q.TQ2_0: 64}[self.type]
                d = [struct.unpack("<e", self.block(row, at)[start : start + 2])[0] for row in range(16)]
                factors = [self.factors(row, at) for row in range(16)]
                scales = b"".join(struct.pack("<16b", *group) for group in zip(*factors, strict=True))
                return struct.pack("<16f", *d) + scales + b"".join(self.group(at + 32 * g) for g in range(8))
            case _:
                raise AssertionError(self.type)

    def six_bit_planes(self, at: int) -> bytes:
        low, high = bytearray(128), bytearray(64)
        for g in range(8):
            for row in range(16):
                scale, minimum = twin_six_bits(self.block(row, at)[4:16], g)
                low[16 * g + row] = scale & 15 | (minimum & 15) << 4
                high[16 * (g // 2) + row] |= (scale >> 4 | (minimum >> 4) << 2) << (4 * (g % 2))
        return bytes(low + high)


def twin_tile(raw: U8, first: int, quant_type: QuantType, num_columns: int) -> TwinTile:
    rows = [raw[r].tobytes() if r < len(raw) else None for r in range(first, first + 16)]
    return TwinTile(rows, quant_type, num_columns)


def twin_panel(tile_a: TwinTile, tile_b: TwinTile) -> bytes:
    padded = (tile_a.num_columns + 63) // 64 * 64
    out = b""
    for start in range(0, padded, 256):
        num_columns = min(256, padded - start)
        out += tile_a.chunk(start, num_columns) + tile_b.chunk(start, num_columns)
    return out


def twin_matrix(raw: U8, quant_type: QuantType, num_columns: int) -> bytes:
    return b"".join(
        twin_panel(twin_tile(raw, r, quant_type, num_columns), twin_tile(raw, r + 16, quant_type, num_columns))
        for r in range(0, len(raw), 32)
    )


def twin_pair(raw_a: U8, type_a: QuantType, raw_b: U8, type_b: QuantType, num_columns: int) -> bytes:
    return b"".join(
        twin_panel(twin_tile(raw_a, r, type_a, num_columns), twin_tile(raw_b, r, type_b, num_columns))
        for r in range(0, len(raw_a), 16)
    )


SHAPES = [(32, 256), (1, 256), (17, 512), (49, 256), (16, 32), (33, 64), (32, 96), (5, 288), (20, 352)]
CASES = [(of_type, *shape) for of_type in REVERSIBLE for shape in SHAPES if shape[1] % of_type.block_elements == 0]


@pytest.mark.parametrize(("quant_type", "num_rows", "num_columns"), CASES)
def test_matrix_equals_the_twin(quant_type: QuantType, num_rows: int, num_columns: int) -> None:
    raw = random_rows(quant_type, num_rows, num_columns, 3)
    assert p32.pack_matrix(raw, quant_type, num_columns).tobytes() == twin_matrix(raw, quant_type, num_columns)


@pytest.mark.parametrize("type_a", [Q.Q4_K, Q.Q5_0, Q.Q8_0, Q.BF16])
@pytest.mark.parametrize("type_b", [Q.Q4_K, Q.Q6_K, Q.Q5_1, Q.F32, Q.MXFP4, Q.Q2_K])
@pytest.mark.parametrize(("num_rows", "num_columns"), [(16, 256), (37, 512)])
def test_pair_equals_the_twin(type_a: QuantType, type_b: QuantType, num_rows: int, num_columns: int) -> None:
    raw_a = random_rows(type_a, num_rows, num_columns, 4)
    raw_b = random_rows(type_b, num_rows, num_columns, 5)
    packed = p32.pack_pair(raw_a, type_a, raw_b, type_b, num_columns)
    assert packed.tobytes() == twin_pair(raw_a, type_a, raw_b, type_b, num_columns)


@pytest.mark.parametrize(("type_a", "type_b"), [(Q.Q4_0, Q.Q5_1), (Q.Q8_0, Q.F16), (Q.IQ4_NL, Q.MXFP4)])
@pytest.mark.parametrize("num_columns", [32, 288, 480])
def test_pair_with_a_short_last_chunk_equals_the_twin(type_a: QuantType, type_b: QuantType, num_columns: int) -> None:
    raw_a, raw_b = random_rows(type_a, 18, num_columns, 6), random_rows(type_b, 18, num_columns, 7)
    packed = p32.pack_pair(raw_a, type_a, raw_b, type_b, num_columns)
    assert packed.tobytes() == twin_pair(raw_a, type_a, raw_b, type_b, num_columns)


@given(quant_type=reversible, num_rows=st.integers(1, 100), num_blocks=st.integers(1, 40), seed=seeds)
def test_matrix_unpacks_to_the_same_bytes(quant_type: QuantType, num_rows: int, num_blocks: int, seed: int) -> None:
    num_columns = columns_of(quant_type, num_blocks if quant_type.block_elements <= 32 else 1 + num_blocks % 5)
    raw = random_rows(quant_type, num_rows, num_columns, seed)
    packed = p32.pack_matrix(raw, quant_type, num_columns)
    assert packed.nbytes == p32.packed_bytes((quant_type, quant_type), num_rows, num_columns, pair=False)
    np.testing.assert_array_equal(p32.unpack_matrix(packed, quant_type, num_rows, num_columns), raw)


@given(type_a=reversible, type_b=reversible, num_rows=st.integers(1, 70), num_groups=st.integers(1, 20), seed=seeds)
def test_pair_unpacks_to_the_same_bytes(
    type_a: QuantType, type_b: QuantType, num_rows: int, num_groups: int, seed: int
) -> None:
    step = max(type_a.block_elements, type_b.block_elements)
    num_columns = step * (num_groups if step <= 32 else 1 + num_groups % 3)
    raw_a, raw_b = random_rows(type_a, num_rows, num_columns, seed), random_rows(type_b, num_rows, num_columns, seed)
    packed = p32.pack_pair(raw_a, type_a, raw_b, type_b, num_columns)
    assert packed.nbytes == p32.packed_bytes((type_a, type_b), num_rows, num_columns, pair=True)
    again_a, again_b = p32.unpack_pair(packed, type_a, type_b, num_rows, num_columns)
    np.testing.assert_array_equal(again_a, raw_a)
    np.testing.assert_array_equal(again_b, raw_b)


@settings(max_examples=30)
@given(quant_type=types, num_rows=st.integers(33, 200), border=st.integers(1, 6), seed=seeds)
def test_slices_at_panel_borders_pack_alike(quant_type: QuantType, num_rows: int, border: int, seed: int) -> None:
    raw = random_rows(quant_type, num_rows, 256, seed)
    parts = [p32.pack_matrix(part, quant_type, 256) for part in (raw[: 32 * border], raw[32 * border :])]
    np.testing.assert_array_equal(np.concatenate(parts), p32.pack_matrix(raw, quant_type, 256))


@pytest.mark.parametrize("quant_type", sorted(p32.TRANSCODED, key=ALL.index))
@pytest.mark.parametrize("num_rows", [32, 40])
def test_transcoded_types_keep_their_values(quant_type: QuantType, num_rows: int) -> None:
    """Every value that lies in a tile, found by the description of the packed form, is that of the gguf package."""
    raw = random_blocks(quant_type, (num_rows, 512), quant_type.value)
    panels = p32.pack_matrix(raw, quant_type, 512).reshape(-1, 2, 2, p32.tile_chunk_bytes(quant_type, 256))
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[quant_type.value])
    values = VALUES.get(quant_type, (-1, 0, 1))
    for row in range(num_rows):
        for column in range(0, 512, 7):
            tile = panels[row // 32, column // 256, row % 32 // 16].tobytes()
            assert tile_value(tile, quant_type, row % 16, column % 256, values) == expected[row, column]


def tile_value(tile: bytes, quant_type: QuantType, row: int, column: int, values: Sequence[int]) -> float:
    """One value of a tile of one unit: d, factors, lines of four bits; of TQ1_0: d, lines of two bits."""
    (d,) = struct.unpack_from("<f", tile, 4 * row)
    block, quad, byte = column // 32, column % 32 // 4, 4 * row + column % 4
    if quant_type is Q.TQ1_0:
        return d * values[tile[64 + 128 * block + 64 * (quad // 4) + byte] >> quad % 4 * 2 & 3]
    num_groups = 16 if quant_type in (Q.IQ1_M, Q.IQ2_XS, Q.IQ2_S) else 8
    factor = tile[64 + 16 * (column * num_groups // 256) + row]
    line = 64 + 16 * num_groups + 256 * block + 64 * (quad // 2)
    return d * factor * values[tile[line + byte] >> quad % 2 * 4 & 15]


@pytest.mark.parametrize("quant_type", REVERSIBLE)
def test_long_matrices_come_in_pieces_of_whole_panels(quant_type: QuantType) -> None:
    num_columns, num_rows = 2048, 3 * (1 << 20) // quant_type.row_bytes(2048) + 7
    raw = random_rows(quant_type, num_rows, num_columns, 8)
    pieces = list(p32.matrix_pieces(raw, quant_type, num_columns))
    assert len(pieces) > 1
    assert all(len(piece) % p32.panel_bytes((quant_type, quant_type), num_columns) == 0 for piece in pieces)
    whole = np.concatenate(pieces)
    np.testing.assert_array_equal(p32.unpack_matrix(whole, quant_type, num_rows, num_columns), raw)
    pair = np.concatenate(list(p32.pair_pieces(raw, quant_type, raw, quant_type, num_columns)))
    for again in p32.unpack_pair(pair, quant_type, quant_type, num_rows, num_columns):
        np.testing.assert_array_equal(again, raw)


def test_source_bytes_may_be_unaligned_and_read_only() -> None:
    raw = random_rows(Q.Q6_K, 40, 512, 9)
    shifted = np.frombuffer(b"x" + raw.tobytes(), np.uint8)[1:].reshape(raw.shape)
    np.testing.assert_array_equal(p32.pack_matrix(shifted, Q.Q6_K, 512), p32.pack_matrix(raw, Q.Q6_K, 512))


@pytest.mark.parametrize(
    ("quant_type", "columns", "num_bytes"),
    [
        (Q.Q4_0, 64, 576),
        (Q.Q5_0, 64, 704),
        (Q.Q8_0, 64, 1088),
        (Q.Q4_1, 64, 2 * 320),
        (Q.Q5_1, 64, 2 * 384),
        (Q.Q4_K, 256, 2304),
        (Q.Q5_K, 256, 2816),
        (Q.Q6_K, 256, 3392),
        (Q.IQ4_NL, 64, 576),
        (Q.IQ4_XS, 256, 2240),
        (Q.MXFP4, 64, 1088),  # units are whole
        (Q.MXFP4, 128, 1088),
        (Q.MXFP4, 192, 2176),
        (Q.NVFP4, 64, 576),
        (Q.Q2_K, 256, 1344),
        (Q.Q3_K, 256, 1856),
        (Q.TQ1_0, 256, 1088),
        (Q.TQ2_0, 256, 1088),
        (Q.IQ1_S, 256, 2240),
        (Q.IQ1_M, 256, 2368),
        (Q.F32, 64, 64 * 64),
        (Q.F16, 64, 64 * 32),
        (Q.BF16, 64, 64 * 32),
    ],
)
def test_bytes_of_a_tile(quant_type: QuantType, columns: int, num_bytes: int) -> None:
    assert p32.tile_chunk_bytes(quant_type, columns) == num_bytes
    assert num_bytes % 64 == 0


def test_sizes() -> None:
    assert p32.panel_bytes((Q.Q4_0, Q.Q8_0), 100 * 32 - 32) == 50 * (576 + 1088)
    assert p32.num_panels(33, pair=False) == 2
    assert p32.num_panels(33, pair=True) == 3
    assert p32.packed_bytes((Q.Q4_K, Q.Q6_K), 33, 256, pair=True) == 3 * (2304 + 3392)
    assert p32.packed_bytes((Q.F32, Q.F32), 33, 1, pair=False) == 2 * 2 * 64 * 64
