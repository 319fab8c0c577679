"""One sequence with the machine to itself: logits of every position, and measurements."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from isotherm.engine.kv_pages import SequencePages
from isotherm.engine.sampling import Sampler
from isotherm.program import batch as program_batch
from isotherm.program.backend import CompiledProgram
from isotherm.program.batch import Batch
from isotherm.program.ops import Value
from isotherm.program.recording import Recording
from isotherm.types import SamplingParams

F32 = NDArray[np.float32]


def num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both start with."""
    differing = (index for index, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(differing, min(len(first), len(second)))


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
class SoloSequence:
    """A sequence, empty at first; `Engine.alone` makes it."""

    compiled: CompiledProgram
    pages: SequencePages
    vocab_size: int
    batch_tokens: int

    def logit_blocks(self, ids: Sequence[int], rows: Sequence[int], block_rows: int) -> Iterator[F32]:
        """Logits of the given rising positions, at most `block_rows` of them at a time: [<= block_rows, vocab_size].

        What `ids` start with in common with the text before is not computed again, up to the first of the rows.
        """
        num_known = num_common(self.pages.token_ids, ids[: rows[0]] if len(rows) else ids)
        for start in range(self.pages.go_back(num_known), len(ids), self.batch_tokens):
            chunk = list(ids[start : start + self.batch_tokens])
            wanted = np.array([row - start for row in rows if start <= row < start + len(chunk)], np.int32)
            self._forward(chunk, wanted)
            for first in range(0, len(wanted), block_rows):
                yield self.compiled.logits(first, min(block_rows, len(wanted) - first))

    def observe(self, ids: Sequence[int], wanted: Collection[Value], look: Callable[[Value, F32], None]) -> None:
        """Computes `ids` and shows the wanted Values of them all: see CompiledProgram.observe."""
        for start in range(0, len(ids), self.batch_tokens):
            chunk = list(ids[start : start + self.batch_tokens])
            batch = self._reserve(chunk, np.arange(len(chunk), dtype=np.int32))
            self.compiled.observe(batch, wanted, look)
            self.pages.commit(chunk)

    def time_prefill(self, num_tokens: int) -> float:
        """Seconds from an empty cache to the logits after `num_tokens` tokens."""
        ids = [token % self.vocab_size for token in range(1, num_tokens + 1)]
        started = time.perf_counter()
        self._next_logits(ids)
        return time.perf_counter() - started

    def time_decode(self, num_tokens: int, depth: int) -> DecodeTiming:
        """Decodes `num_tokens` greedily after `depth` cached ones, which are not timed."""
        self.time_prefill(max(1, depth))
        busy_before_s = self.compiled.busy_s
        total_s, sampler_s = self._decode(num_tokens)
        return DecodeTiming(total_s, self.compiled.busy_s - busy_before_s + sampler_s)

    def time_reading(self, ids: Sequence[int], first: int) -> float:
        """Seconds that the tokens from `first` on take one by one; those before are computed at once, and not timed."""
        self._next_logits(list(ids[:first]))
        started = time.perf_counter()
        for token_id in ids[first:]:
            self._next_logits([token_id])
        return time.perf_counter() - started

    def read_weights_s(self) -> float | None:
        """Seconds to read every weight of a token once and compute nothing; None where the backend cannot tell."""
        return self.compiled.read_weights_s()

    def record_prefill(self, num_tokens: int) -> RecordedRun:
        """`time_prefill`, and what each thread did in it. Raises OptionError where the backend cannot tell."""
        num_batches = -(-num_tokens // self.batch_tokens)
        total_s, recording = self.compiled.record(partial(self.time_prefill, num_tokens), num_batches)
        return RecordedRun(total_s, 0.0, recording)

    def record_decode(self, num_tokens: int, depth: int) -> RecordedRun:
        """`time_decode`, and what each thread did in it. Raises OptionError where the backend cannot tell."""
        self.time_prefill(max(1, depth))
        (total_s, sampler_s), recording = self.compiled.record(partial(self._decode, num_tokens), num_tokens)
        return RecordedRun(total_s, sampler_s, recording)

    def _decode(self, num_tokens: int) -> tuple[float, float]:
        """Seconds that `num_tokens` greedy steps after what is cached take, and the sampler's part of them."""
        depth = len(self.pages.token_ids)
        sampler = Sampler(SamplingParams(), self.vocab_size)
        history = np.ones(depth + num_tokens, np.int32)
        started = time.perf_counter()
        token_id = 1
        is_short = sampler.num_needed <= self.compiled.most_kept
        for position in range(depth, len(history)):
            if is_short:
                self._forward([token_id], np.zeros(1, np.int32))
                (row,) = self.compiled.shortlists(0, [sampler.num_needed])
                token_id = sampler.sample_short(row, position, 0).token_id
            else:
                logits = self._next_logits([token_id])
                token_id = sampler.sample(logits, history[:position], position, 0).token_id
        return time.perf_counter() - started, sampler.busy_s

    def _next_logits(self, ids: list[int]) -> F32:
        """Computes `ids` after what is cached; logits [vocab_size] of the last one."""
        for start in range(0, len(ids), self.batch_tokens):
            chunk = ids[start : start + self.batch_tokens]
            is_last = start + len(chunk) == len(ids)
            self._forward(chunk, np.array([len(chunk) - 1] if is_last else [], np.int32))
        row: F32 = self.compiled.logits(0, 1)[0]
        return row

    def _forward(self, ids: list[int], logit_rows: NDArray[np.int32]) -> None:
        self.compiled.forward(self._reserve(ids, logit_rows))
        self.pages.commit(ids)

    def _reserve(self, ids: list[int], logit_rows: NDArray[np.int32]) -> Batch:
        has_room = self.pages.reserve(len(ids))
        assert has_room, "a sequence alone has room for the whole context"
        cached, tables = len(self.pages.token_ids), self.pages.page_tables
        part = program_batch.Sequence(len(ids), cached, tables, self.pages.is_trimmed)
        return Batch(np.array(ids, np.int32), (part,), logit_rows)
