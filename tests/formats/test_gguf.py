"""The GGUF reader against the `gguf` package: real models, and files of every type written by it."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_models import random_blocks, write_tiny

from isotherm.errors import ModelFileChanged, ModelFileError, ModelNotFound
from isotherm.formats.checkpoint import open_checkpoint
from isotherm.formats.gguf import GgufFile, open_gguf
from isotherm.formats.gguf_tables import FILE_TYPES, TENSOR_TYPES, UNSUPPORTED_TENSOR_TYPES
from isotherm.types import QuantType

# the reader of the gguf package takes ten seconds for a large vocabulary
REAL_MODELS = (
    "smollm2-135m",
    pytest.param("gemma3-270m", marks=pytest.mark.slow),
    pytest.param("qwen2.5-coder-0.5b", marks=pytest.mark.slow),
)


def assert_same_as_reader(path: Path, ours: GgufFile) -> None:
    """All metadata, and all bytes of all tensors."""
    theirs = gguf.GGUFReader(path)
    expected = {name: item for name, item in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.metadata.values) == list(expected)
    for key, item in expected.items():
        value = ours.metadata.values[key]
        plain = value.tolist() if isinstance(value, np.ndarray) else list(value) if isinstance(value, tuple) else value
        assert plain == item.contents(), key
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.quant_type.value == tensor.tensor_type.name
        assert mine.dims == tuple(tensor.shape.tolist())
        assert mine.read().tobytes() == tensor.data.tobytes(), tensor.name


@pytest.mark.parametrize("name", REAL_MODELS)
def test_real_model_equals_reader_of_gguf_package(name: str, real_model: Callable[[str], Path]) -> None:
    path = real_model(name)
    with open_gguf(path) as ours:
        assert_same_as_reader(path, ours)


def test_metadata_of_a_quarter_million_tokens_is_read_in_half_a_second(real_model: Callable[[str], Path]) -> None:
    path = real_model("gemma3-270m")
    took_s = []
    for _ in range(3):
        start = time.process_time()
        open_gguf(path).close()
        took_s.append(time.process_time() - start)
    assert min(took_s) < 0.5


@pytest.mark.parametrize("quant_type", QuantType)
def test_every_tensor_type_equals_reader_of_gguf_package(quant_type: QuantType, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "llama", quant_type, num_layers=1)
    with open_gguf(path) as ours:
        assert_same_as_reader(path, ours)


def write_values(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    kinds = gguf.GGUFValueType
    for kind, value in {
        kinds.UINT8: 255,
        kinds.INT8: -128,
        kinds.UINT16: 65535,
        kinds.INT16: -32768,
        kinds.UINT32: 2**32 - 1,
        kinds.INT32: -(2**31),
        kinds.FLOAT32: 0.5,
        kinds.BOOL: True,
        kinds.STRING: "naïve ▁ 模型 \x00 end",
        kinds.UINT64: 2**64 - 1,
        kinds.INT64: -(2**63),
        kinds.FLOAT64: 1e300,
    }.items():
        writer.add_key_value(f"value.{kind.name}", value, kind)
        writer.add_key_value(f"values.{kind.name}", [value, value, value], kinds.ARRAY, sub_type=kind)
    writer.add_key_value("value.false", False, kinds.BOOL)
    writer.add_key_value("value.empty", "", kinds.STRING)
    writer.add_tensor("one", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_kind_of_value_equals_reader_of_gguf_package(tmp_path: Path) -> None:
    write_values(tmp_path / "values.gguf")
    with open_gguf(tmp_path / "values.gguf") as ours:
        assert_same_as_reader(tmp_path / "values.gguf", ours)
        assert ours.version == 3
        assert ours.metadata.values["value.BOOL"] is True
        assert ours.metadata.values["value.UINT64"] == 2**64 - 1
        assert ours.tensors["one"].dims == (4, 3, 2)
        assert ours.tensors["one"].num_rows == 6


def test_version_2_reads_like_version_3(tmp_path: Path) -> None:
    path = tmp_path / "values.gguf"
    write_values(path)
    data = bytearray(path.read_bytes())
    data[4] = 2
    path.write_bytes(data)
    with open_gguf(path) as ours:
        assert ours.version == 2
        assert_same_as_reader(path, ours)


def test_rows_are_read_by_range(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "qwen2", QuantType.Q4_K, num_layers=1)
    with open_gguf(path) as ours:
        tensor = ours.tensors["blk.0.ffn_up.weight"]
        whole = tensor.read()
        assert whole.shape == (512, 144)
        for start, end in ((0, 512), (0, 1), (511, 512), (100, 203), (7, 7)):
            assert np.array_equal(tensor.read(start, end), whole[start:end])


def test_type_tables_equal_those_of_gguf_package() -> None:
    ours = {number: quant_type.value for number, quant_type in TENSOR_TYPES.items()} | UNSUPPORTED_TENSOR_TYPES
    for theirs in gguf.GGMLQuantizationType:
        assert ours[theirs.value] == theirs.name
    for number, quant_type in TENSOR_TYPES.items():
        block_elements, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
        assert (quant_type.block_elements, quant_type.block_bytes) == (block_elements, block_bytes)
    for number, name in FILE_TYPES.items():
        assert gguf.LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_") == name


# split files


def write_split(folder: Path, num_parts: int = 3) -> list[Path]:
    """Eight tensors over `num_parts` files, as gguf-split names them."""
    writer = gguf.GGUFWriter(folder / "big.gguf", "llama", split_max_tensors=-(-8 // num_parts))
    writer.add_name("Split")
    for index in range(8):
        blocks = random_blocks(QuantType.Q8_0, (4, 64), index)
        writer.add_tensor(f"tensor.{index}", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("big-*.gguf"))


def test_parts_of_two_dialects_are_of_two_models(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    paths[1].write_bytes(b"PWRI" + paths[1].read_bytes()[4:])
    for path in paths:
        with pytest.raises(ModelFileError, match="of another format than"):
            open_gguf(path)


def test_split_files_open_from_any_part(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    assert [path.name for path in paths] == [f"big-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    identities = set()
    for path in paths:
        with open_gguf(path) as model:
            assert model.path == path
            assert model.metadata.string("general.name") == "Split"
            assert len(model.parts) == 3
            for index in range(8):
                expected = random_blocks(QuantType.Q8_0, (4, 64), index)
                assert np.array_equal(model.tensors[f"tensor.{index}"].read(), expected)
            identities.add(model.identity.hex())
    assert len(identities) == 1


def test_missing_part_is_named(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    paths[1].unlink()
    with pytest.raises(ModelFileError, match=r"part 3 of 3; part .*big-00002-of-00003\.gguf is missing"):
        open_gguf(paths[2])


def test_renamed_part_is_refused(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    paths[0].rename(tmp_path / "mine.gguf")
    with pytest.raises(ModelFileError, match="part 1 of 3 of a model, but its name does not say so"):
        open_gguf(tmp_path / "mine.gguf")


def test_part_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(ModelFileError, match="says it is part 3 of 3, expected part 2 of 3"):
        open_gguf(paths[0])


def test_parts_of_different_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths, others = write_split(tmp_path, 3), write_split(tmp_path / "other", 2)
    paths[1].write_bytes(others[1].read_bytes())
    with pytest.raises(ModelFileError, match="says it is part 2 of 2, expected part 2 of 3"):
        open_gguf(paths[0])


def test_damaged_part_is_named(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    paths[1].write_bytes(paths[1].read_bytes()[:-200])
    with pytest.raises(ModelFileError, match="big-00002-of-00003"):
        open_gguf(paths[0])


def test_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    paths[1].write_bytes(paths[1].read_bytes().replace(b"tensor.3", b"tensor.0"))
    with pytest.raises(ModelFileError, match=r"'tensor\.0' is in an earlier part too"):
        open_gguf(paths[0])


def test_wrong_sum_of_tensors_is_refused(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    data = paths[0].read_bytes()
    key = b"split.tensors.count"
    at = data.index(key) + len(key) + 4
    paths[0].write_bytes(data[:at] + b"\x09" + data[at + 1 :])
    with pytest.raises(ModelFileError, match="the parts hold 8 tensors, expected 9"):
        open_gguf(paths[0])


# identity, and change after opening


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny.gguf", "llama", QuantType.Q8_0, hidden_size=64, head_dim=16, ffn_size=64)


def test_identity_tells_files_apart(tiny: Path, tmp_path: Path) -> None:
    with open_checkpoint(tiny) as first, open_checkpoint(tiny) as again:
        assert first.identity == again.identity
        before = first.identity
    with open_gguf(tiny) as model:
        header = model.identity.header_sha256
    os.utime(tiny, ns=(0, 1))
    with open_checkpoint(tiny) as touched, open_gguf(tiny) as model:
        assert touched.identity != before
        assert model.identity.header_sha256 == header
    other = write_tiny(tmp_path / "other.gguf", "llama", QuantType.Q8_0, hidden_size=64, head_dim=16, ffn_size=128)
    with open_gguf(other) as model:
        assert model.identity.header_sha256 != header


def rewrite(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data)
    os.utime(path, ns=(0, 1))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def truncate_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def truncate_and_restore_time(path: Path) -> None:
    status = path.stat()
    os.truncate(path, 100)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def replace(path: Path) -> None:
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    status = path.stat()
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.rename(path)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    "change", [rewrite, truncate, truncate_to_nothing, truncate_and_restore_time, append, replace, remove]
)
def test_a_file_changed_after_opening_is_noticed(change: Callable[[Path], None], tiny: Path) -> None:
    with open_checkpoint(tiny) as checkpoint:
        checkpoint.tensors["embed"].read()
        change(tiny)
        for source in checkpoint.tensors.values():
            with pytest.raises(ModelFileChanged, match=r"tiny\.gguf"):
                source.read()


def test_reading_after_close_is_an_error_and_closing_twice_is_not(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(ValueError, match="closed file"):
        checkpoint.tensors["embed"].read()


def test_refused_file_leaves_nothing_open(tiny: Path) -> None:
    before = os.listdir("/proc/self/fd")
    tiny.write_bytes(tiny.read_bytes().replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"))
    with pytest.raises(ModelFileError, match="attn_q"):
        open_checkpoint(tiny)
    os.truncate(tiny, 1000)
    with pytest.raises(ModelFileError):
        open_checkpoint(tiny)
    assert os.listdir("/proc/self/fd") == before


# what is no file at all


def test_missing_file_is_not_found(tmp_path: Path) -> None:
    for name in ("none.gguf", "none/none.gguf", "nul\0.gguf"):
        with pytest.raises(ModelNotFound, match="no file"):
            open_checkpoint(tmp_path / name)


def test_folder_and_fifo_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="is a folder"):
        open_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ModelFileError, match="not a regular file"):
        open_checkpoint(tmp_path / "fifo")
