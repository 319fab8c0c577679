"""Measures this machine, within what its container leaves of it."""

import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped, unused-ignore]

from isotherm import _native
from isotherm.errors import OptionError, UnsupportedCpu
from isotherm.facts import DeviceFacts

_MAX_BUFFER_BYTES = 384 << 20  # larger than the caches of today
_NUM_ROUNDS = 10
_ROUND_S = 0.025
_MAX_THREADS = 1024
_ROOT = Path("/")


def measure(num_threads: int, isa: str | None = None) -> DeviceFacts:
    """Measures on `num_threads` threads for about half a second each; isa None is the fastest one.

    Raises OptionError for an impossible number of threads, UnsupportedCpu for an instruction set that is not here.
    """
    if not 1 <= num_threads <= _MAX_THREADS:
        raise OptionError(f"num_threads is {num_threads}; it must be from 1 to {_MAX_THREADS}")
    isas = _native.available_isas()
    chosen = isas[-1] if isa is None else isa
    if chosen not in isas:
        raise UnsupportedCpu(f"this processor cannot run the instruction set {chosen!r}; it runs {', '.join(isas)}")
    memory_bytes = available_memory_bytes()
    buffer_bytes = min(_MAX_BUFFER_BYTES, memory_bytes // 4)
    return DeviceFacts(
        cpu_name=_cpu_name(_ROOT),
        num_cores=physical_cores(),
        memory_bytes=memory_bytes,
        isa=chosen,
        read_bytes_per_s=_native.measure_read(chosen, num_threads, buffer_bytes, _NUM_ROUNDS, _ROUND_S),
        int8_ops_per_s=_native.measure_int8(chosen, num_threads, _NUM_ROUNDS, _ROUND_S),
    )


def physical_cores() -> int:
    """Physical cores that this process may use: by its affinity, within its CPU quota; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        cores = _distinct_cores(_ROOT, os.sched_getaffinity(0))
    else:
        cores = psutil.cpu_count(logical=False) or 1
    return max(1, math.floor(min(cores, _quota_cpus(_ROOT))))


def available_memory_bytes() -> int:
    """Bytes that this process can still take without swapping: the machine's, and no more than its cgroups leave."""
    available: int = psutil.virtual_memory().available
    return int(max(0, min(available, _cgroup_memory_bytes(_ROOT))))


def _distinct_cores(root: Path, cpus: set[int]) -> int:
    # Threads of one core share one list of siblings; a CPU without a list counts as a core of its own.
    siblings = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return len({_read(root / siblings.format(cpu)) or cpu for cpu in cpus})


def _quota_cpus(root: Path) -> float:
    """CPUs that the strictest cgroup grants in a period; infinite without a quota."""
    quotas = [math.inf]
    for folder in _cgroup_folders(root, "cpu"):
        words = _read(folder / "cpu.max").split()  # v2: "quota period" or "max period"
        if not words:
            words = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]  # v1: -1 is none
        if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]) > 0:
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas)


def _cgroup_memory_bytes(root: Path) -> float:
    """Bytes that the strictest cgroup leaves; infinite without a limit. File cache does not count as used."""
    free = [math.inf]
    for folder in _cgroup_folders(root, "memory"):
        for limit_file, usage_file, cache_keys in (
            ("memory.max", "memory.current", ("inactive_file", "active_file")),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
        ):
            limit, usage = _read(folder / limit_file), _read(folder / usage_file)
            if limit.isdecimal() and usage.isdecimal():
                lines = (line.split() for line in _read(folder / "memory.stat").splitlines())
                cached = sum(int(words[1]) for words in lines if words and words[0] in cache_keys)
                free.append(int(limit) - max(0, int(usage) - cached))
    return min(free)


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """This process's cgroups for a controller, up to the mount point: each of them sets limits.

    Inside a container the path may be the host's while the mount shows the container's own group as its root: paths
    that are not there read as empty. (cgroups(7))
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            mounts = [root / "sys/fs/cgroup" / controller]
        else:
            continue
        group = Path(path.lstrip("/"))
        for mount in mounts:
            yield from (mount / inner for inner in (group, *group.parents))


def _cpu_name(root: Path) -> str:
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _read(path: Path) -> str:
    """The text of a small system file; empty where the system has no such file or does not show it."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
