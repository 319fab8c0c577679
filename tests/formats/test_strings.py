"""Arrays of strings in a header against a slow twin, read through windows of any size; pairs of pieces."""

import hashlib
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_tiny

from isotherm import _native
from isotherm.errors import ModelFileError
from isotherm.formats import gguf_header
from isotherm.formats.gguf import open_gguf
from isotherm.formats.part_file import open_part
from isotherm.types import QuantType

# characters of 1 to 4 bytes, a block of the reader's, and bytes that are no UTF-8 by themselves but may be together
SOUND = st.text(max_size=6).map(lambda text: text.encode("utf-8", "replace")) | st.sampled_from(
    [b"", b"\0", "Ġ".encode(), "模型".encode(), "🙂".encode(), b"x" * 5000, "é".encode() * 9000]
)
BROKEN = st.sampled_from([b"\xc4", b"\xa0", b"\xf0\x9f", b"\x99\x82", b"\xff", b"\xed\xa0\x80", b"a\xc4", b"\xa0b"])


def prefixed(strings: list[bytes]) -> bytes:
    return b"".join(len(string).to_bytes(8, "little") + string for string in strings)


def sound_start(strings: list[bytes]) -> list[str]:
    """The strings before the first that is no UTF-8, one decoded after the other."""
    found = []
    for string in strings:
        try:
            found.append(string.decode())
        except UnicodeDecodeError:
            break
    return found


def read(data: bytes, count: int, window_bytes: int) -> tuple[tuple[str, ...], int, str]:
    with tempfile.TemporaryDirectory() as folder, patch.object(gguf_header, "_READ_BYTES", window_bytes):
        path = Path(folder) / "strings"
        path.write_bytes(data)
        part = open_part(path)
        try:
            cursor = gguf_header._Cursor(part)
            return cursor.strings(count, "text"), cursor.position, cursor.sha256()
        finally:
            part.close()


@settings(max_examples=200, deadline=None)
@given(st.lists(SOUND, max_size=12) | st.lists(SOUND | BROKEN, max_size=12), st.integers(1, 40_000), st.binary())
def test_strings_are_those_of_the_slow_twin(strings: list[bytes], window_bytes: int, rest: bytes) -> None:
    data = prefixed(strings)
    expected = sound_start(strings)
    if len(expected) == len(strings):
        hashed = hashlib.sha256(data).hexdigest()
        assert read(data + rest, len(strings), window_bytes) == (tuple(expected), len(data), hashed)
    else:
        place = len(prefixed(strings[: len(expected) + 1]))
        with pytest.raises(ModelFileError, match=f"near byte {place}: .* expected UTF-8 text"):
            read(data + rest, len(strings), window_bytes)


@settings(deadline=None)
@given(st.lists(SOUND, min_size=1, max_size=6), st.data())
def test_strings_that_are_cut_off_are_refused(strings: list[bytes], data: st.DataObject) -> None:
    whole = prefixed(strings)
    end = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ModelFileError, match="near byte"):
        read(whole[:end], len(strings), 1 << 14)


@settings(max_examples=200, deadline=None)
@given(st.lists(SOUND | BROKEN, max_size=8), st.integers(0, 10), st.integers(0, 20_000), st.integers(0, 100))
def test_the_native_reader_stops_before_what_is_not_sound(
    strings: list[bytes], count: int, max_bytes: int, start: int
) -> None:
    expected = sound_start(strings[:count])
    expected = expected[: next((i for i, s in enumerate(strings[: len(expected)]) if len(s) > max_bytes), None)]
    found = ["before"]
    data = b"\xff" * start + prefixed(strings)
    offset = _native.read_strings(data, start, count + 1, max_bytes, found)
    assert found == ["before", *expected[: len(found) - 1]]
    assert offset == start + len(prefixed(strings[: len(found) - 1]))
    if len(expected) == min(count, len(strings)):
        assert len(found) == 1 + len(expected)


def test_many_strings_before_a_bad_one_are_read_once() -> None:
    strings = [b""] * 500_000 + [b"\xff"]
    with pytest.raises(ModelFileError, match="near byte 4000009: "):
        read(prefixed(strings), len(strings), 1 << 18)


def test_a_start_past_the_end_finds_nothing() -> None:
    found: list[str] = []
    assert _native.read_strings(b"", 0, 1, 9, found) == 0
    assert _native.read_strings(b"1234567", 7, 1, 9, found) == 7
    assert _native.read_strings((2**64 - 1).to_bytes(8, "little"), 0, 1, 2**64 - 1, found) == 0
    assert found == []


@given(st.lists(st.text("ab \n é", max_size=5)))
def test_what_is_no_pair_is_found(texts: list[str]) -> None:
    wrong = [i for i, text in enumerate(texts) if len(text.split(" ")) != 2 or not all(text.split(" "))]
    assert _native.find_unpaired(texts) == (wrong[0] if wrong else None)


@pytest.mark.parametrize("window_bytes", [1, 7, 4096])
def test_a_header_is_the_same_through_small_windows(window_bytes: int, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "llama", QuantType.F32)
    with open_gguf(path) as whole, patch.object(gguf_header, "_READ_BYTES", window_bytes), open_gguf(path) as pieced:
        assert pieced.identity == whole.identity
        assert list(pieced.tensors) == list(whole.tensors)
        assert str(pieced.metadata.values) == str(whole.metadata.values)
