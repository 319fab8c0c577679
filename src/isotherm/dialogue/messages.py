"""Checks the messages of a request (as OpenAI's API writes them) and reads them into records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from isotherm.dialogue.json_scan import object_of
from isotherm.errors import MessageError

MAX_CALLS = 256  # of one answer
ROLES = ("system", "developer", "user", "assistant", "tool")
_FIELDS = {
    "assistant": ("role", "content", "name", "tool_calls", "reasoning_content"),
    "tool": ("role", "content", "name", "tool_call_id"),
}
_OTHER_FIELDS = ("role", "content", "name")


@dataclass(frozen=True)
class PastCall:
    """A tool call of an earlier answer."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class ChatMessage:
    """One turn. calls: of an assistant; answered: the call whose result a message of role "tool" brings."""

    role: str
    content: str
    name: str | None = None
    reasoning: str | None = None
    calls: tuple[PastCall, ...] = ()
    answered: PastCall | None = None


def read_messages(messages: Sequence[Any]) -> tuple[ChatMessage, ...]:
    """Raises MessageError for what is no message, and for tool results that follow no call."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise MessageError("messages", "must be a list of at least one message")
    read: list[ChatMessage] = []
    waiting: list[PastCall] = []  # calls of the last answer that have no result yet
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        record = _read_message(message, field)
        if record.role == "tool":
            call = _answered(message.get("tool_call_id"), waiting, field)
            waiting.remove(call)
            record = replace(record, answered=call)
        else:
            waiting = list(record.calls)
        read.append(record)
    return tuple(read)


def _answered(call_id: Any, waiting: list[PastCall], field: str) -> PastCall:
    if not waiting:
        raise MessageError(field, "is the result of a tool, but no call of the message before it waits for one")
    if call_id is None:
        return waiting[0]
    for call in waiting:
        if call.id == call_id:
            return call
    raise MessageError(f"{field}.tool_call_id", f"is {call_id!r}, which no call of the message before it has")


def _read_message(message: Any, field: str) -> ChatMessage:
    if not isinstance(message, Mapping):
        raise MessageError(field, "must be an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise MessageError(f"{field}.role", f"is {role!r}; it must be one of {', '.join(ROLES)}")
    for key, value in message.items():
        if value and key not in _FIELDS.get(role, _OTHER_FIELDS):
            raise MessageError(f"{field}.{key}", f"is not supported in a message of role {role}")
    calls = message.get("tool_calls") or ()
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise MessageError(f"{field}.tool_calls", "must be a list")
    if len(calls) > MAX_CALLS:
        raise MessageError(f"{field}.tool_calls", f"has {len(calls)} calls, the limit is {MAX_CALLS}")
    content = message.get("content")
    if content is None and role != "assistant":
        raise MessageError(f"{field}.content", "is missing")
    return ChatMessage(
        role=role,
        content=_text(content, f"{field}.content"),
        name=_optional_text(message.get("name"), f"{field}.name"),
        reasoning=_optional_text(message.get("reasoning_content"), f"{field}.reasoning_content"),
        calls=tuple(_read_call(call, f"{field}.tool_calls[{index}]", index) for index, call in enumerate(calls)),
    )


def _optional_text(value: Any, field: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise MessageError(field, "must be text")
    return value or None


def _text(content: Any, field: str) -> str:
    """Parts are joined by line breaks."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise MessageError(field, "must be text or a list of parts")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise MessageError(f"{field}[{index}].type", f"is {kind!r}; only text is supported, no images or sound")
        if not isinstance(part.get("text"), str):
            raise MessageError(f"{field}[{index}].text", "must be text")
        texts.append(part["text"])
    return "\n".join(texts)


def _read_call(call: Any, field: str, index: int) -> PastCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type", "function") != "function":
        raise MessageError(field, "must have type function and a function with name and arguments")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise MessageError(f"{field}.function.name", "must be text")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = object_of(arguments) if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise MessageError(f"{field}.function.arguments", "must be the JSON text of an object")
    call_id = call.get("id") or f"call_{index}"
    if not isinstance(call_id, str):
        raise MessageError(f"{field}.id", "must be text")
    return PastCall(call_id, name, arguments)
