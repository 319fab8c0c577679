"""The packed model file: what goes in comes out, and nothing damaged, stale or half-written is ever believed."""

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isotherm.quantization import packed_file
from isotherm.quantization.layouts import U8
from isotherm.quantization.p32 import matrix_pieces, pack_matrix, pack_pair, pair_pieces
from isotherm.quantization.packed_file import (
    CacheMiss,
    CacheUnavailable,
    EntryKind,
    EntrySpec,
    PackedFile,
    PackedMemory,
    PackedSink,
    PackedWeights,
    PackedWriter,
    temporary_path,
)
from isotherm.types import QuantType

KEY = "model v1"

HEAD_SPEC = EntrySpec("head", EntryKind.MATRIX, (QuantType.Q6_K,), (40, 256))
FFN_SPEC = EntrySpec("0.ffn", EntryKind.PAIR, (QuantType.Q4_0, QuantType.Q8_0), (20, 96))
NORM_SPEC = EntrySpec("norm", EntryKind.VECTOR, (QuantType.F32,), (96,))


def source(quant_type: QuantType, num_rows: int, num_columns: int) -> U8:
    rng = np.random.default_rng(num_rows)
    return rng.integers(0, 120, (num_rows, quant_type.row_bytes(num_columns)), np.uint8)  # small bytes: no NaN scales


HEAD = source(QuantType.Q6_K, 40, 256)
GATE, UP = source(QuantType.Q4_0, 20, 96), source(QuantType.Q8_0, 20, 96)
NORM = np.linspace(-1, 1, 96, dtype=np.float32)


def build(sink: PackedSink) -> None:
    sink.add(HEAD_SPEC, matrix_pieces(HEAD, QuantType.Q6_K, 256))
    sink.add(NORM_SPEC, [NORM[:50].view(np.uint8), NORM[50:].view(np.uint8)])
    sink.add(FFN_SPEC, pair_pieces(GATE, QuantType.Q4_0, UP, QuantType.Q8_0, 96))


def write(path: Path, key: str = KEY) -> Path:
    with PackedWriter(path, key) as writer:
        build(writer)
        writer.commit()
    return path


@pytest.fixture
def packed_path(tmp_path: Path) -> Path:
    return write(tmp_path / "model.p32")


def opened(path: Path, key: str = KEY) -> PackedFile:
    result = PackedFile.open(path, key)
    assert isinstance(result, PackedFile), result
    return result


def reason(path: Path, key: str = KEY) -> str:
    result = PackedFile.open(path, key)
    assert isinstance(result, CacheMiss)
    return result.reason


def check_content(weights: PackedWeights) -> None:
    assert weights.names == ("head", "norm", "0.ffn")
    for spec in (HEAD_SPEC, NORM_SPEC, FFN_SPEC):
        assert weights.entry(spec.name) == spec
        array = weights.array(spec.name)
        assert array.nbytes == spec.num_bytes
        assert array.ctypes.data % 64 == 0
        assert not array.flags.writeable
    np.testing.assert_array_equal(weights.array("head"), pack_matrix(HEAD, QuantType.Q6_K, 256))
    np.testing.assert_array_equal(weights.array("0.ffn"), pack_pair(GATE, QuantType.Q4_0, UP, QuantType.Q8_0, 96))
    norm = weights.array("norm")
    assert norm.dtype == np.float32
    np.testing.assert_array_equal(norm, NORM)


def test_what_goes_in_comes_out(packed_path: Path) -> None:
    packed = opened(packed_path)
    check_content(packed)
    assert packed.verify() == ()
    assert os.listdir(packed_path.parent) == ["model.p32"]


