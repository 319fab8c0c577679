"""/v1/messages, asked by the `anthropic` package; answers are held against the model itself."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from serving import Serving

import isotherm
from isotherm.text import TextGenerator
from isotherm.types import Grammar

MESSAGES: Any = [{"role": "user", "content": "the rain in spain"}]
PROMPT: Any = [{"role": "system", "content": "the sea"}, *MESSAGES]
OPTIONS: Any = {"model": "tiny", "system": "the sea", "messages": MESSAGES, "max_tokens": 12}


@pytest.fixture(scope="module")
def claude(server: Serving) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def model(tiny: Path) -> Iterator[TextGenerator]:
    with isotherm.load(tiny, cache_bytes=0) as loaded:
        yield loaded


def text_of(message: anthropic.types.Message) -> str:
    (block,) = message.content
    assert block.type == "text"
    return block.text


def test_an_answer_is_the_models(claude: anthropic.Anthropic, model: TextGenerator) -> None:
    got = claude.messages.create(**OPTIONS)
    expected = model.generate(PROMPT, max_tokens=12)
    assert (got.type, got.role, got.model) == ("message", "assistant", "tiny")
    assert got.id.startswith("msg_")
    assert text_of(got) == expected.text
    assert got.stop_reason == {"stop": "end_turn", "length": "max_tokens"}[expected.finish_reason]
    assert got.stop_sequence is None
    usage = got.usage
    assert usage.output_tokens == expected.num_tokens
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == expected.num_prompt_tokens


def test_sampling_reaches_the_model(claude: anthropic.Anthropic, model: TextGenerator) -> None:
    """One candidate is left whatever the temperature; an answer drawn freely may be empty."""
    got = claude.messages.create(**OPTIONS, extra_body={"temperature": 1.0, "top_k": 1, "top_p": 0.5})
    assert text_of(got) == model.generate(PROMPT, max_tokens=12).text
    drawn = [claude.messages.create(**OPTIONS, extra_body={"temperature": 1.0}).content for _ in range(8)]
    assert any(content != drawn[0] for content in drawn)


def test_a_stream_is_the_whole_answer_in_pieces(claude: anthropic.Anthropic) -> None:
    whole = claude.messages.create(**OPTIONS)
    with claude.messages.stream(**OPTIONS) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == text_of(whole)
    assert [block.type for block in message.content] == ["text"]
    assert message.content[0].text == text  # type: ignore[union-attr]
    assert (message.stop_reason, message.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    assert message.usage.output_tokens == whole.usage.output_tokens
    counts = [one.usage.input_tokens + (one.usage.cache_read_input_tokens or 0) for one in (message, whole)]
    assert counts[0] == counts[1]


def test_the_events_on_the_wire(server: Serving) -> None:
    with httpx.stream("POST", f"{server.url}/v1/messages", json={**OPTIONS, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events.pop() == ""
    names = [event.split("\n")[0].removeprefix("event: ") for event in events]
    assert all(f'data: {{"type":"{name}"' in event for name, event in zip(names, events, strict=True))
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[3:-3]) == {"content_block_delta"}


def test_stop_sequences_are_told(claude: anthropic.Anthropic, model: TextGenerator) -> None:
    free = model.generate(PROMPT, max_tokens=12)
    stop = free.text[4:6]
    got = claude.messages.create(**OPTIONS, stop_sequences=["never said", stop])
    assert text_of(got) == free.text[: free.text.index(stop)]
    assert (got.stop_reason, got.stop_sequence) == ("stop_sequence", stop)


def test_blocks_and_text_are_the_same_prompt(claude: anthropic.Anthropic) -> None:
    marked: Any = {"type": "ephemeral", "ttl": "1h"}
    blocks: Any = [{"type": "text", "text": "the rain in spain", "cache_control": marked}]
    system: Any = [{"type": "text", "text": "the sea", "cache_control": {"type": "ephemeral"}}]
    got = claude.messages.create(
        model="tiny",
        system=system,
        messages=[{"role": "user", "content": blocks}],
        max_tokens=12,
        metadata={"user_id": "somebody"},
        service_tier="auto",
    )
    assert text_of(got) == text_of(claude.messages.create(**OPTIONS))
    assert (got.usage.cache_read_input_tokens or 0) > 0


def test_count_tokens(claude: anthropic.Anthropic, model: TextGenerator) -> None:
    got = claude.messages.count_tokens(model="tiny", system="the sea", messages=MESSAGES)
    assert got.input_tokens == len(model.prompt_ids(PROMPT))


def test_an_answer_in_the_form_of_a_schema(claude: anthropic.Anthropic, model: TextGenerator) -> None:
    schema = {"type": "object", "properties": {"wet": {"type": "boolean"}}, "required": ["wet"]}
    config: Any = {"format": {"type": "json_schema", "schema": schema}}
    got = claude.messages.create(**OPTIONS, extra_body={"output_config": config})
    kept = Grammar("json_schema", json.dumps(schema))
    assert text_of(got) == model.generate(PROMPT, max_tokens=12, grammar=kept).text
    assert text_of(got).startswith("{")


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": []}]}, "messages"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "The"}]}, "go on with an answer"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b"}]}]}, "tool_use"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
        ({"tools": [{"name": "a", "input_schema": {}, "defer_loading": True}]}, "defer_loading"),
        ({"tools": [{"name": "a", "input_schema": {}, "eager_input_streaming": False}]}, "eager_input_streaming"),
        ({"tool_choice": {"type": "some"}}, "tool_choice"),
        ({"output_config": {"effort": "low"}}, "effort"),
        ({"container": "x"}, "container"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"inference_geo": "eu"}, "inference_geo"),
        ({"metadata": {"other": "x"}}, "metadata"),
    ],
)
def test_what_cannot_be_honoured_is_refused(claude: anthropic.Anthropic, changed: dict[str, Any], names: str) -> None:
    body = {key: value for key, value in {**OPTIONS, **changed}.items() if value is not None}
    with pytest.raises(anthropic.BadRequestError) as raised:
        claude.post("/v1/messages", body=body, cast_to=object)
    described: Any = raised.value.body
    assert described["type"] == "error"
    assert described["error"]["type"] == "invalid_request_error"
    assert names in described["error"]["message"]


def test_other_errors(claude: anthropic.Anthropic, server: Serving) -> None:
    with pytest.raises(anthropic.NotFoundError, match="served: tiny"):
        claude.messages.create(model="claude", messages=MESSAGES, max_tokens=1)
    long: Any = [{"role": "user", "content": "a b c d " * 400}]
    with pytest.raises(anthropic.BadRequestError, match="too many"):
        claude.messages.create(model="tiny", messages=long, max_tokens=1)
    assert httpx.post(f"{server.url}/v1/messages", content=b"{").json()["error"]["type"] == "invalid_request_error"


def test_the_key_of_the_client_is_taken(tiny: Path, tmp_path: Path) -> None:
    with Serving([str(tiny), "--api-key", "sesame"], tmp_path) as server:
        server.wait_healthy()
        for key, allowed in (("sesame", True), ("wrong", False)):
            with anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0) as client:
                if allowed:
                    assert client.messages.create(**OPTIONS).stop_reason
                else:
                    with pytest.raises(anthropic.AuthenticationError) as raised:
                        client.messages.create(**OPTIONS)
                    assert raised.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
