"""Anthropic's words for conversations, tools and parts of answers, without a server."""

import json
from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from isotherm.dialogue.parts import Content, Part, Reasoning, ToolCallArguments, ToolCallEnd, ToolCallStart
from isotherm.server.anthropic import ContentBlocks
from isotherm.server.anthropic_fields import Conversation, CountRequest

START: dict[str, Any] = {
    "id": "msg_x",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [],
    "usage": {"input_tokens": 1, "output_tokens": 0},
}
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def conversation(*messages: dict[str, Any], **fields: Any) -> Conversation:
    return CountRequest.model_validate({"model": "m", "messages": list(messages), **fields})


def as_client(parts: list[Part]) -> tuple[list[Any], list[Any]]:
    """Content blocks as the client's own code adds up our events, and ours."""
    blocks = ContentBlocks()
    events = [*blocks.add(parts), *blocks.end()]
    start = {"type": "message_start", "message": START}
    snapshot, buffers = None, dict[int, bytes]()
    for event in (start, *events):
        snapshot = accumulate_event(event=EVENT.validate_python(event), current_snapshot=snapshot, json_bufs=buffers)
    assert snapshot is not None
    return [block.to_dict() for block in snapshot.content], blocks.content


def test_parts_become_blocks_in_their_order() -> None:
    parts: list[Part] = [
        Reasoning("let me "),
        Reasoning("see"),
        Content("It is "),
        Content("wet."),
        ToolCallStart(0, "look"),
        ToolCallArguments(0, '{"where": '),
        ToolCallArguments(0, '"out"}'),
        ToolCallEnd(0),
        ToolCallStart(1, "wait"),
        ToolCallArguments(1, "{}"),
        ToolCallEnd(1),
        Content("So."),
    ]
    theirs, ours = as_client(parts)
    assert theirs == ours
    first, second = ours[2].pop("id"), ours[3].pop("id")
    assert first != second
    assert ours == [
        {"type": "thinking", "thinking": "let me see", "signature": ""},
        {"type": "text", "text": "It is wet."},
        {"type": "tool_use", "name": "look", "input": {"where": "out"}},
        {"type": "tool_use", "name": "wait", "input": {}},
        {"type": "text", "text": "So."},
    ]


def test_a_call_that_is_cut_short_is_no_block() -> None:
    blocks = ContentBlocks()
    events = blocks.add([Content("So "), ToolCallStart(0, "look"), ToolCallArguments(0, '{"wh')]) + blocks.end()
    assert blocks.content == [{"type": "text", "text": "So "}]
    assert [event["type"] for event in events][-2:] == ["content_block_delta", "content_block_stop"]


CALLS = st.builds(
    lambda name, arguments, cut: (name, json.dumps(arguments), cut),
    st.text("abc", min_size=1),
    st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.booleans())),
    st.integers(0, 5),
)


@given(st.lists(st.builds(Content, st.text(min_size=1)) | st.builds(Reasoning, st.text(min_size=1)) | CALLS))
def test_the_client_adds_up_what_we_do(said: list[Any]) -> None:
    parts: list[Part] = []
    calls = 0
    for one in said:
        if not isinstance(one, tuple):
            parts.append(one)
            continue
        name, arguments, cut = one
        parts += [ToolCallStart(calls, name), ToolCallArguments(calls, arguments[:cut])]
        parts += [ToolCallArguments(calls, arguments[cut:]), ToolCallEnd(calls)]
        calls += 1
    theirs, ours = as_client(parts)
    assert theirs == ours
    assert "".join(block.get("text", "") for block in ours) == "".join(
        part.text for part in parts if isinstance(part, Content)
    )


def test_a_conversation_with_tools() -> None:
    body = conversation(
        {"role": "user", "content": "Is it wet?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I look.", "signature": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"where": "out"}},
                {"type": "tool_use", "id": "toolu_2", "name": "ask", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "wet"},
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_2",
                    "is_error": True,
                    "content": [{"type": "text", "text": "nobody"}, {"type": "text", "text": "here"}],
                },
                {"type": "text", "text": "So?"},
            ],
        },
        {"role": "user", "content": "Well?"},
        system=[{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}],
    )
    assert body.prompt() == (
        {"role": "system", "content": "Be\nbrief"},
        {"role": "user", "content": "Is it wet?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "I look.",
            "tool_calls": [
                {"id": "toolu_1", "type": "function", "function": {"name": "look", "arguments": '{"where": "out"}'}},
                {"id": "toolu_2", "type": "function", "function": {"name": "ask", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "wet"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: nobody\nhere"},
        {"role": "user", "content": "So?\nWell?"},
    )


def test_tools_and_their_choice() -> None:
    schema = {"type": "object", "properties": {"where": {"type": "string"}}}
    tool = {"name": "look", "description": "Looks.", "input_schema": schema, "cache_control": {"type": "ephemeral"}}
    body = conversation({"role": "user", "content": "x"}, tools=[tool, {"name": "ask", "input_schema": {}}])
    assert body.declarations() == (
        {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": schema}},
        {"type": "function", "function": {"name": "ask", "parameters": {}}},
    )
    for choice, expected, is_parallel in (
        (None, None, True),
        ({"type": "auto"}, "auto", True),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "none"}, "none", True),
        ({"type": "tool", "name": "look"}, {"type": "function", "function": {"name": "look"}}, True),
    ):
        body = conversation({"role": "user", "content": "x"}, tool_choice=choice)
        assert (body.choice(), body.is_parallel) == (expected, is_parallel)


def test_thinking_is_a_variable_of_the_template() -> None:
    user = {"role": "user", "content": "x"}
    assert conversation(user).thinks() is None
    assert conversation(user, thinking={"type": "adaptive"}).thinks() is None
    assert conversation(user, thinking={"type": "disabled"}).thinks() is False
    with pytest.raises(ValidationError):
        conversation(user, thinking={"type": "enabled", "budget_tokens": 2048})
