"""Requests in, token ids out. Knows nothing of text."""

import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from isotherm.engine.kv_pages import KvPages, SequencePages
from isotherm.engine.sampling import SampledToken, Sampler, check_sampling
from isotherm.engine.scheduler import Job, Scheduler, Share
from isotherm.errors import ContextOverflow, OptionError
from isotherm.program import batch as program_batch
from isotherm.program.backend import CompiledProgram
from isotherm.program.batch import Batch
from isotherm.program.recorder import Program
from isotherm.program.recording import Recording
from isotherm.types import SamplingParams

F32 = NDArray[np.float32]

_HEAD_ROWS = 32  # whose logits are asked for at once


@dataclass(frozen=True)
class Request:
    """max_tokens None: as many as the context holds. An id of `end_ids` ends the answer and is not part of it."""

    prompt_ids: tuple[int, ...]
    max_tokens: int | None
    sampling: SamplingParams
    end_ids: frozenset[int]


@dataclass
class RunFacts:
    """What one request cost; filled while it runs. Seconds are those of the steps that it had a part in."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    reached_limit: bool = False  # max_tokens or the context ended it, not an end token


@dataclass(frozen=True)
class DecodeTiming:
    """busy_s: the part of total_s in which native code computed, backend or sampler; the rest is Python's."""

    total_s: float
    busy_s: float


@dataclass(frozen=True)
class RecordedRun:
    """A prefill or some steps of decode; sampler_s is the native sampler's part of total_s."""

    total_s: float
    sampler_s: float
    recording: Recording


@dataclass(frozen=True)
class EngineLimits:
    """What the engine was made for; `num_pages` by state group."""

    context_tokens: int
    batch_tokens: int
    num_pages: tuple[int, ...]
    max_running: int = 1  # sequences in one batch
    stall_tokens: int = 128  # of prompts that a step computes beside sequences that decode


@dataclass(eq=False)
class _Answer:
    """One request on its way. Its job's `num_tokens` says how much of it is there: an interrupt may come anywhere."""

    request: Request
    facts: RunFacts
    job: Job
    sampler: Sampler
    chosen: list[SampledToken] = field(default_factory=list)
    num_read: int = 0
    ended: bool = False  # by an end token
    error: Exception | None = None  # what went wrong with this request alone

    @property
    def num_chosen(self) -> int:
        return self.job.num_tokens - len(self.request.prompt_ids)

    @property
    def is_done(self) -> bool:
        return self.ended or self.error is not None or self.job.num_tokens == len(self.job.tokens)

    def choose(self, logits: F32) -> None:
        """The next token; an end token is not kept."""
        job = self.job
        try:
            token = self.sampler.sample(logits, job.tokens[: job.num_tokens], job.num_tokens, 0)
        except (OptionError, AssertionError) as error:
            self.error = error
            return
        if token.token_id in self.request.end_ids:
            self.ended = True
            return
        self.facts.reached_limit = job.num_tokens + 1 == len(job.tokens)
        self.chosen[self.num_chosen :] = [token]
        job.append(token.token_id)

    def read(self) -> SampledToken | None:
        """The next token for the reader; None at the end. Raises what went wrong."""
        if self.num_read < self.num_chosen:
            self.num_read += 1
            return self.chosen[self.num_read - 1]
        if self.error:
            raise self.error
        return None


