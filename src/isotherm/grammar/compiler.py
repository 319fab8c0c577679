"""Grammars compiled for one model's vocabulary by llguidance: after each token, a bit for each that may come next.

An answer's constraint is a function of the answer so far. It is computed by worker threads, which no signal interrupts
and whose stacks are large: the library recurses as deep as a chain of references or rules is long.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property

import llguidance
import numpy as np
from numpy.typing import NDArray

from isotherm.errors import GrammarError
from isotherm.grammar.gbnf import lark_of_gbnf
from isotherm.grammar.limits import check_source
from isotherm.tokenization.tokenizer import Tokenizer
from isotherm.types import Grammar

Bitmask = NDArray[np.uint32]

_COMPILE_TIMEOUT_S = 5.0
_NUM_MASK_WORKERS = 2
# Measured: up to 16 KiB for each of the definitions in a chain of $ref, of which the source limit allows 3700.
_STACK_BYTES = 128 << 20
_STARTING = threading.Lock()
# Of sources made to cost most, a mask takes some 20 ms, the first one 100 ms, and a constraint 50 to 100 MB.
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=250_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_items_in_row=2_000,
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
# Small models like to go on with white space for ever.
_JSON_SPACE = r"[ \n\r\t]{1,32}"


class GrammarCompiler:
    """Compiles grammars for one model; any thread may use it. Builds what it knows of the vocabulary at first use."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """vocab_size: of a row of logits, which may be longer than the tokenizer's list."""
        assert tokenizer.num_tokens <= vocab_size
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._building = threading.Lock()

    def compile(self, grammar: Grammar) -> "GrammarConstraint":
        """The constraint of one answer, which is to begin.

        Raises GrammarError where the grammar is not valid, asks for what is not supported, allows no text, or is past a
        limit.
        """
        check_source(grammar)
        with self._building:
            compile_worker, mask_workers, vocabulary = self._compile_worker, self._mask_workers, self._vocabulary
        compiled = compile_worker.submit(self._build, grammar, vocabulary, mask_workers)
        try:
            return compiled.result(_COMPILE_TIMEOUT_S)
        except TimeoutError as error:
            compiled.cancel()
            raise GrammarError(
                f"the {grammar.kind} took longer than {_COMPILE_TIMEOUT_S:g} s to compile; make it simpler, or try "
                "again where others were being compiled"
            ) from error

    @cached_property
    def _compile_worker(self) -> ThreadPoolExecutor:
        return _start_workers(1, "compile grammar")

    @cached_property
    def _mask_workers(self) -> ThreadPoolExecutor:
        return _start_workers(_NUM_MASK_WORKERS, "mask tokens")

    @cached_property
    def _vocabulary(self) -> llguidance.LLTokenizer:
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer))
        return llguidance.LLTokenizer(wrapper)

    def _build(
        self, grammar: Grammar, vocabulary: llguidance.LLTokenizer, workers: ThreadPoolExecutor
    ) -> "GrammarConstraint":
        with _refusals(grammar.kind):
            matcher = llguidance.LLMatcher(vocabulary, _library_form(grammar), log_level=0, limits=_LIMITS)
            if matcher.is_error():
                raise ValueError(matcher.get_error())
        constraint = GrammarConstraint(matcher, grammar.kind, self._tokenizer, self._vocab_size, workers)
        constraint.compute(np.zeros(0, np.int32))
        return constraint


