"""Forced calls: what llguidance allows under our grammars is what templates write and what our parser reads."""

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from vocabularies import NUM_BYTES, byte_tokenizer

from isotherm.dialogue.answer_parser import AnswerParser
from isotherm.dialogue.call_grammar import CallGrammar
from isotherm.dialogue.parts import Content, Reasoning, ToolCallArguments, ToolCallStart
from isotherm.dialogue.reasoning import REASONING_BLOCKS, ReasoningBlock
from isotherm.dialogue.rendering import spelled_call
from isotherm.dialogue.tool_formats import TOOL_FORMATS
from isotherm.dialogue.tools import read_tools
from isotherm.tokenization.tokenizer import Detokenizer, Tokenizer

llguidance = pytest.importorskip("llguidance")

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Köln"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = read_tools(
    [
        {"type": "function", "function": {"name": "get_weather", "parameters": CITY}},
        {"type": "function", "function": {"name": "now", "parameters": {"additionalProperties": False}}},
    ]
)
MARKERS = (
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<|tool_call>", "<tool_call|>"),
    *('<|"|>', "<start_function_call>", "<end_function_call>", "<escape>", "<think>", "</think>"),
)
TOKENIZERS = [
    pytest.param(byte_tokenizer(), id="spelled"),
    pytest.param(byte_tokenizer(control=MARKERS), id="control"),
    pytest.param(byte_tokenizer(user_defined=MARKERS), id="user defined"),
]
THINK = REASONING_BLOCKS[0]
FORMATS = sorted(TOOL_FORMATS)
JSON_FORMATS = [name for name in FORMATS if TOOL_FORMATS[name].quote is None]


def matcher_of(tokenizer: Tokenizer, source: str) -> Any:
    tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.num_tokens)]
    special = [token for token in range(tokenizer.num_tokens) if tokenizer.is_special(token)]

    class Vocabulary:
        eos_token_id = NUM_BYTES
        bos_token_id = None
        special_token_ids = special

        def __init__(self) -> None:
            self.tokens = tokens

        def __call__(self, text: str | bytes) -> list[int]:
            return list(text.encode() if isinstance(text, str) else text)

    wrapped = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary()))
    matcher = llguidance.LLMatcher(wrapped, llguidance.LLMatcher.grammar_from_lark(source), log_level=0)
    assert not matcher.get_error()
    return matcher


def source_of(
    tokenizer: Tokenizer,
    name: str,
    block: ReasoningBlock | None = None,
    *,
    is_parallel: bool = True,
    is_open: bool = False,
) -> str:
    writer = CallGrammar(TOOL_FORMATS[name], block, marker_ids(tokenizer))
    grammar = writer.of_calls(TOOLS, is_parallel=is_parallel, is_reasoning=is_open)
    assert grammar.kind == "lark"
    return grammar.source


def marker_ids(tokenizer: Tokenizer) -> dict[str, int]:
    found = {text: tokenizer.special_id(text) for text in MARKERS}
    return {text: token for text, token in found.items() if token is not None}


def is_allowed(tokenizer: Tokenizer, source: str, text: str) -> bool:
    """As a whole answer, its markers tokens where there are such."""
    return are_allowed(tokenizer, source, tokenizer.encode(text, add_special=False, parse_special=True))


def are_allowed(tokenizer: Tokenizer, source: str, ids: list[int]) -> bool:
    matcher = matcher_of(tokenizer, source)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", JSON_FORMATS)
def test_what_a_template_would_write_is_allowed(tokenizer: Tokenizer, name: str) -> None:
    tool_format = TOOL_FORMATS[name]
    spelling = tool_format.spelling
    weather = spelled_call(tool_format, "get_weather", '{"city": "Köln", "days": 3}')
    now = spelled_call(tool_format, "now", "{}")
    one = spelling.first + weather + spelling.last
    two = spelling.first + spelling.between.join([weather, now]) + spelling.last
    source, single = source_of(tokenizer, name), source_of(tokenizer, name, is_parallel=False)
    assert is_allowed(tokenizer, source, one)
    assert is_allowed(tokenizer, source, two)
    assert is_allowed(tokenizer, single, one)
    assert not is_allowed(tokenizer, single, two)
    for wrong in (
        "Hello",
        "",
        one[:-1],
        one.replace("get_weather", "other"),
        one.replace("Köln", "Rome"),
        one.replace('"city"', '"town"'),
        one.replace("3", "3.5"),
    ):
        assert not is_allowed(tokenizer, source, wrong), wrong


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize(
    ("name", "opener", "closer"),
    [("gemma4", "<|tool_call>", "<tool_call|>"), ("function_gemma", "<start_function_call>", "<end_function_call>")],
)
def test_calls_of_gemma(tokenizer: Tokenizer, name: str, opener: str, closer: str) -> None:
    quote, source = TOOL_FORMATS[name].quote, source_of(tokenizer, name)
    call = f"{opener}call:get_weather{{city:{quote}Köln{quote},days:[-1.5e3,{{a:true}}]}}{closer}"
    assert is_allowed(tokenizer, source, call)
    assert is_allowed(tokenizer, source, f"{call}{opener}call:now{{}}{closer}")
    for wrong in (call[:-1], call.replace("city", "town"), call.replace("true", "tru"), call.replace("_w", "w")):
        assert not is_allowed(tokenizer, source, wrong), wrong


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", JSON_FORMATS)
def test_one_call_at_most(tokenizer: Tokenizer, name: str) -> None:
    tool_format = TOOL_FORMATS[name]
    spelling = tool_format.spelling
    writer = CallGrammar(tool_format, None, marker_ids(tokenizer))
    source = writer.of_text_with_calls(TOOLS, is_parallel=False, is_reasoning=False).source
    call = spelled_call(tool_format, "now", "{}")
    one = spelling.first + call + spelling.last
    assert is_allowed(tokenizer, source, one)
    assert is_allowed(tokenizer, source, "Text.")
    assert not is_allowed(tokenizer, source, spelling.first + call + spelling.between + call + spelling.last)
    assert not is_allowed(tokenizer, source, f"{one} {one}")
    assert not are_allowed(tokenizer, source, list(f"{one}\n{one}".encode()))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", JSON_FORMATS)
