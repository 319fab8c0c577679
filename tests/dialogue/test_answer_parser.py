"""What real models write per format, and properties that hold for any text and any cuts of it."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isotherm.dialogue.answer_parser import AnswerParser
from isotherm.dialogue.json_scan import JsonScan
from isotherm.dialogue.parts import Content, Part, Reasoning, ToolCallArguments, ToolCallEnd, ToolCallStart
from isotherm.dialogue.reasoning import REASONING_BLOCKS, ReasoningBlock
from isotherm.dialogue.rendering import spelled_call
from isotherm.dialogue.tool_formats import TOOL_FORMATS

NAMES = ("get_weather", "get", "now")
THINK, THINK_TAG, CHANNEL = REASONING_BLOCKS
CALL = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
PARIS = ("get_weather", '{"city": "Paris"}')


def parts_of(parser: AnswerParser, pieces: list[str]) -> list[Part]:
    """With neighbouring texts of a kind joined, which is all that cuts may change."""
    parts: list[Part] = []
    for part in [part for piece in pieces for part in parser.push(piece)] + parser.finish():
        last = parts[-1] if parts else None
        if isinstance(part, Content) and isinstance(last, Content):
            parts[-1] = Content(last.text + part.text)
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
            parts[-1] = Reasoning(last.text + part.text)
        else:
            parts.append(part)
    return parts


def parser_of(name: str, block: ReasoningBlock | None = None, *, is_reasoning: bool = False) -> AnswerParser:
    return AnswerParser(block, is_reasoning=is_reasoning, tool_format=TOOL_FORMATS[name], names=NAMES)


def short(parts: list[Part]) -> list[Any]:
    """Content as its text, a call as (name, arguments), reasoning as it is."""
    found: list[Any] = []
    for part in parts:
        if isinstance(part, Content):
            found.append(part.text)
        elif isinstance(part, Reasoning):
            found.append(part)
        elif isinstance(part, ToolCallStart):
            assert part.index == sum(isinstance(item, tuple) for item in found)
            found.append((part.name, ""))
        elif isinstance(part, ToolCallArguments):
            found[-1] = (found[-1][0], found[-1][1] + part.text)
        else:
            assert isinstance(part, ToolCallEnd)
            assert isinstance(json.loads(found[-1][1]), dict)
    return found


ANSWERS: list[tuple[str, str, list[Any]]] = [
    # Qwen2.5, Qwen3, Hermes 2 and 3, Granite 4: model cards and templates
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", [PARIS]),
    ("hermes", f"Let me see.\n\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>",
     ["Let me see.", PARIS, PARIS]),
    ("hermes", '<tool_call>\n{"arguments": {"city": "Paris"}, "name": "get_weather"}\n</tool_call>', [PARIS]),
    ("hermes", f"<tool_call>{CALL}\n{CALL}</tool_call>", [PARIS, PARIS]),
    ("hermes", f"<tool_call>\n{CALL}", [PARIS]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', [("now", "{}")]),
    ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>', [("now", '{"a": 1}')]),
    # Qwen2.5-Coder forgets the markers
    ("hermes", f"```json\n{CALL}\n```", [PARIS]),
    ("hermes", f"I will look.\n```json\n{CALL}\n```\nThere.", ["I will look.", PARIS, "There."]),
    ("hermes", CALL, [PARIS]),
    # Llama 3.1 and 3.2: prompt format pages
    ("llama3", '{"name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS]),
    ("llama3", '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS]),
    ("llama3", '{"name": "now", "parameters": {}}; {"name": "now", "parameters": {"a": 1}}',
     [("now", "{}"), ("now", '{"a": 1}')]),
    # Mistral 7B v0.3 and Nemo; then Small 3.2 and Devstral
    ("mistral", f'[TOOL_CALLS] [{CALL}, {{"name": "now", "arguments": {{}}, "id": "abcdefghi"}}]',
     [PARIS, ("now", "{}")]),
    ("mistral_args", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[ARGS]{}', [PARIS, ("now", "{}")]),
    ("mistral_args", '[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"city": "Paris"}', [PARIS]),
    # FunctionGemma: formatting and best practices; Gemma 4: its template
    ("function_gemma", "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>", [PARIS]),
    ("gemma4", '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>', [PARIS]),
    ("gemma4", "<|tool_call>call:now{}<tool_call|>"
     '<|tool_call>call:now{a:[1,-2.5],b:{c:true,<|"|>d e<|"|>:null}}<tool_call|>',
     [("now", "{}"), ("now", '{"a": [1, -2.5], "b": {"c": true, "d e": null}}')]),
    # Gemma 3: function calling page, JSON and fences
    ("generic", '```tool_code\n{"name": "get_weather", "parameters": {"city": "Paris"}}\n```', [PARIS]),
    ("generic", f"[{CALL}, {CALL}]", [PARIS, PARIS]),
    ("generic", f"{CALL}\n{CALL}", [PARIS, PARIS]),
    # none of these is a call
    ("hermes", '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>', None),
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par', None),
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": Paris}}\n</tool_call>', None),
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": [1]}\n</tool_call>', None),
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": "city"}\n</tool_call>', None),
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": NaN}}\n</tool_call>', None),
    ("hermes", '<tool_call>{"name": ["now"], "arguments": {}}', None),
    ("hermes", '<tool_call>{"arguments": {}}', None),
    ("hermes", "Use <tool_call> as in `<tool_", None),
    ("hermes", '```json\n{"city": "Paris"}\n```\n', None),
    ("hermes", "```python\nprint({})\n```", None),
    ("hermes", f"So: {CALL}", None),
    ("llama3", "{ not JSON }", None),
    ("mistral_args", "[TOOL_CALLS]other[ARGS]{}", None),
    ("gemma4", "<|tool_call>call:now{a:tru}<tool_call|>", None),
    ("gemma4", '<|tool_call>call:now{a:<|"|>x}<tool_call|>', None),
    ("generic", '{"answer": 42}', None),
    ("generic", " \n ", None),
    ("generic", "[1, 2]", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "expected"), ANSWERS)
@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_answers_of_real_models(name: str, text: str, expected: list[Any] | None, size: int) -> None:
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert short(parts_of(parser_of(name), pieces)) == ([text] if expected is None else expected)


@pytest.mark.parametrize(
    ("block", "is_reasoning", "text", "expected"),
    [
        (THINK, False, "<think>\nHm.\n\nSo\n</think>\n\nHi", [Reasoning("Hm.\n\nSo"), "Hi"]),
        (THINK, False, "\n<think>Hm", [Reasoning("Hm")]),
        (THINK, True, "\nHm</think>Hi\n", [Reasoning("Hm"), "Hi\n"]),
        (THINK, False, "<think>\n\n</think>\n\nHi", ["Hi"]),
        (THINK, True, f"I call</think>\n<tool_call>\n{CALL}\n</tool_call>", [Reasoning("I call"), PARIS]),
        (THINK, True, f"Hm</think>\n{CALL}", [Reasoning("Hm"), PARIS]),
        (THINK, True, f"<tool_call>{CALL}</tool_call>", [Reasoning(f"<tool_call>{CALL}</tool_call>")]),
        (THINK, False, "Use <think>x</think>", ["Use <think>x</think>"]),
        (THINK, False, "<thin", ["<thin"]),
        (THINK, True, "a </thin", [Reasoning("a </thin")]),
        (None, False, "<think>x</think>y", ["<think>x</think>y"]),
        (THINK_TAG, False, "[THINK]a[/THINK]b", [Reasoning("a"), "b"]),
        (CHANNEL, False, "<|channel>thought\nHm\n<channel|>Hi", [Reasoning("Hm"), "Hi"]),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 10_000])
def test_reasoning(block: ReasoningBlock | None, is_reasoning: bool, text: str, expected: list[Any], size: int) -> None:
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert short(parts_of(parser_of("hermes", block, is_reasoning=is_reasoning), pieces)) == expected


FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "```", "json", "\n"),
        *("<|tool_call>", "<tool_call|>", "call:now{", "call:get", '<|"|>', "{", "}", "[", "]", ",", ":", ";", '"'),
        *("<think>", "</think>", "now", "get", "get_weather", "x", " ", "1", "tru", "é", "\\", "a:"),
        *('{"name": "now", "arguments": {}}', '{"name": "get", "parameters": {"a": [1, "}"]}}', '{"name": "', CALL),
        *("<start_function_call>", "<end_function_call>", "<escape>", "<", "<t", "`", "thought"),
    ]
)
TEXTS = st.lists(FRAGMENTS, max_size=14).map("".join)


@settings(max_examples=400)
@given(
    st.sampled_from(sorted(TOOL_FORMATS)),
    st.sampled_from([None, *REASONING_BLOCKS]),
    st.booleans(),
    TEXTS,
    st.lists(st.integers(0, 120), max_size=8),
)
def test_cuts_change_nothing_and_nothing_is_lost(
    name: str, block: ReasoningBlock | None, is_open: bool, text: str, cuts: list[int]
) -> None:
    is_reasoning = is_open and block is not None
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(bounds)]
    cut = parts_of(parser_of(name, block, is_reasoning=is_reasoning), pieces)
    whole = parts_of(parser_of(name, block, is_reasoning=is_reasoning), [text])
    singly = parts_of(parser_of(name, block, is_reasoning=is_reasoning), list(text))
    assert cut == whole == singly
    found = short(whole)
    if all(isinstance(part, Content) for part in whole) and block is None:
        assert "".join(found) == text
    shown = [item if isinstance(item, str) else getattr(item, "text", "") for item in found]
    rest = iter(text)
    assert all(char in rest for char in "".join(shown)), "text that is not in the answer, or in another order"


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6
)
ARGUMENTS = st.dictionaries(st.text(min_size=1), VALUES, max_size=4)


@given(
    st.sampled_from(["hermes", "llama3", "mistral", "mistral_args", "generic"]),
    st.lists(st.tuples(st.sampled_from(NAMES), ARGUMENTS), min_size=1, max_size=3),
)
def test_spelled_calls_are_read_back(name: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    spelling = TOOL_FORMATS[name].spelling
    texts = [spelled_call(TOOL_FORMATS[name], tool, json.dumps(arguments)) for tool, arguments in calls]
    answer = spelling.first + spelling.between.join(texts) + spelling.last
    found = short(parts_of(parser_of(name), list(answer)))
    assert [(tool, json.loads(arguments)) for tool, arguments in found] == calls


def test_nothing_is_held_longer_than_needed() -> None:
    parser = parser_of("hermes")
    assert parser.push("Hello") == [Content("Hello")]
    assert parser.push(" <") == []
    assert parser.push("b") == [Content(" <b")]
    assert parser.push("<tool_call>\n{") == []
    assert parser.push('"city"') == [Content('<tool_call>\n{"city"')]
    parser = parser_of("hermes")
    assert parser.push('{"name": "other"') == [Content('{"name": "other"')]
    parser = parser_of("llama3")
    assert len(parser.push('{"name": "now", "parameters": {}}')) == 3  # at once: no marker is waited for
    assert parser_of("hermes").push('```json\n{"a') == []
    parser = AnswerParser()
    assert parser.push("<tool_call> ") == [Content("<tool_call> ")]


def test_a_long_call_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    num_tokens = 0
    step = JsonScan._step

    def counted(scan: JsonScan, text: str) -> bool:
        nonlocal num_tokens
        num_tokens += 1
        return step(scan, text)

    monkeypatch.setattr(JsonScan, "_step", counted)
    parser = parser_of("hermes")
    text = '<tool_call>{"name": "now", "arguments": {"a": [' + "1, " * 20_000 + "1]}}</tool_call>"
    parts = [part for start in range(0, len(text), 60) for part in parser.push(text[start : start + 60])]
    assert len(parts) == 3
    assert num_tokens < 45_000  # of the text itself 40 020, and what is tried again at the end of a piece
