"""Grammars for tool calls in a model's own format, in the Lark dialect of llguidance (docs/syntax.md there)."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from isotherm.dialogue.reasoning import ReasoningBlock
from isotherm.dialogue.rendering import spelled_name
from isotherm.dialogue.tool_formats import BARE, ToolFormat
from isotherm.dialogue.tools import Tool
from isotherm.types import Grammar

MAX_PARALLEL_CALLS = 16

# As templates write JSON: a small model that may write any space writes nothing else.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_ANY_TEXT = "ANY_TEXT: /(?s:.*)/"
# does not begin as a call without a marker would
_FREE_TEXT = r"FREE_TEXT: /[ \t\r\n]*([^ \t\r\n{\[](?s:.*))?/"

_GEMMA_VALUES = r"""
object: "{" (member ("," member)*)? "}"
member: KEY ":" value
value: text | NUMBER | "true" | "false" | "null" | object | "[" (value ("," value)*)? "]"
KEY: /[A-Za-z_][A-Za-z0-9_-]*/
NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/
"""


class CallGrammar:
    """Writes grammars of answers that call tools, for one model.

    marker_ids: markers that are tokens of the vocabulary; such a one is what the model was trained to write. Where text
    ends in a marker it may be spelled out too, since whoever reads the answer sees no difference.

    A reasoning block may stand first, where the model has one; is_reasoning: the prompt has opened it. Arguments match
    their schema, but in Gemma's formats, which are no JSON: there the first names are the schema's, and values are any.
    """

    def __init__(
        self, tool_format: ToolFormat, reasoning: ReasoningBlock | None, marker_ids: Mapping[str, int]
    ) -> None:
        self._format = tool_format
        self._spelling = tool_format.spelling
        self._reasoning = reasoning
        self._marker_ids = marker_ids
        longest_first = sorted(marker_ids, key=len, reverse=True)
        self._markers = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if marker_ids else None

    def of_calls(self, tools: Sequence[Tool], *, is_parallel: bool, is_reasoning: bool) -> Grammar:
        """At least one call of `tools` and nothing else; at most MAX_PARALLEL_CALLS."""
        rules = [f"answer: {self._group(is_parallel, opener='')}", *self._call_rules(tools, opener="")]
        return self._grammar(rules, is_reasoning)

    def of_text_with_calls(self, tools: Sequence[Tool], *, is_parallel: bool, is_reasoning: bool) -> Grammar:
        """Any text, in which what begins as a call of the format is one; arguments of strict tools match their schema.

        A call in a fenced block is text here, and must not be read as a call.
        """
        opener = next((block.opener for block in self._format.blocks if block.opener.strip("`")), None)
        is_bare = BARE in self._format.blocks
        free = "FREE_TEXT" if is_bare else "ANY_TEXT"
        answers, rules = [free], [self._free_text(is_reasoning)]
        if is_bare:
            answers.append(f"bare {self._repeated('bare', is_parallel)}")
            rules += self._rules("bare", tools, _bare_before(self._spelling.before), "}", any_object=True)
        if opener is not None:
            group = self._group(is_parallel, opener)
            # where there may be no other call the answer ends: in text behind it one could begin
            answers.append(f"first {group} (next {group})* ANY_TEXT" if is_parallel else f"first {group}")
            rules += self._text_up_to("first", opener, free) + self._text_up_to("next", opener, "ANY_TEXT")
            rules += self._call_rules(tools, opener, any_object=True)
        return self._grammar([f"answer: {' | '.join(answers)}", *rules], is_reasoning)

    def _grammar(self, rules: list[str], is_reasoning: bool) -> Grammar:
        start = "answer"
        rules = [*rules, _ANY_TEXT]
        if self._reasoning is not None:
            thought = "thought" if is_reasoning else f"({self._literal(self._reasoning.opener)} thought)?"
            start = f"{thought} answer"
            rules += [
                "thought: reasons /[ \\n]{0,2}/",
                *self._text_up_to("reasons", self._reasoning.closer, "ANY_TEXT"),
            ]
        if self._format.quote is not None:
            quote = self._format.quote
            rules += [_GEMMA_VALUES, f"text: {self._literal(quote)} quoted"]
            rules += self._text_up_to("quoted", quote, "ANY_TEXT")
        return Grammar("lark", "\n".join([f"start: {start}", *rules]) + "\n")

    def _free_text(self, is_reasoning: bool) -> str:
        """Nor as a reasoning block, which would hide what follows it."""
        if self._reasoning is None or is_reasoning:
            return _FREE_TEXT
        return rf"{_FREE_TEXT} & ~/[ \t\r\n]*{re.escape(self._reasoning.opener)}(?s:.*)/"

    def _group(self, is_parallel: bool, opener: str) -> str:
        """Calls with what stands around all of them; without the opener, where that has been read."""
        spelling = self._spelling
        first = self._literal(spelling.first.removeprefix(opener))
        calls = "call"
        if not (opener and spelling.before.startswith(opener)):  # else each call has its own opener
            calls += " " + self._repeated("call", is_parallel)
        return " ".join(filter(None, [first, calls, self._literal(spelling.last)]))

    def _repeated(self, rule: str, is_parallel: bool) -> str:
        if not is_parallel:
            return ""
        return f"({self._literal(self._spelling.between)} {rule}){{0,{MAX_PARALLEL_CALLS - 1}}}"

    def _call_rules(self, tools: Sequence[Tool], opener: str, *, any_object: bool = False) -> list[str]:
        before = self._spelling.before.removeprefix(opener)
        return self._rules("call", tools, before, self._spelling.after, any_object=any_object)

    def _rules(
        self, rule: str, tools: Sequence[Tool], before: str, after: str, *, any_object: bool = False
    ) -> list[str]:
        """`rule`: a call of one of `tools`. any_object: those that are not strict take any arguments."""
        rules = [f"{rule}: " + " | ".join(f"{rule}_{index}" for index in range(len(tools)))]
        for index, tool in enumerate(tools):
            schema = {"type": "object"} if any_object and not tool.is_strict else tool.parameters
            if self._format.quote is None:
                arguments = "%json " + json.dumps({**schema, "x-guidance": _JSON_STYLE})
            else:
                arguments = _gemma_object(schema)
            parts = [self._literal(spelled_name(before, tool.name)), arguments, self._literal(after)]
            rules.append(f"{rule}_{index}: " + " ".join(filter(None, parts)))
        return rules

    def _text_up_to(self, rule: str, marker: str, text: str) -> list[str]:
        """`text` and the next `marker`."""
        spelled = f"{rule}_spelled"
        token = f"{text} <[{self._marker_ids[marker]}]> | " if marker in self._marker_ids else ""
        return [f"{rule}: {token}{spelled}", f"{spelled}[lazy]: {text} {json.dumps(marker)}"]

    def _literal(self, text: str) -> str:
        """Text in quotes, markers by id where they are tokens."""
        pieces = [text] if self._markers is None else self._markers.split(text)
        return " ".join(
            f"<[{self._marker_ids[piece]}]>" if piece in self._marker_ids else json.dumps(piece)
            for piece in pieces
            if piece
        )


def _bare_before(before: str) -> str:
    """What stands before the arguments of a call without a marker."""
    return before[before.index("{") :]


def _gemma_object(schema: Mapping[str, Any]) -> str:
    names = schema.get("properties") or {}
    if not names:
        return '"{" "}"'
    member = "(" + " | ".join(json.dumps(f"{name}:") for name in names) + ") value"
    return f'"{{" ({member} ("," {member})*)? "}}"'
