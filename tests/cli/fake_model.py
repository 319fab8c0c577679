"""A model that says what a test wants, in place of `isotherm.load`; it records what it was asked."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Self

from isotherm.answer import Answer, Piece
from isotherm.types import SamplingParams

Step = str | BaseException  # a piece of the answer, or what is raised in its place


@dataclass(frozen=True)
class Asked:
    prompt: Any
    max_tokens: int | None
    stop: tuple[str, ...]
    raw: bool
    sampling: SamplingParams


@dataclass
class FakeModel:
    """answers: the steps of one answer after the other; the last one is repeated."""

    answers: Sequence[Sequence[Step]] = (("Hello", " there"),)
    context_tokens: int = 128
    has_chat_template: bool = True
    finish_reason: str = "stop"
    num_prompt_tokens: int = 10
    num_cached_tokens: int = 4
    asked: list[Asked] = field(default_factory=list)
    load_arguments: dict[str, Any] = field(default_factory=dict)
    closed_streams: int = 0
    is_closed: bool = False
    facts: Any = field(default_factory=lambda: SimpleNamespace(name="fake", load_s=0.25))

    def load(self, name: str, **arguments: Any) -> Self:
        self.load_arguments = {"name": name, **arguments}
        return self

    def stream(
        self,
        prompt: Any,
        *,
        max_tokens: int | None,
        sampling: SamplingParams,
        stop: Sequence[str] = (),
        raw: bool = False,
    ) -> Iterator[Piece]:
        self.asked.append(Asked(prompt, max_tokens, tuple(stop), raw, sampling))
        return self._say(self.answers[min(len(self.asked), len(self.answers)) - 1])

    def _say(self, steps: Sequence[Step]) -> Iterator[Piece]:
        said = ""
        try:
            for step in steps:
                if isinstance(step, BaseException):
                    raise step
                said += step
                yield Piece(step)
            ids = tuple(range(len(steps)))
            yield Piece(
                "",
                Answer(said, ids, self.finish_reason, self.num_prompt_tokens, self.num_cached_tokens, 0.5, 0.25, ()),
            )
        finally:
            self.closed_streams += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closed = True


def contents(messages: Any) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def loads_strictly(text: str, parse: Callable[[str], Any] = json.loads) -> Any:
    """JSON that is one value and a line end, nothing else."""
    assert text.endswith("\n")
    return parse(text)
