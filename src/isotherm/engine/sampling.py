"""The next token of a sequence, chosen by SamplingParams: checked here, computed in native/runtime/sampler.cpp."""

import math
import secrets
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from isotherm import _native
from isotherm.errors import OptionError
from isotherm.program.backend import Shortlist
from isotherm.types import SamplingParams

# name, lowest and highest allowed value
_FLOATS = (
    ("temperature", 0.0, 100.0),
    ("top_p", 1e-6, 1.0),
    ("min_p", 0.0, 1.0),
    ("repeat_penalty", 0.01, 100.0),
    ("presence_penalty", -100.0, 100.0),
    ("frequency_penalty", -100.0, 100.0),
)
_INTEGERS = (
    ("top_k", 0, 2**31 - 1),
    ("penalty_tokens", -1, 2**31 - 1),
    ("num_logprobs", 0, 2**31 - 1),
)
_MAX_BIAS = 1e6


def check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Raises OptionError for the first value out of range; it names the value and what is allowed."""
    for name, low, high in _FLOATS:
        value = getattr(params, name)
        if not isinstance(value, float | int) or isinstance(value, bool) or not low <= value <= high:
            raise OptionError(f"{name} is {value!r}; it must be a number from {low:g} to {high:g}")
    for name, lowest, highest in _INTEGERS:
        _check_integer(name, getattr(params, name), lowest, highest)
    if params.seed is not None:
        _check_integer("seed", params.seed, 0, 2**64 - 1)
    _check_integer("sequence", params.sequence, 0, 2**64 - 1)
    seen = set[int]()
    for token_id, bias in params.logit_bias:
        _check_integer("a token id of logit_bias", token_id, 0, vocab_size - 1)
        if not (bias == -math.inf or abs(bias) <= _MAX_BIAS):
            raise OptionError(f"logit_bias of token {token_id} is {bias!r}; it must be -inf or within ±{_MAX_BIAS:g}")
        if token_id in seen:
            raise OptionError(f"logit_bias names token {token_id} twice; give each token one bias")
        seen.add(token_id)


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise OptionError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")


@dataclass(frozen=True)
class SampledToken:
    """A chosen token. `top_logprobs` are the `num_logprobs` likeliest, by value, then by id; banned ones are left out.

    Log-probabilities are those of the model, as OpenAI's: the log-softmax of the unmodified logits, whatever bias,
    penalties, filters and temperature then chose.
    """

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses tokens by one request's params; one call at a time, more wait.

    Each rule keeps a part of the vocabulary: top_k the k largest logits (of equal ones the lowest ids); top_p the
    shortest prefix of those by value whose probabilities reach top_p of their sum; min_p what has at least min_p of
    the largest probability. The draw goes over the survivors by rising id. Greedy takes the largest, of equal ones
    the lowest id. Penalties are llama.cpp's and count prompt and answer alike; a bias of -inf bans, and so does a bit
    of `allowed` that is not set.

    The random number is a function of (seed, sequence, position) alone: Philox4x64-10 (Salmon et al. 2011).
    The bits of an answer depend neither on the processor nor on libm: exp and log are our own.
    """

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        """Raises OptionError for a value out of range."""
        check_sampling(params, vocab_size)
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        rules = _native.SamplingRules()
        for name, *_ in (*_FLOATS, *_INTEGERS):
            setattr(rules, name, getattr(params, name))
        rules.logit_bias = list(params.logit_bias)
        rules.seed = self.seed
        self._native = _native.Sampler(rules, vocab_size)

    @property
    def busy_s(self) -> float:
        """Seconds that `sample` has spent in native code so far."""
        return self._native.busy_s

    @property
    def num_needed(self) -> int:
        """How many of the largest logits are enough to choose by, whatever the others are; 0: all are needed."""
        return self._native.num_needed

    def sample_short(self, row: Shortlist, position: int, sequence: int) -> SampledToken:
        """As `sample`, bit for bit, of a row of which `row` has the `num_needed` largest logits."""
        if not row.is_sound:
            raise AssertionError("logits must be finite or -inf, and one of them finite")
        token_id, logprob = self._native.sample_short(row.logits, row.ids, (row.peak, row.total), position, sequence)
        return SampledToken(token_id, logprob, ())

    def sample(
        self,
        logits: npt.NDArray[np.float32],
        history: npt.NDArray[np.int32],
        position: int,
        sequence: int,
        allowed: npt.NDArray[np.uint32] | None = None,
    ) -> SampledToken:
        """The token for `position`, after `history` (prompt and answer so far, ids [n]), by `logits` [vocab_size].

        sequence: which answer of the request this is. allowed: a bitmask [ceil(vocab_size / 32)], token i in bit i % 32
        of word i // 32; None allows all. Raises OptionError where every token is banned, AssertionError
        for logits that are NaN, +inf, or all -inf.
        """
        chosen = self._native.sample(logits, history, position, sequence, allowed)
        if chosen is None:
            bans = "logit_bias bans" if allowed is None else "logit_bias and the grammar together ban"
            raise OptionError(f"{bans} every token that the model could choose; leave at least one")
        token_id, logprob, top = chosen
        return SampledToken(token_id, logprob, tuple(top))
