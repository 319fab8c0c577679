"""The NumPy truth against the gguf package, to the last bit."""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isotherm.quantization.codebooks import scattered_half
from isotherm.quantization.layouts import (
    BLOCKS,
    CODE_BITS,
    F32,
    U8,
    VALUES,
    decode,
    dequantise,
    repack_codes,
    repack_scales,
    unpack_codes,
    unpack_scales,
    view_blocks,
)
from isotherm.quantization.p32 import TRANSCODED
from isotherm.types import QuantType

SHARED = Path(os.environ.get("ISOTHERM_SHARED", Path(__file__).parents[3] / "shared"))
# Together they have F32, Q4_1, Q8_0; Q5_0, Q4_K, Q6_K. The gguf package reads the second one's vocabulary slowly.
MODELS = ("smollm2-135m", pytest.param("qwen2.5-coder-0.5b", marks=pytest.mark.slow))
QUANTISED = tuple(CODE_BITS)
GROUPS_OF_16 = [QuantType[name] for name in ("Q6_K", "NVFP4", "Q2_K", "Q3_K", "IQ1_M", "IQ2_XS", "IQ2_S")]
HALF_FIELDS = ("d", "m", "dmin")
# zero, minus zero, the smallest and the largest denormal, the smallest normal, the largest
EDGE_HALVES = np.array([0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF], "<u2")

types = st.sampled_from(tuple(QuantType))
quantised = st.sampled_from(QUANTISED)
seeds = st.integers(0, 2**32 - 1)