@pytest.mark.parametrize("write_bytes", [4096, 8192, 1 << 20])
def test_the_size_of_writes_changes_no_byte(tmp_path: Path, write_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(tmp_path / "whole.p32").read_bytes()
    monkeypatch.setattr(packed_file, "_WRITE_BYTES", write_bytes)
    assert write(tmp_path / "model.p32").read_bytes() == whole


def test_memory_reads_like_a_file() -> None:
    memory = PackedMemory()
    build(memory)
    check_content(memory)


def test_shape_of_a_vector_is_kept(tmp_path: Path) -> None:
    spec = EntrySpec("mask", EntryKind.VECTOR, (QuantType.F32,), (2, 3, 4))
    values = np.arange(24, dtype=np.float32)
    memory = PackedMemory()
    with PackedWriter(tmp_path / "m.p32", KEY) as writer:
        for sink in (writer, memory):
            sink.add(spec, [values.view(np.uint8)])
        writer.commit()
    for weights in (opened(tmp_path / "m.p32"), memory):
        np.testing.assert_array_equal(weights.array("mask"), values.reshape(2, 3, 4))


def test_a_map_outlives_its_file(packed_path: Path) -> None:
    packed = opened(packed_path)
    write(packed_path, "another")
    packed_path.unlink()
    check_content(packed)


def test_touching_a_file_that_shrank_meanwhile_is_survived(packed_path: Path) -> None:
    packed = opened(packed_path)
    packed.touch()
    os.truncate(packed_path, 10)
    packed.touch()  # a read past the end of a mapped file would kill the process


def test_opening_marks_the_file_as_used(packed_path: Path) -> None:
    os.utime(packed_path, (1, 1))
    opened(packed_path)
    assert packed_path.stat().st_mtime > 1


def test_a_file_for_another_key_is_not_used(packed_path: Path) -> None:
    os.utime(packed_path, (1, 1))
    assert "another file or with other options" in reason(packed_path, "model v2")
    assert packed_path.stat().st_mtime == 1


def test_a_file_of_another_version_is_not_used(packed_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_file, "FORMAT_VERSION", 7)
    assert "format version 1, this program uses 7" in reason(packed_path)


def test_no_file_an_empty_file_a_folder_and_a_pipe(tmp_path: Path) -> None:
    assert "does not exist" in reason(tmp_path / "none.p32")
    (tmp_path / "empty.p32").touch()
    (tmp_path / "folder.p32").mkdir()
    os.mkfifo(tmp_path / "pipe.p32")
    (tmp_path / "text.p32").write_bytes(b"GGUF" * 100)
    for name in ("empty", "folder", "pipe", "text"):
        assert "not a packed model" in reason(tmp_path / f"{name}.p32")


def test_a_truncated_file_is_never_believed(packed_path: Path) -> None:
    whole = packed_path.read_bytes()
    short = packed_path.with_name("short.p32")
    places = {*range(100), *range(100, len(whole), 211), *range(len(whole) - 400, len(whole))}
    for num_bytes in sorted(places):
        short.write_bytes(whole[:num_bytes])
        assert isinstance(PackedFile.open(short, KEY), CacheMiss), num_bytes
    short.write_bytes(whole + b"\0")
    assert "not complete" in reason(short)


def test_a_file_with_a_hole_at_its_head_is_never_believed(packed_path: Path) -> None:
    whole = packed_path.read_bytes()
    packed_path.write_bytes(bytes(16) + whole[16:])
    assert "not a packed model" in reason(packed_path)


def test_each_flipped_byte_of_head_table_and_tail_is_seen(packed_path: Path) -> None:
    whole = packed_path.read_bytes()
    (table_offset,) = struct.unpack("<Q", whole[-24:-16])
    assert whole[table_offset : table_offset + 1] == b"{"
    flipped = packed_path.with_name("flipped.p32")
    for place in [*range(16), *range(table_offset, len(whole))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        flipped.write_bytes(damaged)
        assert isinstance(PackedFile.open(flipped, KEY), CacheMiss), place


@given(data=st.data())
def test_a_flipped_byte_of_the_weights_is_found_by_verify(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.mktemp("flip") / "model.p32")
    name = data.draw(st.sampled_from(["head", "norm", "0.ffn"]))
    offset = next(entry["offset"] for entry in table_of(path)["entries"] if entry["name"] == name)
    place = offset + data.draw(st.integers(0, opened(path).entry(name).num_bytes - 1))
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ data.draw(st.integers(1, 255))]))
    assert opened(path).verify() == (name,)


def table_of(path: Path) -> dict[str, Any]:
    whole = path.read_bytes()
    offset, num_bytes = struct.unpack("<QQ", whole[-24:-8])
    table: dict[str, Any] = json.loads(whole[offset : offset + num_bytes])
    return table


def forge(path: Path, table: object, *, text: bytes | None = None) -> None:
    """Replaces the table by another one with a right checksum."""
    whole = path.read_bytes()
    (offset,) = struct.unpack("<Q", whole[-24:-16])
    encoded = json.dumps(table).encode() if text is None else text
    digest = hashlib.sha256(whole[:16] + encoded).digest()
    path.write_bytes(whole[:offset] + encoded + digest + struct.pack("<QQ", offset, len(encoded)) + whole[-8:])


def test_forging_an_equal_table_changes_nothing(packed_path: Path) -> None:
    forge(packed_path, table_of(packed_path))
    check_content(opened(packed_path))


