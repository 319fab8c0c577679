"""How families of models write a tool call, and how to read one from text that comes bit by bit.

A call counts only where it names one of the request's tools; all else is text for the reader.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from isotherm.dialogue.json_scan import JsonScan, object_of

_SPACE = " \t\r\n"
_CALL_KEYS = frozenset(["name", "arguments", "parameters", "type", "id"])
_FENCE = "```"
_FENCE_WORDS = ("json", "tool_code", "tool_call")
_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_SCALAR_END = re.compile(r"[,}\]]")
_MAX_NESTING = 64


@dataclass(frozen=True)
class ToolCall:
    """arguments: the JSON text of an object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Block:
    """What stands before calls, and what may stand behind them."""

    opener: str
    closer: str


BARE = Block("", "")  # a call with no marker, which only an answer's first character can begin
FENCED = Block(_FENCE, _FENCE)


class MoreText(Exception):
    """Not enough text to decide."""


class NoCall(Exception):
    """Whatever follows, this is no call."""


@dataclass
class Cursor:
    """A place in a text that may still grow. Raises MoreText or NoCall where it cannot go on."""

    text: str
    position: int
    is_end: bool  # nothing will follow `text`
    scans: dict[int, JsonScan]  # by start, kept while the same text grows

    def skip(self, characters: str) -> None:
        while self.text[self.position : self.position + 1] and self.text[self.position] in characters:
            self.position += 1

    def peek(self) -> str:
        """The next character, which there must be."""
        if self.position == len(self.text):
            raise NoCall if self.is_end else MoreText
        return self.text[self.position]

    def accept(self, literal: str) -> bool:
        """Goes behind `literal`, if it stands here."""
        if self.text.startswith(literal, self.position):
            self.position += len(literal)
            return True
        if not self.is_end and literal.startswith(self.text[self.position :]):
            raise MoreText
        return False

    def expect(self, literal: str) -> None:
        if not self.accept(literal):
            raise NoCall

    def until(self, literal: str) -> str:
        """The text before the next `literal`, and goes behind it."""
        at = self.text.find(literal, self.position)
        if at < 0:
            raise NoCall if self.is_end else MoreText
        before = self.text[self.position : at]
        self.position = at + len(literal)
        return before

    def match(self, pattern: re.Pattern[str], ends: re.Pattern[str]) -> str:
        """What `pattern` matches here; it is known once something has come that `ends` finds."""
        if not self.is_end and not ends.search(self.text, self.position):
            raise MoreText
        match = pattern.match(self.text, self.position)
        if match is None:
            raise NoCall
        self.position = match.end()
        return match[0]

    def name(self, names: frozenset[str], follows: tuple[str, ...]) -> str:
        """One of `names` with one of `follows` behind it."""
        waits = False
        for name in sorted(names, key=len, reverse=True):
            for literal in follows:
                try:
                    if self.accept(name + literal):
                        self.position -= len(literal)
                        return name
                except MoreText:
                    waits = True
        raise MoreText if waits else NoCall

    def json_object(self, is_possible: Callable[[JsonScan], bool]) -> JsonScan:
        """The object that starts here; gives up as soon as `is_possible` says no."""
        if self.peek() != "{":
            raise NoCall
        scan = self.scans.setdefault(self.position, JsonScan(self.position))
        scan.advance(self.text)
        if scan.has_failed or not is_possible(scan):
            raise NoCall
        if not scan.has_ended:
            raise NoCall if self.is_end else MoreText
        self.position = scan.end
        return scan


CallReader = Callable[[Cursor, frozenset[str]], ToolCall]


def read_json_call(cursor: Cursor, names: frozenset[str]) -> ToolCall:
    """`{"name": ..., "arguments": {...}}`, or "parameters", alone or in an array."""
    cursor.skip(_SPACE + "[")
    scan = cursor.json_object(lambda scan: _may_be_call(scan, names))
    if "name" not in scan.members:
        raise NoCall
    arguments = scan.members.get("arguments", scan.members.get("parameters", "null"))
    return ToolCall(json.loads(scan.members["name"]), _as_object(arguments))


