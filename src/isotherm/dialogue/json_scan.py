"""JSON that comes bit by bit: where an object ends, what its members are, whether it can still become sound."""

import json
import re
from typing import Any

_MAX_NESTING = 64

_SPACE = re.compile(r"[ \t\r\n]*+")
_STRING = re.compile(r'"[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+"')
_STRING_START = re.compile(
    r'"[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+(?:\\(?:u[0-9a-fA-F]{0,3})?)?\Z'
)
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?(?=[ \t\r\n,\]}])")
_NUMBER_START = re.compile(r"-?(?:(?:0|[1-9][0-9]*+)(?:\.[0-9]*+|(?:\.[0-9]++)?[eE][+-]?[0-9]*+)?)?\Z")
_WORDS = ("true", "false", "null")


class JsonScan:
    """Reads the JSON object (RFC 8259) that starts at `start` of a text that grows; linear in its length.

    has_ended: the object is whole, and `end` is where the text goes on. has_failed: no more text can make it sound.
    keys: of the object itself, as far as read; members: the JSON texts of those values that are whole.
    """

    def __init__(self, start: int) -> None:
        self.end = start
        self.has_ended = False
        self.has_failed = False
        self.keys: list[str] = []
        self.members: dict[str, str] = {}
        self._brackets: list[str] = []
        self._expects = "value"
        self._value_start = start

    def advance(self, text: str) -> None:
        """Reads on; `text` begins with what the call before was given."""
        while not (self.has_ended or self.has_failed):
            space = _SPACE.match(text, self.end)
            assert space is not None
            self.end = space.end()
            if self.end == len(text) or not self._step(text):
                return

    def _step(self, text: str) -> bool:
        """Reads one token; False where it may not be whole yet."""
        char = text[self.end]
        if self._expects == "value":
            return self._value(text, char)
        if self._expects == "first element" and char != "]":
            return self._value(text, char)
        if self._expects in ("key", "first key") and char == '"':
            return self._key(text)
        if self._expects == "colon" and char == ":":
            self.end += 1
            self._expects = "value"
        elif self._expects == "next" and char == ",":
            self.end += 1
            self._expects = "key" if self._brackets[-1] == "}" else "value"
        elif self._expects in ("next", "first key", "first element") and char == self._brackets[-1]:
            self._close(text)
        else:
            self.has_failed = True
        return True

    def _value(self, text: str, char: str) -> bool:
        if len(self._brackets) == 1:
            self._value_start = self.end
        if char in "{[":
            if len(self._brackets) == _MAX_NESTING:
                self.has_failed = True
            self._brackets.append("}" if char == "{" else "]")
            self._expects = "first key" if char == "{" else "first element"
            self.end += 1
            return True
        end = _scalar_end(text, self.end)
        if end is None:
            return False
        if end < 0 or not self._brackets:
            self.has_failed = True
            return True
        self.end = end
        self._value_ended(text)
        return True

    def _key(self, text: str) -> bool:
        end = _scalar_end(text, self.end)
        if end is None:
            return False
        if end < 0:
            self.has_failed = True
        else:
            if len(self._brackets) == 1:
                self.keys.append(json.loads(text[self.end : end]))
            self.end = end
            self._expects = "colon"
        return True

    def _close(self, text: str) -> None:
        self.end += 1
        self._brackets.pop()
        if self._brackets:
            self._value_ended(text)
        else:
            self.has_ended = True

    def _value_ended(self, text: str) -> None:
        self._expects = "next"
        if len(self._brackets) == 1:
            self.members[self.keys[-1]] = text[self._value_start : self.end]


def _scalar_end(text: str, start: int) -> int | None:
    """Where the string, number or word at `start` ends; None where it may go on, -1 where it is none."""
    char = text[start]
    if char == '"':
        match, prefix = _STRING.match(text, start), _STRING_START
    elif char in "-0123456789":
        match, prefix = _NUMBER.match(text, start), _NUMBER_START
    else:
        for word in _WORDS:
            if text.startswith(word, start):
                return start + len(word)
            if word.startswith(text[start:]):
                return None
        return -1
    if match is not None:
        return match.end()
    return None if prefix.match(text, start) else -1


def object_of(text: str) -> dict[str, Any] | None:
    """The JSON object that `text` is; None where it is anything else. Numbers are read as Python reads them."""
    scan = JsonScan(0)
    if text.lstrip(" \t\r\n")[:1] != "{":
        return None
    scan.advance(text)
    if not scan.has_ended or text[scan.end :].strip(" \t\r\n"):
        return None
    try:
        value = json.loads(text)
    except ValueError:  # an integer with more digits than Python converts
        return None
    assert isinstance(value, dict)
    return value
