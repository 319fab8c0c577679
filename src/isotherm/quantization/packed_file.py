"""The packed model file: weights in kernel order, kept so that a second start is an mmap.

    [head: magic, version] [entry] [entry] ... [table: JSON] [tail: SHA-256, offset and size of the table, magic]

Entries start at multiples of 4096 bytes, the gaps are zero. Tail and head are written last, and the file gets its name
only after it reached the disk: one without both is never believed. The SHA-256 covers head and table.

Only head, table, tail and sizes are checked when a file is opened. Reading all weights would cost about a third of a
second per gigabyte at each start and would catch only a disk that decays: a torn write cannot get past fsync and
rename. `PackedFile.verify` reads everything; `isotherm doctor` calls it.
"""

import hashlib
import json
import math
import mmap
import os
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from isotherm import _native
from isotherm.quantization.layouts import F32, U8
from isotherm.quantization.neurons import neuron_bytes, neuron_form, row_bytes
from isotherm.quantization.p32 import packed_bytes
from isotherm.types import QuantType

FORMAT_VERSION = 1  # of this file and of P32: a change of either makes every cached file stale
SUFFIX = ".p32"

_ENTRY_ALIGNMENT = 4096
_WRITE_BYTES = 4 << 20  # a multiple of huge pages
_HEAD = struct.Struct("<8sI4x")  # magic, version
_HEAD_MAGIC = b"ISOTHERM"
_TAIL = struct.Struct("<32sQQ8s")  # SHA-256 of head and table, offset and size of the table, magic
_TAIL_MAGIC = b"P32-DONE"


class CacheUnavailable(OSError):
    """The cache cannot be written (full, read-only, no locks): the caller goes on with `PackedMemory` and says so."""


class EntryKind(Enum):
    MATRIX = "matrix"  # P32
    PAIR = "pair"  # P32 of two matrices of one shape
    VECTOR = "vector"  # plain float32: norms, biases
    ROWS = "rows"  # of a matrix, each in one piece: see neurons.py
    NEURONS = "neurons"  # columns of a matrix, each in one piece


@dataclass(frozen=True)
class EntrySpec:
    """What one entry holds."""

    name: str
    kind: EntryKind
    types: tuple[QuantType, ...]  # of a pair: two; of a vector: F32
    shape: tuple[int, ...]  # rows, columns of each matrix; a vector may have any

    @property
    def is_sound(self) -> bool:
        num_types = 2 if self.kind is EntryKind.PAIR else 1
        if len(self.types) != num_types or not self.shape or min(self.shape) < 1:
            return False
        if self.kind is EntryKind.VECTOR:
            return self.types == (QuantType.F32,)
        if self.kind is EntryKind.NEURONS and neuron_form(self.types[0]) is None:
            return False
        return len(self.shape) == 2 and not any(self.shape[1] % of_type.block_elements for of_type in self.types)

    @property
    def num_bytes(self) -> int:
        if self.kind is EntryKind.VECTOR:
            return 4 * math.prod(self.shape)
        if self.kind is EntryKind.ROWS:
            return self.shape[0] * row_bytes(self.types[0], self.shape[1])
        if self.kind is EntryKind.NEURONS:
            return neuron_bytes(self.types[0], *self.shape)
        types = (self.types[0], self.types[-1])
        return packed_bytes(types, self.shape[0], self.shape[1], pair=self.kind is EntryKind.PAIR)


class PackedSink(Protocol):
    """Where packed weights go: a `PackedWriter` or a `PackedMemory`."""

    def add(self, spec: EntrySpec, pieces: Iterable[U8]) -> None:
        """Stores one entry; the pieces, one after the other, are its `num_bytes` bytes."""


