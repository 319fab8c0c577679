"""Parses what stands before the tensor data of one GGUF file (v2, v3, little-endian).

The file is taken for hostile: every count, length and offset is compared, as an exact Python integer, with the bytes
that are there before anything is read or allocated for it. The caps are far above any real model and bound what a
crafted file can make us hold. Text must be UTF-8, tokens too, as the specification says: both tokenizers we run
spell raw bytes in characters, and a lone surrogate would only fail later, far from its cause.
"""

import hashlib
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

import numpy as np

from isotherm import _native
from isotherm.errors import ModelFileError, UnsupportedModel
from isotherm.formats.gguf_tables import (
    ARRAY_KIND,
    BOOL_KIND,
    GPU_INDEX,
    MAGIC,
    POWERINFER_MAGIC,
    SCALAR_KINDS,
    STRING_KIND,
    TENSOR_TYPES,
    UNSUPPORTED_TENSOR_TYPES,
    VERSIONS,
    describe_beginning,
)
from isotherm.formats.metadata import MetadataValue, quoted
from isotherm.formats.part_file import PartFile
from isotherm.types import QuantType

MAX_HEADER_BYTES = 1 << 28
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_KEY_BYTES = (1 << 16) - 1  # specification
MAX_NAME_BYTES = 256  # the specification says 64
MAX_STRING_BYTES = 1 << 24
MAX_STRINGS = 1 << 22  # in the whole header; vocabularies end near 2^18, merges near 2^19
MAX_ARRAYS = 1 << 16  # in the whole header
MAX_NESTING = 4
MAX_DIMS = 4
MIN_ALIGNMENT = 8
MAX_ALIGNMENT = 1 << 16
DEFAULT_ALIGNMENT = 32

_READ_BYTES = 1 << 18
_MIN_KEY_BYTES = 8 + 1 + 4 + 1  # key length, key, kind, value
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, number of dims, one dim, type, offset


@dataclass(frozen=True)
class TensorEntry:
    """One row of the tensor table. `dims[0]` is the row length; `offset` counts from the start of the file."""

    name: str
    quant_type: QuantType
    dims: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Header:
    part: PartFile
    version: int
    is_powerinfer: bool
    metadata: dict[str, MetadataValue]
    tensors: tuple[TensorEntry, ...]
    sha256: str  # of every byte before the padding that precedes the tensor data


