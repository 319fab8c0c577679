"""Opens GGUF models, split ones too: metadata at once, tensors when they are read.

Source: GGUF specification; the naming and keys of split files as `gguf-split` of llama.cpp writes them.
"""

import hashlib
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from isotherm.errors import ModelFileError, ModelNotFound
from isotherm.formats.gguf_header import Header, TensorEntry, read_header
from isotherm.formats.metadata import Metadata, quoted
from isotherm.formats.part_file import PartFile, open_part
from isotherm.types import QuantType

MAX_PARTS = 512  # each keeps a file open

_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in its file: `num_rows` rows of `row_bytes` bytes, in the order of the file."""

    part: PartFile = field(repr=False)
    entry: TensorEntry

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def quant_type(self) -> QuantType:
        return self.entry.quant_type

    @property
    def dims(self) -> tuple[int, ...]:
        """Row length first, as GGUF has it."""
        return self.entry.dims

    @property
    def row_bytes(self) -> int:
        return self.quant_type.row_bytes(self.dims[0])

    @property
    def num_rows(self) -> int:
        return self.entry.num_bytes // self.row_bytes

    def read(self, row_start: int = 0, row_end: int | None = None) -> NDArray[np.uint8]:
        """Rows [row_start, row_end) as uint8 [rows, row_bytes]. Raises ModelFileChanged, ModelFileError."""
        row_end = self.num_rows if row_end is None else row_end
        assert 0 <= row_start <= row_end <= self.num_rows
        num_rows, row_bytes = row_end - row_start, self.row_bytes
        data = self.part.read(self.entry.offset + row_start * row_bytes, num_rows * row_bytes)
        return data.reshape(num_rows, row_bytes)


@dataclass(frozen=True)
class FileIdentity:
    """What tells this model from any other, without reading its tensors.

    Two trainings of one model may share size and header, so the modification times and inodes belong to it.
    """

    parts: tuple[tuple[int, int, int], ...]  # num_bytes, mtime_ns, inode of each file
    header_sha256: str  # over the headers of all parts, in order

    def hex(self) -> str:
        return hashlib.sha256(f"{self.header_sha256} {self.parts}".encode()).hexdigest()


@dataclass(frozen=True)
class GgufFile:
    """An open model: checked metadata and tensor table of all its parts. Close it, or use it as a context."""

    path: Path  # the part that was asked for
    version: int
    is_powerinfer: bool  # in its dialect: see powerinfer.py
    metadata: Metadata
    tensors: Mapping[str, GgufTensor]
    identity: FileIdentity
    parts: tuple[PartFile, ...]

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_gguf(path: Path | str) -> GgufFile:
    """Open the model that `path` is, or is a part of.

    Raises ModelNotFound, ModelFileError (damaged, or a part is missing), UnsupportedModel.
    """
    with ExitStack() as opened:
        asked = _read_part(Path(path), opened)
        headers = _read_parts(asked, opened)
        model = GgufFile(
            path=asked.part.path,
            version=headers[0].version,
            is_powerinfer=headers[0].is_powerinfer,
            metadata=Metadata(headers[0].part.path, headers[0].metadata),
            tensors=_gather_tensors(headers),
            identity=_identity(headers),
            parts=tuple(header.part for header in headers),
        )
        opened.pop_all()
        return model


def _read_part(path: Path, opened: ExitStack) -> Header:
    part = open_part(path)
    opened.callback(part.close)
    return read_header(part)


def _read_parts(asked: Header, opened: ExitStack) -> list[Header]:
    """Headers of all parts in order, `asked` being one of them."""
    count, number = _split_keys(asked)
    if count == 1:
        return [asked]
    path = asked.part.path
    name = _PART_NAME.fullmatch(path.name)
    if name is None or (int(name["number"]), int(name["count"])) != (number, count):
        raise ModelFileError(
            f"{path}: part {number} of {count} of a model, but its name does not say so; "
            f"the parts must be named NAME-00001-of-{count:05}.gguf and so on"
        )
    headers = []
    for index in range(1, count + 1):
        if index == number:
            headers.append(asked)
            continue
        sibling = path.with_name(f"{name['stem']}-{index:05}-of-{count:05}.gguf")
        try:
            header = _read_part(sibling, opened)
        except ModelNotFound as error:
            raise ModelFileError(
                f"{path.name} is part {number} of {count}; part {sibling} is missing: fetch it into the same folder"
            ) from error
        if header.is_powerinfer != asked.is_powerinfer:
            raise ModelFileError(f"{sibling}: of another format than {path.name}; the parts are of different models")
        if _split_keys(header) != (count, index):
            raise ModelFileError(
                f"{sibling}: says it is part {_split_keys(header)[1]} of {_split_keys(header)[0]}, "
                f"expected part {index} of {count}; the parts are of different models"
            )
        headers.append(header)
    return headers


def _split_keys(header: Header) -> tuple[int, int]:
    """(number of parts, number of this part from 1 on)."""
    metadata = Metadata(header.part.path, header.metadata)
    # `gguf-split --merge` leaves a split.count of 0 behind
    count = metadata.integer("split.count", low=0, high=MAX_PARTS, default=0)
    if count <= 1:
        return 1, 1
    return count, metadata.integer("split.no", low=0, high=count - 1) + 1


def _gather_tensors(headers: list[Header]) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for header in headers:
        for entry in header.tensors:
            if entry.name in tensors:
                raise ModelFileError(f"{header.part.path}: tensor {quoted(entry.name)} is in an earlier part too")
            tensors[entry.name] = GgufTensor(header.part, entry)
    if len(headers) > 1:
        metadata = Metadata(headers[0].part.path, headers[0].metadata)
        expected = metadata.integer("split.tensors.count", low=0, high=1 << 31, default=len(tensors))
        if len(tensors) != expected:
            raise ModelFileError(f"{metadata.path}: the parts hold {len(tensors)} tensors, expected {expected}")
    return tensors


def _identity(headers: list[Header]) -> FileIdentity:
    parts = tuple((header.part.num_bytes, header.part.mtime_ns, header.part.inode) for header in headers)
    return FileIdentity(parts, hashlib.sha256("".join(header.sha256 for header in headers).encode()).hexdigest())
