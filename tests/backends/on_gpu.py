"""Programs compiled for the device that tests run on; see gpu_drivers.py."""

import atexit
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from gpu_drivers import open_driver
from sketch import Finished

from isotherm.backends.cpu.backend import CompiledCpu, CpuBackend
from isotherm.backends.cpu.buffers import plan_buffers
from isotherm.backends.cpu.isa import choose_isa
from isotherm.backends.cpu.limits import CpuLimits
from isotherm.backends.cpu.packing import pack_program
from isotherm.backends.gpu.compiler import GpuCompiler
from isotherm.backends.gpu.device import KernelCache, OpenGpu
from isotherm.backends.gpu.sources import Tiling
from isotherm.backends.gpu.storage import Weights
from isotherm.program.recorder import Program
from isotherm.quantization.packed_file import PackedMemory, PackedWeights

_SCRATCH = tempfile.TemporaryDirectory()
atexit.register(_SCRATCH.cleanup)
KERNELS = KernelCache(Path(_SCRATCH.name))


def open_gpu(tiling: Tiling | None = None) -> OpenGpu:
    """Skips where there is no PoCL."""
    if reason := open_driver():
        pytest.skip(reason)
    return OpenGpu(0, KERNELS, tiling)


def compile_on_gpu(
    program: Program,
    weights: PackedWeights,
    limits: CpuLimits,
    placed: Iterable[int] | None = None,
    tiling: Tiling | None = None,
) -> CompiledCpu:
    """placed: indices of the ops that the GPU takes; by default all."""
    indices = frozenset(range(len(program.ops)) if placed is None else placed)
    entries: Weights = weights
    part = GpuCompiler(open_gpu(tiling), program, indices, entries, limits, plan_buffers(program))
    return CpuBackend(weights, isa=choose_isa(), num_threads=2, most_active=1.0).compile(program, limits, part)


def compile_sketch(finished: Finished, num_pages: tuple[int, ...] = (), tiling: Tiling | None = None) -> CompiledCpu:
    """For batches of up to 2048 tokens and positions."""
    memory = PackedMemory()
    pack_program(finished.program, finished.tensors, memory)
    limits = CpuLimits(2048, num_pages, max_tokens=2048, max_head_rows=2048)
    return compile_on_gpu(finished.program, memory, limits, tiling=tiling)
