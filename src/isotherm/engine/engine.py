"""Requests in, token ids out. Knows nothing of text."""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from isotherm.engine.kv_pages import CachedSequence
from isotherm.engine.sampling import SampledToken, Sampler, check_sampling
from isotherm.errors import ContextOverflow
from isotherm.program import batch as program_batch
from isotherm.program.backend import CompiledProgram
from isotherm.program.batch import Batch
from isotherm.program.recorder import Program
from isotherm.program.recording import Recording
from isotherm.types import SamplingParams

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Request:
    """max_tokens None: as many as the context holds. An id of `end_ids` ends the answer and is not part of it."""

    prompt_ids: tuple[int, ...]
    max_tokens: int | None
    sampling: SamplingParams
    end_ids: frozenset[int]


@dataclass
class RunFacts:
    """What one request cost; filled while it runs."""

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


class Engine:
    """One sequence at a time, its KV kept for the next request that starts alike. Not thread safe."""

    def __init__(self, compiled: CompiledProgram, program: Program, *, context_tokens: int, batch_tokens: int) -> None:
        self._compiled = compiled
        self._vocab_size = program.logits.width
        self.context_tokens = context_tokens
        self.batch_tokens = batch_tokens
        self._sequence = CachedSequence(program.states, context_tokens, batch_tokens)

    def generate(self, request: Request, facts: RunFacts) -> Generator[SampledToken, None, None]:
        """Token after token; `facts` are true whenever the iterator rests, and complete when it ends.

        Raises ContextOverflow where the prompt leaves no room for an answer.
        """
        num_prompt = facts.num_prompt_tokens = len(request.prompt_ids)
        limit = self.num_answer_tokens(request)
        started = time.perf_counter()
        sampler = Sampler(request.sampling, self._vocab_size)
        history = np.empty(num_prompt + limit, np.int32)
        history[:num_prompt] = request.prompt_ids
        facts.num_cached_tokens = self._sequence.keep_prefix(list(request.prompt_ids))
        logits = self._next_logits(list(request.prompt_ids[facts.num_cached_tokens :]))
        token = sampler.sample(logits, history[:num_prompt], num_prompt, 0)
        facts.prefill_s = time.perf_counter() - started
        for position in range(num_prompt, num_prompt + limit):
            if token.token_id in request.end_ids:
                return
            facts.reached_limit = position + 1 == num_prompt + limit
            yield token
            if facts.reached_limit:
                return
            started = time.perf_counter()
            history[position] = token.token_id
            logits = self._next_logits([token.token_id])
            token = sampler.sample(logits, history[: position + 1], position + 1, 0)
            facts.decode_s += time.perf_counter() - started

    def logit_blocks(self, token_ids: Sequence[int], rows: Sequence[int], block_rows: int) -> Iterator[F32]:
        """Logits of the given rising positions, at most `block_rows` of them at a time: [<= block_rows, vocab_size].

        Raises ContextOverflow where the tokens do not fit.
        """
        ids = list(token_ids)
        if len(ids) > self.context_tokens:
            raise self._overflow(len(ids), "the text")
        self._sequence.keep_prefix([])
        for start in range(0, len(ids), self.batch_tokens):
            chunk = ids[start : start + self.batch_tokens]
            wanted = np.array([row - start for row in rows if start <= row < start + len(chunk)], np.int32)
            self._forward(chunk, wanted)
            for first in range(0, len(wanted), block_rows):
                yield self._compiled.logits(first, min(block_rows, len(wanted) - first))

    def time_prefill(self, num_tokens: int) -> float:
        """Seconds from an empty cache to the logits after `num_tokens` tokens."""
        ids = [token % self._vocab_size for token in range(1, num_tokens + 1)]
        self._sequence.keep_prefix([])
        started = time.perf_counter()
        self._next_logits(ids)
        return time.perf_counter() - started

    def time_decode(self, num_tokens: int, depth: int) -> DecodeTiming:
        """Decodes `num_tokens` greedily after `depth` cached ones, which are not timed."""
        self.time_prefill(max(1, depth))
        busy_before_s = self._compiled.busy_s
        total_s, sampler_s = self._decode(num_tokens, max(1, depth))
        return DecodeTiming(total_s, self._compiled.busy_s - busy_before_s + sampler_s)

    def read_weights_s(self) -> float | None:
        """Seconds to read every weight of a token once and compute nothing; None where the backend cannot tell."""
        return self._compiled.read_weights_s()

    def record_prefill(self, num_tokens: int) -> RecordedRun:
        """`time_prefill`, and what each thread did in it. Raises OptionError where the backend cannot tell."""
        num_batches = -(-num_tokens // self.batch_tokens)
        total_s, recording = self._compiled.record(lambda: self.time_prefill(num_tokens), num_batches)
        return RecordedRun(total_s, 0.0, recording)

    def record_decode(self, num_tokens: int, depth: int) -> RecordedRun:
        """`time_decode`, and what each thread did in it. Raises OptionError where the backend cannot tell."""
        self.time_prefill(max(1, depth))
        run = partial(self._decode, num_tokens, max(1, depth))
        (total_s, sampler_s), recording = self._compiled.record(run, num_tokens)
        return RecordedRun(total_s, sampler_s, recording)

    def _decode(self, num_tokens: int, depth: int) -> tuple[float, float]:
        """Seconds that `num_tokens` greedy steps after `depth` cached tokens take, and the sampler's part of them."""
        sampler = Sampler(SamplingParams(), self._vocab_size)
        history = np.ones(depth + num_tokens, np.int32)
        started = time.perf_counter()
        token_id = 1
        for position in range(depth, len(history)):
            logits = self._next_logits([token_id])
            token_id = sampler.sample(logits, history[:position], position, 0).token_id
        return time.perf_counter() - started, sampler.busy_s

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

    def _next_logits(self, ids: list[int]) -> F32:
        """Computes `ids` after what is cached; logits [vocab_size] of the last one."""
        for start in range(0, len(ids), self.batch_tokens):
            chunk = ids[start : start + self.batch_tokens]
            is_last = start + len(chunk) == len(ids)
            self._forward(chunk, np.array([len(chunk) - 1] if is_last else [], np.int32))
        row: F32 = self._compiled.logits(0, 1)[0]
        return row

    def _forward(self, ids: list[int], logit_rows: NDArray[np.int32]) -> None:
        sequence = self._sequence
        sequence.reserve(len(ids))
        part = program_batch.Sequence(len(ids), len(sequence.token_ids), sequence.page_tables)
        self._compiled.forward(Batch(np.array(ids, np.int32), (part,), logit_rows))
        sequence.commit(ids)