def random_rows(quant_type: QuantType, num_rows: int, num_blocks: int, seed: int) -> U8:
    """Random bytes, with finite float16 scales of every magnitude."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (num_rows, num_blocks * quant_type.block_bytes), np.uint8)
    if quant_type.is_float:
        return raw
    blocks = raw.view(BLOCKS[quant_type])
    for name in set(HALF_FIELDS) & set(blocks.dtype.names or ()):
        halves = blocks[name]
        halves[(halves & 0x7C00) == 0x7C00] ^= 0x4000
        edges = rng.random(halves.shape) < 0.3
        halves[edges] = rng.choice(EDGE_HALVES, int(edges.sum()))
        blocks[name] = halves
    if quant_type is QuantType.IQ1_M:  # the top nibbles of its scales are a float16
        infinite = (scattered_half(blocks) & 0x7C00) == 0x7C00
        blocks["scales"][infinite] ^= np.array([0, 0, 0, 0x4000], "<u2")
    return raw


def bits(values: F32) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32)


def reference(raw: U8, quant_type: QuantType) -> F32:
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[quant_type.name])


@given(quant_type=types, num_rows=st.integers(1, 5), num_blocks=st.integers(1, 4), seed=seeds)
def test_dequantise_equals_gguf_to_the_last_bit(
    quant_type: QuantType, num_rows: int, num_blocks: int, seed: int
) -> None:
    raw = random_rows(quant_type, num_rows, num_blocks, seed)
    values = dequantise(raw, quant_type, num_blocks * quant_type.block_elements)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(bits(values), bits(reference(raw, quant_type)))


@pytest.mark.parametrize("quant_type", [QuantType.F16, QuantType.BF16])
def test_every_number_of_a_short_float_type(quant_type: QuantType) -> None:
    raw = np.arange(65536, dtype="<u2").view(np.uint8).reshape(1, -1)
    np.testing.assert_array_equal(bits(dequantise(raw, quant_type, 65536)), bits(reference(raw, quant_type)))


@given(quant_type=quantised, num_rows=st.integers(1, 5), num_blocks=st.integers(1, 4), seed=seeds)
def test_decoded_fields_rebuild_the_values(quant_type: QuantType, num_rows: int, num_blocks: int, seed: int) -> None:
    raw = random_rows(quant_type, num_rows, num_blocks, seed)
    num_columns = num_blocks * quant_type.block_elements
    fields = decode(raw, quant_type, num_columns)
    assert fields.codes.shape == (num_rows, num_columns)
    assert quant_type in VALUES or fields.codes.max() < 1 << CODE_BITS[quant_type]
    assert fields.group_size == (16 if quant_type in GROUPS_OF_16 else 32)
    assert fields.scale.shape == (num_rows, num_columns // fields.group_size)
    assert fields.scale.dtype == np.float32
    has_minimum = quant_type.name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K", "Q2_K")
    assert (fields.minimum is not None) == has_minimum
    wide = np.repeat(fields.scale.astype(np.float64), fields.group_size, axis=1)
    values = wide * (fields.codes.astype(np.float64) - fields.zero_point)  # exact: 17 bits times 8
    rebuilt = values.astype(np.float32)
    if fields.minimum is not None:
        assert fields.minimum.dtype == np.float32
        assert fields.minimum.shape == fields.scale.shape
        rebuilt += np.repeat(fields.minimum, fields.group_size, axis=1)
    np.testing.assert_array_equal(rebuilt, reference(raw, quant_type))


@pytest.mark.parametrize(
    ("quant_type", "zero_point"),
    [
        *((QuantType.Q4_0, 8), (QuantType.Q5_0, 16), (QuantType.Q6_K, 32), (QuantType.Q8_0, 128), (QuantType.Q4_K, 0)),
        *((QuantType.Q2_K, 0), (QuantType.Q3_K, 4), (QuantType.TQ2_0, 1), (QuantType.MXFP4, 16)),
    ],
)
def test_zero_points(quant_type: QuantType, zero_point: int) -> None:
    raw = np.zeros((1, quant_type.block_bytes), np.uint8)
    assert decode(raw, quant_type, quant_type.block_elements).zero_point == zero_point


@pytest.mark.parametrize("quant_type", [QuantType.Q4_K, QuantType.Q5_K, QuantType.Q6_K])
def test_scales_of_k_types_are_exact_products(quant_type: QuantType) -> None:
    blocks = view_blocks(random_rows(quant_type, 8, 4, 1), quant_type, 1024)
    fields = decode(blocks.view(np.uint8).reshape(8, -1), quant_type, 1024)
    halves = blocks["d"].view("<f2").astype(np.float64)[..., None]
    factors = blocks["scales"] if quant_type is QuantType.Q6_K else unpack_scales(blocks["scales"])[0]
    np.testing.assert_array_equal(fields.scale.astype(np.float64), (halves * factors).reshape(8, -1))


@pytest.mark.parametrize("quant_type", QUANTISED)
def test_codes_and_scales_fit_the_kernels(quant_type: QuantType) -> None:
    """Scales times 1.5 * 2**23 are exact, up to 2**105, and codes pass 127 only where it is known."""
    fields = decode(random_rows(quant_type, 16, 8, 5), quant_type, 8 * quant_type.block_elements)
    scale = fields.scale[np.abs(fields.scale) < 2.0**105]
    np.testing.assert_array_equal(scale * np.float32(3 * 2**22), scale.astype(np.float64) * 3 * 2**22)
    wide = quant_type in (QuantType.Q8_0, QuantType.IQ4_NL, QuantType.IQ4_XS)
    assert (fields.codes.max() > 127) == wide


@pytest.mark.parametrize("byte", range(256))
def test_every_scale_of_the_float_formats(byte: int) -> None:
    for quant_type, head in ((QuantType.MXFP4, 1), (QuantType.NVFP4, 4)):
        raw = np.full((1, quant_type.block_bytes), 0x62, np.uint8)
        raw[:, :head] = byte
        values = dequantise(raw, quant_type, quant_type.block_elements)
        np.testing.assert_array_equal(bits(values), bits(reference(raw, quant_type)))


@pytest.mark.parametrize("quant_type", [t for t in QUANTISED if t.name.startswith("IQ") and t.name[2] in "123"])
def test_every_pattern_of_a_grid(quant_type: QuantType) -> None:
    """All bits of the fields that choose patterns and signs, thousands of blocks of them."""
    raw = random_rows(quant_type, 64, 64, 6)
    np.testing.assert_array_equal(bits(dequantise(raw, quant_type, 64 * 256)), bits(reference(raw, quant_type)))


reversible = st.sampled_from([quant_type for quant_type in QUANTISED if quant_type not in TRANSCODED])


@given(quant_type=reversible, num_rows=st.integers(1, 5), num_blocks=st.integers(1, 4), seed=seeds)
def test_codes_go_back_to_the_same_bytes(quant_type: QuantType, num_rows: int, num_blocks: int, seed: int) -> None:
    raw = np.random.default_rng(seed).integers(0, 256, (num_rows, num_blocks * quant_type.block_bytes), np.uint8)
    blocks = view_blocks(raw, quant_type, num_blocks * quant_type.block_elements)
    again = blocks.copy()
    for name in {"low", "high"} & set(again.dtype.names or ()):
        again[name] = 0
    repack_codes(again, unpack_codes(blocks, quant_type), quant_type)
    np.testing.assert_array_equal(again.view(np.uint8), raw)


@given(st.binary(min_size=12, max_size=12))
def test_six_bit_scales_go_back_to_the_same_bytes(packed: bytes) -> None:
    assert repack_scales(*unpack_scales(np.frombuffer(packed, np.uint8))).tobytes() == packed


def test_rows_may_be_a_view_of_a_wider_array() -> None:
    raw = random_rows(QuantType.Q4_K, 6, 2, 7)
    wide = np.zeros((6, raw.shape[1] + 5), np.uint8)
    wide[:, 3:-2] = raw
    np.testing.assert_array_equal(
        dequantise(wide[::2, 3:-2], QuantType.Q4_K, 512), dequantise(raw[::2], QuantType.Q4_K, 512)
    )


def test_a_row_of_the_wrong_length_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        dequantise(np.zeros((1, 18), np.uint8), QuantType.Q4_0, 64)


@pytest.mark.parametrize("model", MODELS)
def test_tensors_of_real_models(model: str) -> None:
    getter = SHARED / "models" / "get.py"
    if not getter.is_file():
        pytest.skip(f"no test models: {getter} is missing (ISOTHERM_SHARED names the folder)")
    path = subprocess.run([sys.executable, getter, model], check=True, capture_output=True, text=True).stdout.strip()
    seen: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        seen[tensor.tensor_type.name] = seen.get(tensor.tensor_type.name, 0) + 1
        if seen[tensor.tensor_type.name] > 3:
            continue
        quant_type = QuantType[tensor.tensor_type.name]
        num_columns = int(tensor.shape[0])
        raw = np.asarray(tensor.data).view(np.uint8).reshape(-1, quant_type.row_bytes(num_columns))[:64]
        np.testing.assert_array_equal(
            bits(dequantise(raw, quant_type, num_columns)), bits(reference(raw, quant_type)), err_msg=tensor.name
        )
    assert len(seen) > 1
