"""Which GPUs there are, and what they can do at best."""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from isotherm import _native
from isotherm.backends.gpu.device import build
from isotherm.backends.gpu.sources import ROW_LANES, Dot4, probe_source
from isotherm.errors import DeviceFailed, DeviceNotFound, InsufficientMemory
from isotherm.facts import GpuDeviceFacts, GpuLimits

_MOST_COPY_BYTES = 256 << 20
_NUM_ROUNDS = 5
_LAUNCHES = 256
_LEAST_S = 0.005


def survey() -> list[GpuDeviceFacts]:
    """Every device of every driver, measured for about half a second each. Raises DeviceNotFound without a driver."""
    return [examine(i, facts) for i, facts in enumerate(_native.list_gpus())]


def examine(index: int, facts: _native.GpuFacts) -> GpuDeviceFacts:
    """Measures one; what fails there is told in `complaint`."""
    complaint = f"it lacks {facts.lacks}" if facts.lacks else ""
    limits = None
    if not complaint:
        try:
            limits = measure(index)
        except (DeviceNotFound, DeviceFailed, InsufficientMemory) as error:
            complaint = str(error)
    return GpuDeviceFacts(
        device=f"gpu:{index}",
        name=facts.name,
        driver=f"{facts.platform} {facts.driver}".strip(),
        is_gpu=facts.is_gpu,
        shares_memory=facts.shares_memory,
        memory_bytes=facts.memory_bytes,
        num_units=facts.num_units,
        complaint=complaint,
        limits=limits,
    )


def measure(index: int) -> GpuLimits:
    """The best of several rounds. Raises what a GpuDevice does."""
    device = _native.GpuDevice(index)
    program = build(device, probe_source(find_dot4(device)))
    return GpuLimits(_copy_bytes_per_s(device), _int8_ops_per_s(device, program), _launch_s(device, program))


def find_dot4(device: _native.GpuDevice) -> Dot4:
    """The quickest means that this driver compiles and that gives what C does."""
    facts, rng = device.facts, np.random.default_rng(0)
    wanted = [Dot4.KHRONOS] if facts.has_dot_product else []
    wanted += [Dot4.PTX] if "NVIDIA" in facts.vendor else []
    a, b = (rng.integers(-128, 128, (ROW_LANES, 4)).astype(np.int8) for _ in range(2))
    expected = (a.astype(np.int32) * b).sum(axis=1) + np.arange(ROW_LANES)
    for dot4 in wanted:
        try:
            if np.array_equal(_dot4s(device, dot4, a, b), expected):
                return dot4
        except DeviceFailed:  # it does not compile
            continue
    return Dot4.PLAIN


def _dot4s(device: _native.GpuDevice, dot4: Dot4, a: NDArray[np.int8], b: NDArray[np.int8]) -> NDArray[np.int32]:
    out = np.zeros(ROW_LANES, np.int32)
    buffers = [device.allocate(4 * ROW_LANES) for _ in range(3)]
    for buffer, values in zip(buffers, (a, b), strict=False):
        device.write(buffer, 0, values.reshape(-1).view(np.uint8))
    kernel = device.kernel(build(device, probe_source(dot4)), "check_dot4", list(buffers))
    device.launch(kernel, (1, 1, 1), ROW_LANES)
    device.read(buffers[2], 0, out.view(np.uint8))
    return out


def _copy_bytes_per_s(device: _native.GpuDevice) -> float:
    num_bytes = min(_MOST_COPY_BYTES, device.facts.memory_bytes // 8, device.facts.largest_buffer_bytes)
    num_bytes -= num_bytes % 4096
    source, target = device.allocate(num_bytes), device.allocate(num_bytes)
    device.write(source, 0, np.zeros(num_bytes, np.uint8))
    return 2 * num_bytes / best_s(device, lambda: device.copy(source, target, num_bytes))


def _int8_ops_per_s(device: _native.GpuDevice, program: int) -> float:
    """Rounds are doubled until they take long enough to be timed."""
    num_groups, num_rounds = 16 * device.facts.num_units, 64
    out = device.allocate(4 * num_groups * ROW_LANES)
    while True:
        kernel = device.kernel(program, "multiply_int8", [out, num_rounds])
        seconds = best_s(device, partial(device.launch, kernel, (num_groups, 1, 1), ROW_LANES))
        if seconds > _LEAST_S or num_rounds > 1 << 24:
            return 2 * 8 * 8 * num_rounds * num_groups * ROW_LANES / seconds
        num_rounds *= 2


def _launch_s(device: _native.GpuDevice, program: int) -> float:
    kernel = device.kernel(program, "nothing", [device.allocate(4)])

    def launch() -> None:
        for _ in range(_LAUNCHES):
            device.launch(kernel, (1, 1, 1), ROW_LANES)

    return best_s(device, launch) / _LAUNCHES


def best_s(device: _native.GpuDevice, run: Callable[[], None]) -> float:
    """Seconds of what `run` enqueues, at best of several rounds."""
    times = []
    for _ in range(_NUM_ROUNDS):
        device.finish()
        started = time.perf_counter()
        run()
        device.finish()
        times.append(time.perf_counter() - started)
    return min(times)
