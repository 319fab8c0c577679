"""What of a grammar's source is refused before anything is built from it. Sources come from strangers."""

import json
import re
from typing import Any

from isotherm.errors import GrammarError
from isotherm.types import Grammar

KINDS = ("json_schema", "json_object", "regex", "lark", "gbnf")
MAX_SCHEMA_BYTES = 128 << 10
MAX_TEXT_BYTES = 16 << 10  # of a regular expression, Lark or GBNF
MAX_SCHEMA_NESTING = 100  # the library's parser ends at 128
MAX_RULES = 500  # of Lark and GBNF: a chain of terminals costs more than its length
# llguidance reads it as an attribute of a rule and leaves it to the caller.
_TEMPERATURE = re.compile(r"(?m)^\s*[?!]?\w+\s*\[[^\]\n]*\btemperature\b")


def check_source(grammar: Grammar) -> None:
    """Raises GrammarError for what is no grammar of its kind on the face of it, or is too large."""
    if grammar.kind not in KINDS:
        raise GrammarError(f"grammar of kind {grammar.kind!r}; known: {', '.join(KINDS)}")
    if not isinstance(grammar.source, str):
        raise GrammarError(f"the source of a grammar is text, not {type(grammar.source).__name__}")
    try:
        num_bytes = len(grammar.source.encode())
    except UnicodeEncodeError as error:
        raise GrammarError(f"grammar, character {error.start}: a lone surrogate is no text; remove it") from error
    max_bytes = MAX_SCHEMA_BYTES if grammar.kind == "json_schema" else MAX_TEXT_BYTES
    if num_bytes > max_bytes:
        raise GrammarError(f"the {grammar.kind} has {num_bytes} bytes, the limit is {max_bytes}; make it smaller")
    if grammar.kind == "json_object" and grammar.source:
        raise GrammarError("json_object takes no source; a schema goes with json_schema")
    if grammar.kind == "json_schema":
        _check_schema(grammar.source)
    if grammar.kind == "lark" and _TEMPERATURE.search(grammar.source):
        raise GrammarError("the lark gives a rule a temperature, which is not supported; give one to the whole answer")
    if grammar.kind in ("lark", "gbnf"):
        _check_rules(grammar.source)


def _check_schema(source: str) -> None:
    try:
        schema = json.loads(source)
    except ValueError as error:
        raise GrammarError(f"the JSON schema is not JSON: {error}; correct it") from error
    except RecursionError as error:
        raise _too_deep() from error
    if not isinstance(schema, dict):
        raise GrammarError(f"a JSON schema is an object, not {type(schema).__name__}; {{}} allows any value")
    if "x-guidance" in schema:
        raise GrammarError("x-guidance in a JSON schema is not supported; remove it")
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_NESTING + 1):
        level = [child for value in level for child in _children(value)]
    if level:
        raise _too_deep()


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _too_deep() -> GrammarError:
    return GrammarError(f"the JSON schema is nested deeper than {MAX_SCHEMA_NESTING} levels; use $defs and $ref")


def _check_rules(source: str) -> None:
    """Both languages end a rule with its line, so that there are at most as many rules as lines."""
    num_rules = sum(1 for line in source.splitlines() if line.strip() and not line.lstrip().startswith(("#", "//")))
    if num_rules > MAX_RULES:
        raise GrammarError(f"the grammar has {num_rules} lines, the limit is {MAX_RULES}; join or drop rules")
