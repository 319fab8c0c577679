"""One request in the form that all APIs share: what is asked of a model, and how its answers come."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

from isotherm.answer import Answer, Piece, TextStream
from isotherm.dialogue import (
    AnswerParser,
    ChoiceMode,
    Content,
    Part,
    Reasoning,
    ToolCallArguments,
    ToolCallStart,
    read_tool_choice,
    read_tools,
)
from isotherm.engine.sampling import SampledToken
from isotherm.server.errors import bad_request
from isotherm.server.gate import Scope
from isotherm.server.logs import RequestLog
from isotherm.server.shelf import Shelf
from isotherm.server.thinking import check_thinking
from isotherm.server.worker import Inbox, Progress, Reply, Worker
from isotherm.text import TextGenerator
from isotherm.types import Grammar, SamplingParams

_QUIET_S = 15.0  # without news a client is sent a sign of life


@dataclass(frozen=True)
class Ask:
    """What is asked of a model.

    prompt: text as it is, token ids, or messages as OpenAI's API writes them. tools and tool_choice: likewise.
    grammar: what the answer must match; it is content then, with no reasoning before it. thinks: whether it reasons
    before it answers; None as its template has it. keep_alive_s: None for the server's own.
    """

    model: str
    prompt: str | tuple[int, ...] | tuple[Mapping[str, Any], ...]
    sampling: SamplingParams
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    num_answers: int = 1
    priority: int = 0
    wants_progress: bool = False
    keep_alive_s: float | None = None
    grammar: Grammar | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: str | Mapping[str, Any] | None = None
    is_parallel: bool = True  # several tool calls in one answer
    thinks: bool | None = None
    is_exact: bool = False  # whatever quality the model was loaded with


@dataclass(frozen=True)
class Delta:
    """What has come of one answer since the last. finish_reason, at its end: "stop", "length" or "tool_calls"."""

    parts: tuple[Part, ...]
    tokens: tuple[SampledToken, ...]
    answer: Answer | None = None
    finish_reason: str | None = None


@dataclass
class Call:
    """A tool call; arguments: the JSON text of an object."""

    name: str
    arguments: str = ""


@dataclass
class Outcome:
    """One answer, as its deltas add up. `answer` and `finish_reason` are there once it has ended."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    answer: Answer | None = None
    finish_reason: str | None = None

    def add(self, delta: Delta) -> Delta:
        """Returns it, with a finish_reason where it is the last."""
        for part in delta.parts:
            match part:
                case Content(text):
                    self.content += text
                case Reasoning(text):
                    self.reasoning += text
                case ToolCallStart(_, name):
                    self.calls.append(Call(name))
                case ToolCallArguments(index, text):
                    self.calls[index].arguments += text
        if delta.answer is None:
            return delta
        reason = delta.answer.finish_reason
        self.answer = delta.answer
        self.finish_reason = "tool_calls" if self.calls and reason == "stop" else reason
        return replace(delta, finish_reason=self.finish_reason)


@dataclass(frozen=True)
class Quiet:
    """Nothing has come for a while."""


News = Delta | Progress | Quiet


