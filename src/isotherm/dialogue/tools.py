"""The tools of a request, and whether one must be called (as OpenAI's API writes them)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from isotherm.errors import MessageError

_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


@dataclass(frozen=True)
class Tool:
    """parameters: the JSON schema of an object. declaration: for the template, as the request has it; templates rely
    on there being parameters, so that those are added where it has none."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    is_strict: bool
    declaration: Mapping[str, Any]


class ChoiceMode(Enum):
    """NONE: the model is not told of the tools; REQUIRED: it must call at least one."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


@dataclass(frozen=True)
class ToolChoice:
    """name: the one tool that must be called, where the mode is REQUIRED."""

    mode: ChoiceMode = ChoiceMode.AUTO
    name: str | None = None


AUTO = ToolChoice()


def read_tools(tools: Sequence[Any] | None) -> tuple[Tool, ...]:
    """Checks the `tools` of a request. Raises MessageError."""
    if tools is None:
        return ()
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise MessageError("tools", "must be a list")
    read = tuple(_read_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools))
    names: set[str] = set()
    for index, tool in enumerate(read):
        if tool.name in names:
            raise MessageError(f"tools[{index}].function.name", f"is {tool.name!r}, which an earlier tool has")
        names.add(tool.name)
    return read


def _read_tool(tool: Any, field: str) -> Tool:
    if not isinstance(tool, Mapping):
        raise MessageError(field, "must be an object")
    if tool.get("type", "function") != "function":
        raise MessageError(f"{field}.type", f'is {tool["type"]!r}; only "function" is supported')
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise MessageError(f"{field}.function", "must be an object with a name")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise MessageError(f"{field}.function.name", "must have 1 to 128 letters, digits or any of _ - . :")
    description = function.get("description") or ""
    if not isinstance(description, str):
        raise MessageError(f"{field}.function.description", "must be text")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
        tool = {**tool, "function": {**function, "parameters": parameters}}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise MessageError(f"{field}.function.parameters", "must be the JSON schema of an object")
    strict = function.get("strict") or False
    if not isinstance(strict, bool):
        raise MessageError(f"{field}.function.strict", "must be true or false")
    return Tool(name, description, {"type": "object", **parameters}, strict, tool)


def read_tool_choice(choice: Any, tools: Sequence[Tool]) -> ToolChoice:
    """Checks the `tool_choice` of a request. Raises MessageError."""
    if choice is None:
        return AUTO
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if choice.get("type") != "function" or name not in [tool.name for tool in tools]:
            raise MessageError("tool_choice", "must name one of the tools, as type function, function.name")
        return ToolChoice(ChoiceMode.REQUIRED, name)
    if choice not in [mode.value for mode in ChoiceMode]:
        raise MessageError("tool_choice", 'must be "auto", "none", "required" or name a function')
    if choice == ChoiceMode.REQUIRED.value and not tools:
        raise MessageError("tool_choice", 'is "required", but there are no tools')
    return ToolChoice(ChoiceMode(choice))
