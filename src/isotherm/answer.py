"""An answer as it becomes text: tokens in, whole characters out, up to a stop string."""

from dataclasses import dataclass
from typing import Self

from isotherm.engine.engine import Engine
from isotherm.engine.request import Request, RunFacts
from isotherm.engine.sampling import SampledToken
from isotherm.tokenization.partial_marker import num_undecided
from isotherm.tokenization.tokenizer import Detokenizer, Tokenizer


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
    stop_string: str | None = None  # the one that ended it

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Piece:
    """What the next tokens add to the text, which may be nothing yet. The last piece carries the Answer."""

    text: str
    answer: Answer | None = None
    tokens: tuple[SampledToken, ...] = ()


class TextStream:
    """One answer on its way. Close it, finished or not. Not thread safe."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        request: Request,
        stop: tuple[str, ...],
        *,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """shown: control tokens that appear in the text. Raises ContextOverflow, OptionError."""
        self.facts = RunFacts()
        self.is_done = False
        self._engine = engine
        self._generation = engine.start(request, self.facts)
        self._chosen: list[SampledToken] = []
        self._detokenizer = Detokenizer(tokenizer, shown=shown, continues=True)
        self._text = _StopFilter(stop)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is computed for it; `poll` may still have something to tell."""
        return self._generation.is_done

    def poll(self) -> Piece | None:
        """What has come since the last call; None where nothing has. Raises what went wrong with this request."""
        text, tokens = "", list[SampledToken]()
        while not self.is_done and self._generation.has_news:
            piece = self._take(self._generation.read())
            text += piece.text
            tokens += piece.tokens
            if piece.answer:
                return Piece(text, piece.answer, tuple(tokens))
        return Piece(text, None, tuple(tokens)) if tokens else None

    def wait(self) -> Piece:
        """What the next token brings; computes steps, for others too, until it is there."""
        assert not self.is_done
        return self._take(self._engine.next_token(self._generation))

    def close(self) -> None:
        """Nothing more of it is computed."""
        self.is_done = True
        self._engine.leave(self._generation)

    def _take(self, token: SampledToken | None) -> Piece:
        if token is None:
            return self._end(self._text.finish(self._detokenizer.finish()), ())
        self._chosen.append(token)
        text = self._text.push(self._detokenizer.push(token.token_id))
        return self._end(text, (token,)) if self._text.stopped else Piece(text, None, (token,))

    def _end(self, text: str, tokens: tuple[SampledToken, ...]) -> Piece:
        self.close()
        facts, stopped = self.facts, self._text.stopped
        answer = Answer(
            self._text.emitted,
            tuple(token.token_id for token in self._chosen),
            "stop" if stopped or not facts.reached_limit else "length",
            facts.num_prompt_tokens,
            facts.num_cached_tokens,
            facts.prefill_s,
            facts.decode_s,
            tuple(self._chosen),
            self._text.stopped_by,
        )
        return Piece(text, answer, tokens)

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
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        return self.stopped_by is not None

    def push(self, text: str) -> str:
        self._held += text
        found = [(at, string) for string in self._stop if (at := self._held.find(string)) >= 0]
        if found:
            at, self.stopped_by = min(found)
            return self._emit(at)
        return self._emit(len(self._held) - num_undecided(self._held, self._stop))

    def finish(self, text: str) -> str:
        """The rest, once no more text can follow."""
        return self.push(text) + ("" if self.stopped else self._emit(len(self._held)))

    def _emit(self, size: int) -> str:
        piece, self._held = self._held[:size], self._held[size:]
        self.emitted += piece
        return piece
