"""Grammars of strangers: each is refused with its reason, or works within the limits; none takes the process down."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_tiny

from isotherm.errors import GrammarError
from isotherm.formats.checkpoint import open_checkpoint
from isotherm.grammar import limits
from isotherm.grammar.compiler import GrammarCompiler
from isotherm.tokenization.tokenizer import Tokenizer, build_tokenizer
from isotherm.types import Grammar, QuantType


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama", QuantType.Q8_0)
    return build_tokenizer(open_checkpoint(path).tokenizer)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.num_tokens)


def take_steps(compiler: GrammarCompiler, grammar: Grammar, num_steps: int = 20) -> None:
    """Compiles it and goes on as long as it lets us, by tokens spread over what is allowed."""
    constraint = compiler.compile(grammar)
    answer = np.zeros(num_steps, np.int32)
    for step in range(num_steps):
        constraint.prepare(answer[:step])
        mask = constraint.allowed()
        if mask is None:
            return
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        plain = [token for token in allowed.tolist() if token not in compiler._tokenizer.end_ids]
        if not plain:
            return
        answer[step] = plain[7 * step % len(plain)]


def chain(length: int, link: Callable[[str], object]) -> str:
    definitions = {f"d{i}": link(f"#/$defs/d{i + 1}") for i in range(length)}
    return json.dumps(
        {"$defs": {**definitions, f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"}, separators=(",", ":")
    )


def nested(opening: str, closing: str, depth: int, middle: str = '{"type":"string"}') -> str:
    return opening * depth + middle + closing * depth


WORDS = [f"value {i}" for i in range(6000)]
KEYWORDS = (
    *("type", "properties", "items", "anyOf", "allOf", "oneOf", "$ref", "$defs", "a", "enum", "const", "required"),
    *("minLength", "maxLength", "minItems", "maxItems", "minimum", "maximum", "multipleOf", "pattern", "format"),
    *("additionalProperties", "patternProperties", "prefixItems", "not"),
)


def schema(value: object) -> Grammar:
    return Grammar("json_schema", value if isinstance(value, str) else json.dumps(value))


def lark(*rules: str) -> Grammar:
    return Grammar("lark", "\n".join(rules))


def rules(length: int, name: str, copies: int = 1) -> Grammar:
    """A chain of them."""
    links = [f"{name}{i}: " + " ".join([f"{name}{i + 1}"] * copies) for i in range(length)]
    return lark(f"start: {name}0", *links, f'{name}{length}: "a"')


NO_END = "no text that has an end"
REFUSED: dict[str, tuple[Grammar, str]] = {
    "unknown kind": (Grammar("xml", "<a/>"), "known: json_schema, json_object, regex, lark, gbnf"),
    "not text": (Grammar("regex", None), "is text, not NoneType"),  # type: ignore[arg-type]
    "a surrogate": (Grammar("regex", "a\ud800"), "lone surrogate"),
    "a megabyte": (schema({"enum": ["x" * 1_000_000]}), "1000014 bytes, the limit is 131072"),
    "a megabyte of regex": (Grammar("regex", "a|" * 500_000), "1000000 bytes, the limit is 16384"),
    "a source too many": (Grammar("json_object", "{}"), "takes no source"),
    "no JSON": (schema('{"type": '), "not JSON: Expecting value: line 1 column 10"),
    "no schema": (schema([1]), "is an object, not list"),
    "a schema without words": (schema("false"), "is an object, not bool"),
    "no type": (schema({"type": "text"}), "not valid"),
    "NaN": (schema('{"const": NaN}'), "not valid"),
    "nested": (schema(nested('{"items":', "}", 101)), "deeper than 100 levels"),
    "nested beyond Python": (schema(nested("[", "]", 60_000, "")), "deeper than 100 levels"),
    "nested in the end": (schema(nested('{"a":', "}", 120, "1")), "deeper than 100 levels"),
    "nothing fits": (schema({"allOf": [{"type": "string"}, {"type": "null"}]}), "[Uu]nsatisfiable"),
    "keywords": (schema({"not": {"type": "string"}}), 'Unimplemented keys: \\["not"\\]'),
    "format": (schema({"type": "string", "format": "zip"}), "Unknown format: zip"),
    "options of the library": (schema({"x-guidance": {"lenient": True}}), "x-guidance"),
    "another host": (schema({"$ref": "http://host/schema"}), "does not fetch"),
    "a file": (schema({"$ref": "file:///etc/passwd"}), "not present|does not fetch"),
    "nothing there": (schema({"$ref": "#/$defs/a"}), "does not exist"),
    "itself": (schema({"$ref": "#"}), NO_END),
    "itself and more": (schema({"allOf": [{"$ref": "#"}, {"type": "string"}]}), "circular"),
    "a product": (schema({"allOf": [{"anyOf": [{"required": [f"{i}{k}"]} for k in "ab"]} for i in range(40)]}), "."),
    "unclosed": (Grammar("regex", "(a"), "unclosed group"),
    "lookahead": (Grammar("regex", "(?=a)b"), "look-around"),
    "backreference": (Grammar("regex", r"(a)\1"), "backreferences are not supported"),
    "nested groups": (Grammar("regex", nested("(", ")", 8000, "a")), "not valid"),
    "repeated repetitions": (Grammar("regex", "((a{1000}){1000}){1000}"), "too many expressions"),
    "starred": (Grammar("regex", "(a|aa)*" * 2000 + "b"), "."),
    "lark": (lark("start: ("), "not valid"),
    "lark open slash": (lark('start: / "test"', ""), "not valid"),
    "lark without start": (lark('a: "b"'), "not valid"),
    "lark ring": (lark("start: a", "a: b", "b: a"), NO_END),
    "lark ring of terminals": (lark("start: A", 'A: "a" A'), "circular reference"),
    "lark doubled": (rules(24, "R", copies=2), "."),
    "lark rules": (rules(600, "r"), "602 lines, the limit is 500"),
    "lark nested": (lark("start: " + nested("(", ")", 400, '"a"')), "deeply nested"),
    "lark temperature": (lark("start: a", 'a[temperature=0.5]: "x"'), "gives a rule a temperature"),
    "lark garbage": (Grammar("lark", "\0" * 999), "not valid"),
    "gbnf nested": (Grammar("gbnf", "root ::= " + nested("(", ")", 8000, '"a"')), "nested deeper than 24"),
    "gbnf without end": (Grammar("gbnf", 'root ::= root "a" | root "b"'), NO_END),
}
ENDURED = {
    "references in a chain": schema(chain(3500, lambda to: {"$ref": to})),
    "objects in a chain": schema(chain(1100, lambda to: {"properties": {"a": {"$ref": to}}, "required": ["a"]})),
    "arrays in a chain": schema(chain(2600, lambda to: {"items": {"$ref": to}})),
    "twice each": schema(chain(30, lambda to: {"type": "array", "prefixItems": [{"$ref": to}, {"$ref": to}]})),
    "an enum": schema({"enum": [f"value {i}" for i in range(6000)]}),
    "properties": schema({"properties": {f"value {i}": {} for i in range(1500)}}),
    "a recursive schema": schema({"properties": {"a": {"$ref": "#"}}, "additionalProperties": False}),
    "one without end": schema({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
    "many items": schema({"type": "array", "items": {"type": "integer"}, "minItems": 10**9}),
    "a long string": schema({"type": "string", "maxLength": 10**9}),
    "nested to the limit": schema(nested('{"items":', "}", 99)),
    "rules in a chain": rules(490, "r"),
    "terminals in a chain": rules(490, "R"),
    "ambiguous": lark("start: e", 'e: e e | "a" | '),
    "nullable": lark("start: e e e e", 'e: e e e | ""'),
    "alternatives": lark('start: "x" | ' + " | ".join(f'start "{i}"' for i in range(500))),
    "letters of all scripts": Grammar("regex", r"(\p{L}*\w+){3}"),
    "far ahead": Grammar("regex", ".*a.{100000}"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_reason(compiler: GrammarCompiler, name: str) -> None:
    grammar, message = REFUSED[name]
    with pytest.raises(GrammarError, match=message) as raised:
        take_steps(compiler, grammar)
    assert len(str(raised.value)) < 700
    assert "panic" not in str(raised.value)


@pytest.mark.parametrize("name", ENDURED)
def test_endured(compiler: GrammarCompiler, name: str) -> None:
    take_steps(compiler, ENDURED[name])


def test_the_next_grammar_works(compiler: GrammarCompiler) -> None:
    for name in ("nested groups", "lark garbage", "repeated repetitions"):
        with pytest.raises(GrammarError):
            take_steps(compiler, REFUSED[name][0])
        take_steps(compiler, Grammar("regex", "[ab]{4}"))


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["regex", "lark", "gbnf", "json_schema"]),
    source=st.one_of(
        st.text('abroot:=|*+?(){}[]/\\"^$.,019 \n%<>~-_"', max_size=40),
        st.text('abroot:=|*+?(){}[]/\\" \n', max_size=40).map(lambda text: f"start: {text}\n"),
        st.text('ab|*+?(){}[]/\\" \n', max_size=40).map(lambda text: f"root ::= {text}\n"),
        st.recursive(
            st.sampled_from(["string", "object", "#", "#/a", True, None, 0, -1, 1e300, "a*", "("]),
            lambda some: st.dictionaries(st.sampled_from(KEYWORDS), some, max_size=3) | st.lists(some, max_size=3),
            max_leaves=6,
        ).map(json.dumps),
    ),
)
def test_noise_is_refused_or_works(compiler: GrammarCompiler, kind: str, source: str) -> None:
    with suppress(GrammarError):  # anything else, a panic too, fails
        take_steps(compiler, Grammar(kind, source), 4)


def test_the_documentation_lists_the_limits() -> None:
    page = (Path(__file__).parents[2] / "docs" / "structured-output.md").read_text(encoding="utf-8")
    stated = {
        f"{limits.MAX_SCHEMA_BYTES >> 10} KiB",
        f"{limits.MAX_TEXT_BYTES >> 10} KiB",
        f"{limits.MAX_SCHEMA_NESTING} levels",
        f"{limits.MAX_RULES} lines",
    }
    assert not [limit for limit in stated if limit not in page]
