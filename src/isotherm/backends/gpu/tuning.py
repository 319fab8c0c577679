"""Which tiling is the quickest on a device: a short search, once for each device, driver and version of the kernels."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np

from isotherm.backends.gpu.device import Argument, KernelCache, OpenGpu
from isotherm.backends.gpu.sources import SLICE_LANES, Dot4, Tiling, matmul_source
from isotherm.backends.gpu.survey import best_s, find_dot4
from isotherm.errors import DeviceFailed
from isotherm.quantization.p32 import packed_bytes
from isotherm.types import QuantType

_TYPE = QuantType.Q4_0
_FEW = ((8, 1), (16, 1), (32, 1), (8, 2), (16, 2), (32, 2))  # slices and depth
_MANY = ((8, 8), (4, 16), (16, 4), (8, 4), (4, 8), (16, 8))  # slices and tokens
_COLUMNS = 4096
_FEW_OUTPUTS = 32768  # more weights than a cache holds
_MANY_OUTPUTS, _MANY_ROWS = 4096, 128


def tuned_tiling(gpu: OpenGpu, cache: KernelCache, notify: Callable[[str], None]) -> Tiling:
    """What an earlier search found, or this one. A CPU that poses as a device is not searched."""
    if not gpu.facts.is_gpu:
        return Tiling()
    key = gpu.key(matmul_source(_TYPE, _TYPE, Tiling())) + "-tiling"
    if kept := cache.read(key):
        values = json.loads(kept)
        return Tiling(**values | {"dot4": Dot4(values["dot4"])})
    notify(f"tuning the kernels for {gpu.name} ({gpu.facts.name}), once")
    found = search(gpu)
    cache.write(key, json.dumps(asdict(found)).encode())
    return found


def search(gpu: OpenGpu, few_outputs: int = _FEW_OUTPUTS, many_outputs: int = _MANY_OUTPUTS) -> Tiling:
    """Times one decoded row of a wide and of a narrow matrix, then many rows, with what the device can run."""
    most_slices, dot4 = gpu.facts.max_lanes // SLICE_LANES, find_dot4(gpu.device)
    few = [Tiling(few_slices=slices, few_depth=depth, dot4=dot4) for slices, depth in _FEW if slices <= most_slices]
    best = min(few, key=lambda tiling: _if_it_runs(gpu, tiling, few_outputs, 1))
    alike = [tiling for tiling in few if tiling.few_depth == best.few_depth]
    narrow = min(alike, key=lambda tiling: _if_it_runs(gpu, tiling, many_outputs, 1))
    best = replace(best, narrow_slices=narrow.few_slices)
    many = [replace(best, many_slices=slices, many_tokens=tokens) for slices, tokens in _MANY if slices <= most_slices]
    return min(many, key=lambda tiling: _if_it_runs(gpu, tiling, many_outputs, _MANY_ROWS))


def _if_it_runs(gpu: OpenGpu, tiling: Tiling, num_outputs: int, num_rows: int) -> float:
    """Seconds; without end where a group needs more registers than the device has."""
    try:
        return _time_s(gpu, tiling, num_outputs, num_rows)
    except DeviceFailed:
        if tiling == Tiling(dot4=tiling.dot4):
            raise
        return math.inf


def _time_s(gpu: OpenGpu, tiling: Tiling, num_outputs: int, num_rows: int) -> float:
    """One matmul, with all buffers of its own: every candidate begins alike."""
    num_blocks, device = _COLUMNS // 32, gpu.device
    weight_bytes = packed_bytes((_TYPE, _TYPE), num_outputs, _COLUMNS, pair=False)
    blocks = num_rows * num_blocks
    sizes = (weight_bytes, 32 * blocks, 4 * blocks, 8 * blocks, 4, 64, 4 * num_rows * num_outputs)
    buffers = [gpu.upload(size, [np.zeros(size, np.uint8)]) for size in sizes]
    weight, codes, scales, sums, batch, nothing, out = buffers
    device.write(batch, 0, np.array([num_rows], np.int32).view(np.uint8))
    arguments: list[Argument] = [weight, num_blocks, codes, scales, sums, batch, 0, nothing, nothing, 0]
    arguments += [out, num_outputs, 0, num_outputs]
    is_few = num_rows == 1
    source, name = matmul_source(_TYPE, _TYPE, tiling), "multiply_1" if is_few else "multiply_many"
    kernel = gpu.kernel(source, name, arguments)
    lanes = SLICE_LANES * (tiling.slices_of(1) if is_few else tiling.many_slices)
    row_groups = 1 if is_few else -(-num_rows // (tiling.many_slices * tiling.many_tokens))
    seconds = best_s(device, lambda: device.launch(kernel, (num_outputs // 32, row_groups, 1), lanes))
    for buffer in buffers:
        device.release(buffer)
    return seconds
