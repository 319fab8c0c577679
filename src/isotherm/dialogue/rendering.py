"""Messages as templates want them: with tools in the template's own way, or spelled out in plain messages."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from isotherm.dialogue.messages import ChatMessage, PastCall
from isotherm.dialogue.tool_formats import ToolFormat
from isotherm.dialogue.tools import Tool

_MISTRAL_ID = re.compile(r"[A-Za-z0-9]{9}")

_TOOLS_TEXT = """You can call tools. Each line describes one, with the JSON schema of its arguments:
{tools}

To call a tool, answer with a JSON object and nothing else; for several calls, one object on each line:
{{"name": "the tool's name", "arguments": {{"argument": "value"}}}}
If you need no tool, answer in plain text."""


def spelled_call(tool_format: ToolFormat, name: str, arguments: str) -> str:
    """One call in the format, its arguments as JSON text; for formats that are JSON."""
    assert tool_format.quote is None
    spelling = tool_format.spelling
    return spelled_name(spelling.before, name) + arguments + spelling.after


def spelled_name(before: str, name: str) -> str:
    """`before` of a CallSpelling with the tool's name in it, as JSON text where it is a JSON value."""
    return before.replace("NAME", json.dumps(name) if '{"name": NAME' in before else name)


def tools_text(tools: Sequence[Tool]) -> str:
    """What a model is told whose template knows no tools."""
    lines = [{"name": tool.name, "description": tool.description, "parameters": tool.parameters} for tool in tools]
    return _TOOLS_TEXT.format(tools="\n".join(json.dumps(line, ensure_ascii=False) for line in lines))


def in_plain_messages(
    messages: Sequence[ChatMessage], tools: Sequence[Tool], tool_format: ToolFormat, *, has_system_role: bool
) -> list[ChatMessage]:
    """The same conversation in messages of system, user and assistant only, with the tools described in its first."""
    plain: list[ChatMessage] = []
    for index, message in enumerate(messages):
        if message.role == "tool":
            assert message.answered is not None
            result = f"Result of {message.answered.name}: {message.content}"
            if messages[index - 1].role == "tool":
                plain[-1] = replace(plain[-1], content=f"{plain[-1].content}\n{result}")
            else:
                plain.append(ChatMessage("user", result))
        elif message.calls:
            calls = [spelled_call(tool_format, call.name, _json(call.arguments)) for call in message.calls]
            content = "\n".join([message.content, *calls] if message.content else calls)
            plain.append(replace(message, content=content, calls=()))
        elif message.role == "user" and index > 0 and messages[index - 1].role == "tool":
            plain[-1] = replace(plain[-1], content=f"{plain[-1].content}\n\n{message.content}")
        else:
            plain.append(message)
    return _with_tools(plain, tools_text(tools), has_system_role=has_system_role) if tools else plain


def _with_tools(messages: list[ChatMessage], text: str, *, has_system_role: bool) -> list[ChatMessage]:
    role = "system" if has_system_role else "user"
    for index, message in enumerate(messages):
        if message.role == role or (role == "system" and message.role == "developer"):
            # instructions of the system come before the tools, a question after them
            parts = [message.content, text] if has_system_role else [text, message.content]
            described = replace(message, content="\n\n".join(parts))
            return [*messages[:index], described, *messages[index + 1 :]]
    return [ChatMessage(role, text), *messages]


def one_call_a_message(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Splits answers of several calls into one each, followed by its result (Llama 3)."""
    split: list[ChatMessage] = []
    results: dict[int, list[ChatMessage]] = {}
    for message in messages:
        if message.answered is not None:
            results.setdefault(id(message.answered), []).append(message)
    for message in messages:
        for call in message.calls:
            split += [replace(message, calls=(call,)), *results.get(id(call), ())]
        if not message.calls and message.answered is None:
            split.append(message)
    return split


def template_messages(
    messages: Sequence[ChatMessage], source: str, *, has_short_ids: bool = False
) -> list[dict[str, Any]]:
    """As the template's source reads them: role developer and past reasoning only where it knows them.

    has_short_ids: ids of calls have 9 letters and digits (Mistral).
    """
    return [_template_message(message, source, has_short_ids) for message in messages]


def _template_message(message: ChatMessage, source: str, has_short_ids: bool) -> dict[str, Any]:
    role = "system" if message.role == "developer" and "developer" not in source else message.role
    fields: dict[str, Any] = {"role": role, "content": message.content}
    if message.name is not None:
        fields["name"] = message.name
    if message.reasoning is not None and "reasoning_content" in source:
        fields["reasoning_content"] = message.reasoning

    def id_of(call: PastCall) -> str:
        if has_short_ids and not _MISTRAL_ID.fullmatch(call.id):
            return hashlib.sha256(call.id.encode("utf-8", "surrogatepass")).hexdigest()[:9]
        return call.id

    if message.calls:
        fields["tool_calls"] = [
            {"id": id_of(call), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.calls
        ]
    if message.answered is not None:
        fields["tool_call_id"] = id_of(message.answered)
        fields["name"] = message.answered.name
    return fields


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
