"""OpenAI's /v1/responses, without a memory: nothing is stored, a conversation comes whole with each request."""

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from isotherm.answer import Answer
from isotherm.server.ask import Ask, Delta, Exchange, Quiet
from isotherm.server.errors import ApiError, bad_request
from isotherm.server.fields import JsonObject, Never, Strict
from isotherm.server.openai_fields import MAX_TOOLS, MAX_TOP_LOGPROBS, TIMINGS, logprob_entries, timings
from isotherm.server.openapi import document
from isotherm.server.output_format import JsonFormat, TextFormat, schema_grammar
from isotherm.server.response_input import Item, messages_of
from isotherm.server.response_output import ResponseOutput
from isotherm.server.streaming import SSE, event, respond
from isotherm.types import Grammar, SamplingParams

router = APIRouter()

_LABEL_CHARS = 512
_LOGPROBS = "message.output_text.logprobs"


class SchemaFormat(Strict):
    """strict: it is always kept to."""

    type: Literal["json_schema"]
    name: str
    schema_: Annotated[JsonObject, Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class TextOptions(Strict):
    format: Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")] = TextFormat(type="text")
    verbosity: Literal["medium"] | None = None

    def grammar(self) -> Grammar | None:
        match self.format:
            case JsonFormat():
                return schema_grammar(None)
            case SchemaFormat():
                return schema_grammar(self.format.schema_)
        return None


class FunctionTool(Strict):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None

    def as_in_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": self.model_dump(exclude={"type"}, exclude_none=True)}


class NamedTool(Strict):
    type: Literal["function"]
    name: str

    def as_in_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": {"name": self.name}}


class ReasoningOptions(Strict):
    effort: Literal["none"] | None = None  # how much else is the model's own affair
    summary: None = None


class ResponseStreamOptions(Strict):
    include_obfuscation: Never | None = None


Label = Annotated[str, Field(max_length=_LABEL_CHARS)]


class ResponsesRequest(Strict):
    """The body of /v1/responses. Fields that may only be null or false are those of a server with a memory."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    text: TextOptions = TextOptions()
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    truncation: Literal["disabled"] | None = None
    store: Never | None = None
    background: Never | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    reasoning: ReasoningOptions | None = None
    max_tool_calls: None = None
    service_tier: Literal["auto", "default"] | None = None
    # labels, for which we have no use
    metadata: Annotated[dict[Label, Label], Field(max_length=16)] | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    # extensions
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    exact: bool = False

    @property
    def wants_logprobs(self) -> bool:
        if self.top_logprobs is not None and not self.include:
            raise bad_request(f"top_logprobs needs include: [{_LOGPROBS!r}]", "top_logprobs")
        return bool(self.include)

    def streams(self) -> bool:
        """Raises ApiError for what only a stream can tell."""
        if self.stream_options and not self.stream:
            raise bad_request("stream_options needs stream: true", "stream_options")
        return bool(self.stream)

    def thinks(self) -> bool | None:
        return False if self.reasoning and self.reasoning.effort == "none" else None

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """The params of this request; `defaults` where it is silent."""
        names = ("temperature", "top_p", "top_k", "min_p")
        given: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        seed = defaults.seed if self.seed is None else self.seed % 2**64
        return replace(defaults, **given, seed=seed, num_logprobs=self.top_logprobs or 0)


_USAGE = {
    "input_tokens": int,
    "input_tokens_details": {"cached_tokens": int},
    "output_tokens": int,
    "output_tokens_details": {"reasoning_tokens": int},
    "total_tokens": int,
}
_RESPONSE = {
    "id": str,
    "object": str,
    "created_at": int,
    "status": str,
    "error": (None, {"code": str, "message": str}),
    "incomplete_details": (None, {"reason": str}),
    "output": [dict],
    "usage": (_USAGE, None),
    "timings": (TIMINGS, None),
    "model": str,
    "instructions": (str, None),
    "max_output_tokens": (int, None),
    "temperature": float,
    "top_p": float,
    "top_logprobs": int,
    "text": dict,
    "tools": [dict],
    "tool_choice": (str, dict),
    "parallel_tool_calls": bool,
    "metadata": dict,
    "user": (str, None),
    "reasoning": dict,
    "store": bool,
    "background": bool,
    "previous_response_id": None,
    "truncation": str,
}


@router.post("/v1/responses", responses=document(_RESPONSE, stream=SSE))
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """An answer to a conversation, as items."""
    wants_logprobs, choice = body.wants_logprobs, body.tool_choice
    ask = Ask(
        body.model,
        messages_of(body.instructions, body.input),
        body.sampling(request.app.state.sampling),
        body.max_output_tokens,
        priority=body.priority,
        grammar=body.text.grammar(),
        tools=tuple(tool.as_in_chat() for tool in body.tools or ()),
        tool_choice=choice.as_in_chat() if isinstance(choice, NamedTool) else choice,
        is_parallel=body.parallel_tool_calls is not False,
        thinks=body.thinks(),
        is_exact=body.exact,
    )
    exchange = Exchange(request.app.state.shelf, ask, request.scope)
    return await respond(exchange, request, partial(_Response, body, wants_logprobs), streams=body.streams())


class _Response:
    """One exchange in OpenAI's words. `described` is the response as it is so far."""

    def __init__(self, body: ResponsesRequest, wants_logprobs: bool, exchange: Exchange) -> None:
        self._exchange = exchange
        model = exchange.model
        self._output = ResponseOutput((lambda tokens: logprob_entries(model, tokens)) if wants_logprobs else None)
        self._num_events = 0
        sampling = exchange.ask.sampling
        self.described: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(24)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "output": self._output.items,
            "usage": None,
            "timings": None,
            **_asked(body),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }

    async def whole(self) -> dict[str, Any]:
        async for _ in self._progress():
            pass
        return self.described

    async def parts(self) -> AsyncIterator[bytes]:
        async for fields in self._progress():
            yield self._event(fields) if fields else b": still at work\n\n"

    async def _progress(self) -> AsyncIterator[dict[str, Any] | None]:
        """What happens, as fields of events; None where nothing has for a while."""
        yield {"type": "response.created", "response": self.described}
        yield {"type": "response.in_progress", "response": self.described}
        async for _, news in self._exchange.news():
            match news:
                case Quiet():
                    yield None
                case Delta():
                    for fields in self._output.take(news):
                        yield fields
        (answer,) = self._exchange.answers
        is_cut = self._exchange.outcomes[0].finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        for fields in self._output.end(status):
            yield fields
        details = {"reason": "max_output_tokens"} if is_cut else None
        facts = {"usage": _usage(answer, self._output.num_reasoning_tokens), "timings": timings(answer)}
        self.described |= {"status": status, "incomplete_details": details, **facts}
        yield {"type": f"response.{status}", "response": self.described}

    def failure(self, error: ApiError) -> bytes:
        """The last event, where something went wrong on the way."""
        self.described |= {"status": "failed", "error": {"code": "server_error", "message": error.message}}
        return self._event({"type": "response.failed", "response": self.described})

    def _event(self, fields: dict[str, Any]) -> bytes:
        self._num_events += 1
        return event({**fields, "sequence_number": self._num_events - 1}, fields["type"])


def _asked(body: ResponsesRequest) -> dict[str, Any]:
    """What the request said, or what holds where it was silent."""
    choice = body.tool_choice or "auto"
    return {
        "model": body.model,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "top_logprobs": body.top_logprobs or 0,
        "text": body.text.model_dump(by_alias=True, exclude_none=True),
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "metadata": body.metadata or {},
        "user": body.user,
        "reasoning": (body.reasoning or ReasoningOptions()).model_dump(),
        "store": False,
        "background": False,
        "previous_response_id": None,
        "truncation": "disabled",
    }


def _usage(answer: Answer, num_reasoning_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": answer.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": answer.num_cached_tokens},
        "output_tokens": answer.num_tokens,
        "output_tokens_details": {"reasoning_tokens": num_reasoning_tokens},
        "total_tokens": answer.num_prompt_tokens + answer.num_tokens,
    }