def _may_be_call(scan: JsonScan, names: frozenset[str]) -> bool:
    if not _CALL_KEYS.issuperset(scan.keys):
        return False
    name = scan.members.get("name")
    return name is None or (name.startswith('"') and json.loads(name) in names)


def _as_object(text: str) -> str:
    """Models write null for no arguments, and some write the object's text as a string."""
    if text == "null":
        return "{}"
    if text.startswith('"'):
        text = json.loads(text)
        if object_of(text) is None:
            raise NoCall
        return text.strip(_SPACE)
    if not text.startswith("{"):
        raise NoCall
    return text


def read_fenced_call(cursor: Cursor, names: frozenset[str]) -> ToolCall:
    """A JSON call in a fenced block, its language none, json, tool_code or tool_call."""
    if not any(cursor.accept(word) for word in _FENCE_WORDS) and cursor.peek() not in _SPACE:
        raise NoCall
    return read_json_call(cursor, names)


def read_mistral_call(cursor: Cursor, names: frozenset[str]) -> ToolCall:
    """An array of JSON calls (to 2024), or `name[ARGS]{...}`, with `[CALL_ID]...` between in some versions."""
    cursor.skip(_SPACE)
    if cursor.peek() in "[{":
        return read_json_call(cursor, names)
    name = cursor.name(names, ("[ARGS]", "[CALL_ID]", "{"))
    if cursor.accept("[CALL_ID]"):
        cursor.until("[ARGS]")
    else:
        cursor.accept("[ARGS]")
    cursor.skip(_SPACE)
    scan_start = cursor.position
    scan = cursor.json_object(lambda scan: True)
    return ToolCall(name, cursor.text[scan_start : scan.end])


def gemma_reader(quote: str, closer: str) -> CallReader:
    """Reads `call:name{key:value,...}`, texts between two `quote`; a call counts once its closer has come."""

    def read(cursor: Cursor, names: frozenset[str]) -> ToolCall:
        cursor.skip(_SPACE)
        cursor.expect("call:")
        name = cursor.name(names, ("{",))
        if not cursor.is_end and closer not in cursor.text[cursor.position :]:
            raise MoreText
        return ToolCall(name, _gemma_value(cursor, quote, 0))

    return read


def _gemma_value(cursor: Cursor, quote: str, depth: int) -> str:
    """As JSON text."""
    if depth == _MAX_NESTING:
        raise NoCall
    cursor.skip(_SPACE)
    if cursor.accept(quote):
        return json.dumps(cursor.until(quote), ensure_ascii=False)
    if cursor.peek() == "{":
        return _gemma_list(cursor, "{}", lambda: _gemma_member(cursor, quote, depth))
    if cursor.peek() == "[":
        return _gemma_list(cursor, "[]", lambda: _gemma_value(cursor, quote, depth + 1))
    return cursor.match(_SCALAR, _SCALAR_END)


def _gemma_member(cursor: Cursor, quote: str, depth: int) -> str:
    cursor.skip(_SPACE)
    if cursor.accept(quote):
        key = cursor.until(quote)
        cursor.skip(_SPACE)
        cursor.expect(":")
    else:
        key = cursor.until(":").strip(_SPACE)
    return f"{json.dumps(key, ensure_ascii=False)}: {_gemma_value(cursor, quote, depth + 1)}"


def _gemma_list(cursor: Cursor, brackets: str, read_item: Callable[[], str]) -> str:
    cursor.expect(brackets[0])
    items: list[str] = []
    cursor.skip(_SPACE)
    while not cursor.accept(brackets[1]):
        if items:
            cursor.expect(",")
        items.append(read_item())
        cursor.skip(_SPACE)
    return brackets[0] + ", ".join(items) + brackets[1]


@dataclass(frozen=True)
class CallSpelling:
    """How calls are spelled, for grammars and for templates that know no tools; NAME stands for the tool's name."""

    before: str
    after: str
    between: str
    first: str = ""
    last: str = ""


