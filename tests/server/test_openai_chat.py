"""/v1/chat/completions, asked by the `openai` package; answers are held against the model itself."""

import itertools
from typing import Any

import httpx
import openai
import pytest
from serving import Serving

from isotherm.text import TextGenerator

MESSAGES: Any = [{"role": "system", "content": "the sea"}, {"role": "user", "content": "the rain in spain"}]


def test_an_answer_is_the_models(client: openai.OpenAI, model: TextGenerator) -> None:
    expected = model.generate(MESSAGES, max_tokens=12, temperature=0.8, seed=5)
    got = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12, temperature=0.8, seed=5)
    assert got.object == "chat.completion"
    assert got.id.startswith("chatcmpl-")
    (choice,) = got.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert got.usage is not None
    assert got.usage.prompt_tokens == expected.num_prompt_tokens
    assert got.usage.completion_tokens == expected.num_tokens


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20, "seed": 3, "temperature": 1.0}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in parts) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in parts][-1] == whole.choices[0].finish_reason
    assert all(chunk.choices[0].finish_reason is None for chunk in parts[:-1])
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert parts[-1].timings["predicted_n"] == whole.usage.completion_tokens  # type: ignore[attr-defined]


def test_the_wire_ends_with_done(server: Serving) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


def test_several_answers_to_one_prompt(client: openai.OpenAI, model: TextGenerator) -> None:
    options: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 1.0, "seed": 9}
    got = client.chat.completions.create(**options, n=3)
    texts = [choice.message.content for choice in got.choices]
    assert [choice.index for choice in got.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts[0] == model.generate(MESSAGES, max_tokens=8, temperature=1.0, seed=9).text
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**options, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_logprobs_are_the_models(client: openai.OpenAI, model: TextGenerator) -> None:
    options: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 5, "logprobs": True, "top_logprobs": 4}
    got = client.chat.completions.create(**options)
    expected = model.generate(MESSAGES, max_tokens=5, num_logprobs=4).tokens
    logprobs = got.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.logprob for entry in logprobs.content] == [token.logprob for token in expected]
    for entry, token in zip(logprobs.content, expected, strict=True):
        assert bytes(entry.bytes or ()) == model.token_bytes(token.token_id)
        assert [top.logprob for top in entry.top_logprobs] == [logprob for _, logprob in token.top_logprobs]
    chunks = client.chat.completions.create(**options, stream=True)
    streamed = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    entries = itertools.chain.from_iterable(part.content or () for part in streamed)
    assert [entry.logprob for entry in entries] == [token.logprob for token in expected]


def test_stop_and_bias_and_penalties_reach_the_model(client: openai.OpenAI, model: TextGenerator) -> None:
    free = model.generate(MESSAGES, max_tokens=20)
    stop = free.text[4:6]
    got = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20, stop=[stop])
    assert got.choices[0].message.content == free.text[: free.text.index(stop)]
    assert got.choices[0].finish_reason == "stop"
    first = free.token_ids[0]
    biased = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=4, logit_bias={str(first): -100}
    )
    banned = model.generate(MESSAGES, max_tokens=4, logit_bias=((first, -float("inf")),))
    assert biased.choices[0].message.content == banned.text
    punished = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=20, frequency_penalty=1.5, presence_penalty=0.5
    )
    expected = model.generate(MESSAGES, max_tokens=20, frequency_penalty=1.5, presence_penalty=0.5)
    assert punished.choices[0].message.content == expected.text


def test_the_prompt_is_cached_and_its_progress_told(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "the rain in spain falls " * 20}]
    options: Any = {"model": "tiny", "messages": messages, "max_tokens": 2}
    first = client.chat.completions.create(**options)
    again = client.chat.completions.create(**options)
    assert first.usage is not None
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert (again.usage.prompt_tokens_details.cached_tokens or 0) >= first.usage.prompt_tokens - 64
    fresh: Any = [{"role": "user", "content": "and the sea " * 40}]
    chunks = client.chat.completions.create(
        model="tiny", messages=fresh, max_tokens=2, stream=True, extra_body={"return_progress": True}
    )
    told = [chunk.prompt_progress for chunk in chunks if hasattr(chunk, "prompt_progress")]
    assert all(0 < one["processed"] <= one["total"] for one in told)


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"messages": []}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"return_progress": True}, "return_progress"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"store": True}, "store"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ],
)
def test_what_cannot_be_honoured_is_refused(client: openai.OpenAI, changed: dict[str, Any], param: str) -> None:
    body = {"model": "tiny", "messages": MESSAGES, **changed}
    with pytest.raises(openai.BadRequestError) as raised:
        client.post("/chat/completions", body=body, cast_to=object)
    assert raised.value.type == "invalid_request_error"
    assert (raised.value.param or "").startswith(param)
    assert param.partition(".")[0] in raised.value.message


def test_a_prompt_too_long_says_by_how_much(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "a b c d " * 400}]
    with pytest.raises(openai.BadRequestError, match="too many") as raised:
        client.chat.completions.create(model="tiny", messages=messages)
    assert raised.value.code == "context_length_exceeded"
    body: Any = raised.value.body
    assert body["n_ctx"] == 512
    assert body["n_prompt_tokens"] > 512


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "isotherm"
    with pytest.raises(openai.NotFoundError, match="served: tiny"):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert raised.value.code == "model_not_found"
