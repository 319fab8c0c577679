"""Ollama's words for durations, conversations and parts of answers, without a server."""

import json
import math
from contextlib import suppress
from fractions import Fraction
from typing import Any

import ollama
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import PydanticCustomError

from isotherm.dialogue.parts import Content, Part, Reasoning, ToolCallArguments, ToolCallEnd, ToolCallStart
from isotherm.server.errors import ApiError
from isotherm.server.ollama import Said, Speech, as_message
from isotherm.server.ollama_fields import AnswerFields, ChatRequest, duration_s

UNITS = {
    "h": Fraction(3600),
    "m": Fraction(60),
    "s": Fraction(1),
    "ms": Fraction(1, 10**3),
    "us": Fraction(1, 10**6),
    "µs": Fraction(1, 10**6),
    "ns": Fraction(1, 10**9),
}
PARTS = st.tuples(st.integers(0, 9999), st.sampled_from([".", ".5", ".25"]), st.sampled_from(sorted(UNITS)))


@given(st.lists(PARTS, min_size=1, max_size=5))
def test_durations_as_go_writes_them(parts: list[tuple[int, str, str]]) -> None:
    text = "".join(f"{whole}{decimals}{unit}" for whole, decimals, unit in parts)
    exact = sum(
        Fraction(f"{whole}{decimals if decimals != '.' else ''}") * UNITS[unit] for whole, decimals, unit in parts
    )
    assert math.isclose(duration_s(text), float(exact), rel_tol=1e-12, abs_tol=0.0)
    assert math.isinf(duration_s(f"-{text}")) == (exact > 0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (300, 300.0),
        (0, 0.0),
        (0.5, 0.5),
        (-1, math.inf),
        ("-1", math.inf),
        ("-1m", math.inf),
        ("0", 0.0),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        (10**400, math.inf),
        (math.inf, math.inf),
    ],
)
def test_durations(given: float | str, expected: float) -> None:
    assert duration_s(given) == expected


@given(st.text(max_size=80) | st.booleans() | st.none() | st.just(math.nan) | st.lists(st.integers(), max_size=2))
def test_what_is_no_duration_is_refused(value: Any) -> None:
    with suppress(PydanticCustomError):
        assert duration_s(value) >= 0.0
        assert any(digit in value for digit in "0123456789")


def chat(*messages: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """As the client's own types write them."""
    sent = [ollama.Message(**message).model_dump(exclude_none=True) for message in messages]
    return ChatRequest.model_validate({"model": "m", "messages": sent}).prompt()


def test_a_conversation_with_tools() -> None:
    calls = [
        {"function": {"name": "look", "arguments": {"where": "out"}}},
        {"function": {"name": "ask", "arguments": {}}},
    ]
    got = chat(
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Is it wet?"},
        {"role": "assistant", "content": "", "thinking": "I look.", "tool_calls": calls},
        {"role": "tool", "content": "nobody", "tool_name": "ask"},
        {"role": "tool", "content": "wet"},
    )
    assert got == (
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Is it wet?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "I look.",
            "tool_calls": [
                {"id": "call_2_0", "type": "function", "function": {"name": "look", "arguments": '{"where": "out"}'}},
                {"id": "call_2_1", "type": "function", "function": {"name": "ask", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "content": "nobody", "tool_call_id": "call_2_1"},
        {"role": "tool", "content": "wet", "tool_call_id": "call_2_0"},
    )
    with pytest.raises(ApiError, match="sing"):
        chat({"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "x", "tool_name": "sing"})


def test_ids_of_calls_are_kept() -> None:
    messages = [
        {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "look", "arguments": {}}}]},
        {"role": "tool", "content": "wet", "tool_call_id": "a", "tool_name": "look"},
    ]
    asked, answered = ChatRequest.model_validate({"model": "m", "messages": messages}).prompt()
    assert asked["tool_calls"][0]["id"] == answered["tool_call_id"] == "a"


def test_parts_become_messages() -> None:
    speech = Speech()
    parts: list[Part] = [
        Reasoning("I look."),
        Content("So: "),
        ToolCallStart(0, "look"),
        ToolCallArguments(0, '{"where": '),
    ]
    first = speech.add(parts)
    assert (first.thinking, first.content, first.calls) == ("I look.", "So: ", [])
    second = speech.add([ToolCallArguments(0, '"out"}'), ToolCallEnd(0), ToolCallStart(1, "wait")])
    third = speech.add([ToolCallArguments(1, "{}"), ToolCallEnd(1), ToolCallStart(2, "cut"), ToolCallArguments(2, "{")])
    whole = ollama.Message(**as_message(Said("So: ", "I look.", second.calls + third.calls))["message"])
    assert (whole.content, whole.thinking) == ("So: ", "I look.")
    assert whole.tool_calls is not None
    assert [(call.function.name, call.function.arguments) for call in whole.tool_calls] == [
        ("look", {"where": "out"}),
        ("wait", {}),
    ]
    first_id, second_id = (call["id"] for call in second.calls + third.calls)
    assert first_id != second_id


def test_formats_are_grammars() -> None:
    def kind(form: Any) -> tuple[str, str] | None:
        grammar = AnswerFields.model_validate({"model": "m", "format": form}).grammar()
        return None if grammar is None else (grammar.kind, grammar.source)

    assert kind(None) is None
    assert kind("") is None
    assert kind("json") == ("json_object", "")
    assert kind({}) == ("json_schema", "{}")
    assert kind({"type": "array"}) == ("json_schema", json.dumps({"type": "array"}))
