"""GGUF files put together byte by byte, so that each count, length and offset can lie."""

import struct
from dataclasses import dataclass, field

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
TYPE_F32, TYPE_Q8_0, TYPE_Q4_K = 0, 8, 12


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes, length: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return u64(len(data) if length is None else length) + data


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + u32(kind) + payload


def array(kind: int, length: int, payload: bytes) -> bytes:
    """The payload of an array value; `length` may lie."""
    return u32(kind) + u64(length) + payload


def tensor(name: str | bytes, dims: tuple[int, ...] = (8,), type_id: int = TYPE_F32, offset: int = 0) -> bytes:
    return text(name) + u32(len(dims)) + b"".join(u64(dim) for dim in dims) + u32(type_id) + u64(offset)


@dataclass(frozen=True)
class RawGguf:
    """By default a sound file of three keys and two tensors."""

    magic: bytes = b"GGUF"
    version: int = 3
    keys: tuple[bytes, ...] = (
        key("general.architecture", STRING, text("llama")),
        key("numbers", ARRAY, array(U32, 3, u32(1) + u32(2) + u32(3))),
        key("words", ARRAY, array(STRING, 2, text("one") + text("two"))),
    )
    tensors: tuple[bytes, ...] = field(default=(tensor("a", (8,)), tensor("b", (4, 2), offset=32)))
    num_keys: int | None = None
    num_tensors: int | None = None
    alignment: int = 32
    data: bytes = bytes(range(64))

    def header(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_keys = len(self.keys) if self.num_keys is None else self.num_keys
        counts = u64(num_tensors) + u64(num_keys)
        return self.magic + u32(self.version) + counts + b"".join(self.keys) + b"".join(self.tensors)

    def build(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % self.alignment) + self.data
