"""Where the time of a run goes, kernel by kernel, beside what the machine allows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isotherm.engine.solo import RecordedRun
from isotherm.facts import DeviceFacts
from isotherm.program.recording import Phase, Recording, StepFacts

Ints = NDArray[np.int64]

WAIT, SAMPLER, PYTHON = "wait", "sampler", "Python"


@dataclass(frozen=True)
class KernelTime:
    """One kernel in all runs of a profile. time_s is the mean over the threads, share that of the time of the runs.

    limit: what bounds it, the read bandwidth or the int8 rate; None for what neither bounds.
    """

    kernel: str
    calls: int
    time_s: float
    share: float
    num_bytes: int = 0
    num_ops: int = 0
    limit: str | None = None
    limit_share: float | None = None

    @property
    def bytes_per_s(self) -> float | None:
        return self.num_bytes / self.time_s if self.num_bytes and self.time_s else None

    @property
    def ops_per_s(self) -> float | None:
        return self.num_ops / self.time_s if self.num_ops and self.time_s else None


@dataclass(frozen=True)
class Profile:
    """kernels: in the order in which they run; then waiting, sampler and Python. Their times add up to total_s."""

    test: str
    num_runs: int
    total_s: float
    kernels: tuple[KernelTime, ...]


@dataclass(frozen=True)
class Lane:
    """The spans of one thread, in order; in each walk they leave no gap. Of equal length, by span."""

    walk: Ints
    step: Ints
    phase: Ints
    begin_ns: Ints
    end_ns: Ints


def lanes(recording: Recording) -> Iterator[Lane]:
    """What each thread did. Until it has woken up for a walk, and once it is through with it, it waits."""
    first = recording.marks[0]
    starts = np.flatnonzero(first["phase"] == Phase.START)
    assert len(starts) == len(recording.walks), "a walk without its marks"
    walk_begins, walk_ends = first["ns"][starts], first["ns"][np.append(starts[1:], len(first)) - 1]
    for marks in recording.marks:
        is_start = marks["phase"] == Phase.START
        starts = np.flatnonzero(is_start)
        ends = np.append(starts[1:], len(marks))  # past each walk's last mark, where one more span goes
        begins = np.roll(marks["ns"], 1)
        begins[starts] = walk_begins
        columns = (
            (np.cumsum(is_start) - 1, np.arange(len(starts))),
            (marks["step"], marks["step"][ends - 1]),
            (np.where(is_start, Phase.WAIT, marks["phase"]), Phase.WAIT),
            (begins, marks["ns"][ends - 1]),
            (marks["ns"], walk_ends),
        )
        yield Lane(*(np.insert(column, ends, last).astype(np.int64) for column, last in columns))


def profile(test: str, runs: Sequence[RecordedRun], device: DeviceFacts, *, is_decode: bool) -> Profile:
    """Adds up the runs of one test; they are of one model. is_decode: a row at a time, so that all is bound by reading.

    Matrix products take at least what reading their weights takes, and what their operations take: the longer one is
    their limit. Products of floats, attention's among them, have the first one only, and in decode only.
    """
    sums = _Sums(runs[0].recording.steps)
    for run in runs:
        sums.add(run.recording)
    total_s, sampler_s = sum(run.total_s for run in runs), sum(run.sampler_s for run in runs)
    rows = [_row(kernel, total_s, device, is_decode) for kernel in sums.kernels if kernel.calls]
    if sampler_s:
        rows.append(KernelTime(SAMPLER, sums.num_walks // 2, sampler_s, sampler_s / total_s))
    python_s = total_s - sampler_s - sums.walks_s
    rows.append(KernelTime(PYTHON, sums.num_walks, python_s, python_s / total_s))
    return Profile(test, len(runs), total_s, tuple(rows))


@dataclass
class _Kernel:
    name: str
    is_int8: bool
    calls: int = 0
    time_s: float = 0.0
    num_bytes: int = 0
    num_ops: int = 0


class _Sums:
    """Recordings of one program, added up by kernel."""

    def __init__(self, steps: tuple[StepFacts, ...]) -> None:
        self.num_walks, self.walks_s = 0, 0.0
        self._steps = steps
        names = dict.fromkeys(name for step in steps for name in (step.prepares, step.kind) if name)
        places = {name: place for place, name in enumerate([*names, WAIT])}
        floats = {step.kind for step in steps if not step.is_int8}
        self.kernels = [_Kernel(name, name not in floats) for name in places]
        self._places = np.array(  # [steps, phases]
            [[places[name] for name in (WAIT, step.prepares or step.kind, step.kind, WAIT)] for step in steps]
        )

    def add(self, recording: Recording) -> None:
        assert recording.steps == self._steps
        for lane in lanes(recording):
            spans_s = (lane.end_ns - lane.begin_ns) * 1e-9 / len(recording.marks)
            times_s = np.bincount(self._places[lane.step, lane.phase], spans_s, len(self.kernels))
            for kernel, time_s in zip(self.kernels, times_s.tolist(), strict=True):
                kernel.time_s += time_s
            self.walks_s += float(spans_s.sum())
        self.num_walks += len(recording.walks)
        self._count(recording)

    def _count(self, recording: Recording) -> None:
        """Calls, and what the work of each step costs in its walk."""
        first = recording.marks[0]
        walks = np.cumsum(first["phase"] == Phase.START) - 1
        passed = np.unique(np.stack([walks, first["step"], first["phase"]]), axis=1)
        for walk, step, phase in passed.T.tolist():
            if phase in (Phase.PREPARE, Phase.WORK):
                kernel = self.kernels[self._places[step, phase]]
                kernel.calls += 1
                if phase == Phase.WORK:
                    kernel.num_bytes += self._steps[step].num_bytes(recording.walks[walk])
                    kernel.num_ops += self._steps[step].num_ops(recording.walks[walk])
        self.kernels[-1].calls += int((first["phase"] == Phase.WAIT).sum()) - len(recording.walks)  # but for each end


def _row(kernel: _Kernel, total_s: float, device: DeviceFacts, is_decode: bool) -> KernelTime:
    read_s, int8_s = kernel.num_bytes / device.read_bytes_per_s, kernel.num_ops / device.int8_ops_per_s
    limit, limit_s = ("int8 rate", int8_s) if kernel.is_int8 and int8_s > read_s else ("read bandwidth", read_s)
    has_limit = kernel.num_ops and kernel.time_s and (kernel.is_int8 or is_decode)
    return KernelTime(
        kernel.name,
        kernel.calls,
        kernel.time_s,
        kernel.time_s / total_s,
        kernel.num_bytes,
        kernel.num_ops,
        limit if has_limit else None,
        limit_s / kernel.time_s if has_limit else None,
    )
