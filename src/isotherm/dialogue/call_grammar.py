"""Grammars that force tool calls in a model's own format, in the Lark dialect of llguidance (docs/syntax.md there)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from isotherm.dialogue.reasoning import ReasoningBlock
from isotherm.dialogue.tool_formats import ToolFormat
from isotherm.dialogue.tools import Tool
from isotherm.tokenization.tokenizer import Tokenizer
from isotherm.types import Grammar

MAX_PARALLEL_CALLS = 16

# As templates write JSON: a small model that may write any space writes nothing else.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_GEMMA_VALUES = r"""
object: "{" (member ("," member)*)? "}"
member: KEY ":" value
value: text | NUMBER | "true" | "false" | "null" | object | "[" (value ("," value)*)? "]"
KEY: /[A-Za-z_][A-Za-z0-9_-]*/
NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/
"""


class CallGrammar:
    """Writes the grammar of answers that call tools, for one model. The vocabulary says which markers are tokens."""

    def __init__(self, tool_format: ToolFormat, reasoning: ReasoningBlock | None, tokenizer: Tokenizer) -> None:
        self._format = tool_format
        self._reasoning = reasoning
        self._tokenizer = tokenizer

    def of(self, tools: Sequence[Tool], *, is_parallel: bool, is_reasoning: bool) -> Grammar:
        """At least one call of `tools`, at most MAX_PARALLEL_CALLS; a reasoning block before it, where there is one.

        is_reasoning: the prompt has opened it. Arguments match their schema, but in Gemma's formats, which are no
        JSON: there the first names are the schema's, and values are any.
        """
        spelling = self._format.spelling
        calls = "call"
        if is_parallel:
            calls += f" ({self._literal(spelling.between)} call){{0,{MAX_PARALLEL_CALLS - 1}}}"
        start = " ".join(
            filter(
                None, [self._reasoned(is_reasoning), self._literal(spelling.first), calls, self._literal(spelling.last)]
            )
        )
        rules = [f"start: {start}", "call: " + " | ".join(f"call_{index}" for index in range(len(tools)))]
        rules += [f"call_{index}: {self._call(tool)}" for index, tool in enumerate(tools)]
        if self._reasoning is not None:
            rules += self._reasoning_rules(self._reasoning)
        if self._format.quote is not None:
            rules += [_GEMMA_VALUES, *self._quoted_rules(self._format.quote)]
        return Grammar("lark", "\n".join(rules) + "\n")

    def _call(self, tool: Tool) -> str:
        spelling = self._format.spelling
        name = json.dumps(tool.name) if '{"name": NAME' in spelling.before else tool.name
        before, after = self._literal(spelling.before.replace("NAME", name)), self._literal(spelling.after)
        if self._format.quote is None:
            arguments = "%json " + json.dumps(_styled(tool.parameters))
        else:
            arguments = _gemma_object(tool.parameters)
        return " ".join(filter(None, [before, arguments, after]))

    def _reasoned(self, is_reasoning: bool) -> str:
        if self._reasoning is None:
            return ""
        return "thought" if is_reasoning else f"({self._literal(self._reasoning.opener)} thought)?"

    def _reasoning_rules(self, block: ReasoningBlock) -> list[str]:
        return [*self._text_up_to("thought", block.closer, r"/[ \n]{0,2}/")]

    def _quoted_rules(self, quote: str) -> list[str]:
        return [f"text: {self._literal(quote)} quoted", *self._text_up_to("quoted", quote, "")]

    def _text_up_to(self, rule: str, marker: str, after: str) -> list[str]:
        """Any text and the next `marker`."""
        text = f"{rule.upper()}_TEXT"
        if self._tokenizer.hidden_id(marker) is not None:
            return [f"{rule}: {text} {self._literal(marker)} {after}", f"{text}: /(?s:.*)/"]
        return [
            f"{rule}: {rule}_to_end {after}",
            f"{rule}_to_end[lazy]: {text} {self._literal(marker)}",
            f"{text}: /(?s:.*)/",
        ]

    def _literal(self, text: str) -> str:
        """Text in quotes, control tokens by id: their spelling alone does not make them."""
        pieces = [
            f"<[{fragment}]>" if isinstance(fragment, int) else json.dumps(fragment)
            for fragment in self._tokenizer.cut_at_control(text)
        ]
        return " ".join(pieces)


def _styled(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {**schema, "x-guidance": _JSON_STYLE}


def _gemma_object(schema: Mapping[str, Any]) -> str:
    names = schema.get("properties") or {}
    if not names:
        return '"{" "}"'
    member = "(" + " | ".join(json.dumps(f"{name}:") for name in names) + ") value"
    return f'"{{" ({member} ("," {member})*)? "}}"'