class PackedWeights(Protocol):
    """Where packed weights are read: a `PackedFile` or a `PackedMemory`."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def entry(self, name: str) -> EntrySpec: ...

    def array(self, name: str) -> U8 | F32:
        """Read-only: uint8 [num_bytes] of a matrix or pair, float32 [shape] of a vector."""

    def touch(self) -> None:
        """Brings every page into this process."""


@dataclass(frozen=True)
class CacheMiss:
    """Why a packed file is not used; the reason is a sentence for the user."""

    reason: str


@dataclass(frozen=True)
class _Stored:
    spec: EntrySpec
    offset: int
    crc32: int


class _Unusable(Exception):
    """Carries the reason of a CacheMiss out of the checks."""


class PackedFile:
    """A packed file, mapped read-only. The map outlives removal or replacement of the file."""

    def __init__(self, path: Path, key: str, entries: Mapping[str, _Stored], data: U8) -> None:
        self.path = path
        self.key = key
        self._entries = entries
        self._data = data

    @classmethod
    def open(cls, path: Path, key: str) -> "PackedFile | CacheMiss":
        """The file at `path` if it is whole, of this format and made for `key`; marks it as just used."""
        try:
            packed = _read(path)
            if packed.key != key:
                raise _Unusable("was packed from another file or with other options")
        except FileNotFoundError:
            return CacheMiss(f"{path} does not exist")
        except OSError as error:
            return CacheMiss(f"{path} cannot be read: {error.strerror}")
        except _Unusable as reason:
            return CacheMiss(f"{path} {reason}")
        # In a cache that may be read only, the order of eviction is lost; there is nothing to evict there either.
        with suppress(OSError):
            os.utime(path)
        return packed

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def entry(self, name: str) -> EntrySpec:
        return self._entries[name].spec

    def array(self, name: str) -> U8 | F32:
        stored = self._entries[name]
        return _shaped(self._data[stored.offset : stored.offset + stored.spec.num_bytes], stored.spec)

    def touch(self) -> None:
        """Maps every page now: in a thread of its own it runs beside what else a start does."""
        _native.populate(self._data)  # where the system cannot, pages come as they are read

    def verify(self) -> tuple[str, ...]:
        """Names of the entries whose bytes are damaged; reads the whole file."""
        return tuple(
            name
            for name, stored in self._entries.items()
            if zlib.crc32(self._data[stored.offset : stored.offset + stored.spec.num_bytes].data) != stored.crc32
        )


class PackedMemory:
    """Packed weights in anonymous memory, for a run without a cache; the same reading interface as PackedFile."""

    def __init__(self) -> None:
        self._specs: dict[str, EntrySpec] = {}
        self._data: dict[str, U8] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._specs)

    def add(self, spec: EntrySpec, pieces: Iterable[U8]) -> None:
        """Stores one entry; the pieces, one after the other, are its `num_bytes` bytes."""
        assert spec.is_sound
        assert spec.name not in self._specs
        data = np.frombuffer(mmap.mmap(-1, spec.num_bytes), np.uint8)  # pages: aligned, zeroed, given back at once
        end = 0
        for piece in pieces:
            start, end = end, end + piece.nbytes
            data[start:end] = piece.reshape(-1).view(np.uint8)
        assert end == spec.num_bytes
        data.flags.writeable = False
        self._specs[spec.name], self._data[spec.name] = spec, data

    def entry(self, name: str) -> EntrySpec:
        return self._specs[name]

    def array(self, name: str) -> U8 | F32:
        return _shaped(self._data[name], self._specs[name])

    def touch(self) -> None:
        """Nothing to do: packing wrote every page."""


class PackedWriter:
    """Writes a packed file beside `path`; `commit` puts it in place, leaving the block without it removes it.

    The caller holds `build_lock(path)`. Raises CacheUnavailable where the file cannot be written.

    The file grows by aligned blocks of `_WRITE_BYTES`: file systems with large folios (ext4, xfs) then keep it in huge
    pages, and map it so.
    """

    def __init__(self, path: Path, key: str) -> None:
        assert path.suffix == SUFFIX
        self._path, self._key = path, key
        self._entries: dict[str, _Stored] = {}
        self._offset = _HEAD.size
        self._block = np.zeros(_WRITE_BYTES, np.uint8)
        self._block_offset = 0
        with cache_errors(temporary_path(path)):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            self._file = os.open(temporary_path(path), flags, 0o644)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
        temporary_path(self._path).unlink(missing_ok=True)  # renamed by now, if committed

    def add(self, spec: EntrySpec, pieces: Iterable[U8]) -> None:
        """Stores one entry; the pieces, one after the other, are its `num_bytes` bytes."""
        assert spec.is_sound
        assert spec.name not in self._entries
        offset = -(-self._offset // _ENTRY_ALIGNMENT) * _ENTRY_ALIGNMENT
        end, crc32 = offset, 0
        for piece in pieces:
            data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
            crc32 = zlib.crc32(data, crc32)
            self._append(data, end)
            end += len(data)
        assert end - offset == spec.num_bytes
        self._entries[spec.name] = _Stored(spec, offset, crc32)
        self._offset = end

    def commit(self) -> None:
        """Writes table, tail and head, waits for the disk and puts the file in place."""
        table = json.dumps(
            {"key": self._key, "entries": [_to_json(stored) for stored in self._entries.values()]}
        ).encode()
        head = _HEAD.pack(_HEAD_MAGIC, FORMAT_VERSION)
        tail = _TAIL.pack(hashlib.sha256(head + table).digest(), self._offset, len(table), _TAIL_MAGIC)
        self._append(memoryview(table + tail), self._offset)
        self._write(self._block[: self._offset + len(table + tail) - self._block_offset].data, self._block_offset)
        self._write(memoryview(head), 0)
        with cache_errors(self._path):
            os.fsync(self._file)
            os.replace(temporary_path(self._path), self._path)
            directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def _append(self, data: memoryview, offset: int) -> None:
        """Offsets rise; what lies between is zero."""
        while data:
            if offset - self._block_offset >= _WRITE_BYTES:
                self._write(self._block.data, self._block_offset)
                self._block[:] = 0
                self._block_offset += _WRITE_BYTES
            else:
                start = offset - self._block_offset
                part = data[: _WRITE_BYTES - start]
                self._block[start : start + len(part)] = part
                data, offset = data[len(part) :], offset + len(part)

    def _write(self, data: memoryview, offset: int) -> None:
        with cache_errors(temporary_path(self._path)):
            while data:
                written = os.pwrite(self._file, data, offset)
                data, offset = data[written:], offset + written


def temporary_path(path: Path) -> Path:
    """Where the packed file `path` grows before it is whole."""
    return path.with_name(path.name + ".tmp")


@contextmanager
def cache_errors(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into CacheUnavailable; never put around code that reads the model."""
    try:
        yield
    except OSError as error:
        raise CacheUnavailable(error.errno, error.strerror, str(path)) from error


