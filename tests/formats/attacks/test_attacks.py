"""Files made to hurt: each is refused with a ModelFileError that says why, and no memory is taken for its claims."""

import random
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from formats.attacks.mutation import mutate
from formats.attacks.raw_gguf import (
    ARRAY,
    BOOL,
    F32,
    STRING,
    TYPE_Q4_K,
    TYPE_Q8_0,
    U8,
    U32,
    U64,
    RawGguf,
    array,
    key,
    tensor,
    text,
    u32,
    u64,
)
from formats.powerinfer_files import write_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_tiny

from isotherm.errors import ModelFileError, UnsupportedModel
from isotherm.formats.checkpoint import open_checkpoint
from isotherm.formats.gguf import open_gguf
from isotherm.types import QuantType

SOUND = RawGguf()
MAX_PEAK_BYTES = 8 << 20  # the first read of a header is 1 MiB

HUGE_COUNTS = (2**17 + 1, 2**31, 2**32, 2**60, 2**61 + 1, 2**63, 2**64 - 1)


def with_key(*keys: bytes) -> bytes:
    return replace(SOUND, keys=keys).build()


def with_tensors(*tensors: bytes, data: bytes = bytes(64)) -> bytes:
    return replace(SOUND, tensors=tensors, data=data).build()


def nested(depth: int) -> bytes:
    payload = array(U8, 0, b"")
    for _ in range(depth - 1):
        payload = array(ARRAY, 1, payload)
    return payload


