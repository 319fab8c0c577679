"""What Anthropic's endpoints take, in the words of OpenAI's. What cannot be honoured is refused.

Fields without effect, by what they mean: `metadata.user_id` and `service_tier` are labels; `cache_control` marks what
to keep, and every prefix is kept as long as there is memory; the `signature` of a thinking block is for who checks it.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from isotherm.server.errors import bad_request
from isotherm.server.fields import JsonObject, Strict
from isotherm.server.openai_fields import Stop
from isotherm.server.output_format import schema_grammar
from isotherm.types import Grammar

Message = dict[str, Any]  # as OpenAI's API writes it

_MAX_STOPS = 64


class CacheControl(Strict):
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Strict):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: None = None


class ThinkingBlock(Strict):
    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class ToolUseBlock(Strict):
    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)]
    input: JsonObject
    cache_control: CacheControl | None = None


def _blocks(content: Any) -> Any:
    """Text is short for one block of it."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


TextBlocks = Annotated[list[TextBlock], BeforeValidator(_blocks, json_schema_input_type=str | list[TextBlock])]


class ToolResultBlock(Strict):
    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(min_length=1)]
    content: TextBlocks | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None

    def message(self) -> Message:
        """A failure is told in words: messages of tools have no other place for it."""
        text = _joined(block.text for block in self.content or ())
        content = f"Error: {text}" if self.is_error else text
        return {"role": "tool", "tool_call_id": self.tool_use_id, "content": content}


UserBlocks = Annotated[
    list[Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]],
    Field(min_length=1),
]
AssistantBlocks = list[Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]]


class UserMessage(Strict):
    role: Literal["user"]
    content: Annotated[UserBlocks, BeforeValidator(_blocks, json_schema_input_type=str | UserBlocks)]


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: Annotated[AssistantBlocks, BeforeValidator(_blocks, json_schema_input_type=str | AssistantBlocks)]


class SystemMessage(Strict):
    role: Literal["system"]
    content: TextBlocks


Turn = Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]


def _only(supported: bool) -> AfterValidator:
    def check(value: bool) -> bool:
        if value is not supported:
            raise PydanticCustomError("unsupported", "it can only be {value} here", {"value": str(supported).lower()})
        return value

    return AfterValidator(check)


class ToolField(Strict):
    name: Annotated[str, Field(min_length=1, max_length=128)]
    input_schema: JsonObject
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None
    defer_loading: Annotated[bool, _only(False)] | None = None
    eager_input_streaming: Annotated[bool, _only(True)] | None = None  # arguments come as they are computed

    def declaration(self) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self.name, "parameters": self.input_schema}
        if self.description is not None:
            function["description"] = self.description
        if self.strict is not None:
            function["strict"] = self.strict
        return {"type": "function", "function": function}


class FreeChoice(Strict):
    type: Literal["auto", "any"]
    disable_parallel_tool_use: bool = False


class NamedChoice(Strict):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool = False


class NoChoice(Strict):
    type: Literal["none"]


class Adaptive(Strict):
    type: Literal["adaptive"]
    display: Literal["summarized"] | None = None  # shown, which is how thinking goes on by itself


class Disabled(Strict):
    type: Literal["disabled"]


class Metadata(Strict):
    user_id: str | None = None


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    schema_: Annotated[JsonObject, Field(alias="schema")]


class OutputConfig(Strict):
    format: SchemaFormat | None = None


class Conversation(Strict):
    """What a prompt is made of."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    messages: Annotated[list[Turn], Field(min_length=1)]
    system: TextBlocks | None = None
    tools: list[ToolField] | None = None
    tool_choice: Annotated[FreeChoice | NamedChoice | NoChoice, Field(discriminator="type")] | None = None
    thinking: Annotated[Adaptive | Disabled, Field(discriminator="type")] | None = None
    cache_control: CacheControl | None = None
    output_config: OutputConfig | None = None

    def prompt(self) -> tuple[Message, ...]:
        """Messages in OpenAI's words. Turns of one role that follow each other are one, as Anthropic's API has it."""
        if self.messages[-1].role != "user":
            raise bad_request("messages must end with a user's: to go on with an answer is not supported", "messages")
        prompt = list(_messages("system", list(self.system or ())))
        for role, turns in groupby(self.messages, key=lambda turn: turn.role):
            prompt += _messages(role, [block for turn in turns for block in turn.content])
        return tuple(prompt)

    def declarations(self) -> tuple[dict[str, Any], ...]:
        return tuple(tool.declaration() for tool in self.tools or ())

    def choice(self) -> str | dict[str, Any] | None:
        """`tool_choice` in OpenAI's words."""
        match self.tool_choice:
            case NamedChoice(name=name):
                return {"type": "function", "function": {"name": name}}
            case FreeChoice(type="any"):
                return "required"
            case FreeChoice() | NoChoice() as choice:
                return choice.type
        return None

    @property
    def is_parallel(self) -> bool:
        return not getattr(self.tool_choice, "disable_parallel_tool_use", False)

    def grammar(self) -> Grammar | None:
        chosen = self.output_config and self.output_config.format
        return schema_grammar(chosen.schema_) if chosen else None

    def thinks(self) -> bool | None:
        """`adaptive` asks for nothing that a model cannot do: how much it thinks, if at all, it decides."""
        return False if self.thinking and self.thinking.type == "disabled" else None


class CountRequest(Conversation):
    """/v1/messages/count_tokens."""


class MessagesRequest(Conversation):
    """/v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[list[Stop], Field(max_length=_MAX_STOPS)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


def _joined(texts: Iterable[str]) -> str:
    """Blocks are paragraphs of their own."""
    return "\n".join(texts)


def _messages(role: str, blocks: list[Any]) -> Iterator[Message]:
    """One turn; results of tools are messages of their own."""
    if role == "assistant":
        yield _answer(blocks)
        return
    for is_result, run in groupby(blocks, key=lambda block: isinstance(block, ToolResultBlock)):
        if is_result:
            yield from (block.message() for block in run)
        else:
            yield {"role": role, "content": _joined(block.text for block in run)}


def _answer(blocks: list[TextBlock | ThinkingBlock | ToolUseBlock]) -> Message:
    message: Message = {
        "role": "assistant",
        "content": _joined(block.text for block in blocks if isinstance(block, TextBlock)),
    }
    thinking = _joined(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
    calls = [
        {
            "id": block.id,
            "type": "function",
            "function": {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)},
        }
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    if thinking:
        message["reasoning_content"] = thinking
    if calls:
        message["tool_calls"] = calls
    return message