@pytest.mark.parametrize(
    "change",
    [
        {"offset": 1 << 40},
        {"offset": -4096},
        {"offset": 64},
        {"offset": float("inf")},
        {"offset": None},
        {"num_bytes": 1},
        {"num_bytes": 1 << 62},
        {"shape": [1 << 40, 256]},
        {"shape": [40, 255]},
        {"shape": [40]},
        {"shape": []},
        {"shape": [-40, -256]},
        {"shape": [40, 256, 1]},
        {"shape": "40"},
        {"types": ["Q4_K"]},
        {"types": ["Q6_K", "Q6_K"]},
        {"types": ["IQ2_XS"]},
        {"types": []},
        {"kind": "pair"},
        {"kind": "vector"},
        {"kind": "tensor"},
    ],
)
def test_a_forged_entry_is_refused(packed_path: Path, change: dict[str, object]) -> None:
    table = table_of(packed_path)
    table["entries"][0] |= change
    forge(packed_path, table)
    assert "its table cannot be understood" in reason(packed_path)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b'{"key": 1}', b'{"key": "", "entries": 1}', b"\xff", b"[" * 100_000]
)
def test_a_forged_table_is_refused(packed_path: Path, text: bytes) -> None:
    forge(packed_path, None, text=text)
    assert "its table cannot be understood" in reason(packed_path)


def test_without_commit_nothing_is_left(tmp_path: Path) -> None:
    with PackedWriter(tmp_path / "model.p32", KEY) as writer:
        build(writer)
        assert temporary_path(tmp_path / "model.p32").exists()
    assert os.listdir(tmp_path) == []


def test_a_half_written_file_is_not_believed_under_its_right_name(tmp_path: Path) -> None:
    path = tmp_path / "model.p32"
    with PackedWriter(path, KEY) as writer:
        build(writer)
        temporary_path(path).rename(path)
        assert isinstance(PackedFile.open(path, KEY), CacheMiss)


def test_an_error_of_the_source_passes_through(tmp_path: Path) -> None:
    def pieces() -> Any:
        yield pack_matrix(HEAD[:32], QuantType.Q6_K, 256)
        raise OSError("the model file vanished")

    with pytest.raises(OSError, match="vanished") as caught, PackedWriter(tmp_path / "model.p32", KEY) as writer:
        writer.add(HEAD_SPEC, pieces())
    assert not isinstance(caught.value, CacheUnavailable)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("sink", ["file", "memory"])
def test_an_entry_of_the_wrong_length_is_our_own_mistake(tmp_path: Path, sink: str) -> None:
    with PackedWriter(tmp_path / "model.p32", KEY) as writer:
        target = writer if sink == "file" else PackedMemory()
        with pytest.raises(AssertionError):
            target.add(NORM_SPEC, [NORM[:-1].view(np.uint8)])


@pytest.mark.parametrize(
    "spec",
    [
        EntrySpec("x", EntryKind.MATRIX, (QuantType.Q4_K,), (32, 128)),
        EntrySpec("x", EntryKind.MATRIX, (QuantType.Q4_K, QuantType.Q4_K), (32, 256)),
        EntrySpec("x", EntryKind.PAIR, (QuantType.Q4_K,), (32, 256)),
        EntrySpec("x", EntryKind.VECTOR, (QuantType.F16,), (32,)),
        EntrySpec("x", EntryKind.VECTOR, (QuantType.F32,), (0,)),
    ],
)
def test_unsound_specs(spec: EntrySpec) -> None:
    assert not spec.is_sound


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write, budget = os.pwrite, [5000]

    def full(file: int, data: memoryview, offset: int) -> int:
        if budget[0] == 0:
            raise OSError(28, "No space left on device")
        written = real_write(file, data[: budget[0]], offset)  # a short write first, as a disk that fills up gives
        budget[0] -= written
        return written

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(packed_file, "_WRITE_BYTES", 4096)
    with pytest.raises(CacheUnavailable, match="No space left"), PackedWriter(tmp_path / "model.p32", KEY) as writer:
        build(writer)
    assert os.listdir(tmp_path) == []
    budget[0] = 1 << 30
    check_content(opened(write(tmp_path / "model.p32")))


def test_a_disk_that_fills_up_at_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int) -> None:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CacheUnavailable, match="quota"):
        write(tmp_path / "model.p32")
    assert os.listdir(tmp_path) == []


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    temporary_path(tmp_path / "model.p32").symlink_to(victim)
    with pytest.raises(CacheUnavailable):
        PackedWriter(tmp_path / "model.p32", KEY)
    assert victim.read_text() == "precious"
