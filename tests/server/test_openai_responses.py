"""/v1/responses, asked by the `openai` package; answers are held against the model itself."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving import Serving
from tiny_models import write_tiny

import isotherm
from isotherm.dialogue.parts import Content, Reasoning, ToolCallArguments, ToolCallEnd, ToolCallStart
from isotherm.engine.sampling import SampledToken
from isotherm.server.ask import Delta
from isotherm.server.response_input import Item, messages_of
from isotherm.server.response_output import ResponseOutput
from isotherm.text import TextGenerator
from isotherm.types import QuantType

MESSAGES: Any = [{"role": "system", "content": "the sea"}, {"role": "user", "content": "the rain in spain"}]
ASKED: Any = {"model": "tiny", "instructions": "the sea", "input": "the rain in spain"}


def test_an_answer_is_the_models(client: openai.OpenAI, model: TextGenerator) -> None:
    expected = model.generate(MESSAGES, max_tokens=12, temperature=0.8, seed=5)
    extra = {"seed": 5}
    got = client.responses.create(**ASKED, max_output_tokens=12, temperature=0.8, extra_body=extra, metadata={"a": "b"})
    assert got.object == "response"
    assert got.output_text == expected.text
    assert got.usage is not None
    assert got.usage.input_tokens == expected.num_prompt_tokens
    assert got.usage.output_tokens == expected.num_tokens
    assert got.usage.output_tokens_details.reasoning_tokens == 0
    assert got.status == {"stop": "completed", "length": "incomplete"}[expected.finish_reason]
    assert got.temperature == 0.8
    assert got.metadata == {"a": "b"}
    assert got.instructions == "the sea"
    assert got.to_dict()["store"] is False


def test_cut_and_whole(client: openai.OpenAI, model: TextGenerator) -> None:
    got = client.responses.create(**ASKED, max_output_tokens=2)
    assert got.status == got.output[0].status == "incomplete"  # type: ignore[union-attr]
    assert got.incomplete_details is not None
    assert got.incomplete_details.reason == "max_output_tokens"
    format_: Any = {"type": "json_schema", "name": "yes", "schema": {"type": "boolean"}, "strict": True}
    got = client.responses.create(**ASKED, text={"format": format_})
    assert got.status == got.output[0].status == "completed"  # type: ignore[union-attr]
    assert got.incomplete_details is None
    assert isinstance(json.loads(got.output_text), bool)
    assert got.text is not None
    assert got.to_dict()["text"]["format"] == format_  # type: ignore[index]


def test_a_stream_tells_how_the_answer_came_to_be(client: openai.OpenAI, model: TextGenerator) -> None:
    expected = model.generate(MESSAGES, max_tokens=9, num_logprobs=2)
    include: Any = ["message.output_text.logprobs"]
    events = list(client.responses.create(**ASKED, max_output_tokens=9, stream=True, top_logprobs=2, include=include))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{'incomplete' if expected.finish_reason == 'length' else 'completed'}",
    ]
    assert "".join(event.delta for event in deltas) == expected.text
    logprobs = [entry.logprob for event in deltas for entry in event.logprobs]
    assert logprobs == [token.logprob for token in expected.tokens]
    last: Any = events[-1]
    assert last.response.output_text == expected.text
    (part,) = last.response.output[0].content
    assert [entry.logprob for entry in part.logprobs] == logprobs
    assert [[top.logprob for top in entry.top_logprobs] for entry in part.logprobs] == [
        [logprob for _, logprob in token.top_logprobs] for token in expected.tokens
    ]
    assert last.response.usage.output_tokens == expected.num_tokens
    format_: Any = {"type": "json_schema", "name": "yes", "schema": {"type": "boolean"}}
    with client.responses.stream(**ASKED, text={"format": format_}) as stream:  # its own bookkeeping finds no fault
        assert isinstance(json.loads(stream.get_final_response().output_text), bool)


def test_events_are_named_on_the_wire(server: Serving) -> None:
    body = {**ASKED, "max_output_tokens": 2, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/responses", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events.pop() == ""
    for event in events:
        name, data = event.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def test_a_conversation_comes_whole(client: openai.OpenAI, model: TextGenerator) -> None:
    first = client.responses.create(**ASKED, max_output_tokens=6)
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "the rain in spain"}]},
        *[item.to_dict() for item in first.output],
        {"type": "message", "role": "user", "content": "and the sea"},
    ]
    got = client.responses.create(model="tiny", instructions="the sea", input=items, max_output_tokens=6)
    messages: Any = [
        *MESSAGES,
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "and the sea"},
    ]
    assert got.output_text == model.generate(messages, max_tokens=6).text


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"role": "user", "content": "x", "colour": "red"}]}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"text": {"verbosity": "low"}}, "text"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"n": 2}, "n"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ],
)
def test_what_cannot_be_honoured_is_refused(client: openai.OpenAI, changed: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.post("/responses", body={**ASKED, **changed}, cast_to=object)
    assert raised.value.type == "invalid_request_error"
    assert (raised.value.param or "").startswith(param)


def test_reasoning_is_an_item_of_its_own(tmp_path: Path) -> None:
    """The template opens the block, which a tiny model never closes."""
    template = "{{ messages[0].content }}{% if enable_thinking is not false %}<think>{% else %}</think>{% endif %}"
    metadata = {"tokenizer.chat_template": template}
    path = write_tiny(tmp_path / "thinker.gguf", "llama", QuantType.Q4_0, metadata=metadata)
    with isotherm.load(path, cache_bytes=0) as alone:
        thought = alone.generate("the rain<think>", raw=True, max_tokens=6)
        said = alone.generate("the rain</think>", raw=True, max_tokens=6)
    options: Any = {"model": "thinker", "input": "the rain", "max_output_tokens": 6}
    with Serving([str(path), "--threads", "1"], tmp_path) as server:
        client = openai.OpenAI(base_url=f"{server.wait_healthy().url}/v1", api_key="none", max_retries=0)
        events = list(client.responses.create(**options, stream=True))
        last: Any = events[-1]
        (item,) = last.response.output
        assert item.type == "reasoning"
        assert item.content[0].text == thought.text
        assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == thought.text
        assert last.response.usage.output_tokens_details.reasoning_tokens == thought.num_tokens
        plain = client.responses.create(**options, reasoning={"effort": "none"})
        assert plain.output_text == said.text
        assert plain.reasoning is not None
        assert plain.reasoning.effort == "none"
        client.close()


# --- translation, without a model ---


def items_of(*items: dict[str, Any]) -> list[Item]:
    from isotherm.server.openai_responses import ResponsesRequest

    read = ResponsesRequest.model_validate({"model": "m", "input": list(items)}).input
    assert not isinstance(read, str)
    return read


def call_of(name: str, call_id: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}


def test_items_become_messages() -> None:
    thought = {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    call = {"type": "function_call", "arguments": "{}", "status": "completed"}
    items = items_of(
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        thought,
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "so", "annotations": []}]},
        {**call, "call_id": "1", "name": "f"},
        {**call, "call_id": "2", "name": "g"},
        {"type": "function_call_output", "call_id": "1", "output": "one"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "two"}]},
        {**call, "call_id": "3", "name": "f"},
        thought,
        {"role": "assistant", "content": "done"},
        {"type": "function_call_output", "call_id": "3", "output": "three"},
        {"role": "assistant", "content": "so"},
        {"role": "assistant", "content": "really"},
    )
    assert messages_of("first", items) == (
        {"role": "system", "content": "first"},
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "a\nb"},
        {
            "role": "assistant",
            "content": "so",
            "reasoning_content": "hm",
            "tool_calls": [call_of("f", "1"), call_of("g", "2")],
        },
        {"role": "tool", "content": "one", "tool_call_id": "1"},
        {"role": "tool", "content": "two", "tool_call_id": "2"},
        {"role": "assistant", "content": "done", "reasoning_content": "hm", "tool_calls": [call_of("f", "3")]},
        {"role": "tool", "content": "three", "tool_call_id": "3"},
        {"role": "assistant", "content": "so\nreally"},
    )


def tokens(count: int) -> tuple[SampledToken, ...]:
    return tuple(SampledToken(number, -float(number), ()) for number in range(count))


DELTAS = (
    Delta((), tokens(1)),
    Delta((Reasoning("let"),), tokens(1)),
    Delta((Reasoning(" me"),), tokens(2)),
    Delta((), tokens(1)),
    Delta((Content("so"),), tokens(1)),
    Delta((Content(" it"), Content(" is")), tokens(2)),
    Delta((ToolCallStart(0, "f"), ToolCallArguments(0, '{"a":'), ToolCallArguments(0, "1}")), tokens(5)),
    Delta((ToolCallEnd(0), ToolCallStart(1, "g"), ToolCallArguments(1, "{}"), ToolCallEnd(1)), tokens(5)),
)


def test_parts_become_items_and_events() -> None:
    output = ResponseOutput(lambda tokens: [{"logprob": token.logprob} for token in tokens])

    def run() -> Iterator[dict[str, Any]]:
        for delta in DELTAS:
            yield from output.take(delta)
        yield from output.end("completed")

    events = [json.loads(json.dumps(fields)) for fields in run()]
    thought, message, first, second = output.items
    assert (thought["type"], thought["content"]) == ("reasoning", [{"type": "reasoning_text", "text": "let me"}])
    assert message["content"][0]["text"] == "so it is"
    assert [entry["logprob"] for entry in message["content"][0]["logprobs"]] == [0, 0, 0, -1]
    assert (first["name"], first["arguments"]) == ("f", '{"a":1}')
    assert (second["name"], second["arguments"]) == ("g", "{}")
    assert first["call_id"] != second["call_id"]
    assert {item["status"] for item in output.items} == {"completed"}
    assert output.num_reasoning_tokens == 4
    # whoever follows the events alone has the same items at the end
    built: list[Any] = []
    for event in events:
        match event["type"].removeprefix("response."):
            case "output_item.added":
                assert event["output_index"] == len(built)
                assert event["item"]["status"] == "in_progress"
                built.append(event["item"])
            case "content_part.added":
                assert event["part"]["text"] == ""
                built[event["output_index"]]["content"].append(event["part"])
            case "output_text.delta" | "reasoning_text.delta":
                part = built[event["output_index"]]["content"][event["content_index"]]
                part["text"] += event["delta"]
                if "logprobs" in event:
                    part["logprobs"] += event["logprobs"]
            case "function_call_arguments.delta":
                built[event["output_index"]]["arguments"] += event["delta"]
            case "output_item.done":
                built[event["output_index"]]["status"] = "completed"
                assert event["item"] == built[event["output_index"]]
    assert built == output.items


def test_an_answer_that_says_nothing_is_an_empty_message() -> None:
    output = ResponseOutput(None)
    assert [fields["type"] for fields in output.take(Delta((), ()))] == []
    assert len(list(output.end("completed"))) == 5
    assert output.items[0]["content"][0]["text"] == ""
