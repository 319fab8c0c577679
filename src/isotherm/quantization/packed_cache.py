"""The folder of packed model files: who may write, who waits, and what goes when it grows too large."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from isotherm.quantization.packed_file import (
    SUFFIX,
    CacheMiss,
    CacheUnavailable,
    PackedFile,
    PackedSink,
    PackedWriter,
    cache_errors,
    peek_key,
    temporary_path,
)


def open_or_build(
    path: Path, key: str, build: Callable[[PackedSink], None], notify: Callable[[str], None]
) -> PackedFile:
    """The packed file at `path`, made by `build` where there is none that is whole and of this `key`.

    One process builds, others wait for it. `notify` gets a line when we wait or build anew. Raises CacheUnavailable.
    """
    opened = PackedFile.open(path, key)
    if isinstance(opened, PackedFile):
        return opened
    with build_lock(path, notify):
        opened = PackedFile.open(path, key)  # built while we waited for the lock?
        if isinstance(opened, PackedFile):
            return opened
        if path.exists():
            notify(f"{opened.reason}: packing again")
        remove_leftovers(path.parent)
        with PackedWriter(path, key) as writer:
            build(writer)
            writer.commit()
        opened = PackedFile.open(path, key)
    if isinstance(opened, CacheMiss):
        raise CacheUnavailable(f"{opened.reason}, though it was written a moment ago")
    return opened


@contextmanager
def build_lock(path: Path, notify: Callable[[str], None]) -> Iterator[None]:
    """Holds the only right to write `path`; says so before it waits for another. Raises CacheUnavailable."""
    lock_path = _lock_path(path)
    with cache_errors(lock_path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _try_lock(lock_path)
    if lock is None:
        notify(f"waiting for another process that packs {path}")
    with cache_errors(lock_path):
        while lock is None:
            lock = _try_lock(lock_path, wait=True)
    try:
        yield
    finally:
        _release(lock, lock_path)


@dataclass(frozen=True)
class CachedModel:
    path: Path
    num_bytes: int
    last_used_s: float  # seconds since the epoch

    @cached_property
    def key(self) -> str | None:
        """What it was made for; None: damaged, or of another format version. Opens the file, which no start needs."""
        return peek_key(self.path)


def list_cache(directory: Path) -> list[CachedModel]:
    """The packed files of `directory`, least recently used first; empty where there is no such folder."""
    models = []
    for path in directory.glob(f"*{SUFFIX}"):
        with suppress(FileNotFoundError):  # removed by another process meanwhile
            status = path.stat()
            models.append(CachedModel(path, status.st_size, status.st_mtime))
    return sorted(models, key=lambda model: (model.last_used_s, model.path))


def clear_cache(directory: Path) -> int:
    """Removes every packed file and leftover of `directory`, but for what is being written; returns bytes freed.

    Processes that use a removed file keep their map of it.
    """
    return sum(_remove(model.path) for model in list_cache(directory)) + remove_leftovers(directory)


def enforce_cap(directory: Path, cap_bytes: int, *, keep: Path) -> list[CachedModel]:
    """Removes least recently used files, never `keep`, until `directory` fits `cap_bytes`; returns what went."""
    models = list_cache(directory)
    total_bytes = sum(model.num_bytes for model in models)
    removed = []
    for model in models:
        if total_bytes > cap_bytes and model.path.name != keep.name:
            _remove(model.path)
            total_bytes -= model.num_bytes
            removed.append(model)
    return removed


def remove_leftovers(directory: Path) -> int:
    """Removes temporary and lock files that no living process holds; returns bytes freed."""
    freed_bytes = 0
    targets = {path.with_suffix("") for end in (".tmp", ".lock") for path in directory.glob(f"*{SUFFIX}{end}")}
    for target in targets:
        with suppress(OSError):  # another user's, or gone meanwhile: not ours to remove
            lock = _try_lock(_lock_path(target))
            if lock is None:
                continue
            try:
                freed_bytes += _remove(temporary_path(target))
            finally:
                _release(lock, _lock_path(target))
    return freed_bytes


def _remove(path: Path) -> int:
    """Bytes freed: 0 where there is no such file."""
    with suppress(FileNotFoundError):
        num_bytes = path.stat().st_size
        path.unlink()
        return num_bytes
    return 0


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _try_lock(lock_path: Path, *, wait: bool = False) -> int | None:
    """The descriptor that holds the lock, or None: another has it, or had it and removed the file."""
    lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    is_held = False
    try:
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A holder removes its lock file as it leaves; a lock on the removed file would keep nobody out.
            is_held = os.path.samestat(os.fstat(lock), os.stat(lock_path))
    finally:
        if not is_held:
            os.close(lock)
    return lock if is_held else None


def _release(lock: int, lock_path: Path) -> None:
    try:
        lock_path.unlink(missing_ok=True)  # while it is held: see _try_lock
    finally:
        os.close(lock)
