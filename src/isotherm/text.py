"""TextGenerator: tokenizer and engine behind one object, the door for Python, command line and server."""

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, TypedDict

import numpy as np
from numpy.typing import NDArray

from isotherm.answer import Answer, Piece, TextStream
from isotherm.dialogue import Dialogue, Prompt
from isotherm.engine.engine import Engine, EngineLoad
from isotherm.engine.kv_store import StoreCounts
from isotherm.engine.request import Constraint, Request
from isotherm.engine.solo import DecodeTiming, RecordedRun
from isotherm.errors import OptionError
from isotherm.facts import ModelFacts
from isotherm.program.ops import Value
from isotherm.program.recorder import Program
from isotherm.tokenization.chat import ChatTemplate
from isotherm.tokenization.tokenizer import Detokenizer, Tokenizer
from isotherm.types import Grammar, SamplingParams

if TYPE_CHECKING:
    from isotherm.grammar.compiler import GrammarCompiler


class Message(TypedDict):
    """One turn of a conversation; role is "system", "user" or "assistant"."""

    role: str
    content: str


class TextGenerator:
    """A loaded model. Thread safe: answers of several threads are computed together. `isotherm.load` makes it."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, template: ChatTemplate | None, facts: ModelFacts) -> None:
        self._engine: Engine | None = engine
        self._tokenizer = tokenizer
        self.dialogue = None if template is None else Dialogue(template, tokenizer)
        self.facts = facts

    @property
    def context_tokens(self) -> int:
        return self._open_engine().context_tokens

    @property
    def has_chat_template(self) -> bool:
        return self.dialogue is not None

    def generate(self, prompt: str | Sequence[Message], **options: Any) -> Answer:
        """The whole answer at once; takes what `stream` takes and raises what it raises."""
        *_, last = self.stream(prompt, **options)
        assert last.answer is not None
        return last.answer

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        raw: bool = False,
        grammar: Grammar | None = None,
        exact: bool = False,
        sampling: SamplingParams | None = None,
        **sampling_fields: Any,
    ) -> Generator[Piece, None, None]:
        """The answer as it comes.

        prompt: text, one user message where the model has a chat template and `raw` is false; or messages.
        max_tokens: None for as many as the context holds. stop: strings that end the answer and are not part of it.
        grammar: what the answer has to follow, up to a stop string. exact: whatever quality the model was loaded with.
        Fields of SamplingParams may be given by name; greedy by default.
        Raises ContextOverflow, TemplateError, MessageError, GrammarError, OptionError; TypeError for an option that
        does not exist. Closing the iterator stops the answer, and so does Ctrl-C, as KeyboardInterrupt; the object
        stays usable.
        """
        params = replace(sampling or SamplingParams(), **sampling_fields)
        _check_answer_options(max_tokens, stop)
        prompt_ids, end_ids = tuple(self.prompt_ids(prompt, raw=raw)), self._tokenizer.end_ids
        request = Request(prompt_ids, max_tokens, params, end_ids, is_exact=exact)
        self._open_engine().num_answer_tokens(request)  # what is wrong is said here, not at the first `next`
        return self._run(replace(request, constraint=self._constraint(grammar)), tuple(stop))

    @cached_property
    def _grammars(self) -> "GrammarCompiler":
        from isotherm.grammar.compiler import GrammarCompiler  # its library takes long to import, and few need it

        return GrammarCompiler(self._tokenizer, self.facts.config.vocab_size)

    def _constraint(self, grammar: Grammar | None) -> Constraint | None:
        return None if grammar is None else self._grammars.compile(grammar)

    def _run(self, request: Request, stop: tuple[str, ...]) -> Generator[Piece, None, None]:
        with TextStream(self._open_engine(), self._tokenizer, request, stop) as stream:
            while not stream.is_done:
                if (piece := stream.wait()).text or piece.answer:
                    yield piece

    def start(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        grammar: Grammar | None = None,
        sampling: SamplingParams | None = None,
        priority: int = 0,
        exact: bool = False,
        shown: frozenset[int] = frozenset(),
    ) -> TextStream:
        """An answer for who asks now and then how far it is (`poll`), while `step` computes all of them; to be closed.

        priority: higher goes first. shown: control tokens that appear in the text, as `dialogue.shown_tokens` for a
        parser of answers. The other arguments, and what is raised, are those of `stream`.
        """
        params = sampling or SamplingParams()
        _check_answer_options(max_tokens, stop)
        request = Request(tuple(prompt_ids), max_tokens, params, self._tokenizer.end_ids, priority, is_exact=exact)
        request = replace(request, constraint=self._constraint(grammar))
        return TextStream(self._open_engine(), self._tokenizer, request, tuple(stop), shown=shown)

    def step(self) -> bool:
        """Computes the next step of all answers that were started; False where there is none to compute."""
        return self._open_engine().step()

    def load(self) -> EngineLoad:
        """How busy it is at this moment."""
        return self._open_engine().load()

    def prompt_ids(self, prompt: str | Prompt | Sequence[Message], *, raw: bool = False) -> list[int]:
        """The token ids that a request for `prompt` starts from, chat template and BOS applied.

        A Prompt is what `dialogue.render` made of messages.
        """
        if isinstance(prompt, Prompt):
            return self._encode_prompt(prompt)
        if isinstance(prompt, str) and (raw or self.dialogue is None):
            return self._encode_prompt(Prompt(prompt))
        if raw or self.dialogue is None:
            reason = "raw=True takes text" if raw else f"{self.facts.name} has no chat template; pass text"
            raise OptionError(f"messages need a chat template: {reason}")
        messages = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
        return self._encode_prompt(self.dialogue.render(messages))

    def _encode_prompt(self, prompt: Prompt) -> list[int]:
        def encode(*, add_special: bool) -> list[int]:
            return self._tokenizer.encode(
                prompt.text, add_special=add_special, parse_special=True, literal_spans=prompt.literal_spans
            )

        bos = self._tokenizer.bos_id
        ids = encode(add_special=False)
        if bos is not None and ids[:1] == [bos]:  # a template that writes BOS itself must not get a second one
            return ids
        ids = encode(add_special=True)
        if not ids:
            raise OptionError("the prompt is empty, and this model starts with no BOS token; pass some text")
        return ids

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        add_special: adds BOS (and EOS) where the model asks for it. parse_special: control tokens may be spelled out.
        """
        return self._tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text; a special token as it is spelled. Raises OptionError for no such token."""
        return self._tokenizer.token_bytes(token_id)

    def detokenize(self, token_ids: Sequence[int], *, show_special: bool = False) -> str:
        """show_special: control tokens appear as spelled. Raises OptionError for no such token."""
        return self._tokenizer.decode(token_ids, show_special=show_special)

    def detokenizer(self) -> Detokenizer:
        """For tokens of an answer, as they come."""
        return Detokenizer(self._tokenizer, continues=True)

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(token_ids), vocab_size] after each of the tokens. Raises ContextOverflow, OptionError."""
        return np.concatenate(list(self.logit_blocks(token_ids, range(len(token_ids)))))

    def logit_blocks(
        self, token_ids: Sequence[int], rows: Sequence[int], *, block_rows: int = 64, exact: bool = False
    ) -> Iterator[NDArray[np.float32]]:
        """Logits after the tokens at `rows` (rising), [at most block_rows, vocab_size] at a time.

        exact: whatever quality the model was loaded with.
        """
        self._check_text(token_ids)
        with self._open_engine().alone(is_exact=exact) as solo:
            yield from solo.logit_blocks(token_ids, rows, block_rows)

    def logit_blocks_of_each(
        self, texts: Sequence[tuple[Sequence[int], Sequence[int]]], *, block_rows: int = 64
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """`logit_blocks` of several texts (token_ids, rows), in turn: (index of the text, block).

        What a text starts with in common with the one before it is computed once, up to the first of its rows.
        """
        for token_ids, _ in texts:
            self._check_text(token_ids)
        with self._open_engine().alone() as solo:
            for index, (token_ids, rows) in enumerate(texts):
                for block in solo.logit_blocks(token_ids, rows, block_rows):
                    yield index, block

    def _check_text(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise OptionError("there are no tokens to compute")
        if not all(0 <= token < self.facts.config.vocab_size for token in token_ids):
            raise OptionError(f"token ids must lie in 0..{self.facts.config.vocab_size - 1}")
        self._open_engine().check_room(len(token_ids), "the text")

    @property
    def program(self) -> Program:
        """What is computed; `observe` shows its Values."""
        return self._open_engine().program

    def observe(
        self,
        token_ids: Sequence[int],
        wanted: Collection[Value],
        look: Callable[[Value, NDArray[np.float32]], None],
    ) -> None:
        """Computes a text and calls look(value, rows [tokens, width]) for each of the wanted Values of its tokens.

        Long texts come in several parts, each with all Values in the order in which they are made. Raises
        ContextOverflow, OptionError.
        """
        self._check_text(token_ids)
        with self._open_engine().alone() as solo:
            solo.observe(token_ids, wanted, look)

    def prefill_s(self, num_tokens: int) -> float:
        """Measures: seconds that a prompt of `num_tokens` takes, nothing of it cached."""
        with self._open_engine().alone() as solo:
            return solo.time_prefill(num_tokens)

    def decode_s(self, num_tokens: int, *, depth: int = 0) -> DecodeTiming:
        """Measures: seconds that `num_tokens` steps of decode take after `depth` cached tokens."""
        with self._open_engine().alone() as solo:
            return solo.time_decode(num_tokens, depth)

    def read_s(self, token_ids: Sequence[int], *, first: int) -> float:
        """Measures: seconds that the tokens of a text from `first` on take one by one. Raises ContextOverflow."""
        assert 0 < first < len(token_ids)
        self._check_text(token_ids)
        with self._open_engine().alone() as solo:
            return solo.time_reading(token_ids, first)

    def read_weights_s(self) -> float | None:
        """Seconds to read every weight of a token once and compute nothing; None where the backend cannot tell."""
        with self._open_engine().alone() as solo:
            return solo.read_weights_s()

    def record_prefill(self, num_tokens: int) -> RecordedRun:
        """`prefill_s`, and what each thread did in it. Raises OptionError where the backend cannot tell."""
        with self._open_engine().alone() as solo:
            return solo.record_prefill(num_tokens)

    def record_decode(self, num_tokens: int, *, depth: int = 0) -> RecordedRun:
        """`decode_s`, and what each thread did in it. Raises OptionError where the backend cannot tell."""
        with self._open_engine().alone() as solo:
            return solo.record_decode(num_tokens, depth)

    @property
    def store_counts(self) -> StoreCounts | None:
        """KV pages read from `kv_dir` and written there since loading; None where none is used."""
        return self._open_engine().store_counts

    def close(self) -> None:
        """Gives memory and threads back, once running answers have ended; before that, KV pages go to `kv_dir`."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        vars(self).pop("_grammars", None)

    def _open_engine(self) -> Engine:
        if self._engine is None:
            raise OptionError(f"{self.facts.name} was closed; load it again")
        return self._engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_answer_options(max_tokens: int | None, stop: Sequence[str]) -> None:
    if max_tokens is not None and max_tokens < 1:
        raise OptionError(f"max_tokens is {max_tokens}; it must be at least 1, or None for no limit")
    if isinstance(stop, str) or not all(stop):
        raise OptionError("stop must be a list of strings that are not empty")
