"""Files of named NumPy arrays: a ZIP archive (.npz) whose member `meta` is JSON text with format, version and the rest.

A file is written whole under another name, synced and renamed. What is read is not believed: whoever opens one checks
shapes and types inside `reading`, which tells what is wrong with it.
"""

import json
import os
import struct
import tempfile
import tokenize
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isotherm.errors import StatsFileError

# what NumPy, zipfile and json raise of bytes that are not what they should be
_DAMAGES = (
    *(ValueError, KeyError, TypeError, EOFError, RuntimeError, OverflowError, MemoryError),
    *(struct.error, zipfile.BadZipFile, zipfile.LargeZipFile, SyntaxError, tokenize.TokenError),
)


def write_arrays(
    path: Path, kind: tuple[str, int], meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
) -> None:
    """kind: format and version. Raises OSError."""
    text = json.dumps({"format": kind[0], "version": kind[1], **meta})
    members = {"meta": np.frombuffer(text.encode(), np.uint8), **arrays}
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **members)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextmanager
def reading(path: Path, kind: tuple[str, int], what: str, way_out: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """The meta and the archive of arrays. Raises StatsFileError for what is no such file, or is damaged.

    what: the file holds; way_out: what to do where it does not.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.zip.infolist()):
                raise ValueError("compressed arrays")  # which may be of any size
            meta = json.loads(bytes(archive["meta"]).decode())
            if (meta.pop("format"), meta.pop("version")) != kind:
                raise ValueError("another format or version")
            yield meta, archive
    except OSError as error:
        raise StatsFileError(f"{path} cannot be read: {error.strerror or error}") from error
    except _DAMAGES as error:
        raise StatsFileError(f"{path} holds no {what}, or damaged ones: {error}; {way_out}") from error
