"""KV pages on disk: what one process computed, later ones read.

    FOLDER/IDENTITY/GROUP-KEY.kv    [head: magic, version, identity, group, key, bytes of the page] [CRC-32] [page]

The key names the page's tokens and all before them (`kv_pages.page_key`), the identity all else that its bytes follow
from. A reader knows every byte of the head beforehand, and the CRC-32 covers head and page: a file that is not as it
must be is removed, and counts as one that never was. So no write waits for the disk: a page that a power cut tore shows
by its checksum, and costs no more than computing it again. A file gets its name when it is whole; a temporary one is
locked by who writes it, and one that nobody locks is a leftover.
"""

import fcntl
import os
import re
import secrets
import stat
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isotherm.backends.reference.contract import ARITHMETIC_VERSION
from isotherm.errors import OptionError
from isotherm.program.backend import CompiledProgram
from isotherm.program.recorder import PAGE_TOKENS, Program
from isotherm.types import LoadOptions

FORMAT_VERSION = 1

_HEAD = struct.Struct("<8sI16sI16sQ")  # magic, version, identity, state group, page key, bytes of the page
_MAGIC = b"ISOTH-KV"
_CHECKSUM = struct.Struct("<I")
_FOLDER_NAME = re.compile(r"[0-9a-f]{32}")
_FILE_NAME = re.compile(r"[0-9]+-[0-9a-f]{32}\.kv(?P<temporary>\.[0-9a-f]{8}\.tmp)?")
_SCAN_SHARE = 16  # the folder is counted again after each such part of its cap: other processes write there too
_PAUSE_S = 60.0  # without writing, after a write that failed

U8 = NDArray[np.uint8]


@dataclass(frozen=True)
class PageName:
    """A page of one state group: the key of its text, and its index there."""

    group: int
    key: bytes  # [16]
    index: int


@dataclass(frozen=True)
class StoreCounts:
    """What a store did since it was opened."""

    pages_read: int = 0
    bytes_read: int = 0
    pages_written: int = 0
    bytes_written: int = 0
    pages_damaged: int = 0
    pages_skipped: int = 0  # not written: the disk refused them, or their memory was needed before


def store_identity(model_identity: str, program: Program, compiled: CompiledProgram) -> bytes:
    """[16]: differs where the same tokens may have other keys and values, or have them laid out otherwise."""
    parts = (model_identity, program, compiled.page_layout, compiled.page_bytes, PAGE_TOKENS, ARITHMETIC_VERSION)
    return blake2b(repr(parts).encode(), digest_size=16).digest()


def open_store(
    options: LoadOptions,
    model_identity: str,
    program: Program,
    compiled: CompiledProgram,
    notice: Callable[[str], None],
) -> "KvStore | None":
    """The store that the options ask for. Raises OptionError."""
    if options.kv_dir is None:
        return None
    least_bytes = sum(compiled.page_bytes)
    if options.kv_disk_bytes < least_bytes:
        raise OptionError(
            f"kv_disk_bytes is {options.kv_disk_bytes}; {PAGE_TOKENS} tokens of this model alone take {least_bytes}: "
            f"give it more (--kv-disk-gib), or leave kv_dir out"
        )
    identity = store_identity(model_identity, program, compiled)
    return KvStore(Path(options.kv_dir).expanduser().absolute(), identity, options.kv_disk_bytes, notice)


class _Damaged(Exception):
    """Carries what is wrong with a file, as the end of a sentence."""