class Exchange:
    """An `Ask` under way; an async context manager that is entered once the model has taken it."""

    def __init__(self, shelf: Shelf, ask: Ask, scope: Scope) -> None:
        self.ask = ask
        self.prompt_ids: tuple[int, ...] = ()
        self.outcomes = [Outcome() for _ in range(ask.num_answers)]
        self._shelf = shelf
        self._log: RequestLog = scope["isotherm.log"]
        self._logs_prompts: bool = scope["isotherm.log_prompts"]
        self._stack = AsyncExitStack()
        self._inbox = Inbox()
        self._replies: list[Reply] = []
        self._parsers: list[AnswerParser | None] = []
        self._worker: Worker | None = None
        self._has_news = True

    @property
    def answers(self) -> list[Answer]:
        """Those that have ended, in the order of their indices."""
        return [outcome.answer for outcome in self.outcomes if outcome.answer]

    @property
    def model(self) -> TextGenerator:
        assert self._worker is not None
        return self._worker.model

    async def __aenter__(self) -> Self:
        """Raises ApiError and every IsothermError that the model has for such a request."""
        ask, self._log.model = self.ask, self.ask.model
        try:
            self._worker = await self._stack.enter_async_context(self._shelf.borrow(ask.model, ask.keep_alive_s))
            self._stack.enter_context(self._worker.place(ask.num_answers))
            self._task = await asyncio.to_thread(_prepare, self._worker.model, ask)
            self.prompt_ids = self._task.prompt_ids
            self._log.prompt_tokens = (self._log.prompt_tokens or 0) + len(self.prompt_ids)
            if self._logs_prompts:
                self._log.prompt = self._worker.model.detokenize(self.prompt_ids)
            await self._start(0)
        except BaseException:
            await self._stack.aclose()
            raise
        self._tick()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._timer.cancel()
        for reply in self._replies:
            assert self._worker is not None
            self._worker.leave(reply)
        self._replies.clear()
        if answers := self.answers:
            cached = max(answer.num_cached_tokens for answer in answers)
            self._log.cached_tokens = (self._log.cached_tokens or 0) + cached
            self._log.answer_tokens = (self._log.answer_tokens or 0) + sum(answer.num_tokens for answer in answers)
        ends = [outcome.finish_reason or "cancelled" for outcome in self.outcomes]
        self._log.finish_reason = ", ".join(([self._log.finish_reason] if self._log.finish_reason else []) + ends)
        await self._stack.aclose()

    async def news(self) -> AsyncIterator[tuple[int, News]]:
        """What comes, with the index of its answer, until all answers have ended. Raises what went wrong."""
        while len(self.answers) < self.ask.num_answers:
            index, update = await self._inbox.get()
            self._has_news = True
            if isinstance(update, Exception):
                raise update
            if not isinstance(update, Piece):
                yield index, update
                continue
            if len(self._replies) < self.ask.num_answers:  # what the first has computed, the others share
                for other in range(1, self.ask.num_answers):
                    await self._start(other)
            yield index, self.outcomes[index].add(self._delta(index, update))

    def _delta(self, index: int, piece: Piece) -> Delta:
        parser = self._parsers[index]
        parts: list[Part] = []
        if parser is None:
            parts += [Content(piece.text)] if piece.text else []
        else:
            parts += parser.push(piece.text)
            if piece.answer:
                parts += parser.finish()
        return Delta(tuple(parts), piece.tokens, piece.answer)

    def cancel(self) -> None:
        """The client has left: `news` raises, and nothing more is computed."""
        for reply in self._replies:
            reply.cancel()
        self._inbox.put(0, ClientLeft())

    async def _start(self, index: int) -> None:
        assert self._worker is not None
        ask = self.ask
        starting = partial(
            self._worker.model.start,
            self.prompt_ids,
            max_tokens=ask.max_tokens,
            stop=ask.stop,
            grammar=self._task.grammar,
            sampling=replace(ask.sampling, sequence=index),
            priority=ask.priority,
            exact=ask.is_exact,
            shown=self._task.shown,
        )
        stream = await _in_thread(starting)
        self._parsers.append(self._task.new_parser())
        reply = Reply(index, stream, self._inbox, wants_progress=ask.wants_progress)
        self._replies.append(reply)
        self._worker.start(reply)

    def _tick(self) -> None:
        if not self._has_news:
            self._inbox.put(0, Quiet())
        self._has_news = False
        self._timer = asyncio.get_running_loop().call_later(_QUIET_S, self._tick)


async def _in_thread(starting: Callable[[], TextStream]) -> TextStream:
    """A thread cannot be cancelled: what it started for one who is gone is ended again."""
    task = asyncio.ensure_future(asyncio.to_thread(starting))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(lambda done: None if done.exception() else done.result().close())
        raise


class ClientLeft(Exception):
    """Nobody waits for this answer any more."""


@dataclass(frozen=True)
class _Task:
    """An `Ask`, as the model takes it."""

    prompt_ids: tuple[int, ...]
    grammar: Grammar | None
    shown: frozenset[int] = frozenset()
    new_parser: Callable[[], AnswerParser | None] = lambda: None


def _prepare(model: TextGenerator, ask: Ask) -> _Task:
    """Raises every IsothermError that a prompt can have."""
    if ask.thinks is not None:
        check_thinking(model.dialogue, is_wanted=ask.thinks)
    if isinstance(ask.prompt, str):
        return _Task(tuple(model.prompt_ids(ask.prompt, raw=True)), ask.grammar)
    if ask.prompt and isinstance(ask.prompt[0], int):
        return _Task(tuple(ask.prompt), ask.grammar)
    dialogue = model.dialogue
    if dialogue is None:
        raise bad_request(f"{ask.model} has no chat template; ask it by /v1/completions", "messages")
    tools = read_tools(ask.tools)
    choice = read_tool_choice(ask.tool_choice, tools)
    if not ask.is_parallel and choice.mode is ChoiceMode.AUTO:  # only a grammar can hold the model to one call
        tools = tuple(replace(tool, is_strict=True) for tool in tools)
    thinks = False if ask.thinks is None and ask.grammar else ask.thinks
    prompt = dialogue.render(ask.prompt, tools, choice, {} if thinks is None else {"enable_thinking": thinks})
    ids = tuple(model.prompt_ids(prompt))
    forced = dialogue.grammar(prompt.text, tools, choice, is_parallel=ask.is_parallel)
    if ask.grammar and forced:
        raise bad_request("a call of a tool and another form cannot both be required", "response_format")
    if ask.grammar:
        return _Task(ids, ask.grammar)
    return _Task(ids, forced, dialogue.shown_tokens, lambda: dialogue.parser(prompt.text, tools, choice))


def prompt_ids(model: TextGenerator, ask: Ask) -> tuple[int, ...]:
    """What a model starts from. Raises every IsothermError that a prompt can have."""
    return _prepare(model, ask).prompt_ids
