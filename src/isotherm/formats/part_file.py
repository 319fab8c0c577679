"""One file of a model on disk, read by offset, and watched for change.

There is no mmap here on purpose: a mapped page past the end of a file that someone truncates kills the process with
SIGBUS, where `pread` returns short and becomes an error. Big reads go straight into the array that is handed out.
"""

import os
import stat
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isotherm.errors import ModelFileChanged, ModelFileError, ModelNotFound


@dataclass(frozen=True)
class PartFile:
    """An open file with what its inode said when it was opened. Reading it after `close` is a ValueError."""

    path: Path
    num_bytes: int
    mtime_ns: int
    inode: int
    _file: FileIO = field(repr=False, compare=False)

    def read(self, offset: int, num_bytes: int) -> NDArray[np.uint8]:
        """Bytes [offset, offset + num_bytes), which the caller has checked against `num_bytes` of the file.

        Raises ModelFileChanged where the file is no longer the one that was opened.
        """
        assert 0 <= offset <= offset + num_bytes <= self.num_bytes
        data = np.empty(num_bytes, np.uint8)
        unread = data.data
        try:
            while unread:
                # Linux moves at most 2 GiB at once
                done = os.preadv(self._file.fileno(), [unread], offset + num_bytes - len(unread))
                if done == 0:
                    break
                unread = unread[done:]
        except OSError as error:
            raise ModelFileError(f"{self.path}: cannot read bytes from {offset} on: {error.strerror}") from error
        # Asked after the read, which covers a change before it and a change during it.
        self._check_unchanged()
        if unread:
            raise ModelFileChanged(f"{self.path}: shorter than when it was opened; open the model again")
        return data

    def close(self) -> None:
        self._file.close()

    def _check_unchanged(self) -> None:
        # fstat sees our bytes being rewritten, stat by name sees another file put in our place.
        try:
            found = (os.fstat(self._file.fileno()), os.stat(self.path))
        except OSError as error:
            raise ModelFileChanged(f"{self.path}: gone since it was opened ({error.strerror})") from error
        opened = (self.num_bytes, self.mtime_ns, self.inode)
        for status in found:
            if (status.st_size, status.st_mtime_ns, status.st_ino) != opened:
                raise ModelFileChanged(
                    f"{self.path}: changed after it was opened (size was {self.num_bytes} bytes, is {status.st_size}); "
                    "open the model again"
                )


def open_part(path: Path) -> PartFile:
    """Open a regular file; ModelNotFound where there is none, ModelFileError where it cannot be read."""
    path = Path(os.path.abspath(path))
    try:
        # without O_NONBLOCK, opening a FIFO would wait for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: no file can have such a name
        raise ModelNotFound(f"no file {str(path)!r}") from error
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be opened: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise ModelFileError(f"{path} is a folder; name the model file in it")
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(f"{path} is not a regular file")
        return PartFile(path, status.st_size, status.st_mtime_ns, status.st_ino, FileIO(descriptor, "rb"))
    except BaseException:
        os.close(descriptor)
        raise