def peek_key(path: Path) -> str | None:
    """The key a packed file was made for; None: it is damaged, of another format version, or not there."""
    try:
        return _read(path).key
    except (OSError, _Unusable):
        return None


def _shaped(data: U8, spec: EntrySpec) -> U8 | F32:
    return data.view(np.float32).reshape(spec.shape) if spec.kind is EntryKind.VECTOR else data


def _read(path: Path) -> PackedFile:
    """Maps the file and checks all but the weights. Raises OSError, _Unusable."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hang us
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_size < _HEAD.size + _TAIL.size:
            raise _Unusable("is not a packed model")
        mapped = mmap.mmap(file, 0, prot=mmap.PROT_READ)
    finally:
        os.close(file)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them: small pages, a tenth slower
            mapped.madvise(mmap.MADV_HUGEPAGE)  # read from disk in huge pages where the file system can
    data = np.frombuffer(mapped, np.uint8)
    head = data[: _HEAD.size].tobytes()
    magic, version = _HEAD.unpack(head)
    if magic != _HEAD_MAGIC:
        raise _Unusable("is not a packed model")
    if version != FORMAT_VERSION:
        raise _Unusable(f"has format version {version}, this program uses {FORMAT_VERSION}")
    digest, table_offset, table_bytes, tail_magic = _TAIL.unpack(data[-_TAIL.size :].tobytes())
    if tail_magic != _TAIL_MAGIC or table_offset + table_bytes + _TAIL.size != len(data):
        raise _Unusable("is not complete")
    table = data[table_offset : table_offset + table_bytes].tobytes()
    if hashlib.sha256(head + table).digest() != digest:
        raise _Unusable("is damaged: the checksum of its table does not fit")
    try:
        parsed = json.loads(table)
        entries = [_from_json(fields, table_offset) for fields in parsed["entries"]]
        return PackedFile(path, str(parsed["key"]), {stored.spec.name: stored for stored in entries}, data)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _Unusable(f"is damaged: its table cannot be understood ({error})") from error


def _to_json(stored: _Stored) -> dict[str, Any]:
    spec = stored.spec
    return {
        "name": spec.name,
        "kind": spec.kind.value,
        "types": [of_type.value for of_type in spec.types],
        "shape": spec.shape,
        "offset": stored.offset,
        "num_bytes": spec.num_bytes,
        "crc32": stored.crc32,
    }


def _from_json(fields: dict[str, Any], end: int) -> _Stored:
    """Raises KeyError, TypeError, ValueError. Kernels trust these numbers: our own file is checked as any other."""
    spec = EntrySpec(
        name=str(fields["name"]),
        kind=EntryKind(fields["kind"]),
        types=tuple(QuantType(value) for value in fields["types"]),
        shape=tuple(int(size) for size in fields["shape"]),
    )
    stored = _Stored(spec, int(fields["offset"]), int(fields["crc32"]))
    if not spec.is_sound or fields["num_bytes"] != spec.num_bytes:
        raise ValueError(f"entry {spec.name!r} is not as long as its shape says")
    if stored.offset % _ENTRY_ALIGNMENT or not 0 <= stored.offset <= end - spec.num_bytes:
        raise ValueError(f"entry {spec.name!r} lies outside the file")
    return stored