def read_header(part: PartFile) -> Header:
    """Parse and check the header of `part`. Raises ModelFileError, UnsupportedModel or ModelFileChanged."""
    cursor = _Cursor(part)
    is_powerinfer, version = _read_magic(cursor), _read_version(cursor)
    num_tensors = cursor.count("tensor count", MAX_TENSORS, _MIN_TENSOR_BYTES)
    num_keys = cursor.count("key count", MAX_KEYS, _MIN_KEY_BYTES)
    metadata = _read_metadata(cursor, num_keys)
    if metadata.get("general.architecture") == GPU_INDEX:  # said before its integer tensors are
        raise UnsupportedModel(
            f"{part.path}: names the neurons that PowerInfer keeps on a GPU (gpuidx), and holds no weights; give the "
            "model it lies beside"
        )
    alignment = _alignment(cursor, metadata)
    raw = _read_tensor_table(cursor, num_tensors)
    data_start = -(-cursor.position // alignment) * alignment
    tensors = tuple(_check_tensor(cursor, tensor, data_start, alignment) for tensor in raw)
    _check_overlap(cursor, tensors)
    return Header(part, version, is_powerinfer, metadata, tensors, cursor.sha256())


class _Cursor:
    """Reads values one after another and knows where it is, so that every refusal can say so."""

    def __init__(self, part: PartFile) -> None:
        self.part = part
        self._buffer = b""  # of the file, from _start on
        self._start = 0
        self._offset = 0  # of the next value in _buffer
        self._sha256 = hashlib.sha256()  # of what came before _buffer
        self._num_strings = 0
        self._num_arrays = 0

    @property
    def position(self) -> int:
        return self._start + self._offset

    def fail(self, what: str, found: object, expected: str) -> NoReturn:
        raise ModelFileError(
            f"{self.part.path}: {what}, near byte {self.position}: found {found}, expected {expected}; "
            "the file is damaged or cut short: fetch it again"
        )

    def need(self, num_bytes: int, what: str) -> None:
        """Have `num_bytes` more bytes in the buffer; refuse where the file does not have them."""
        if self._offset + num_bytes <= len(self._buffer):
            return
        end = self.position + num_bytes
        if end > self.part.num_bytes:
            self.fail(what, f"{self.part.num_bytes - self.position} bytes to the end of the file", f"{num_bytes} bytes")
        if end > MAX_HEADER_BYTES:
            self.fail(what, f"a header of {end} bytes or more", f"at most {MAX_HEADER_BYTES} bytes")
        self._sha256.update(memoryview(self._buffer)[: self._offset])
        kept = self._buffer[self._offset :]
        self._start, self._offset = self.position, 0
        loaded = self._start + len(kept)
        target = min(self.part.num_bytes, max(end, loaded + _READ_BYTES))
        self._buffer = b"".join((kept, self.part.read(loaded, target - loaded).data))

    def take(self, num_bytes: int, what: str) -> bytes:
        self.need(num_bytes, what)
        start = self._offset
        self._offset = start + num_bytes
        return self._buffer[start : self._offset]

    def scalar(self, kind: int, what: str) -> bool | int | float:
        form, dtype = SCALAR_KINDS[kind]
        value: int | float = struct.unpack(form, self.take(dtype.itemsize, what))[0]
        if kind != BOOL_KIND:
            return value
        return value == 1 if value in (0, 1) else self.fail(what, f"byte {value}", "0 or 1")

    def integer(self, num_bytes: int, what: str) -> int:
        return int.from_bytes(self.take(num_bytes, what), "little")

    def count(self, what: str, cap: int, min_item_bytes: int) -> int:
        """A u64 that counts items of at least `min_item_bytes` each."""
        count = self.integer(8, what)
        if count > cap:
            self.fail(what, count, f"at most {cap}")
        if count * min_item_bytes > self.part.num_bytes - self.position:
            self.fail(what, f"{count} with {self.part.num_bytes - self.position} bytes left", "a count that fits")
        return count

    def string(self, what: str, cap: int = MAX_STRING_BYTES) -> str:
        length = self.count(f"length of {what}", cap, 1)
        data = self.take(length, what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.fail(what, f"the bytes {quoted(data[:24])}", "UTF-8 text")

    def strings(self, count: int, what: str) -> tuple[str, ...]:
        """The hot loop of opening a model, a quarter of a million strings and more: native."""
        self._num_strings += count
        if self._num_strings > MAX_STRINGS:
            self.fail(what, f"{self._num_strings} strings so far", f"at most {MAX_STRINGS} in a file")
        values: list[str] = []
        while len(values) < count:
            # what stops this early, `string` below meets again: it loads more bytes, or says what is wrong
            self._offset = _native.read_strings(self._buffer, self._offset, count, MAX_STRING_BYTES, values)
            if len(values) < count:
                values.append(self.string(what))
        return tuple(values)

    def value(self, kind: int, what: str, depth: int = 0) -> MetadataValue:
        if kind in SCALAR_KINDS:
            return self.scalar(kind, what)
        if kind == STRING_KIND:
            return self.string(what)
        if kind != ARRAY_KIND:
            self.fail(what, f"value kind {kind}", "a kind from 0 to 12")
        return self._array(what, depth + 1)

    def _array(self, what: str, depth: int) -> MetadataValue:
        self._num_arrays += 1
        if self._num_arrays > MAX_ARRAYS:
            self.fail(what, f"{self._num_arrays} arrays so far", f"at most {MAX_ARRAYS} in a file")
        if depth > MAX_NESTING:
            self.fail(what, f"arrays nested {depth} deep", f"at most {MAX_NESTING}")
        kind = self.integer(4, f"item kind of {what}")
        if kind in SCALAR_KINDS:
            return self._numbers(kind, what)
        if kind == STRING_KIND:
            return self.strings(self.count(f"length of {what}", MAX_STRINGS, 8), what)
        if kind != ARRAY_KIND:
            self.fail(f"item kind of {what}", kind, "a kind from 0 to 12")
        count = self.count(f"length of {what}", MAX_ARRAYS, 12)
        return tuple(self._array(what, depth + 1) for _ in range(count))

    def _numbers(self, kind: int, what: str) -> MetadataValue:
        dtype = SCALAR_KINDS[kind][1]
        count = self.count(f"length of {what}", MAX_HEADER_BYTES, dtype.itemsize)
        numbers = np.frombuffer(self.take(count * dtype.itemsize, what), dtype)  # read-only, as the bytes are
        if kind != BOOL_KIND:
            return numbers
        if numbers.size and numbers.max() > 1:
            self.fail(what, f"byte {numbers.max()}", "0 or 1")
        return numbers.view(np.bool_)

    def sha256(self) -> str:
        """Of all that was read."""
        whole = self._sha256.copy()
        whole.update(memoryview(self._buffer)[: self._offset])
        return whole.hexdigest()


def _read_magic(cursor: _Cursor) -> bool:
    """Whether the file is in PowerInfer's dialect."""
    start = cursor.part.read(0, min(cursor.part.num_bytes, 64)).tobytes()
    if start[:4] not in (MAGIC, POWERINFER_MAGIC):
        raise ModelFileError(f"{cursor.part.path}: not a GGUF file; it begins like {describe_beginning(start)}")
    return cursor.take(4, "magic") == POWERINFER_MAGIC


def _read_version(cursor: _Cursor) -> int:
    path = cursor.part.path
    version = cursor.integer(4, "version")
    if version in VERSIONS:
        return version
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise UnsupportedModel(f"{path}: a big-endian GGUF file; fetch the little-endian one")
    advice = "convert the model again" if version < min(VERSIONS) else "a newer Isotherm may read it"
    raise UnsupportedModel(f"{path}: GGUF version {version}; this version reads 2 and 3: {advice}")


def _read_metadata(cursor: _Cursor, num_keys: int) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    for index in range(num_keys):
        key = cursor.string(f"key {index}", MAX_KEY_BYTES)
        if not key or key in metadata:
            cursor.fail(f"key {index}", quoted(key), "a key that is not empty and not there yet")
        kind = cursor.integer(4, f"kind of key {quoted(key)}")
        metadata[key] = cursor.value(kind, f"value of key {quoted(key)}")
    return metadata


def _alignment(cursor: _Cursor, metadata: dict[str, MetadataValue]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    expected = f"a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}"
    if not isinstance(alignment, int) or not MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT:
        cursor.fail("general.alignment", quoted(alignment), expected)
    return alignment if alignment.bit_count() == 1 else cursor.fail("general.alignment", alignment, expected)


def _read_tensor_table(cursor: _Cursor, num_tensors: int) -> list[TensorEntry]:
    """The table as it stands; offsets still count from the start of the tensor data."""
    table: dict[str, TensorEntry] = {}
    for index in range(num_tensors):
        name = cursor.string(f"name of tensor {index}", MAX_NAME_BYTES)
        if not name or name in table:
            cursor.fail(f"name of tensor {index}", quoted(name), "a name that is not empty and not there yet")
        what = f"tensor {quoted(name)}"
        num_dims = cursor.integer(4, f"number of dimensions of {what}")
        if not 1 <= num_dims <= MAX_DIMS:
            cursor.fail(f"number of dimensions of {what}", num_dims, f"1 to {MAX_DIMS}")
        dims = struct.unpack(f"<{num_dims}Q", cursor.take(8 * num_dims, f"dimensions of {what}"))
        quant_type = _tensor_type(cursor, cursor.integer(4, f"type of {what}"), what)
        offset = cursor.integer(8, f"offset of {what}")
        table[name] = TensorEntry(name, quant_type, dims, offset, _tensor_bytes(cursor, dims, quant_type, what))
    return list(table.values())


def _tensor_type(cursor: _Cursor, type_id: int, what: str) -> QuantType:
    if type_id in TENSOR_TYPES:
        return TENSOR_TYPES[type_id]
    if type_id not in UNSUPPORTED_TENSOR_TYPES:
        raise UnsupportedModel(
            f"{cursor.part.path}: {what} has type {type_id}, which is unknown here; "
            "the file is damaged, or newer than this version"
        )
    supported = ", ".join(quant_type.value for quant_type in QuantType)
    raise UnsupportedModel(
        f"{cursor.part.path}: {what} is stored as {UNSUPPORTED_TENSOR_TYPES[type_id]}, which is not supported; "
        f"supported are {supported}: fetch the Q4_K_M file of this model, say"
    )


def _tensor_bytes(cursor: _Cursor, dims: tuple[int, ...], quant_type: QuantType, what: str) -> int:
    if 0 in dims:
        cursor.fail(f"dimensions of {what}", list(dims), "none of them zero")
    if dims[0] % quant_type.block_elements:
        expected = f"a multiple of {quant_type.block_elements}, the block of {quant_type.value}"
        cursor.fail(f"row length of {what}", dims[0], expected)
    num_bytes = quant_type.row_bytes(dims[0])
    for dim in dims[1:]:
        num_bytes *= dim  # exact: Python integers do not overflow
    return num_bytes


def _check_tensor(cursor: _Cursor, tensor: TensorEntry, data_start: int, alignment: int) -> TensorEntry:
    what = f"tensor {quoted(tensor.name)}"
    if tensor.offset % alignment:
        cursor.fail(f"offset of {what}", tensor.offset, f"a multiple of {alignment}")
    offset = data_start + tensor.offset
    end = offset + tensor.num_bytes
    if end > cursor.part.num_bytes:
        cursor.fail(f"data of {what}", f"a file of {cursor.part.num_bytes} bytes", f"at least {end} bytes")
    return TensorEntry(tensor.name, tensor.quant_type, tensor.dims, offset, tensor.num_bytes)


def _check_overlap(cursor: _Cursor, tensors: tuple[TensorEntry, ...]) -> None:
    ordered = sorted(tensors, key=lambda tensor: tensor.offset)
    for before, after in pairwise(ordered):
        if after.offset < before.offset + before.num_bytes:
            what = f"tensors {quoted(before.name)} and {quoted(after.name)}"
            cursor.fail(what, f"both over byte {after.offset}", "data of their own")
