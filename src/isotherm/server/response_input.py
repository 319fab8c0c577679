"""The items that /v1/responses takes, and what they are as messages."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from isotherm.server.fields import Strict

_Status = Literal["in_progress", "completed", "incomplete"] | None


class InputText(Strict):
    type: Literal["input_text"]
    text: str


class OutputText(Strict):
    """annotations and logprobs come back with an earlier answer, and say nothing to a model."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


TextPart = Annotated[InputText | OutputText, Field(discriminator="type")]


class MessageItem(Strict):
    """The fields of an earlier answer's items that name or time it are labels."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[TextPart]
    id: str | None = None
    status: _Status = None

    def role_and_text(self) -> dict[str, Any]:
        return {"role": "system" if self.role == "developer" else self.role, "content": _text(self.content)}


class CallItem(Strict):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: _Status = None

    def tool_call(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


class ResultItem(Strict):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: _Status = None

    def message(self) -> dict[str, Any]:
        return {"role": "tool", "content": _text(self.output), "tool_call_id": self.call_id}


class ReasoningText(Strict):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Strict):
    """Reasoning comes back as it went out; a summary of it, or one that is encrypted, is of another server."""

    type: Literal["reasoning"]
    summary: Annotated[list[Any], Field(max_length=0)] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: None = None
    id: str | None = None
    status: _Status = None


def _kind(item: Any) -> Any:
    """Messages may leave their type out."""
    return item.get("type", "message") if isinstance(item, dict) else "message"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


def messages_of(instructions: str | None, items: str | list[Item]) -> tuple[dict[str, Any], ...]:
    """Messages as OpenAI's chat API writes them.

    Reasoning, text and calls that follow each other are one answer, and so one message: results must come right behind
    the message that has their calls, also where the model went on to speak.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(items, str):
        return (*messages, {"role": "user", "content": items})
    answer: dict[str, Any] | None = None  # the last message, where more of the same answer may follow
    for item in items:
        if isinstance(item, ResultItem) or (isinstance(item, MessageItem) and item.role != "assistant"):
            answer = None
            messages.append(item.message() if isinstance(item, ResultItem) else item.role_and_text())
            continue
        if answer is None:
            answer = {"role": "assistant", "content": ""}
            messages.append(answer)
        match item:
            case ReasoningItem():
                _add_text(answer, "reasoning_content", "".join(part.text for part in item.content or ()))
            case MessageItem():
                _add_text(answer, "content", _text(item.content))
            case CallItem():
                answer.setdefault("tool_calls", []).append(item.tool_call())
    return tuple(messages)


def _add_text(answer: dict[str, Any], field: str, text: str) -> None:
    answer[field] = "\n".join(filter(None, (answer.get(field), text)))


def _text(content: str | list[TextPart] | list[InputText]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
