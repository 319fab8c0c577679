"""Runs as a timeline, in the JSON trace event format of Chrome, which ui.perfetto.dev opens."""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from heapq import merge
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

from isotherm.engine.solo import RecordedRun
from isotherm.errors import OptionError
from isotherm.evaluation.profile import WAIT, Lane, lanes
from isotherm.program.recording import Phase, Recording, StepFacts, Walk

MAX_TRACE_EVENTS = 200_000  # some 25 MB

Event = dict[str, Any]


@dataclass(frozen=True)
class TraceSummary:
    num_events: int
    is_whole: bool  # whether no event was left out for want of room


class TraceFile:
    """A file to be: `write` makes it appear at `path`, whole or not at all. A context manager."""

    def __init__(self, path: Path) -> None:
        """Raises OptionError where there can be no such file."""
        self._path = path
        self._target = Path(os.path.realpath(path))
        if os.path.exists(self._target) and not os.path.isfile(self._target):  # these two never raise
            raise OptionError(f"the trace cannot be written to {path}: that is no file")
        try:
            handle, name = tempfile.mkstemp(dir=self._target.parent, prefix=f".{self._target.name}.")
        except OSError as error:
            raise self._unwritable(error) from error
        self._file = os.fdopen(handle, "w", encoding="utf-8")
        self._temporary: Path | None = Path(name)

    def write(self, process: str, runs: Sequence[RecordedRun]) -> TraceSummary:
        """The runs one after the other, each up to its share of MAX_TRACE_EVENTS; once. Raises OptionError."""
        assert self._temporary is not None, "written before"
        start_ns = min(int(run.recording.marks[0]["ns"][0]) for run in runs)
        num_events, is_whole = 0, True
        try:
            self._file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
            self._file.write(",\n".join(map(json.dumps, _names(process, runs[0].recording))))
            for place, run in enumerate(runs):
                events = _events(run.recording, start_ns)
                for event in islice(events, (MAX_TRACE_EVENTS - num_events) // (len(runs) - place)):
                    self._file.write(",\n" + json.dumps(event))
                    num_events += 1
                is_whole = is_whole and next(events, None) is None
            self._file.write("\n]}\n")
            self._file.close()
            os.replace(self._temporary, self._target)
        except OSError as error:
            raise self._unwritable(error) from error
        self._temporary = None
        return TraceSummary(num_events, is_whole)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._temporary is not None:
            with suppress(OSError):  # a full disk may refuse what is still buffered
                self._file.close()
            with suppress(OSError):
                self._temporary.unlink()

    def _unwritable(self, error: OSError) -> OptionError:
        return OptionError(f"the trace cannot be written to {self._path}: {error.strerror}")


def _names(process: str, recording: Recording) -> Iterator[Event]:
    yield {"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": process}}
    for thread in range(len(recording.marks)):
        name = f"thread {thread}" + (" (Python's)" if thread == 0 else "")
        yield {"name": "thread_name", "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}}
        yield {"name": "thread_sort_index", "ph": "M", "pid": 1, "tid": thread, "args": {"sort_index": thread}}


def _events(recording: Recording, start_ns: int) -> Iterator[Event]:
    """Complete events of all threads by their begin; one that holds others comes before them."""
    return merge(
        *(_lane_events(lane, thread, recording, start_ns) for thread, lane in enumerate(lanes(recording))),
        key=itemgetter("ts"),
    )


def _lane_events(lane: Lane, thread: int, recording: Recording, start_ns: int) -> Iterator[Event]:
    def event(name: str, begin_ns: int, end_ns: int) -> Event:
        times = {"ts": (begin_ns - start_ns) / 1000, "dur": (end_ns - begin_ns) / 1000}
        return {"name": name, "ph": "X", "pid": 1, "tid": thread, **times}

    walk_end_ns = 0
    spans = zip(*(column.tolist() for column in vars(lane).values()), strict=True)
    walk_before = -1
    for walk, step, phase, begin_ns, end_ns in spans:
        if walk != walk_before:
            if walk > 0 and thread == 0:
                yield event("Python, sampler", walk_end_ns, begin_ns)
            walk_end_ns = int(lane.end_ns[lane.walk.searchsorted(walk, "right") - 1])
            yield event(_walk_name(recording.walks[walk]), begin_ns, walk_end_ns)
            walk_before = walk
        if end_ns > begin_ns:
            yield event(_span_name(recording.steps[step], Phase(phase)), begin_ns, end_ns)


def _walk_name(walk: Walk) -> str:
    if not walk.sequences:
        return f"logits of {walk.num_rows}"
    if walk.num_rows == 1:
        return f"token at {walk.sequences[0][1]}"
    return f"{walk.num_rows} tokens"


def _span_name(step: StepFacts, phase: Phase) -> str:
    if phase is Phase.PREPARE:
        return f"{step.name}: {step.prepares}"
    return step.name if phase is Phase.WORK else WAIT
