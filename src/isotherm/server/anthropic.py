"""Anthropic's /v1/messages."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from isotherm.dialogue.parts import Content, Part, Reasoning, ToolCallArguments, ToolCallEnd, ToolCallStart
from isotherm.server.anthropic_fields import Conversation, CountRequest, MessagesRequest
from isotherm.server.ask import Ask, Delta, Exchange, Outcome, Quiet, prompt_ids
from isotherm.server.errors import ApiError, anthropic_body
from isotherm.server.openapi import document
from isotherm.server.shelf import Shelf
from isotherm.server.streaming import SSE, event, respond
from isotherm.types import SamplingParams

router = APIRouter()

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


_USAGE = {
    "input_tokens": int,
    "cache_creation_input_tokens": int,
    "cache_read_input_tokens": int,
    "output_tokens": int,
}
_MESSAGE = {
    "id": str,
    "type": str,
    "role": str,
    "model": str,
    "content": [dict],
    "stop_reason": str,
    "stop_sequence": (str, None),
    "usage": _USAGE,
}


@router.post("/v1/messages", responses=document(_MESSAGE, stream=SSE))
async def messages(body: MessagesRequest, request: Request) -> Response:
    """An answer to a conversation."""
    shelf: Shelf = request.app.state.shelf
    given: dict[str, Any] = {"temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k}
    sampling = replace(
        request.app.state.sampling, **{name: value for name, value in given.items() if value is not None}
    )
    stop = tuple(body.stop_sequences or ())
    ask = replace(_ask(body), sampling=sampling, max_tokens=body.max_tokens, stop=stop, grammar=body.grammar())
    return await respond(Exchange(shelf, ask, request.scope), request, _Message, streams=bool(body.stream))


@router.post("/v1/messages/count_tokens", responses=document({"input_tokens": int}))
async def count_tokens(body: CountRequest, request: Request) -> dict[str, int]:
    """How many tokens a conversation is as a prompt. Loads the model, whose tokenizer says so."""
    shelf: Shelf = request.app.state.shelf
    ask = _ask(body)
    request.scope["isotherm.log"].model = body.model
    async with shelf.borrow(body.model) as worker:
        ids = await asyncio.to_thread(prompt_ids, worker.model, ask)
    return {"input_tokens": len(ids)}


def _ask(body: Conversation) -> Ask:
    return Ask(
        body.model,
        body.prompt(),
        SamplingParams(),
        tools=body.declarations(),
        tool_choice=body.choice(),
        is_parallel=body.is_parallel,
        thinks=body.thinks(),
    )


class _Message:
    """One exchange in Anthropic's words."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._blocks = ContentBlocks()
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": exchange.ask.model,
        }

    async def whole(self) -> dict[str, Any]:
        async for _, news in self._exchange.news():
            if isinstance(news, Delta):
                self._blocks.add(news.parts)
        self._blocks.end()
        return {**self._head, "content": self._blocks.content, **self._stop(), "usage": self._usage()}

    async def parts(self) -> AsyncIterator[bytes]:
        nothing: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        yield _event({"type": "message_start", "message": {**self._head, **nothing, "usage": self._usage()}})
        yield _event({"type": "ping"})
        async for _, news in self._exchange.news():
            match news:
                case Quiet():
                    yield _event({"type": "ping"})
                case Delta():
                    for part in self._blocks.add(news.parts):
                        yield _event(part)
        for part in self._blocks.end():
            yield _event(part)
        yield _event({"type": "message_delta", "delta": self._stop(), "usage": self._usage()})
        yield _event({"type": "message_stop"})

    def failure(self, error: ApiError) -> bytes:
        return event(anthropic_body(error), "error")

    @property
    def _outcome(self) -> Outcome:
        return self._exchange.outcomes[0]

    def _stop(self) -> dict[str, str | None]:
        outcome = self._outcome
        assert outcome.answer is not None
        assert outcome.finish_reason is not None
        stop_string = outcome.answer.stop_string
        reason = "stop_sequence" if stop_string is not None else _STOP_REASONS[outcome.finish_reason]
        return {"stop_reason": reason, "stop_sequence": stop_string}

    def _usage(self) -> dict[str, int]:
        """The three kinds of input add up to the prompt. Until the end nothing is known of the cache."""
        answer = self._outcome.answer
        num_cached = answer.num_cached_tokens if answer else 0
        return {
            "input_tokens": len(self._exchange.prompt_ids) - num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached,
            "output_tokens": answer.num_tokens if answer else 0,
        }


class ContentBlocks:
    """Parts of an answer as content blocks. `content`: the blocks as they add up.

    A tool call that the answer's end cuts short is streamed as far as it came, and is no block of `content`.
    """

    def __init__(self) -> None:
        self.content: list[dict[str, Any]] = []
        self._is_open = False
        self._arguments = ""

    def add(self, parts: Sequence[Part]) -> list[dict[str, Any]]:
        """The events of a stream that bring these parts."""
        return [event for part in parts for event in self._add(part)]

    def end(self) -> list[dict[str, Any]]:
        cut = self._is_open and self.content[-1]["type"] == "tool_use"
        events = list(self._close())
        if cut:
            self.content.pop()
        return events

    def _add(self, part: Part) -> Iterator[dict[str, Any]]:
        match part:
            case Content(text):
                yield from self._open_text("text", {"text": ""})
                self.content[-1]["text"] += text
                yield self._delta({"type": "text_delta", "text": text})
            case Reasoning(text):
                yield from self._open_text("thinking", {"thinking": "", "signature": ""})
                self.content[-1]["thinking"] += text
                yield self._delta({"type": "thinking_delta", "thinking": text})
            case ToolCallStart(_, name):
                self._arguments = ""
                yield from self._open("tool_use", {"id": f"toolu_{secrets.token_hex(12)}", "name": name, "input": {}})
            case ToolCallArguments(_, text):
                self._arguments += text
                yield self._delta({"type": "input_json_delta", "partial_json": text})
            case ToolCallEnd():
                yield from self._close()
                self.content[-1]["input"] = json.loads(self._arguments)

    def _open_text(self, kind: str, empty: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if not self._is_open or self.content[-1]["type"] != kind:
            yield from self._open(kind, empty)

    def _open(self, kind: str, empty: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._close()
        self._is_open = True
        self.content.append({"type": kind, **empty})
        yield {"type": "content_block_start", "index": self._index, "content_block": {"type": kind, **empty}}

    def _close(self) -> Iterator[dict[str, Any]]:
        if self._is_open:
            self._is_open = False
            yield {"type": "content_block_stop", "index": self._index}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    @property
    def _index(self) -> int:
        return len(self.content) - 1


def _event(value: dict[str, Any]) -> bytes:
    return event(value, value["type"])