@dataclass(frozen=True)
class ToolFormat:
    """A family's way to call tools.

    blocks: what may stand around calls, with the reader for what is inside; `spelling`: how the template spells calls.
    quote: stands around texts in formats that are not JSON. is_native: the model's own template describes the tools.
    """

    name: str
    blocks: dict[Block, CallReader] = field(hash=False)
    spelling: CallSpelling
    quote: str | None = None
    is_native: bool = True

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be control tokens of the vocabulary."""
        found = [text for block in self.blocks for text in (block.opener, block.closer)]
        if self.name.startswith("mistral"):
            found += ["[ARGS]", "[CALL_ID]"]
        if self.quote is not None:
            found.append(self.quote)
        return tuple(text for text in found if text and text != _FENCE)


# Models also write calls with no marker, or fenced, where a small or code model forgets its own.
_LOOSE: dict[Block, CallReader] = {FENCED: read_fenced_call, BARE: read_json_call}
_HERMES = Block("<tool_call>", "</tool_call>")
_PYTHON_TAG = Block("<|python_tag|>", "")
_MISTRAL = Block("[TOOL_CALLS]", "")
_GEMMA = Block("<|tool_call>", "<tool_call|>")
_FUNCTION_GEMMA = Block("<start_function_call>", "<end_function_call>")

_ARGUMENTS = '{"name": NAME, "arguments": '
TOOL_FORMATS: dict[str, ToolFormat] = {
    tool_format.name: tool_format
    for tool_format in (
        ToolFormat(
            "hermes",
            {_HERMES: read_json_call, **_LOOSE},
            CallSpelling(f"<tool_call>\n{_ARGUMENTS}", "}\n</tool_call>", "\n"),
        ),
        ToolFormat(
            "llama3",
            {_PYTHON_TAG: read_json_call, **_LOOSE},
            CallSpelling('{"name": NAME, "parameters": ', "}", "; "),
        ),
        ToolFormat("mistral", {_MISTRAL: read_mistral_call}, CallSpelling(_ARGUMENTS, "}", ", ", "[TOOL_CALLS][", "]")),
        ToolFormat("mistral_args", {_MISTRAL: read_mistral_call}, CallSpelling("[TOOL_CALLS]NAME[ARGS]", "", "")),
        ToolFormat(
            "gemma4",
            {_GEMMA: gemma_reader('<|"|>', _GEMMA.closer)},
            CallSpelling("<|tool_call>call:NAME", "<tool_call|>", ""),
            quote='<|"|>',
        ),
        ToolFormat(
            "function_gemma",
            {_FUNCTION_GEMMA: gemma_reader("<escape>", _FUNCTION_GEMMA.closer)},
            CallSpelling("<start_function_call>call:NAME", "<end_function_call>", ""),
            quote="<escape>",
        ),
        ToolFormat("generic", dict(_LOOSE), CallSpelling(_ARGUMENTS, "}", "\n"), is_native=False),
    )
}

# The first whose texts all stand in a template, and whose last do not, is its format.
_SIGNS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("gemma4", ("<|tool_call>", '<|"|>'), ()),
    ("function_gemma", ("<start_function_call>", "<escape>"), ()),
    ("mistral_args", ("[TOOL_CALLS]", "[ARGS]"), ()),
    ("mistral", ("[TOOL_CALLS]",), ()),
    ("hermes", ("<tool_call>", "arguments"), ("<function=", "<arg_key>")),
    ("llama3", ('"parameters": ', "<|start_header_id|>", "ipython"), ("<function=",)),
)


def tool_format_of(template_source: str) -> ToolFormat:
    """The format that the template teaches; "generic" where it knows no tools, or a format that is not listed here."""
    if "tools" in template_source:
        for name, present, absent in _SIGNS:
            if all(text in template_source for text in present) and not any(s in template_source for s in absent):
                return TOOL_FORMATS[name]
    return TOOL_FORMATS["generic"]
