"""Ollama's /api/chat and /api/generate."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from isotherm.dialogue.parts import Content, Part, Reasoning, ToolCallArguments, ToolCallEnd, ToolCallStart
from isotherm.engine.sampling import SampledToken
from isotherm.server.ask import Ask, Delta, Exchange, Quiet
from isotherm.server.errors import ApiError, bad_request, ollama_body
from isotherm.server.ollama_fields import AnswerFields, ChatRequest, GenerateRequest, Options
from isotherm.server.ollama_models import time_text
from isotherm.server.openai_fields import LOGPROB, logprob_entries
from isotherm.server.openapi import document
from isotherm.server.shelf import Shelf
from isotherm.server.streaming import NDJSON, compact, respond
from isotherm.text import TextGenerator

router = APIRouter()


@dataclass
class Said:
    """What a line brings."""

    content: str = ""
    thinking: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Timing:
    """When a request was read, and how long it then waited for its model to be there."""

    started_s: float
    load_s: float


Shape = Callable[[Said], dict[str, Any]]
Prompt = str | tuple[dict[str, Any], ...]


def as_message(said: Said) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": said.content}
    if said.thinking:
        message["thinking"] = said.thinking
    if said.calls:
        message["tool_calls"] = said.calls
    return {"message": message}


def as_response(said: Said) -> dict[str, Any]:
    return {"response": said.content, **({"thinking": said.thinking} if said.thinking else {})}


_LOGPROBS = [{**LOGPROB, "top_logprobs": [LOGPROB]}]
_END = {
    "done_reason": str,
    "total_duration?": int,
    "load_duration?": int,
    "prompt_eval_count?": int,
    "prompt_eval_duration?": int,
    "eval_count?": int,
    "eval_duration?": int,
}
_LINE = {"model": str, "created_at": str, "logprobs?": _LOGPROBS, "done": bool, **_END}
_MESSAGE = {"role": str, "content": str, "thinking?": str, "tool_calls?": [dict]}


@router.post("/api/chat", responses=document({**_LINE, "message": _MESSAGE}, stream=NDJSON))
async def chat(body: ChatRequest, request: Request) -> Response:
    """An answer to a conversation; without messages the model is loaded, or unloaded."""
    if not body.messages:
        return await _without_prompt(body, request, as_message)
    ask = replace(_ask(body, body.prompt(), request), tools=tuple(body.tools or ()))
    return await _answer(body, lambda _: ask, request, as_message)


@router.post("/api/generate", responses=document({**_LINE, "response": str, "thinking?": str}, stream=NDJSON))
async def generate(body: GenerateRequest, request: Request) -> Response:
    """An answer to one prompt; without one the model is loaded, or unloaded."""
    if not body.prompt:
        return await _without_prompt(body, request, as_response)
    if body.raw and (body.system or body.think is not None):
        raise bad_request("raw takes the prompt as it is, without system or think", "raw")
    ask = _ask(body, "", request)
    return await _answer(body, lambda model: replace(ask, prompt=_single_prompt(body, model)), request, as_response)


def _ask(body: AnswerFields, prompt: Prompt, request: Request) -> Ask:
    options = body.options or Options()
    return Ask(
        body.model,
        prompt,
        options.sampling(request.app.state.sampling, body.num_logprobs),
        options.max_tokens,
        tuple(options.stop or ()),
        keep_alive_s=body.keep_alive,
        grammar=body.grammar(),
        thinks=body.think,
    )


def _single_prompt(body: GenerateRequest, model: TextGenerator) -> Prompt:
    """The text as it is where that is asked for, or where the model has no chat template."""
    assert body.prompt
    if body.raw or (not body.system and not model.has_chat_template):
        return body.prompt
    system = [{"role": "system", "content": body.system}] if body.system else []
    return (*system, {"role": "user", "content": body.prompt})


async def _without_prompt(body: AnswerFields, request: Request, shape: Shape) -> JSONResponse:
    shelf: Shelf = request.app.state.shelf
    request.scope["isotherm.log"].model = body.model
    if body.keep_alive == 0:
        await shelf.release(shelf.find(body.model))
    else:
        async with shelf.borrow(body.model, body.keep_alive):
            pass
    reason = "unload" if body.keep_alive == 0 else "load"
    head = {"model": body.model, "created_at": time_text(time.time())}
    return JSONResponse({**head, **shape(Said()), "done": True, "done_reason": reason})


async def _answer(
    body: AnswerFields, ask_of: Callable[[TextGenerator], Ask], request: Request, shape: Shape
) -> Response:
    shelf: Shelf = request.app.state.shelf
    request.scope["isotherm.log"].model = body.model
    started_s = time.perf_counter()
    async with shelf.borrow(body.model, body.keep_alive) as worker:
        load_s = time.perf_counter() - started_s
        _check_context(body.options, worker.model.context_tokens)
        exchange = Exchange(shelf, ask_of(worker.model), request.scope)
        word = partial(_Answer, shape, Timing(started_s, load_s), bool(body.logprobs))
        return await respond(exchange, request, word, streams=body.stream is not False, media_type=NDJSON)


def _check_context(options: Options | None, held_tokens: int) -> None:
    if options and options.num_ctx is not None and options.num_ctx > held_tokens:
        reason = f"num_ctx is {options.num_ctx}, the model is loaded with a context of {held_tokens}"
        raise bad_request(f"{reason}; ask for less, or start the server with --ctx", "options.num_ctx")


def _line(value: dict[str, Any]) -> bytes:
    return f"{compact(value)}\n".encode()


class _Answer:
    """One exchange in Ollama's words."""

    def __init__(self, shape: Shape, timing: Timing, wants_logprobs: bool, exchange: Exchange) -> None:
        self._exchange = exchange
        self._shape = shape
        self._timing = timing
        self._wants_logprobs = wants_logprobs
        self._spoken = Speech()

    async def whole(self) -> dict[str, Any]:
        said = Said()
        async for _, news in self._exchange.news():
            if isinstance(news, Delta):
                more = self._spoken.add(news.parts)
                said = Said(said.content + more.content, said.thinking + more.thinking, said.calls + more.calls)
        (answer,) = self._exchange.answers
        return {**self._record(said, answer.tokens), **self._end()}

    async def parts(self) -> AsyncIterator[bytes]:
        async for _, news in self._exchange.news():
            match news:
                case Quiet():
                    yield _line({**self._record(Said(), ()), "done": False})
                case Delta():
                    said = self._spoken.add(news.parts)
                    if said != Said() or (self._wants_logprobs and news.tokens):
                        yield _line({**self._record(said, news.tokens), "done": False})
        yield _line({**self._record(Said(), ()), **self._end()})

    def failure(self, error: ApiError) -> bytes:
        return _line(ollama_body(error))

    def _record(self, said: Said, tokens: tuple[SampledToken, ...]) -> dict[str, Any]:
        head = {"model": self._exchange.ask.model, "created_at": time_text(time.time())}
        more = {"logprobs": logprob_entries(self._exchange.model, tokens)} if self._wants_logprobs and tokens else {}
        return {**head, **self._shape(said), **more}

    def _end(self) -> dict[str, Any]:
        """Nanoseconds. No duration is 0: clients divide by them."""
        (answer,) = self._exchange.answers
        return {
            "done": True,
            "done_reason": "length" if answer.finish_reason == "length" else "stop",
            "total_duration": _ns(time.perf_counter() - self._timing.started_s),
            "load_duration": _ns(self._timing.load_s),
            "prompt_eval_count": answer.num_prompt_tokens,
            "prompt_eval_duration": _ns(answer.prefill_s),
            "eval_count": answer.num_tokens,
            "eval_duration": _ns(answer.decode_s),
        }


class Speech:
    """Parts of an answer as lines have them: a tool call is told when it is whole; one that is cut short is not."""

    def __init__(self) -> None:
        self._call: dict[str, Any] = {}
        self._arguments = ""

    def add(self, parts: Sequence[Part]) -> Said:
        said = Said()
        for part in parts:
            match part:
                case Content(text):
                    said.content += text
                case Reasoning(text):
                    said.thinking += text
                case ToolCallStart(index, name):
                    self._arguments = ""
                    self._call = {"id": f"call_{secrets.token_hex(6)}", "function": {"index": index, "name": name}}
                case ToolCallArguments(_, text):
                    self._arguments += text
                case ToolCallEnd():
                    self._call["function"]["arguments"] = json.loads(self._arguments)
                    said.calls.append(self._call)
        return said


def _ns(seconds: float) -> int:
    return max(1, round(seconds * 1e9))