class Engine:
    """Computes the requests of all threads together, in steps.

    Whoever waits for a token computes the next step for all, while the others wait for it: there is no thread behind
    it, and Ctrl-C is raised where somebody waits.
    """

    def __init__(self, compiled: CompiledProgram, program: Program, limits: EngineLimits) -> None:
        self._compiled = compiled
        self._vocab_size = program.logits.width
        self.context_tokens = limits.context_tokens
        self.batch_tokens = limits.batch_tokens
        self._kv = KvPages(program.states, limits.num_pages, limits.context_tokens)
        self._scheduler = Scheduler(
            self._kv,
            batch_tokens=limits.batch_tokens,
            stall_tokens=limits.stall_tokens,
            max_running=limits.max_running,
        )
        # Guards what follows, and the scheduler. Reentrant: a generator may be finalised while its thread holds it.
        self._changed = threading.Condition(threading.RLock())
        self._stepping: int | None = None  # the thread that computes
        self._left: deque[Job] = deque()  # no longer wanted; anyone may add at any time, a finaliser too: no lock

    def generate(self, request: Request, facts: RunFacts) -> Generator[SampledToken, None, None]:
        """Token after token; `facts` are true whenever the iterator rests, and complete when it ends.

        Raises ContextOverflow where the prompt leaves no room for an answer.
        """
        num_prompt = facts.num_prompt_tokens = len(request.prompt_ids)
        tokens = np.empty(num_prompt + self.num_answer_tokens(request), np.int32)
        tokens[:num_prompt] = request.prompt_ids
        job = Job(tokens, num_prompt)
        job.owner = answer = _Answer(request, facts, job, Sampler(request.sampling, self._vocab_size))
        with self._changed:
            self._scheduler.add(job)
        try:
            while (token := self._next(answer)) is not None:
                yield token
        finally:
            self._left.append(job)

    def _next(self, answer: _Answer) -> SampledToken | None:
        """The next token of an answer, None at its end; computes steps until it is there."""
        with self._changed:
            while answer.num_read == answer.num_chosen and not answer.is_done:
                if self._stepping is None:
                    with self._turn():
                        self._step()
                elif self._stepping == threading.get_ident():
                    raise self._would_wait_for_itself()
                else:
                    self._changed.wait()
            return answer.read()

    def _remove_ended(self) -> None:
        while self._left:
            self._scheduler.remove(self._left.popleft())
        for job in self._scheduler.running():
            if job.owner.is_done:
                self._scheduler.remove(job)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Makes this thread the one that computes. Called, and left, with the lock held."""
        self._stepping = threading.get_ident()
        try:
            yield
        finally:
            self._stepping = None
            self._changed.notify_all()

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Around what gives and takes pages: an interrupt inside would leave pages that nobody gives back."""
        try:
            yield
        except BaseException:
            self._scheduler.start_over()
            raise

    def _step(self) -> None:
        """Computes one step. What is interrupted before its end never was."""
        with self._whole():
            self._remove_ended()
            shares = self._scheduler.plan()
        assert shares, "somebody waits, and nothing is left to compute"
        started = time.perf_counter()
        try:
            self._changed.release()
            self._compute(shares)
            blocks = self._logits(sum(share.is_last for share in shares))
        finally:
            self._changed.acquire()
        with self._whole():
            self._scheduler.commit(shares)
        rows = (row for block in blocks for row in block)
        answers: list[_Answer] = [share.job.owner for share in shares]
        decoding = [answer.num_chosen > 0 for answer in answers]
        for share, answer in zip(shares, answers, strict=True):
            answer.facts.num_cached_tokens = share.job.num_found or 0
            if share.is_last:
                answer.choose(next(rows))
        step_s = time.perf_counter() - started
        for answer, decodes in zip(answers, decoding, strict=True):
            if decodes:
                answer.facts.decode_s += step_s
            else:
                answer.facts.prefill_s += step_s

    def _compute(self, shares: list[Share]) -> None:
        ids = np.array([token for share in shares for token in share.token_ids], np.int32)
        ends = np.cumsum([len(share.token_ids) for share in shares], dtype=np.int32)
        sequences = tuple(
            program_batch.Sequence(len(share.token_ids), len(share.pages.token_ids), share.pages.page_tables)
            for share in shares
        )
        wanted = np.array([share.is_last for share in shares])
        self._compiled.forward(Batch(ids, sequences, ends[wanted] - np.int32(1)))

    def _logits(self, num_rows: int) -> list[F32]:
        return [
            self._compiled.logits(first, min(_HEAD_ROWS, num_rows - first)) for first in range(0, num_rows, _HEAD_ROWS)
        ]

    # --- one sequence alone -----------------------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[SequencePages]:
        """An empty sequence, with the machine to itself: all others give their pages back and go on afterwards."""
        with self._changed:
            while self._stepping is not None:
                if self._stepping == threading.get_ident():
                    raise self._would_wait_for_itself()
                self._changed.wait()
            self._stepping = threading.get_ident()
        try:
            with self._whole():
                self._remove_ended()
                self._scheduler.preempt_all()
                pages = self._kv.sequence(publishes=False)
                yield pages
                pages.release()
        finally:
            with self._changed, self._turn():
                pass

    def _would_wait_for_itself(self) -> OptionError:
        return OptionError("this thread's last call is still running; finish or close it first")

    def logit_blocks(self, token_ids: Sequence[int], rows: Sequence[int], block_rows: int) -> Iterator[F32]:
        """Logits of the given rising positions, at most `block_rows` of them at a time: [<= block_rows, vocab_size].

        Raises ContextOverflow where the tokens do not fit.
        """
        ids = list(token_ids)
        if len(ids) > self.context_tokens:
            raise self._overflow(len(ids), "the text")
        with self._alone() as pages:
            for start in range(0, len(ids), self.batch_tokens):
                chunk = ids[start : start + self.batch_tokens]
                wanted = np.array([row - start for row in rows if start <= row < start + len(chunk)], np.int32)
                self._forward(pages, chunk, wanted)
                for first in range(0, len(wanted), block_rows):
                    yield self._compiled.logits(first, min(block_rows, len(wanted) - first))

    def time_prefill(self, num_tokens: int) -> float:
        """Seconds from an empty cache to the logits after `num_tokens` tokens."""
        with self._alone() as pages:
            return self._prefill(pages, num_tokens)

    def time_decode(self, num_tokens: int, depth: int) -> DecodeTiming:
        """Decodes `num_tokens` greedily after `depth` cached ones, which are not timed."""
        with self._alone() as pages:
            self._prefill(pages, max(1, depth))
            busy_before_s = self._compiled.busy_s
            total_s, sampler_s = self._decode(pages, num_tokens)
            return DecodeTiming(total_s, self._compiled.busy_s - busy_before_s + sampler_s)

    def read_weights_s(self) -> float | None:
        """Seconds to read every weight of a token once and compute nothing; None where the backend cannot tell."""
        with self._alone():
            return self._compiled.read_weights_s()

    def record_prefill(self, num_tokens: int) -> RecordedRun:
        """`time_prefill`, and what each thread did in it. Raises OptionError where the backend cannot tell."""
        num_batches = -(-num_tokens // self.batch_tokens)
        with self._alone() as pages:
            total_s, recording = self._compiled.record(partial(self._prefill, pages, num_tokens), num_batches)
            return RecordedRun(total_s, 0.0, recording)

    def record_decode(self, num_tokens: int, depth: int) -> RecordedRun:
        """`time_decode`, and what each thread did in it. Raises OptionError where the backend cannot tell."""
        with self._alone() as pages:
            self._prefill(pages, max(1, depth))
            run = partial(self._decode, pages, num_tokens)
            (total_s, sampler_s), recording = self._compiled.record(run, num_tokens)
            return RecordedRun(total_s, sampler_s, recording)

    def _prefill(self, pages: SequencePages, num_tokens: int) -> float:
        ids = [token % self._vocab_size for token in range(1, num_tokens + 1)]
        started = time.perf_counter()
        self._next_logits(pages, ids)
        return time.perf_counter() - started

    def _decode(self, pages: SequencePages, num_tokens: int) -> tuple[float, float]:
        """Seconds that `num_tokens` greedy steps after what is cached take, and the sampler's part of them."""
        depth = len(pages.token_ids)
        sampler = Sampler(SamplingParams(), self._vocab_size)
        history = np.ones(depth + num_tokens, np.int32)
        started = time.perf_counter()
        token_id = 1
        for position in range(depth, len(history)):
            logits = self._next_logits(pages, [token_id])
            token_id = sampler.sample(logits, history[:position], position, 0).token_id
        return time.perf_counter() - started, sampler.busy_s

    def _next_logits(self, pages: SequencePages, ids: list[int]) -> F32:
        """Computes `ids` after what is cached; logits [vocab_size] of the last one."""
        for start in range(0, len(ids), self.batch_tokens):
            chunk = ids[start : start + self.batch_tokens]
            is_last = start + len(chunk) == len(ids)
            self._forward(pages, chunk, np.array([len(chunk) - 1] if is_last else [], np.int32))
        row: F32 = self._compiled.logits(0, 1)[0]
        return row

    def _forward(self, pages: SequencePages, ids: list[int], logit_rows: NDArray[np.int32]) -> None:
        has_room = pages.reserve(len(ids))
        assert has_room, "a sequence alone has room for the whole context"
        part = program_batch.Sequence(len(ids), len(pages.token_ids), pages.page_tables)
        self._compiled.forward(Batch(np.array(ids, np.int32), (part,), logit_rows))
        pages.commit(ids)

    def num_answer_tokens(self, request: Request) -> int:
        """How many tokens the answer may have. Raises ContextOverflow where there is room for none, OptionError."""
        check_sampling(request.sampling, self._vocab_size)
        room = self.context_tokens - len(request.prompt_ids)
        if room < 1:
            raise self._overflow(len(request.prompt_ids) + 1, "the prompt and one token of an answer")
        return room if request.max_tokens is None else min(room, request.max_tokens)

    def _overflow(self, num_tokens: int, what: str) -> ContextOverflow:
        return ContextOverflow(
            f"{what} need {num_tokens} positions, the context has {self.context_tokens}: "
            f"{num_tokens - self.context_tokens} too many; shorten the prompt or raise the context (--ctx)",
            num_tokens=num_tokens,
            context_tokens=self.context_tokens,
        )