@pytest.mark.parametrize("block", [None, THINK], ids=["plain", "reasoning"])
def test_strict_tools_beside_text(tokenizer: Tokenizer, name: str, block: ReasoningBlock | None) -> None:
    tool_format = TOOL_FORMATS[name]
    spelling = tool_format.spelling
    strict = [replace(TOOLS[0], is_strict=True), TOOLS[1]]
    source = CallGrammar(tool_format, block, marker_ids(tokenizer)).of_text_with_calls(
        strict, is_parallel=True, is_reasoning=False
    ).source  # fmt: skip
    weather = spelled_call(tool_format, "get_weather", '{"city": "Paris"}')
    now = spelled_call(tool_format, "now", '{"anything": [1, {}]}')
    opener = next((opener for opener in tool_format.markers if spelling.before.startswith(opener)), "")
    two = spelling.first + spelling.between.join([weather, now]) + spelling.last
    allowed = ["", "Hello.", " \n<b> `{`", two, "```json\n{}\n```"]
    refused = [two.replace("Paris", "Rome"), two.replace("now", "other"), two[:-3], two.replace('"city"', '"town"')]
    if spelling.first or opener:
        allowed += [f"Well.\n{two}", f"{two} So.\n{two} x"]
        refused += [f"Well.\n{two.replace('Paris', 'Rome')}", f"{two} So.\n{two.replace('Paris', 'Rome')}"]
    if block is not None:
        allowed += [f"<think>\nHm {{1}}</think>\n\n{text}" for text in allowed]
        refused += [f"<think>\nHm</think>\n\n{text}" for text in refused]
    for text in allowed:
        assert is_allowed(tokenizer, source, text), text
    for text in refused:
        assert not is_allowed(tokenizer, source, text), text
        assert not are_allowed(tokenizer, source, list(text.encode())), text  # its markers spelled out


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("block", [None, THINK], ids=["plain", "reasoning"])
@pytest.mark.parametrize("is_open", [False, True])
def test_whatever_is_allowed_is_read_as_calls(
    tokenizer: Tokenizer, name: str, block: ReasoningBlock | None, is_open: bool
) -> None:
    is_open = is_open and block is not None
    source = source_of(tokenizer, name, block, is_open=is_open)
    shown = frozenset(tokenizer.encode("".join(MARKERS), add_special=False, parse_special=True)) - set(range(NUM_BYTES))
    for seed in range(2):
        detokenizer = Detokenizer(tokenizer, shown=shown)
        ids = random_answer(matcher_of(tokenizer, source), tokenizer, random.Random(seed))
        text = "".join(map(detokenizer.push, ids)) + detokenizer.finish()
        parser = AnswerParser(block, is_reasoning=is_open, tool_format=TOOL_FORMATS[name], names=["get_weather", "now"])
        parts = parser.push(text) + parser.finish()
        assert not any(isinstance(part, Content) for part in parts), text
        names = [part.name for part in parts if isinstance(part, ToolCallStart)]
        arguments = [json.loads(part.text) for part in parts if isinstance(part, ToolCallArguments)]
        assert names
        assert all(set(given) <= {"city", "days"} for given in arguments)
        if block is None:
            assert not any(isinstance(part, Reasoning) for part in parts)


def random_answer(matcher: Any, tokenizer: Tokenizer, draw: random.Random) -> list[int]:
    """A random walk that prefers what ends texts, lists and blocks, so that it ends."""
    ending = [ord(char) for char in '"}]</>'] + list(range(NUM_BYTES, tokenizer.num_tokens))
    ids: list[int] = []
    while not matcher.is_stopped():
        mask = matcher.compute_bitmask()
        allowed = [token for token in range(tokenizer.num_tokens) if mask[token // 8] >> (token % 8) & 1]
        assert allowed
        forced = matcher.compute_ff_tokens()
        preferred = [token for token in allowed if token in ending]
        letters = [token for token in allowed if token < NUM_BYTES and chr(token).isalnum()]
        if forced:
            token = forced[0]
        elif NUM_BYTES in allowed and draw.random() < 0.5:
            token = NUM_BYTES
        elif THINK_END.startswith(tail := closing_tail(ids)) and tail and ord(THINK_END[len(tail)]) in allowed:
            token = ord(THINK_END[len(tail)])  # half a closer goes on, or a walk of bytes would never find it
        else:
            token = draw.choice(preferred if preferred and draw.random() < 0.7 else letters or allowed)
        assert matcher.consume_token(token)
        ids.append(token)
        assert len(ids) < 5000
    return [token for token in ids if token != NUM_BYTES]


THINK_END = "</think>"


def closing_tail(ids: list[int]) -> str:
    """The longest end of the ids that starts a closer spelled in bytes."""
    text = "".join(chr(token) if token < NUM_BYTES else "\0" for token in ids[-8:])
    return next((text[-size:] for size in range(7, 0, -1) if THINK_END.startswith(text[-size:])), "")
