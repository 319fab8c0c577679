"""GBNF, the grammars of llama.cpp, as Lark.

Rules that refer to no rule but such become terminals: the library matches those as regular expressions, much faster
than it parses.
"""

import json
import re
from dataclasses import dataclass, field

from isotherm.errors import GrammarError

_MAX_NESTING = 24  # of groups; the library ends near 30
_MAX_REPEATS = 10_000
_NAME = re.compile(r"[A-Za-z0-9-_]+")
_BLANK = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_BLANK_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]"}
_HEX_ESCAPE = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})")
_BOUNDS = re.compile(r"\{[ \t]*(\d{1,6})[ \t]*(,?)[ \t]*(\d{1,6})?[ \t]*\}")


def lark_of_gbnf(source: str) -> str:
    """Raises GrammarError where `source` is no GBNF, or a rule is missing."""
    rules = _Parser(source).rules()
    if "root" not in rules:
        raise GrammarError("the gbnf has no rule named root, where an answer begins; add one")
    for name, rule in rules.items():
        if missing := sorted(rule.refers_to - rules.keys()):
            raise GrammarError(
                f"the gbnf's rule {name} refers to {missing[0]}, which does not exist; add or correct it"
            )
    terminals = _terminals(rules)
    lark_names = {name: f"T{i}" if name in terminals else f"r{i}" for i, name in enumerate(rules)}
    lines = [f"{lark_names[name]}: {rule.lark(lark_names)}" for name, rule in rules.items()]
    return "\n".join([f"start: {lark_names['root']}", *lines]) + "\n"


def _terminals(rules: dict[str, "_Rule"]) -> set[str]:
    found = set[str]()
    while more := {name for name, rule in rules.items() if name not in found and rule.refers_to <= found}:
        found |= more
    return found


@dataclass
class _Rule:
    """The pieces of its body in Lark; a reference is a piece of its own."""

    pieces: list[str | tuple[str]] = field(default_factory=list)

    @property
    def refers_to(self) -> set[str]:
        return {piece[0] for piece in self.pieces if isinstance(piece, tuple)}

    def lark(self, names: dict[str, str]) -> str:
        return " ".join(names[piece[0]] if isinstance(piece, tuple) else piece for piece in self.pieces)


class _Parser:
    """Recursive descent; `_at` is the next character."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._at = 0
        self._rule = _Rule()

    def rules(self) -> dict[str, _Rule]:
        rules = dict[str, _Rule]()
        self._skip(_BLANK_LINES)
        while self._at < len(self._source):
            name = self._name()
            self._skip(_BLANK)
            self._expect("::=")
            if name in rules:
                raise self._error(f"a second rule named {name}")
            self._rule = rules[name] = _Rule()
            self._skip(_BLANK_LINES)
            self._alternatives(0)
            if self._peek() not in ("", "\n", "\r"):
                raise self._error("expected the end of the rule")
            self._skip(_BLANK_LINES)
        return rules

    def _alternatives(self, nesting: int) -> None:
        blank = _BLANK_LINES if nesting else _BLANK
        self._sequence(nesting, blank)
        while self._peek() == "|":
            self._at += 1
            self._rule.pieces.append("|")
            self._skip(_BLANK_LINES)
            self._sequence(nesting, blank)

    def _sequence(self, nesting: int, blank: re.Pattern[str]) -> None:
        is_empty = True
        while self._item(nesting):
            is_empty = False
            self._skip(blank)
            self._repeats()
            self._skip(blank)
        if is_empty:
            self._rule.pieces.append('""')

    def _item(self, nesting: int) -> bool:
        """One item, if there is one."""
        first, pieces = self._peek(), self._rule.pieces
        if first == '"':
            pieces.append(self._literal())
        elif first == "[":
            pieces.append(self._characters())
        elif first == ".":
            self._at += 1
            pieces.append(r"/[\x{0}-\x{10FFFF}]/")
        elif first == "(":
            if nesting == _MAX_NESTING:
                raise self._error(f"groups are nested deeper than {_MAX_NESTING} levels; give them names")
            self._at += 1
            self._skip(_BLANK_LINES)
            pieces.append("(")
            self._alternatives(nesting + 1)
            self._expect(")")
            pieces.append(")")
        elif _NAME.match(first):
            pieces.append((self._name(),))
        else:
            return False
        return True

    def _repeats(self) -> None:
        first = self._peek()
        if first and first in "*+?":
            self._at += 1
            self._rule.pieces.append(first)
        elif first == "{":
            bounds = _BOUNDS.match(self._source, self._at)
            if bounds is None:
                raise self._error("expected {m}, {m,} or {m,n}")
            low, comma, high = bounds.groups()
            most = int(high) if high else int(low)
            if int(low) > most or most > _MAX_REPEATS or (high and not comma):
                raise self._error(f"repetitions go from few to many, at most {_MAX_REPEATS}")
            self._at = bounds.end()
            self._rule.pieces.append(f"{{{int(low)}{comma}{most if high else ''}}}")

    def _literal(self) -> str:
        self._at += 1
        text = ""
        while self._peek() != '"':
            text += self._character()
        self._at += 1
        return json.dumps(text, ensure_ascii=False)

    def _characters(self) -> str:
        self._at += 1
        negation = "^" if self._peek() == "^" else ""
        self._at += len(negation)
        ranges = ""
        while self._peek() != "]":
            first = last = self._character()
            if self._peek() == "-" and self._source[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                last = self._character()
            if last < first:
                raise self._error("a range of characters that ends before it begins")
            ranges += rf"\x{{{ord(first):X}}}-\x{{{ord(last):X}}}"
        self._at += 1
        if not ranges:
            raise self._error("a set without a character")
        return f"/[{negation}{ranges}]/"

    def _character(self) -> str:
        character = self._peek()
        if not character or character in "\r\n":
            raise self._error("a literal or set that does not end")
        self._at += 1
        if character != "\\":
            return character
        escape = self._peek()
        if escape and escape in _ESCAPES:
            self._at += 1
            return _ESCAPES[escape]
        number = _HEX_ESCAPE.match(self._source, self._at)
        code = int(number[0][1:], 16) if number else -1
        if number is None or code > 0x10FFFF or 0xD800 <= code < 0xE000:
            raise self._error("an escape that does not exist")
        self._at = number.end()
        return chr(code)

    def _name(self) -> str:
        name = _NAME.match(self._source, self._at)
        if name is None:
            raise self._error("expected the name of a rule")
        self._at = name.end()
        return name[0]

    def _expect(self, text: str) -> None:
        if not self._source.startswith(text, self._at):
            raise self._error(f"expected {text}")
        self._at += len(text)

    def _peek(self) -> str:
        return self._source[self._at : self._at + 1]

    def _skip(self, blank: re.Pattern[str]) -> None:
        match = blank.match(self._source, self._at)
        assert match is not None, "it matches nothing too"
        self._at = match.end()

    def _error(self, what: str) -> GrammarError:
        line = self._source.count("\n", 0, self._at) + 1
        column = self._at - (self._source.rfind("\n", 0, self._at) + 1) + 1
        return GrammarError(f"the gbnf, line {line}, column {column}: {what}")
