"""The probe: sane figures on this machine, and limits read from system folders that the tests lay out."""

import math
import os
from pathlib import Path

import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest

from isotherm import _native, probe
from isotherm.errors import OptionError, UnsupportedCpu


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.fixture
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_NUM_ROUNDS", 2)
    monkeypatch.setattr(probe, "_ROUND_S", 0.001)
    monkeypatch.setattr(probe, "_MAX_BUFFER_BYTES", 4 << 20)


@pytest.mark.usefixtures("short_rounds")
@pytest.mark.parametrize("isa", [None, *_native.available_isas()])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_measures_this_machine(isa: str | None, num_threads: int) -> None:
    facts = probe.measure(num_threads, isa)
    assert facts.isa == (isa or _native.available_isas()[-1])
    assert facts.cpu_name
    assert 1 <= facts.num_cores <= (os.cpu_count() or 1)
    assert 0 < facts.memory_bytes <= psutil.virtual_memory().total
    # no machine is slower than a thousandth, or faster than a thousandfold, of an ordinary one
    assert 1e7 < facts.read_bytes_per_s < 1e14
    assert 1e6 < facts.int8_ops_per_s < 1e17


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(UnsupportedCpu, match=r"'mmx'; it runs scalar"):
        probe.measure(1, "mmx")


@pytest.mark.parametrize("num_threads", [0, -1, 100_000])
def test_an_impossible_number_of_threads_is_refused(num_threads: int) -> None:
    with pytest.raises(OptionError, match="num_threads"):
        probe.measure(num_threads)


def test_this_process_has_a_core_and_memory() -> None:
    assert 1 <= probe.physical_cores() <= (os.cpu_count() or 1)
    assert 0 < probe.available_memory_bytes() <= psutil.virtual_memory().total


def test_without_affinity_psutil_counts_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(probe, "_ROOT", tmp_path)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 6)
    assert probe.physical_cores() == 6


def test_threads_of_a_core_count_once(tmp_path: Path) -> None:
    siblings = {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}
    root = lay_out(
        tmp_path,
        {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": text for cpu, text in siblings.items()},
    )
    assert probe._distinct_cores(root, {0, 1, 4, 5}) == 2
    assert probe._distinct_cores(root, {0, 4}) == 1
    assert probe._distinct_cores(root, {0, 8, 9}) == 3  # no topology: each is a core


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, math.inf),
        # the strictest of the group and its parents
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000",
                "sys/fs/cgroup/a/cpu.max": "150000 100000",
            },
            1.5,
        ),
        # a container that shows its own group as the root
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2.0),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/docker/x\n0::/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            3.0,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            math.inf,
        ),
    ],
)
def test_the_cpu_quota(tmp_path: Path, files: dict[str, str], expected: float) -> None:
    assert probe._quota_cpus(lay_out(tmp_path, files)) == expected


def test_a_quota_below_one_still_leaves_a_core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = lay_out(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"})
    monkeypatch.setattr(probe, "_ROOT", root)
    assert probe.physical_cores() == 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": "5"},
            math.inf,
        ),
        # file cache is given back under pressure
        (
            {
                "proc/self/cgroup": "0::/a",
                "sys/fs/cgroup/a/memory.max": "1000",
                "sys/fs/cgroup/a/memory.current": "700",
                "sys/fs/cgroup/a/memory.stat": "anon 300\nfile 400\ninactive_file 150\nactive_file 250\nshmem 0",
            },
            700,
        ),
        (
            {
                "proc/self/cgroup": "7:memory:/a\n0::/",
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "1000",
                "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "600",
                "sys/fs/cgroup/memory/a/memory.stat": "total_inactive_file 100\ntotal_active_file 0",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "900",
            },
            500,
        ),
    ],
)
def test_the_memory_limit(tmp_path: Path, files: dict[str, str], expected: float) -> None:
    assert probe._cgroup_memory_bytes(lay_out(tmp_path, files)) == expected


def test_memory_over_the_limit_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = {"memory.max": "1000", "memory.current": "1200"}
    root = lay_out(tmp_path, {"proc/self/cgroup": "0::/", **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}})
    monkeypatch.setattr(probe, "_ROOT", root)
    assert probe.available_memory_bytes() == 0


def test_the_name_of_the_processor(tmp_path: Path) -> None:
    root = lay_out(tmp_path, {"proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU: 9000\nflags\t: fpu"})
    assert probe._cpu_name(root) == "Some CPU: 9000"
    assert probe._cpu_name(tmp_path / "nothing")
