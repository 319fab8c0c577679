"""Requests in, token ids out. Knows nothing of text."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isotherm.engine.kv_pages import KvPages
from isotherm.engine.kv_store import U8, KvStore, PageName, StoreCounts
from isotherm.engine.request import Generation, Request, RunFacts
from isotherm.engine.sampling import SampledToken, Sampler, check_sampling
from isotherm.engine.scheduler import Job, Scheduler, Share
from isotherm.engine.solo import SoloSequence
from isotherm.engine.stored_pages import StoredPages
from isotherm.errors import ContextOverflow, OptionError
from isotherm.program import batch as program_batch
from isotherm.program.backend import CompiledProgram, Shortlist
from isotherm.program.batch import Batch
from isotherm.program.recorder import Program

F32 = NDArray[np.float32]

_HEAD_ROWS = 32  # whose logits are asked for at once
_LEAST_STALL_TOKENS = 16  # fewer of a prompt at once cost nearly as much
_FLUSH_S = 10.0  # for which `close` waits for the disk
_PACE_SHARE = 0.25  # how far one step moves what is believed of the next


@dataclass(frozen=True)
class EngineLimits:
    """What the engine was made for; `num_pages` by state group."""

    context_tokens: int
    batch_tokens: int
    num_pages: tuple[int, ...]
    max_running: int = 1  # sequences in one batch
    stall_s: float = 0.1  # for which a prompt may hold up sequences that decode, in one step


@dataclass(frozen=True)
class EngineLoad:
    """How busy an engine is at this moment."""

    num_running: int
    num_waiting: int
    kv_usage: float  # part of the KV pages that sequences hold, of the fullest state group
    num_preemptions: int  # since the start


class Engine:
    """Computes the requests of all threads together, in steps.

    Whoever waits for a token computes the next step for all, while the others wait for it: there is no thread behind
    it, and Ctrl-C is raised where somebody waits.
    """

    def __init__(
        self, compiled: CompiledProgram, program: Program, limits: EngineLimits, store: KvStore | None = None
    ) -> None:
        """store: of the identity of `program` on `compiled`."""
        self.program = program
        self._is_trimmed = program.is_trimmed
        self._compiled = compiled
        self._vocab_size = program.logits.width
        self._limits = limits
        self.context_tokens = limits.context_tokens
        self._stored = StoredPages(store, compiled, self) if store else None
        self._kv = KvPages(program.states, limits.num_pages, limits.context_tokens, self._stored)
        self._scheduler = Scheduler(
            self._kv,
            batch_tokens=limits.batch_tokens,
            stall_tokens=_LEAST_STALL_TOKENS,
            max_running=limits.max_running,
        )
        # One array for all steps: a fresh one each would scatter the heap, and its memory would come page by page.
        self._logits: F32 = np.empty((limits.max_running, self._vocab_size), np.float32)
        self._token_s = 0.0  # seconds of a token of a prompt, as recent steps tell; 0 until one did
        # Guards what follows, and the scheduler. Reentrant: a generator may be finalised while its thread holds it.
        self._changed = threading.Condition(threading.RLock())
        self._stepping: int | None = None  # the thread that computes
        self._is_alone = False  # it has all pages to itself, and takes them without the lock
        self._left: deque[Job] = deque()  # no longer wanted; anyone may add at any time, a finaliser too: no lock

    def start(self, request: Request, facts: RunFacts) -> Generation:
        """From now on every step computes a part of it; `facts` are true between steps, and complete at the end.

        Raises ContextOverflow where the prompt leaves no room for an answer, OptionError.
        """
        num_prompt = facts.num_prompt_tokens = len(request.prompt_ids)
        tokens = np.empty(num_prompt + self.num_answer_tokens(request), np.int32)
        tokens[:num_prompt] = request.prompt_ids
        job = Job(tokens, num_prompt, request.priority, is_trimmed=self._is_trimmed and not request.is_exact)
        job.owner = generation = Generation(request, facts, job, Sampler(request.sampling, self._vocab_size))
        with self._changed:
            self._scheduler.add(job)
        return generation

    def leave(self, generation: Generation) -> None:
        """It is wanted no longer, finished or not. The next step knows."""
        self._left.append(generation.job)
        if self._stored:
            self._stored.sequence_ended()

    def next_token(self, generation: Generation) -> SampledToken | None:
        """Computes steps until it has a token, or None at its end; raises what went wrong with it."""
        with self._changed:
            while not generation.has_news:
                has_stepped = self._step_or_wait()
                assert has_stepped, "somebody waits, and nothing is left to compute"
            return generation.read()

    def step(self) -> bool:
        """Computes the next step for all, or waits for the thread that does; False where nobody wants anything."""
        with self._changed:
            return self._step_or_wait()

    def load(self) -> EngineLoad:
        with self._changed:
            self.release_ended()
            usage = max((pool.usage for pool in self._kv.pools), default=0.0)
            running, waiting = len(self._scheduler.running()), len(self._scheduler.waiting())
            return EngineLoad(running, waiting, usage, self._scheduler.num_preemptions)

    @contextmanager
    def alone(self, *, is_exact: bool = False) -> Iterator[SoloSequence]:
        """An empty sequence, with the machine to itself: all others give their pages back and go on afterwards.

        is_exact: as of a Request.
        """
        with self._changed:
            while self._stepping is not None:
                if self._stepping == threading.get_ident():
                    raise self._would_wait_for_itself()
                self._changed.wait()
            self._stepping = threading.get_ident()
            self._is_alone = True
        try:
            with self._whole():
                self._remove_ended()
                self._scheduler.preempt_all()
                pages = self._kv.sequence(publishes=False, is_trimmed=self._is_trimmed and not is_exact)
                yield SoloSequence(self._compiled, pages, self._vocab_size, self._limits.batch_tokens)
                pages.release()
        finally:
            with self._changed, self._turn():
                self._is_alone = False

    def num_answer_tokens(self, request: Request) -> int:
        """How many tokens the answer may have. Raises ContextOverflow where there is room for none, OptionError."""
        check_sampling(request.sampling, self._vocab_size)
        if not request.prompt_ids:
            raise OptionError("the prompt has no tokens; pass some")
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self._vocab_size:
            raise OptionError(f"token ids of the prompt must lie in 0..{self._vocab_size - 1}")
        self.check_room(len(request.prompt_ids) + 1, "the prompt and one token of an answer")
        room = self.context_tokens - len(request.prompt_ids)
        return room if request.max_tokens is None else min(room, request.max_tokens)

    def check_room(self, num_tokens: int, what: str) -> None:
        """Raises ContextOverflow where the context has fewer positions."""
        if num_tokens > self.context_tokens:
            raise ContextOverflow(
                f"{what} need {num_tokens} positions, the context has {self.context_tokens}: "
                f"{num_tokens - self.context_tokens} too many; shorten the prompt or raise the context (--ctx)",
                num_tokens=num_tokens,
                context_tokens=self.context_tokens,
            )

    # --- pages on disk ----------------------------------------------------------------------------------------------

    @property
    def store_counts(self) -> StoreCounts | None:
        """What was read from disk and written there; None where nothing is kept."""
        return self._stored.counts if self._stored else None

    def close(self) -> None:
        """Waits until the pages of sequences that ended are on disk, but not for long. The engine stays usable."""
        if self._stored:
            self.release_ended()
            self._stored.flush(_FLUSH_S)

    def release_ended(self) -> None:
        """Sequences that ended let go of their pages; while one thread computes, its next step sees to it."""
        with self._changed:
            if self._stepping is None:
                with self._whole():
                    self._remove_ended()

    def copy_page(self, name: PageName) -> U8 | None:
        """For who writes to disk: the page's bytes, or None. A step waits for one copy at most."""
        with self._changed:
            while self._is_alone:
                self._changed.wait()
            page = self._kv.pools[name.group].page_of(name.key)
            return None if page is None else self._compiled.read_page(name.group, page)

    # --- one step ---------------------------------------------------------------------------------------------------

    def _step_or_wait(self) -> bool:
        if self._stepping is None:
            with self._turn():
                return self._step()
        if self._stepping == threading.get_ident():
            raise self._would_wait_for_itself()
        self._changed.wait()
        return True

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

    def _step(self) -> bool:
        """Computes one step, if there is anything to. What is interrupted before its end never was."""
        planned = time.perf_counter()
        with self._whole():
            self._remove_ended()
            self._scheduler.stall_tokens = self._stall_tokens()
            shares = self._scheduler.plan()
        if not shares:
            return False
        started = time.perf_counter()
        for share in shares:
            if share.is_last:
                share.job.owner.prepare()
        try:
            self._changed.release()
            self._compute(shares)
            rows = iter(self._head([share.job.owner.num_needed for share in shares if share.is_last]))
        finally:
            self._changed.acquire()
        with self._whole():
            self._scheduler.commit(shares)
        decoding = [share.job.owner.num_chosen > 0 for share in shares]
        for share in shares:
            if share.is_last:
                share.job.owner.choose(next(rows))
        self._note(shares, decoding, started - planned, time.perf_counter() - started)
        return True

    def _remove_ended(self) -> None:
        while self._left:
            self._scheduler.remove(self._left.popleft())
        for job in self._scheduler.running():
            if job.owner.is_done:
                self._scheduler.remove(job)

    def _stall_tokens(self) -> int:
        """Tokens of prompts that fit into `stall_s`, beside sequences that decode."""
        if not self._token_s:
            return _LEAST_STALL_TOKENS
        return max(_LEAST_STALL_TOKENS, int(self._limits.stall_s / self._token_s))

    def _compute(self, shares: list[Share]) -> None:
        ids: list[int] = []
        rows, sequences = [], []
        for share in shares:
            ids += share.token_ids
            if share.is_last:
                rows.append(len(ids) - 1)
            num_new, pages = len(share.token_ids), share.pages
            sequence = program_batch.Sequence(num_new, len(pages.token_ids), pages.page_tables, pages.is_trimmed)
            sequences.append(sequence)
        self._compiled.forward(Batch(np.array(ids, np.int32), tuple(sequences), np.array(rows, np.int32)))

    def _head(self, needed: list[int]) -> F32 | list[Shortlist]:
        """Of each row that a token is chosen by, so many of its largest logits where a GPU has them; else all."""
        firsts = range(0, len(needed), _HEAD_ROWS)
        if all(0 < count <= self._compiled.most_kept for count in needed):
            blocks = (self._compiled.shortlists(first, needed[first : first + _HEAD_ROWS]) for first in firsts)
            return [row for block in blocks for row in block]
        for first in firsts:
            end = min(len(needed), first + _HEAD_ROWS)
            self._compiled.logits(first, end - first, self._logits[first:end])
        return self._logits[: len(needed)]

    def _note(self, shares: list[Share], decoding: list[bool], plan_s: float, compute_s: float) -> None:
        for share, decodes in zip(shares, decoding, strict=True):
            facts: RunFacts = share.job.owner.facts
            facts.num_cached_tokens = share.job.num_found or 0
            if decodes:
                facts.decode_s += plan_s + compute_s
            else:
                facts.prefill_s += plan_s + compute_s
                facts.num_prefilled_tokens = len(share.pages.token_ids)
        num_tokens = sum(len(share.token_ids) for share in shares)
        if num_tokens - len(shares) >= _LEAST_STALL_TOKENS:  # a step of decode alone tells nothing of prompts
            token_s = compute_s / num_tokens
            self._token_s += (token_s - self._token_s) * (_PACE_SHARE if self._token_s else 1.0)

    def _would_wait_for_itself(self) -> OptionError:
        return OptionError("this thread's last call is still running; finish or close it first")
