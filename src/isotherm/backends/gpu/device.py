"""An open GPU: its driver, and kernels that are compiled once and kept on disk."""

import hashlib
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from isotherm import _native
from isotherm.backends.gpu.sources import Source, Tiling

GpuBuffer: TypeAlias = "_native.GpuBuffer"
Argument: TypeAlias = "int | float | _native.GpuBuffer"
LaunchTuple: TypeAlias = tuple[int, int, int, int, int, int, int]  # as GpuLaunch in native/runtime/gpu_program.h
RowsTuple: TypeAlias = "tuple[int, _native.GpuBuffer, int, int, int]"  # as GpuRows

_DIGEST_BYTES = 32  # before a kept binary: what was half written is never believed
_SUFFIX = ".kernel"


class KernelCache:
    """Compiled kernels, and what else was found out about a device, in a folder by key; nothing where it cannot be."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, key: str) -> bytes:
        """Empty where there is none."""
        try:
            data = (self._folder / (key + _SUFFIX)).read_bytes()
        except OSError:
            return b""
        digest, binary = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        return binary if hashlib.sha256(binary).digest() == digest else b""

    def write(self, key: str, binary: bytes) -> None:
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{key}.", dir=self._folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(hashlib.sha256(binary).digest() + binary)
                os.replace(name, self._folder / (key + _SUFFIX))
            except BaseException:
                os.unlink(name)
                raise


class Gpu(Protocol):
    """What a program is compiled for: a device, or the count of what it would take there."""

    tiling: Tiling
    num_units: int
    has_double: bool

    def allocate(self, num_bytes: int) -> GpuBuffer: ...

    def upload(self, num_bytes: int, parts: Iterable[NDArray[np.uint8]]) -> GpuBuffer: ...

    def kernel(self, source: Source, name: str, arguments: list[Argument]) -> int: ...

    def program(self, batch: GpuBuffer, head: GpuBuffer, num_states: int) -> "ProgramSteps": ...


class ProgramSteps(Protocol):
    """A `_native.GpuProgram`, or nothing in its place."""

    def rope(self, table: NDArray[np.float32]) -> None: ...

    def pages(self, state: int, buffer: GpuBuffer) -> None: ...

    def choice(self, kernel: int, lanes: int, out: GpuBuffer, row_words: int, most_kept: int, /) -> None: ...

    def step(
        self,
        launches: list[LaunchTuple],
        uploads: list[RowsTuple],
        outputs: list[RowsTuple],
        downloads: list[RowsTuple],
        /,
    ) -> int: ...


def build(device: "_native.GpuDevice", source: Source, kept: bytes = b"") -> int:
    """A program of the device's. kept: what was compiled earlier. Raises DeviceFailed where it is not compiled."""
    return int(device.build(source.text, source.options(device.facts.architecture), kept))


class OpenGpu:
    """A device with the programs that were built for it."""

    def __init__(self, index: int, cache: KernelCache | None, tiling: Tiling | None = None) -> None:
        """index: as `_native.list_gpus` has it. Raises DeviceNotFound and DeviceFailed."""
        self.name = f"gpu:{index}"
        self.device = _native.GpuDevice(index)
        self.facts = self.device.facts
        self.tiling = tiling or Tiling()
        self.num_units = self.facts.num_units
        self.has_double = self.facts.has_double
        self._cache = cache
        self._programs: dict[Source, int] = {}

    def allocate(self, num_bytes: int) -> GpuBuffer:
        """Raises InsufficientMemory, there or when it is first written."""
        return self.device.allocate(num_bytes)

    def upload(self, num_bytes: int, parts: Iterable[NDArray[np.uint8]]) -> GpuBuffer:
        """A buffer of these bytes. Raises InsufficientMemory."""
        buffer, offset = self.allocate(num_bytes), 0
        for part in parts:
            self.device.write(buffer, offset, np.ascontiguousarray(part))
            offset += part.size
        assert offset == num_bytes
        return buffer

    def kernel(self, source: Source, name: str, arguments: list[Argument]) -> int:
        """A kernel with its arguments. Raises DeviceFailed where the driver does not compile it."""
        if source not in self._programs:
            self._programs[source] = self._build(source)
        return int(self.device.kernel(self._programs[source], name, arguments))

    def program(self, batch: GpuBuffer, head: GpuBuffer, num_states: int) -> "_native.GpuProgram":
        return _native.GpuProgram(self.device, batch, head, num_states)

    def _build(self, source: Source) -> int:
        key = self.key(source)
        kept = self._cache.read(key) if self._cache else b""
        program = build(self.device, source, kept)
        if self._cache and not kept:
            self._cache.write(key, self.device.binary(program))
        return program

    def key(self, source: Source) -> str:
        """Names what follows from kernels, device and driver."""
        facts = self.facts
        options = source.options(facts.architecture)
        parts = (source.text, options, facts.platform, facts.name, facts.vendor, facts.driver)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
