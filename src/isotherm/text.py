"""TextGenerator: tokenizer and engine behind one object, the door for Python, command line and server."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypedDict

import numpy as np
from numpy.typing import NDArray

from isotherm.engine.engine import DecodeTiming, Engine, RecordedRun, Request, RunFacts
from isotherm.engine.sampling import SampledToken
from isotherm.errors import OptionError
from isotherm.facts import ModelFacts
from isotherm.tokenization.chat import ChatTemplate
from isotherm.tokenization.tokenizer import Detokenizer, Tokenizer
from isotherm.types import SamplingParams


class Message(TypedDict):
    """One turn of a conversation; role is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Answer:
    """A finished answer and what it cost."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop": an end token or a stop string; "length": max_tokens or the context
    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt, whose keys and values an earlier request had left
    prefill_s: float  # to the first token
    decode_s: float  # from the first token to the last
    tokens: tuple[SampledToken, ...]  # with log-probabilities, and the likeliest others where they are asked for

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Piece:
    """What one token adds to the text, which may be nothing yet. The last piece carries the Answer."""

    text: str
    answer: Answer | None = None


class TextGenerator:
    """A loaded model. Thread safe: answers of several threads are computed together. `isotherm.load` makes it."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, template: ChatTemplate | None, facts: ModelFacts) -> None:
        self._engine: Engine | None = engine
        self._tokenizer = tokenizer
        self._template = template
        self.facts = facts

    @property
    def context_tokens(self) -> int:
        return self._open_engine().context_tokens

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

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
        sampling: SamplingParams | None = None,
        **sampling_fields: Any,
    ) -> Generator[Piece, None, None]:
        """The answer as it comes.

        prompt: text, one user message where the model has a chat template and `raw` is false; or messages.
        max_tokens: None for as many as the context holds. stop: strings that end the answer and are not part of it.
        Fields of SamplingParams may be given by name; greedy by default.
        Raises ContextOverflow, TemplateError, OptionError; TypeError for an option that does not exist. Closing the
        iterator stops the answer; so does Ctrl-C, as KeyboardInterrupt. The object stays usable after either.
        """
        params = replace(sampling or SamplingParams(), **sampling_fields)
        if max_tokens is not None and max_tokens < 1:
            raise OptionError(f"max_tokens is {max_tokens}; it must be at least 1, or None for no limit")
        if isinstance(stop, str) or not all(stop):
            raise OptionError("stop must be a list of strings that are not empty")
        ids = self.prompt_ids(prompt, raw=raw)
        request = Request(tuple(ids), max_tokens, params, self._tokenizer.end_ids)
        self._open_engine().num_answer_tokens(request)  # what is wrong is said here, not at the first `next`
        return self._run(request, tuple(stop))

    def prompt_ids(self, prompt: str | Sequence[Message], *, raw: bool = False) -> list[int]:
        """The token ids that a request for `prompt` starts from, chat template and BOS applied."""
        if isinstance(prompt, str) and (raw or self._template is None):
            return self._encode_prompt(prompt)
        if raw or self._template is None:
            reason = "raw=True takes text" if raw else f"{self.facts.name} has no chat template; pass text"
            raise OptionError(f"messages need a chat template: {reason}")
        messages = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
        return self._encode_prompt(self._template.render(messages))

    def _encode_prompt(self, text: str) -> list[int]:
        bos = self._tokenizer.bos_id
        ids = self._tokenizer.encode(text, add_special=False, parse_special=True)
        if bos is not None and ids[:1] == [bos]:  # a template that writes BOS itself must not get a second one
            return ids
        ids = self._tokenizer.encode(text, add_special=True, parse_special=True)
        if not ids:
            raise OptionError("the prompt is empty, and this model starts with no BOS token; pass some text")
        return ids

    def _run(self, request: Request, stop: tuple[str, ...]) -> Generator[Piece, None, None]:
        facts, text = RunFacts(), _StopFilter(stop)
        chosen: list[SampledToken] = []
        detokenizer = Detokenizer(self._tokenizer, continues=True)
        tokens = self._open_engine().generate(request, facts)
        try:
            for token in tokens:
                chosen.append(token)
                if piece := text.push(detokenizer.push(token.token_id)):
                    yield Piece(piece)
                if text.stopped:
                    break
            rest = "" if text.stopped else text.finish(detokenizer.finish())
        finally:
            tokens.close()
        ended = text.stopped or not facts.reached_limit
        yield Piece(
            rest,
            Answer(
                text.emitted,
                tuple(token.token_id for token in chosen),
                "stop" if ended else "length",
                facts.num_prompt_tokens,
                facts.num_cached_tokens,
                facts.prefill_s,
                facts.decode_s,
                tuple(chosen),
            ),
        )

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids of `text`; add_special adds BOS (and EOS) where the model asks for it."""
        return self._tokenizer.encode(text, add_special=add_special, parse_special=True)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids)

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(token_ids), vocab_size] after each of the tokens. Raises ContextOverflow, OptionError."""
        return np.concatenate(list(self.logit_blocks(token_ids, range(len(token_ids)))))

    def logit_blocks(
        self, token_ids: Sequence[int], rows: Sequence[int], *, block_rows: int = 64
    ) -> Iterator[NDArray[np.float32]]:
        """Logits after the tokens at `rows` (rising), [at most block_rows, vocab_size] at a time."""
        if not token_ids:
            raise OptionError("there are no tokens to compute logits of")
        if not all(0 <= token < self.facts.config.vocab_size for token in token_ids):
            raise OptionError(f"token ids must lie in 0..{self.facts.config.vocab_size - 1}")
        yield from self._open_engine().logit_blocks(token_ids, rows, block_rows)

    def prefill_s(self, num_tokens: int) -> float:
        """Measures: seconds that a prompt of `num_tokens` takes, nothing of it cached."""
        return self._open_engine().time_prefill(num_tokens)

    def decode_s(self, num_tokens: int, *, depth: int = 0) -> DecodeTiming:
        """Measures: seconds that `num_tokens` steps of decode take after `depth` cached tokens."""
        return self._open_engine().time_decode(num_tokens, depth)

    def read_weights_s(self) -> float | None:
        """Seconds to read every weight of a token once and compute nothing; None where the backend cannot tell."""
        return self._open_engine().read_weights_s()

    def record_prefill(self, num_tokens: int) -> RecordedRun:
        """`prefill_s`, and what each thread did in it. Raises OptionError where the backend cannot tell."""
        return self._open_engine().record_prefill(num_tokens)

    def record_decode(self, num_tokens: int, *, depth: int = 0) -> RecordedRun:
        """`decode_s`, and what each thread did in it. Raises OptionError where the backend cannot tell."""
        return self._open_engine().record_decode(num_tokens, depth)

    def close(self) -> None:
        """Gives memory and threads back, once running answers have ended."""
        self._engine = None

    def _open_engine(self) -> Engine:
        if self._engine is None:
            raise OptionError(f"{self.facts.name} was closed; load it again")
        return self._engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _StopFilter:
    """Passes text on but for what may still become a stop string."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.emitted = ""
        self.stopped = False

    def push(self, text: str) -> str:
        self._held += text
        found = [at for string in self._stop if (at := self._held.find(string)) >= 0]
        if found:
            self.stopped = True
            return self._emit(min(found))
        return self._emit(len(self._held) - self._num_undecided())

    def finish(self, text: str) -> str:
        """The rest, once no more text can follow."""
        return self.push(text) + ("" if self.stopped else self._emit(len(self._held)))

    def _num_undecided(self) -> int:
        """Length of the longest end of the held text that some stop string starts with."""
        longest = max((len(string) for string in self._stop), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(string.startswith(self._held[-size:]) for string in self._stop):
                return size
        return 0

    def _emit(self, size: int) -> str:
        piece, self._held = self._held[:size], self._held[size:]
        self.emitted += piece
        return piece
