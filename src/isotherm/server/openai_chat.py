"""OpenAI's /v1/chat/completions."""

import secrets
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from isotherm.dialogue import Content, Reasoning, ToolCallArguments, ToolCallEnd, ToolCallStart
from isotherm.server.ask import Ask, Delta, Exchange, Outcome, Quiet
from isotherm.server.errors import ApiError, bad_request, openai_body
from isotherm.server.fields import Never, Strict
from isotherm.server.openai_fields import (
    HEAD,
    LOGPROB,
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
    TIMINGS,
    USAGE,
    SamplingFields,
    logprob_entries,
    timings,
    usage,
)
from isotherm.server.openapi import document
from isotherm.server.output_format import ResponseFormat, StructuredOutputs, grammar_of
from isotherm.server.streaming import SSE, event, respond
from isotherm.server.worker import Progress

router = APIRouter()


class TemplateVariables(Strict):
    """Names for the chat template that requests may set."""

    enable_thinking: bool | None = None


class ChatRequest(SamplingFields):
    """The body of a request; messages and tools are checked where they are read, by the room `dialogue`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none"] | None = None
    chat_template_kwargs: TemplateVariables | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    metadata: dict[str, str] | None = None  # labels, as `user`
    store: Never | None = None
    service_tier: Literal["auto", "default"] | None = None
    response_format: ResponseFormat | None = None
    grammar: str | None = None  # GBNF, llama.cpp's
    structured_outputs: StructuredOutputs | None = None

    @property
    def wants_logprobs(self) -> bool:
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        return bool(self.logprobs)

    def thinks(self) -> bool | None:
        if self.reasoning_effort == "none":
            return False
        return self.chat_template_kwargs.enable_thinking if self.chat_template_kwargs else None


_CALL = {"id": str, "type": str, "function": {"name": str, "arguments": str}}
_MESSAGE = {"role": str, "content": (str, None), "refusal": None, "reasoning_content?": str, "tool_calls?": [_CALL]}
_LOGPROBS = {"content": [{**LOGPROB, "top_logprobs": [LOGPROB]}], "refusal": None}
_CHOICE = {"index": int, "message": _MESSAGE, "logprobs": (_LOGPROBS, None), "finish_reason": str}
_CHAT = {**HEAD, "choices": [_CHOICE], "usage": USAGE, "timings": TIMINGS}


@router.post("/v1/chat/completions", responses=document(_CHAT, stream=SSE))
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """An answer to a conversation."""
    wants_logprobs, streams = body.wants_logprobs, body.streams()
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise bad_request("give max_completion_tokens or max_tokens, not both", "max_tokens")
    ask = Ask(
        body.model,
        tuple(body.messages),
        body.sampling(request.app.state.sampling, body.top_logprobs or 0),
        body.max_completion_tokens or body.max_tokens,
        body.stops(),
        body.n or 1,
        body.priority,
        body.return_progress,
        grammar=grammar_of(body.response_format, body.grammar, body.structured_outputs),
        tools=tuple(body.tools or ()),
        tool_choice=body.tool_choice,
        is_parallel=body.parallel_tool_calls is not False,
        thinks=body.thinks(),
        is_exact=body.exact,
    )
    exchange = Exchange(request.app.state.shelf, ask, request.scope)
    return await respond(exchange, request, partial(_Chat, wants_logprobs, body.includes_usage), streams=streams)


class _Chat:
    """One exchange in OpenAI's words."""

    def __init__(self, wants_logprobs: bool, includes_usage: bool, exchange: Exchange) -> None:
        """includes_usage: a stream ends with it."""
        self._wants_logprobs = wants_logprobs
        self._includes_usage = includes_usage
        self._exchange = exchange
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": exchange.ask.model,
        }

    async def whole(self) -> dict[str, Any]:
        async for _ in self._exchange.news():
            pass
        answers = self._exchange.answers
        choices = [
            {
                "index": index,
                "message": _message(outcome),
                "logprobs": self._logprobs(answer.tokens),
                "finish_reason": outcome.finish_reason,
            }
            for index, (outcome, answer) in enumerate(zip(self._exchange.outcomes, answers, strict=True))
        ]
        facts = {"usage": usage(len(self._exchange.prompt_ids), answers), "timings": timings(answers[0])}
        return {**self._head, "choices": choices, **facts}

    async def parts(self) -> AsyncIterator[bytes]:
        head = {**self._head, "object": "chat.completion.chunk"}
        if self._includes_usage:
            head["usage"] = None
        for index in range(self._exchange.ask.num_answers):
            yield _chunk(head, index, {"role": "assistant", "content": ""})
        async for index, news in self._exchange.news():
            match news:
                case Quiet():
                    yield b": still at work\n\n"
                case Progress():
                    yield event({**head, "choices": [], "prompt_progress": progress(news)})
                case Delta():
                    deltas = [_delta(part) for part in news.parts if not isinstance(part, ToolCallEnd)]
                    if self._wants_logprobs and news.tokens:
                        yield _chunk(head, index, deltas.pop(0) if deltas else {}, self._logprobs(news.tokens))
                    for delta in deltas:
                        yield _chunk(head, index, delta)
                    if news.answer:
                        more = {"timings": timings(news.answer)}
                        yield _chunk({**head, **more}, index, {}, None, news.finish_reason)
        if self._includes_usage:
            counts = usage(len(self._exchange.prompt_ids), self._exchange.answers)
            yield event({**head, "choices": [], "usage": counts})
        yield b"data: [DONE]\n\n"

    def failure(self, error: ApiError) -> bytes:
        return event(openai_body(error))

    def _logprobs(self, tokens: tuple[Any, ...]) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        return {"content": logprob_entries(self._exchange.model, tokens), "refusal": None}


def _message(outcome: Outcome) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": outcome.content, "refusal": None}
    if outcome.reasoning:
        message["reasoning_content"] = outcome.reasoning
    if outcome.calls:
        message["content"] = outcome.content or None
        message["tool_calls"] = [
            {"id": new_call_id(), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in outcome.calls
        ]
    return message


def _delta(part: Content | Reasoning | ToolCallStart | ToolCallArguments) -> dict[str, Any]:
    match part:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case ToolCallStart(index, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": new_call_id(), "type": "function", "function": function}]}
        case ToolCallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def progress(news: Progress) -> dict[str, float]:
    """llama.cpp's."""
    return {
        "total": news.num_prompt_tokens,
        "cache": news.num_cached_tokens,
        "processed": news.num_done_tokens,
        "time_ms": round(news.elapsed_s * 1e3),
    }


def _chunk(
    head: dict[str, Any],
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish_reason: str | None = None,
) -> bytes:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    return event({**head, "choices": [choice]})