def damaged_files() -> Iterator[tuple[str, bytes, str]]:
    """(name, file, what the error says)"""
    for count in HUGE_COUNTS:
        yield f"{count} tensors", replace(SOUND, num_tensors=count).build(), "tensor count"
        yield f"{count} keys", replace(SOUND, num_keys=count).build(), "key count"
        yield f"key of {count} bytes", with_key(text("k", count)), "length of key 0"
        yield f"string of {count} bytes", with_key(key("k", STRING, text("v", count))), "length of value of key 'k'"
        yield f"string of {count} bytes in an array", with_key(key("k", ARRAY, array(STRING, 1, u64(count)))), "'k'"
        yield f"name of {count} bytes", with_tensors(text("t", count)), "tensor count|length of name of tensor 0"
        for kind in (U8, U32, U64, BOOL, STRING, ARRAY):
            yield (
                f"array of {count} of kind {kind}",
                with_key(key("k", ARRAY, array(kind, count, b""))),
                "length of value",
            )
        yield f"dimension {count}", with_tensors(tensor("t", (8, count))), "data of tensor 't'|near byte"
        yield f"offset {count // 32 * 32}", with_tensors(tensor("t", offset=count // 32 * 32)), "data of tensor 't'"
    yield "more tensors than rows", replace(SOUND, num_tensors=3).build(), "tensor 2|name of"
    yield "more keys than pairs", replace(SOUND, num_keys=4).build(), "key 3|name of tensor 0"
    # products that wrap around in 64 bits
    for dims in ((2**32, 2**32), (2**33, 2**31, 2), (2**62, 4), (2**16,) * 4, (2**63, 2), (32, 2**59 + 1)):
        yield f"dimensions {dims}", with_tensors(tensor("t", dims)), "data of tensor 't'"
        yield f"dimensions {dims} of Q8_0", with_tensors(tensor("t", dims, TYPE_Q8_0)), "data of tensor 't'"
    yield "dimension 0", with_tensors(tensor("t", (8, 0))), "none of them zero"
    yield "dimension 0 first", with_tensors(tensor("t", (0, 8))), "none of them zero"
    yield "no dimensions", with_tensors(tensor("t", ()) + u64(0)), "number of dimensions of tensor 't'"
    yield "five dimensions", with_tensors(tensor("t", (1,) * 5)), "number of dimensions of tensor 't'"
    yield "2^32 - 1 dimensions", with_tensors(text("t") + u32(2**32 - 1) + bytes(64)), "number of dimensions"
    yield "row of 31 in blocks of 32", with_tensors(tensor("t", (31, 1), TYPE_Q8_0)), "row length .* multiple of 32"
    yield "row of 128 in blocks of 256", with_tensors(tensor("t", (128, 2), TYPE_Q4_K)), "multiple of 256"
    yield "the same tensor twice", with_tensors(tensor("t"), tensor("t", offset=32)), "not there yet"
    yield "tensor without a name", with_tensors(tensor("")), "not empty"
    yield "tensor with a name that is not UTF-8", with_tensors(tensor(b"\xff\xfe")), "UTF-8"
    yield "tensors at one place", with_tensors(tensor("s"), tensor("t")), "tensors 's' and 't'.*both over byte"
    yield "tensors that overlap", with_tensors(tensor("s", (9,)), tensor("t", offset=32)), "both over byte"
    yield "tensor at an odd offset", with_tensors(tensor("t", offset=1)), "offset of tensor 't'.*multiple of 32"
    yield "tensor at half the alignment", with_tensors(tensor("t", offset=16)), "multiple of 32"
    yield "tensor one byte past the end", with_tensors(tensor("t"), data=bytes(31)), "data of tensor 't'"
    for alignment in (0, 1, 4, 7, 12, 24, 33, 131072, 2**32 - 1):
        yield f"alignment {alignment}", with_key(key("general.alignment", U32, u32(alignment))), "power of two from 8"
    yield "alignment in words", with_key(key("general.alignment", STRING, text("32"))), "power of two"
    yield "alignment that is true", with_key(key("general.alignment", BOOL, b"\x01")), "power of two"
    yield "the same key twice", with_key(key("k", U8, b"\0"), key("k", U8, b"\0")), "not there yet"
    yield "empty key", with_key(key("", U8, b"\0")), "not empty"
    yield "key of 65536 bytes", with_key(key("k" * 65536, U8, b"\0")), "at most 65535"
    yield "key that is not UTF-8", with_key(key(b"\xc3\x28", U8, b"\0")), "UTF-8"
    yield "string that is not UTF-8", with_key(key("k", STRING, text(b"\x80abc"))), "value of key 'k'.*UTF-8"
    yield (
        "token that is not UTF-8",
        with_key(key("k", ARRAY, array(STRING, 2, text("a") + text(b"\xed\xa0\x80")))),
        "UTF",
    )
    for kind in (13, 255, 2**31, 2**32 - 1):
        yield f"value of kind {kind}", with_key(key("k", kind, bytes(16))), f"value kind {kind}"
        yield f"array of kind {kind}", with_key(key("k", ARRAY, array(kind, 1, bytes(16)))), f"found {kind}"
    yield "boolean 2", with_key(key("k", BOOL, b"\x02")), "byte 2"
    yield "boolean 2 in an array", with_key(key("k", ARRAY, array(BOOL, 3, b"\x00\x01\x02"))), "byte 2"
    yield "arrays 5 deep", with_key(key("k", ARRAY, nested(5))), "nested 5 deep"
    yield "arrays 100000 deep", with_key(key("k", ARRAY, nested(100000))), "nested 5 deep"
    wide = array(ARRAY, 65536, array(U8, 0, b"") * 65536)
    yield "more than 65536 arrays", with_key(key("k", ARRAY, wide)), "65537 arrays so far"
    yield "split into 513", with_key(key("split.count", U32, u32(513)), key("split.no", U32, u32(0))), "split.count"
    yield "split into -1", with_key(key("split.count", 5, u32(2**32 - 1))), "split.count"
    yield "part 3 of 2", with_key(key("split.count", U32, u32(2)), key("split.no", U32, u32(2))), "split.no"
    yield "part without a number", with_key(key("split.count", U32, u32(2))), "split.no is missing"
    yield "split into a half", with_key(key("split.count", F32, u32(0x3F000000))), "split.count"


DAMAGED = list(damaged_files())


def refuse(path: Path) -> ModelFileError:
    """Opening `path` fails with a ModelFileError that names the file, and takes little memory to find out."""
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError) as refusal:
            open_gguf(path).close()
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.name in str(refusal.value)
    assert peak_bytes < MAX_PEAK_BYTES + 3 * min(path.stat().st_size, 1 << 24)
    return refusal.value


def test_the_file_that_is_damaged_here_is_sound_before(tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    path.write_bytes(SOUND.build())
    with open_gguf(path) as model:
        assert model.tensors["b"].read().tobytes() == bytes(range(32, 64))
        assert model.metadata.strings("words") == ("one", "two")
        assert model.metadata.integers("numbers").tolist() == [1, 2, 3]


def test_largest_allowed_sizes_open(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    vocabulary = array(STRING, 300000, text("token") * 300000)
    keys = (key("k" * 65535, ARRAY, nested(4)), key("vocabulary", ARRAY, vocabulary))
    aligned = key("general.alignment", U32, u32(65536))
    path.write_bytes(replace(SOUND, keys=(*keys, aligned), tensors=(tensor("t"),), alignment=65536).build())
    with open_gguf(path) as model:
        assert len(model.metadata.strings("vocabulary")) == 300000
        assert model.tensors["t"].entry.offset % 65536 == 0


@pytest.mark.parametrize(("data", "says"), [case[1:] for case in DAMAGED], ids=[case[0] for case in DAMAGED])
def test_damaged_file_is_refused(data: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    assert_says(refuse(path), says)


def assert_says(error: ModelFileError, says: str) -> None:
    with pytest.raises(ModelFileError, match=f"(?s){says}"):
        raise error


def test_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    data = SOUND.build()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ModelFileError, match=r"cut\.gguf"):
            open_gguf(path)


def test_claims_that_a_sparse_file_seems_to_keep_are_refused(tmp_path: Path) -> None:
    """A file of one TiB with hardly a byte on disk: counts that fit it must meet the caps."""
    path = tmp_path / "sparse.gguf"
    claims = (
        (with_key(key("k", ARRAY, array(STRING, 2**22 + 1, b""))), "length of value"),
        (with_key(*(key(f"k{i}", ARRAY, array(STRING, 2**19, bytes(8 * 2**19))) for i in range(9))), "strings so far"),
        (with_key(key("k", ARRAY, array(U8, 2**29, b""))), "length of value"),
        (with_key(key("k", ARRAY, array(U64, 2**26, b""))), "a header of"),
        (with_key(key("k", STRING, text("v", 2**24 + 1))), "length of value"),
        (replace(SOUND, num_keys=2**16 + 1).build(), "key count"),
        (replace(SOUND, num_tensors=2**17 + 1).build(), "tensor count"),
        (with_tensors(tensor("t", (2**20, 2**20))), "data of tensor"),
    )
    for data, says in claims:
        with path.open("wb") as file:
            file.write(data)
            file.truncate(1 << 40)
        if "so far" in says:
            with pytest.raises(ModelFileError, match=says):
                open_gguf(path)
        else:
            assert_says(refuse(path), says)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"GG", "no known beginning"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n<html lang=en>", "web page"),
        (b"PK\x03\x04" + bytes(30), "zip file"),
        (u64(64) + b'{"__metadata__":{}}', "safetensors"),
        (b"version https://git-lfs", "git-lfs pointer"),
        (b"\x80\x02}q\x00", "pickle"),
        (b"lmgg" + bytes(30), "before GGUF"),
        (b'{"error":"not found"}', "JSON"),
        (bytes(4096), "zeros"),
        (b"\x7fELF" + bytes(60), "no known beginning"),
        (b"FUGG" + bytes(30), "big-endian"),
    ],
)
def test_what_is_no_gguf_is_told_by_its_first_bytes(data: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(data)
    error = refuse(path)
    assert_says(error, "not a GGUF file")
    assert_says(error, says)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (replace(SOUND, version=1).build(), "version 1; .*convert"),
        (replace(SOUND, version=4).build(), "version 4; .*newer"),
        (replace(SOUND, version=3 << 24).build(), "big-endian"),
        (with_tensors(tensor("blk.0.up", (256,), 15)), r"'blk\.0\.up' is stored as Q8_K.*supported are F32.*Q4_K_M"),
        (with_tensors(tensor("t", (256,), 24)), "I8"),
        (with_tensors(tensor("t", (256,), 41)), "Q1_0"),
        (with_tensors(tensor("t", (256,), 5)), "Q4_3"),
        (with_tensors(tensor("t", (256,), 77)), "type 77, which is unknown"),
        (with_tensors(tensor("t", (256,), 2**32 - 1)), "type 4294967295, which is unknown"),
    ],
)
def test_what_this_version_lacks_is_unsupported(data: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "lacking.gguf"
    path.write_bytes(data)
    error = refuse(path)
    assert isinstance(error, UnsupportedModel)
    assert_says(error, says)


def test_names_from_a_file_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "escape.gguf"
    for data in (with_tensors(tensor("\x1b[2J\r\n", (256,), 23)), with_key(key("\x1b[2J" * 1000, 99, b""))):
        path.write_bytes(data)
        message = str(refuse(path))
        assert message.isprintable()
        assert len(message) < 1000


# random damage

WHOLE_MODELS = {
    "llama": QuantType.Q8_0,
    "qwen2": QuantType.Q4_0,
    "qwen3moe": QuantType.Q4_1,
    "gemma3": QuantType.F32,
}


@pytest.fixture(scope="module")
def whole_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    sizes: dict[str, Any] = {"hidden_size": 32, "head_dim": 8, "ffn_size": 32, "num_layers": 1}
    models = {
        family: write_tiny(folder / family, family, quant_type, **sizes).read_bytes()
        for family, quant_type in WHOLE_MODELS.items()
    }
    return models | {"powerinfer": write_pair(folder, "llama", QuantType.Q4_0, **sizes)[0].read_bytes()}


@given(seed=st.integers(0, 2**32))
@settings(max_examples=300, deadline=2000)
def test_mutated_small_file_opens_or_is_refused(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = SOUND.build()
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(mutate(data, len(SOUND.header()), random.Random(seed)))
    with suppress(ModelFileError), open_gguf(path) as model:
        for stored in model.tensors.values():
            assert stored.read().nbytes == stored.entry.num_bytes


@given(seed=st.integers(0, 2**32), family=st.sampled_from(["powerinfer", *sorted(WHOLE_MODELS)]))
@settings(max_examples=200, deadline=2000)
def test_mutated_model_opens_or_is_refused(
    seed: int, family: str, whole_models: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = whole_models[family]
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(mutate(data, data.rindex(b"output_norm.weight") + 64, random.Random(seed)))
    with suppress(ModelFileError), open_checkpoint(path) as checkpoint:
        for source in checkpoint.tensors.values():
            assert source.read().nbytes == source.num_bytes


def test_fuzzer_runs_and_finds_nothing(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "fuzz.py"
    command = [sys.executable, str(script), "--seconds", "2", "--save", str(tmp_path / "failure.gguf")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "ModelFileError" in run.stdout
