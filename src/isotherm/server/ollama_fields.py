"""What Ollama's endpoints take. What cannot be honoured is refused."""

import json
import re
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError, core_schema

from isotherm.dialogue.messages import MAX_CALLS
from isotherm.server.errors import bad_request
from isotherm.server.fields import JsonObject, Strict
from isotherm.server.openai_fields import MAX_TOP_LOGPROBS, Stop
from isotherm.server.output_format import schema_grammar
from isotherm.server.shelf import FOREVER_S
from isotherm.types import Grammar, SamplingParams

_MAX_STOPS = 64
_MAX_DURATION_CHARS = 64
_LONGEST_S = 1e9  # 30 years; what is longer is for ever
_UNITS_S = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_DURATION = re.compile(rf"([+-]?)((?:{_NUMBER}(?:ns|us|µs|ms|s|m|h))+|{_NUMBER})", re.ASCII)
_PART = re.compile(rf"({_NUMBER})([a-zµ]*)", re.ASCII)


@dataclass(frozen=True)
class Refused:
    """A field that is not supported, for Annotated: clients send it empty, or with a value that asks for nothing."""

    reason: str
    neutral: tuple[float, ...] = ()

    def __get_pydantic_core_schema__(self, _: object, handler: object) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, _: object, handler: object) -> dict[str, Any]:
        return {"enum": self._nothing}

    @property
    def _nothing(self) -> list[Any]:
        return [None, "", [], *self.neutral]

    def _check(self, value: Any) -> None:
        if isinstance(value, bool) or value not in self._nothing:
            raise PydanticCustomError("refused", "{reason}", {"reason": self.reason})


def duration_s(value: object) -> float:
    """Seconds: a number of them, or text as Go writes durations ("1h30m", "300ms"). Below 0 is for ever."""
    found = _DURATION.fullmatch(value.strip()) if isinstance(value, str) and len(value) <= _MAX_DURATION_CHARS else None
    if found is not None:
        sign, parts = found.groups()
        seconds = sum(float(number) * _UNITS_S.get(unit, 1.0) for number, unit in _PART.findall(parts))
        value = -seconds if sign == "-" else seconds
    if isinstance(value, bool | str) or not isinstance(value, int | float) or value != value:
        raise PydanticCustomError("duration", 'it must be a number of seconds, or text such as "5m"')
    return FOREVER_S if value < 0 or value > _LONGEST_S else float(value)


KeepAlive = Annotated[float, BeforeValidator(duration_s, json_schema_input_type=float | str)]


class Options(Strict):
    """`options`; num_ctx is the context that is needed: the model may have a longer one."""

    num_predict: Annotated[int, Field(ge=-2, lt=2**31)] | None = None
    num_ctx: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[Stop], Field(max_length=_MAX_STOPS)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100.0)] | None = None
    repeat_last_n: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    presence_penalty: Annotated[float, Field(ge=-100.0, le=100.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-100.0, le=100.0)] | None = None
    num_keep: int | None = None  # what stays when a context is shifted; ours never is
    typical_p: Annotated[None, Refused("is not supported; leave it out", (1.0,))] = None
    tfs_z: Annotated[None, Refused("is not supported; leave it out", (1.0,))] = None
    mirostat: Annotated[None, Refused("is not supported; leave it out", (0,))] = None
    num_thread: Annotated[None, Refused("is decided where the server is started: --threads", (0,))] = None
    num_gpu: Annotated[None, Refused("there is no GPU in use; leave it out", (0, -1))] = None

    @property
    def max_tokens(self) -> int | None:
        """-1 and -2: as many as the context holds."""
        if self.num_predict == 0:
            raise bad_request("num_predict is 0; an answer has at least one token", "options.num_predict")
        return None if self.num_predict is None or self.num_predict < 0 else self.num_predict

    def sampling(self, defaults: SamplingParams, num_logprobs: int) -> SamplingParams:
        names = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.repeat_last_n is not None:
            given["penalty_tokens"] = self.repeat_last_n
        if self.seed is not None:
            given["seed"] = None if self.seed == -1 else self.seed % 2**64  # -1: a fresh one, as in llama.cpp
        return replace(defaults, **given, num_logprobs=num_logprobs)


class AnswerFields(Strict):
    """What /api/chat and /api/generate share."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    stream: bool | None = None
    format: Literal["", "json"] | JsonObject | None = None
    options: Options | None = None
    keep_alive: KeepAlive | None = None
    think: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @property
    def num_logprobs(self) -> int:
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        return self.top_logprobs or 0

    def grammar(self) -> Grammar | None:
        if self.format in (None, ""):
            return None
        return schema_grammar(self.format if isinstance(self.format, dict) else None)


class PastFunction(Strict):
    name: Annotated[str, Field(min_length=1)]
    arguments: JsonObject
    index: int | None = None
    description: str | None = None


class PastCall(Strict):
    function: PastFunction
    id: str | None = None
    type: Literal["function"] | None = None


NoImages = Annotated[None, Refused("images are not supported; leave them out")]


class ChatMessage(Strict):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    tool_calls: Annotated[list[PastCall], Field(max_length=MAX_CALLS)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    images: NoImages = None


class ChatRequest(AnswerFields):
    """/api/chat."""

    messages: list[ChatMessage] | None = None
    tools: list[JsonObject] | None = None
    template: Annotated[None, Refused("a template comes with the model, never with a request; leave it out")] = None

    def prompt(self) -> tuple[dict[str, Any], ...]:
        """Messages in OpenAI's words."""
        messages = self.messages or []
        if messages and messages[-1].role == "assistant":
            raise bad_request("messages end with an answer; to go on with one is not supported", "messages")
        waiting: list[tuple[str, str]] = []  # id and name of calls without a result
        prompt = []
        for number, message in enumerate(messages):
            written: dict[str, Any] = {"role": message.role, "content": message.content or ""}
            if message.thinking:
                written["reasoning_content"] = message.thinking
            if message.tool_calls:
                calls = [_call(call, f"call_{number}_{index}") for index, call in enumerate(message.tool_calls)]
                waiting = [(call["id"], call["function"]["name"]) for call in calls]
                written["tool_calls"] = calls
            if message.role == "tool":
                written["tool_call_id"] = _answered(message, waiting)
            prompt.append(written)
        return tuple(prompt)


class GenerateRequest(AnswerFields):
    """/api/generate."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    suffix: Annotated[None, Refused("filling in the middle is not supported; leave it out")] = None
    template: Annotated[None, Refused("a template comes with the model, never with a request; leave it out")] = None
    context: Annotated[None, Refused("past tokens are not taken; /api/chat takes past messages")] = None
    images: NoImages = None


def _call(call: PastCall, made_id: str) -> dict[str, Any]:
    arguments = json.dumps(call.function.arguments, ensure_ascii=False)
    return {
        "id": call.id or made_id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


def _answered(message: ChatMessage, waiting: list[tuple[str, str]]) -> str:
    """The id of the call whose result this is: by id, by the tool's name, or the first that has none."""
    for call in waiting:
        call_id, name = call
        if message.tool_call_id in (None, call_id) and message.tool_name in (None, name):
            waiting.remove(call)
            return call_id
    named = message.tool_call_id or message.tool_name or "a tool"
    raise bad_request(f"the result of {named!r} follows no call of it", "messages")
