"""What every way of fetching a file needs: news for the user, room on the disk, one process at a time, a hash."""

import errno
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from isotherm.errors import DownloadError

_LOCK_POLL_S = 0.1


class FetchReporter(Protocol):
    """Hears what a fetch does; called on the thread that fetches. Raising stops the fetch."""

    def notice(self, text: str) -> None:
        """One sentence to show the user."""

    def progress(self, done_bytes: int, total_bytes: int | None) -> None:
        """Bytes here so far, of how many; may restart lower after a bad connection."""


class SilentReporter:
    def notice(self, text: str) -> None:
        pass

    def progress(self, done_bytes: int, total_bytes: int | None) -> None:
        pass


def size_text(num_bytes: int) -> str:
    """`98.4 MB`, `1.1 GB`: powers of ten, as disks and download pages count."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_free_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises DownloadError where the disk of `folder`, which need not exist yet, has less than `needed_bytes` free."""
    if _free_bytes(folder) < needed_bytes:
        raise disk_full(folder, needed_bytes, what)


def disk_full(folder: Path, needed_bytes: int, what: str) -> DownloadError:
    return DownloadError(
        f"{what} needs {size_text(needed_bytes)} on the disk of {folder}, and {size_text(_free_bytes(folder))} "
        f"are free; make room, or set ISOTHERM_CACHE and HF_HOME to folders on another disk"
    )


def _free_bytes(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free


def is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def one_process_at_a_time(lock_file: Path, what: str, reporter: FetchReporter) -> Iterator[None]:
    """Holds `lock_file`, waiting for whoever has it; the system lets go of it when a process dies.

    The file stays: to unlink it would let a waiter lock a file that nobody else sees.
    """
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _try_lock(handle):
            reporter.notice(f"another process is at work on {what}; waiting for it")
            while not _try_lock(handle):
                time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(handle)


if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: int) -> bool:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
