"""One request: what was asked for, what it cost, and how far it is."""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from isotherm.engine.sampling import SampledToken, Sampler
from isotherm.engine.scheduler import Job
from isotherm.errors import OptionError
from isotherm.program.backend import Shortlist
from isotherm.types import SamplingParams


class Constraint(Protocol):
    """What one answer has to follow. It knows the answer only as it is told it: a step may be computed anew."""

    def prepare(self, answer_ids: NDArray[np.int32]) -> None:
        """Starts to find out, in another thread, what may come after these: the tokens before, and at most one more."""

    def allowed(self) -> NDArray[np.uint32] | None:
        """Waits for it: a bitmask for `Sampler.sample`; None where the answer is complete and can only end.

        End tokens are among the allowed ones where it may end. Raises GrammarError where it can neither end nor go on.
        """


@dataclass(frozen=True)
class Request:
    """max_tokens None: as many as the context holds. An id of `end_ids` ends the answer and is not part of it.

    priority: higher goes first. constraint: of this answer alone. is_exact: the Trims of the Program do not hold.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int | None
    sampling: SamplingParams
    end_ids: frozenset[int]
    priority: int = 0
    constraint: Constraint | None = None
    is_exact: bool = False


@dataclass
class RunFacts:
    """What one request cost; filled while it runs. Seconds are those of the steps that it had a part in."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_prefilled_tokens: int = 0  # of the prompt, cached or computed so far
    prefill_s: float = 0.0
    decode_s: float = 0.0
    reached_limit: bool = False  # max_tokens or the context ended it, not an end token


@dataclass(eq=False)
class Generation:
    """One request on its way. Its job's `num_tokens` says how much of it is there: an interrupt may come anywhere."""

    request: Request
    facts: RunFacts
    job: Job
    sampler: Sampler
    chosen: list[SampledToken] = field(default_factory=list)
    num_read: int = 0
    ended: bool = False  # by an end token, or complete
    error: Exception | None = None  # what went wrong with this request alone

    @property
    def num_chosen(self) -> int:
        return self.job.num_tokens - len(self.request.prompt_ids)

    @property
    def is_done(self) -> bool:
        return self.ended or self.error is not None or self.job.num_tokens == len(self.job.tokens)

    @property
    def has_news(self) -> bool:
        """Whether `read` has a token, or the end, to tell."""
        return self.num_read < self.num_chosen or self.is_done

    def prepare(self) -> None:
        """Before the logits of the next token are computed."""
        if self.request.constraint:
            self.request.constraint.prepare(self.job.tokens[len(self.request.prompt_ids) : self.job.num_tokens])

    @property
    def num_needed(self) -> int:
        """See Sampler.num_needed: a constraint may ban any token."""
        return 0 if self.request.constraint else self.sampler.num_needed

    def choose(self, row: NDArray[np.float32] | Shortlist) -> None:
        """The next token, by its logits or by those that are needed; an end token is not kept."""
        try:
            self._choose(row)
        except (OptionError, AssertionError) as error:
            self.error = error

    def _choose(self, row: NDArray[np.float32] | Shortlist) -> None:
        job, constraint = self.job, self.request.constraint
        allowed = constraint.allowed() if constraint else None
        if constraint and allowed is None:
            self.ended = True
            return
        history, sequence = job.tokens[: job.num_tokens], self.request.sampling.sequence
        if isinstance(row, Shortlist):
            token = self.sampler.sample_short(row, job.num_tokens, sequence)
        else:
            token = self.sampler.sample(row, history, job.num_tokens, sequence, allowed)
        if token.token_id in self.request.end_ids:
            self.ended = True
            return
        self.facts.reached_limit = job.num_tokens + 1 == len(job.tokens)
        self.chosen[self.num_chosen :] = [token]
        job.append(token.token_id)
        if constraint and self.facts.reached_limit:
            self.prepare()
            self.facts.reached_limit = constraint.allowed() is not None

    def read(self) -> SampledToken | None:
        """The next token for the reader; None at the end. Raises what went wrong."""
        if self.num_read < self.num_chosen:
            self.num_read += 1
            return self.chosen[self.num_read - 1]
        if self.error:
            raise self.error
        return None
