"""Which tokens the next step computes: continuous batching with chunked prefill. Plain data, no device.

A step has one token of each sequence that decodes, then chunks of prompts, up to `batch_tokens`; while others decode,
chunks together are at most `stall_tokens`, so that a long prompt delays their next token by no more than that. Jobs are
ranked by priority, then arrival. Where pages run out, the last ranked gives its own back and is computed anew later:
its answer does not change.
"""

from bisect import insort
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isotherm.engine.kv_pages import KvPages, SequencePages

_FETCH_S = 0.02  # for which one plan may read pages from the disk while others wait for it


@dataclass(eq=False)
class Job:
    """One sequence on its way. `tokens`: prompt, then what was chosen; `num_tokens` of them are there so far."""

    tokens: NDArray[np.int32]
    num_tokens: int
    priority: int = 0
    arrival: int = -1
    pages: SequencePages | None = None  # None: it waits
    num_found: int | None = None  # tokens that pages had when it first ran
    is_trimmed: bool = False
    owner: Any = field(default=None, repr=False)

    @property
    def rank(self) -> tuple[int, int]:
        """Lower runs first."""
        return -self.priority, self.arrival

    @property
    def num_missing(self) -> int:
        """Tokens to compute before the next one can be chosen."""
        return self.num_tokens - (len(self.pages.token_ids) if self.pages else 0)

    def append(self, token_id: int) -> None:
        self.tokens[self.num_tokens] = token_id
        self.num_tokens += 1


@dataclass(frozen=True)
class Share:
    """A job's part of a step: its next tokens; the last of them gives logits where nothing is missing after it."""

    job: Job
    pages: SequencePages
    token_ids: list[int]
    is_last: bool


class Scheduler:
    """Not thread safe."""

    def __init__(self, kv: KvPages, *, batch_tokens: int, stall_tokens: int, max_running: int) -> None:
        assert 1 <= max_running <= batch_tokens
        self._kv = kv
        self._batch_tokens = batch_tokens
        self.stall_tokens = stall_tokens  # may change between plans
        self._max_running = max_running
        self._arrivals = count()
        self._jobs: list[Job] = []  # by rank; those with pages run
        self.num_preemptions = 0

    def running(self) -> list[Job]:
        return [job for job in self._jobs if job.pages is not None]

    def waiting(self) -> list[Job]:
        return [job for job in self._jobs if job.pages is None]

    def add(self, job: Job) -> None:
        job.arrival = next(self._arrivals)
        insort(self._jobs, job, key=lambda other: other.rank)

    def remove(self, job: Job) -> None:
        """Finished or no longer wanted; nothing happens where it is neither waiting nor running."""
        if job in self._jobs:
            self._jobs.remove(job)
            self._release(job)
            job.owner = None  # each held the other, and with it a sampler as large as the vocabulary

    def preempt_all(self) -> None:
        """Every running job gives its pages back and waits; most of them are found again."""
        for job in reversed(self.running()):
            self._preempt(job)

    def start_over(self) -> None:
        """After an interrupt in the middle of any of this: whoever held which page is forgotten, and all jobs wait."""
        self._kv.forget()
        for job in self._jobs:
            job.pages = None

    def plan(self) -> list[Share]:
        """The next step; empty where nothing is left to do. What `commit` never hears of is planned again."""
        running = [(job, job.num_missing) for job in self.running()]
        for job, num_missing in running:
            if num_missing == 0:  # interrupted between commit and choice: its last token is computed once more
                self._preempt(job)
        shares: list[Share] = []
        for job, num_missing in running:
            if num_missing == 1:
                self._place(job, 1, shares)
        left = self._batch_tokens - len(shares)
        if shares:
            left = min(left, self.stall_tokens)
        for job, num_missing in running:
            if left and num_missing > 1:
                left -= self._place(job, min(left, num_missing), shares)
        for job in self.waiting():
            if not left or len(self.running()) == self._max_running:
                break
            num_new = self._admit(job, left, shares)
            if not num_new:
                break
            left -= num_new
        return shares

    def commit(self, shares: list[Share]) -> None:
        """These were computed."""
        for share in shares:
            share.pages.commit(share.token_ids)

    def _place(self, job: Job, num_new: int, shares: list[Share]) -> int:
        """Tokens of `job` that go into the step: num_new, or 0 where it has to wait for pages."""
        if job.pages is None:  # preempted for one of higher rank, in this very plan
            return 0
        while not job.pages.reserve(num_new):
            placed = {share.job for share in shares}
            victim = next(other for other in reversed(self.running()) if other not in placed)
            if victim is job:  # the first ranked has its turn yet, and may take all: somebody is always placed
                return 0
            self._preempt(victim)
        shares.append(self._share(job, job.pages, num_new))
        return num_new

    def _admit(self, job: Job, left: int, shares: list[Share]) -> int:
        token_ids = job.tokens[: job.num_tokens].tolist()
        if not self._kv.fetch(token_ids, _FETCH_S if shares else None, is_trimmed=job.is_trimmed):
            return 0  # the next plan reads on
        pages = self._kv.sequence(is_trimmed=job.is_trimmed)
        num_found = pages.find_prefix(token_ids)
        num_new = min(left, job.num_tokens - num_found)
        if not pages.reserve(num_new):
            pages.release()
            return 0
        job.pages = pages
        if job.num_found is None:
            job.num_found = num_found
        shares.append(self._share(job, pages, num_new))
        return num_new

    def _preempt(self, job: Job) -> None:
        self._release(job)
        self.num_preemptions += 1

    def _release(self, job: Job) -> None:
        if job.pages is not None:
            job.pages.release()
            job.pages = None

    def _share(self, job: Job, pages: SequencePages, num_new: int) -> Share:
        start = len(pages.token_ids)
        token_ids = job.tokens[start : start + num_new].tolist()
        return Share(job, pages, token_ids, start + num_new == job.num_tokens)