class GrammarConstraint:
    """One answer under a grammar (see engine.constraint.Constraint)."""

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        kind: str,
        tokenizer: Tokenizer,
        vocab_size: int,
        workers: ThreadPoolExecutor,
    ) -> None:
        self._matcher = matcher
        self._kind = kind
        self._end_of_text = tokenizer.num_tokens
        self._num_words = -(-vocab_size // 32)
        self._ends = np.zeros(self._num_words, np.uint32)
        for token in tokenizer.end_ids:
            self._ends[token // 32] |= np.uint32(1 << token % 32)
        self._workers = workers
        self._computing = threading.Lock()
        self._num_consumed = 0
        self._num_prepared = -1
        self._mask: Future[Bitmask | None] = Future()

    def prepare(self, answer_ids: NDArray[np.int32]) -> None:
        """Starts to compute what may follow the answer so far; asked again for the same, nothing happens."""
        if self._num_prepared != len(answer_ids):
            self._mask = self._workers.submit(self.compute, answer_ids)
            self._num_prepared = len(answer_ids)

    def allowed(self) -> Bitmask | None:
        """Waits for what was prepared; None where the answer is complete and can only end."""
        return self._mask.result()

    def compute(self, answer_ids: NDArray[np.int32]) -> Bitmask | None:
        """See `allowed`."""
        with self._computing, _refusals(self._kind):
            return self._compute(answer_ids)

    def _compute(self, answer_ids: NDArray[np.int32]) -> Bitmask | None:
        for token in answer_ids[self._num_consumed :].tolist():
            if not self._matcher.consume_token(token):
                raise self._stuck(self._matcher.get_error())
            self._num_consumed += 1
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        if self._matcher.is_error():  # the bitmask is that of an end then
            raise self._stuck(self._matcher.get_error())
        may_end = bool(words[self._end_of_text // 32] >> np.uint32(self._end_of_text % 32) & 1)
        mask = np.zeros(self._num_words, np.uint32)
        num_words = min(len(words), self._num_words)
        mask[:num_words] = words[:num_words]
        if self._end_of_text // 32 < self._num_words:
            mask[self._end_of_text // 32] &= ~np.uint32(1 << self._end_of_text % 32)
        mask &= ~self._ends
        if not mask.any():
            if may_end:
                return None
            raise self._stuck("no token of this model can go on")
        return mask | self._ends if may_end else mask

    def _stuck(self, reason: str) -> GrammarError:
        where = f"the {self._kind}, after {self._num_consumed} tokens of the answer"
        if "NoExtension" in reason:
            return GrammarError(
                f"{where}, allows no text that has an end; look for rules that refer to themselves only"
            )
        return GrammarError(f"{where}: {_first_line(reason)}; make the grammar simpler")


class _Vocabulary:
    """What llguidance asks of a tokenizer. A token more than the model has stands for the end of the text: a grammar
    then has one end whatever end tokens the model has, and end tokens are ours to allow.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        num_tokens = self.eos_token_id = tokenizer.num_tokens
        self.tokens = [*map(tokenizer.token_bytes, range(num_tokens)), b"<end of text>"]
        self.special_token_ids = [*filter(self._is_marker, range(num_tokens)), num_tokens]

    def _is_marker(self, token: int) -> bool:
        """Special tokens are no text, but for the runs of white space that some vocabularies list among them."""
        tokenizer = self._tokenizer
        if token in tokenizer.end_ids or tokenizer.is_hidden(token):
            return True
        is_space = self.tokens[token].isspace() and not tokenizer.prefixes_space
        return tokenizer.is_special(token) and not is_space

    def __call__(self, text: str) -> list[int]:
        """Asked where only one text can follow: then only its own first token is allowed, not others that begin it."""
        return self._tokenizer.encode_continuation(text)


def _start_workers(num_workers: int, name: str) -> ThreadPoolExecutor:
    """All of them at once, since the size of a stack is a setting of the process while threads start."""
    workers = ThreadPoolExecutor(num_workers, thread_name_prefix=name)
    all_started = threading.Event()
    with _STARTING:
        before = threading.stack_size(_STACK_BYTES)
        try:
            for _ in range(num_workers):
                workers.submit(all_started.wait)  # none is idle, so that each needs a thread of its own
        finally:
            threading.stack_size(before)
            all_started.set()
    return workers


def _library_form(grammar: Grammar) -> str:
    if grammar.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(grammar.source)
    if grammar.kind == "lark":
        return llguidance.LLMatcher.grammar_from_lark(grammar.source)
    if grammar.kind == "gbnf":
        return llguidance.LLMatcher.grammar_from_lark(lark_of_gbnf(grammar.source))
    schema = grammar.source if grammar.kind == "json_schema" else '{"type": "object"}'
    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _JSON_SPACE})


@contextmanager
def _refusals(kind: str) -> Iterator[None]:
    """What the library raises becomes a GrammarError, a panic of its Rust code too, which is no Exception."""
    try:
        yield
    except GrammarError:
        raise
    except BaseException as error:
        if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
            raise
        raise GrammarError(f"the {kind} is not valid, or not supported: {_first_line(str(error))}") from error


def _first_line(reason: str) -> str:
    """What the library says, without the dump of its state."""
    lines = [line.strip() for line in reason.splitlines() if line.strip() and not line.startswith("<")]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]  # of a regular expression
    return " ".join([*lines[:1], *told[:1]])[:400] or "no reason is given"