class KvStore:
    """The pages of one identity. Any thread may use it, and other processes the same folder."""

    def __init__(self, folder: Path, identity: bytes, cap_bytes: int, notice: Callable[[str], None]) -> None:
        """cap_bytes: of all pages in `folder`, whatever their identity. Raises OptionError where it cannot be used."""
        self._folder = folder
        self._identity = identity
        self._cap_bytes = cap_bytes
        self.notice = notice
        self._own_folder = folder / identity.hex()
        self._paused_until_s = 0.0
        self._is_refused = False  # the last write was
        self._uncounted_bytes = cap_bytes  # written since the folder was counted, which it never was
        self._lock = threading.Lock()
        self.counts = StoreCounts()
        try:
            self._make_folder()
            remove_leftovers(folder)
        except OSError as error:
            raise OptionError(
                f"keys and values cannot be kept in {folder}: {error.strerror}; name another folder (--kv-dir)"
            ) from error

    def has(self, group: int, key: bytes) -> bool:
        return os.path.exists(self._path(group, key))

    def read(self, name: PageName, out: U8) -> bool:
        """Fills `out` with the page. False: it is not there, cannot be read, or was damaged and is removed."""
        path = self._path(name.group, name.key)
        try:
            self._read(path, name, out)
        except FileNotFoundError:
            return False
        except OSError as error:  # too many open files, say: nothing against the page
            self.notice(f"{path} cannot be read: {error.strerror}; what it holds is computed again")
            return False
        except _Damaged as damage:
            self.notice(f"{path} {damage}; what it held is computed again")
            self._count(pages_damaged=1)
            with suppress(OSError):  # not ours to remove: whoever reads it next is told again
                path.unlink()
            return False
        self._count(pages_read=1, bytes_read=out.nbytes)
        return True

    def touch(self, name: PageName) -> bool:
        """Marks the page as used just now; False: it is not there."""
        try:
            os.utime(self._path(name.group, name.key), ns=_used_ns(name))
        except OSError:
            return False
        return True

    def write(self, name: PageName, page: U8) -> None:
        """Keeps the page. A disk that refuses it is left alone for a minute, and the user is told once."""
        if time.monotonic() < self._paused_until_s:
            self.skip(1)
            return
        try:
            self._make_folder()
            self._make_room(page.nbytes)
            self._write(name, page)
        except FileNotFoundError:  # somebody emptied the folder, or took our file for a leftover before it was locked
            self.skip(1)
        except OSError as error:
            self._paused_until_s = time.monotonic() + _PAUSE_S
            self.skip(1)
            if not self._is_refused:
                self.notice(f"keys and values are not kept in {self._folder} for now: {error.strerror}")
            self._is_refused = True
        else:
            self._is_refused = False
            self._count(pages_written=1, bytes_written=page.nbytes)

    def skip(self, num_pages: int) -> None:
        """These will not be written."""
        self._count(pages_skipped=num_pages)

    def _count(self, **more: int) -> None:
        with self._lock:
            self.counts = replace(self.counts, **{name: getattr(self.counts, name) + n for name, n in more.items()})

    def _make_folder(self) -> None:
        # For its owner only: keys tell which tokens a conversation had, to one who guesses them.
        self._own_folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _path(self, group: int, key: bytes) -> Path:
        return self._own_folder / f"{group}-{key.hex()}.kv"

    def _head(self, name: PageName, page: U8) -> bytes:
        return _HEAD.pack(_MAGIC, FORMAT_VERSION, self._identity, name.group, name.key, page.nbytes)

    def _read(self, path: Path, name: PageName, out: U8) -> None:
        """Raises OSError, _Damaged."""
        head = bytearray(_HEAD.size + _CHECKSUM.size)
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)  # a FIFO must not hang us
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode) or status.st_size != len(head) + out.nbytes:
                raise _Damaged("has the wrong length")
            if os.preadv(file, [head, out.data], 0) != status.st_size:  # the system splits what is 2 GiB and more
                raise _Damaged("was cut short")
            expected = self._head(name, out)
            if head[: _HEAD.size] != expected:
                raise _Damaged("is damaged: its head is not that of this page")
            if _CHECKSUM.unpack(head[_HEAD.size :])[0] != zlib.crc32(out.data, zlib.crc32(expected)):
                raise _Damaged("is damaged: its checksum does not fit")
            with suppress(OSError):  # in a folder that may be read only, nothing is removed either
                os.utime(file, ns=_used_ns(name))
        finally:
            os.close(file)

    def _write(self, name: PageName, page: U8) -> None:
        path, head = self._path(name.group, name.key), self._head(name, page)
        parts = [memoryview(head + _CHECKSUM.pack(zlib.crc32(page.data, zlib.crc32(head)))), page.data]
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")  # two processes may write the same page
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for part in parts:
                while part:
                    part = part[os.write(file, part) :]
            os.utime(file, ns=_used_ns(name))
            os.replace(temporary, path)
        finally:
            os.close(file)
            temporary.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        """Removes the least recently used pages where the cap would be passed before the folder is counted again."""
        share = max(num_bytes, self._cap_bytes // _SCAN_SHARE)
        if self._uncounted_bytes + num_bytes > share:
            files = sorted(_files(self._folder, temporary=False), key=lambda file: file.used_ns)
            excess = sum(file.num_bytes for file in files) + share - self._cap_bytes
            for file in files:
                if excess <= 0:
                    break
                with suppress(OSError):  # removed by another process meanwhile, or not ours to remove
                    file.path.unlink()
                excess -= file.num_bytes
            self._uncounted_bytes = 0
        self._uncounted_bytes += num_bytes


@dataclass(frozen=True)
class _File:
    path: Path
    num_bytes: int
    used_ns: int


def _files(folder: Path, *, temporary: bool) -> Iterator[_File]:
    """The store's files in `folder`, of every identity. What else lies there is a user's own."""
    for own in os.scandir(folder):
        if not _FOLDER_NAME.fullmatch(own.name) or not own.is_dir(follow_symlinks=False):
            continue
        with suppress(FileNotFoundError):  # the folder was removed meanwhile
            for entry in os.scandir(own):
                match = _FILE_NAME.fullmatch(entry.name)
                if match and bool(match["temporary"]) is temporary:
                    with suppress(FileNotFoundError):  # and so was the file
                        status = entry.stat(follow_symlinks=False)
                        yield _File(Path(entry.path), status.st_size, status.st_mtime_ns)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that no living process writes."""
    for leftover in list(_files(folder, temporary=True)):
        with suppress(OSError):  # locked by who writes it, or gone meanwhile, or not ours to remove
            file = os.open(leftover.path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.path.unlink()
            finally:
                os.close(file)


def _used_ns(name: PageName) -> tuple[int, int]:
    """Times of access and change. The deeper a page, the earlier: ends of texts go before their starts."""
    now = time.time_ns() - name.index * 1_000_000
    return now, now
