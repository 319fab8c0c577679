"""The output of /v1/responses: items, and the events that tell how they come to be."""

import secrets
from collections.abc import Callable, Iterator
from typing import Any

from isotherm.dialogue.parts import Content, Part, Reasoning, ToolCallArguments, ToolCallEnd, ToolCallStart
from isotherm.engine.sampling import SampledToken
from isotherm.server.ask import Delta

Fields = dict[str, Any]


class ResponseOutput:
    """Adds up the deltas of one answer. `items` are whole once `end` was called.

    An event shows its item as it is when the event comes, and has to be written before the next is asked for.
    """

    def __init__(self, logprobs: Callable[[tuple[SampledToken, ...]], list[Fields]] | None) -> None:
        """logprobs: as OpenAI writes them; None where they are not asked for."""
        self.items: list[Fields] = []
        self.num_reasoning_tokens = 0
        self._logprobs = logprobs
        self._is_open = False  # the last item
        self._held: tuple[SampledToken, ...] = ()  # which have brought no part yet

    def take(self, delta: Delta) -> Iterator[Fields]:
        """The events of one delta."""
        tokens = self._held + delta.tokens
        self._held = () if delta.parts else tokens
        if delta.parts and all(isinstance(part, Reasoning) for part in delta.parts):
            self.num_reasoning_tokens += len(tokens)
        for part in delta.parts:
            yield from self._add(part, tokens)
            if isinstance(part, Content):
                tokens = ()

    def end(self, status: str) -> Iterator[Fields]:
        """The last events; status: "completed", or "incomplete" where the answer was cut."""
        if self._held and self._is_in("message"):
            yield from self._add(Content(""), self._held)
        if not self.items:
            yield from self._begin(_message())
        yield from self._close(status)

    def _add(self, part: Part, tokens: tuple[SampledToken, ...]) -> Iterator[Fields]:
        match part:
            case Content(text):
                if not self._is_in("message"):
                    yield from self._begin(_message())
                entries = self._logprobs(tokens) if self._logprobs else []
                yield self._text(text, "response.output_text.delta", logprobs=entries)
                self.items[-1]["content"][0]["logprobs"] += entries
            case Reasoning(text):
                if not self._is_in("reasoning"):
                    yield from self._begin(_reasoning())
                yield self._text(text, "response.reasoning_text.delta")
            case ToolCallStart(_, name):
                yield from self._begin(_call(name))
            case ToolCallArguments(_, text):
                assert self._is_in("function_call"), "calls come one after the other"
                self.items[-1]["arguments"] += text
                yield {"type": "response.function_call_arguments.delta", **self._place(), "delta": text}
            case ToolCallEnd():
                yield from self._close("completed")

    def _is_in(self, kind: str) -> bool:
        return self._is_open and self.items[-1]["type"] == kind

    def _begin(self, item: Fields) -> Iterator[Fields]:
        yield from self._close("completed")
        self.items.append(item)
        self._is_open = True
        empty = {**item, "content": []} if "content" in item else item
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": empty}
        if "content" in item:
            yield {"type": "response.content_part.added", **self._part_place(), "part": item["content"][0]}

    def _text(self, text: str, kind: str, **more: Any) -> Fields:
        self.items[-1]["content"][0]["text"] += text
        return {"type": kind, **self._part_place(), "delta": text, **more}

    def _close(self, status: str) -> Iterator[Fields]:
        if not self._is_open:
            return
        self._is_open = False
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield {"type": "response.function_call_arguments.done", **self._place(), **done}
        else:
            part = item["content"][0]
            more = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            yield {"type": f"response.{part['type']}.done", **self._part_place(), "text": part["text"], **more}
            yield {"type": "response.content_part.done", **self._part_place(), "part": part}
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    def _place(self) -> Fields:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _part_place(self) -> Fields:
        return {**self._place(), "content_index": 0}


def _message() -> Fields:
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {**_item("msg", "message"), "role": "assistant", "content": [part]}


def _reasoning() -> Fields:
    return {**_item("rs", "reasoning"), "summary": [], "content": [{"type": "reasoning_text", "text": ""}]}


def _call(name: str) -> Fields:
    return {**_item("fc", "function_call"), "call_id": f"call_{secrets.token_hex(12)}", "name": name, "arguments": ""}


def _item(prefix: str, kind: str) -> Fields:
    return {"id": f"{prefix}_{secrets.token_hex(12)}", "type": kind, "status": "in_progress"}
