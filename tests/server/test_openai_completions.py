"""/v1/completions, asked by the `openai` package; answers are held against the model itself."""

from typing import Any

import openai
import pytest

from isotherm.text import TextGenerator

PROMPT = "the rain in spain"
OTHER = "and the sea"


def test_an_answer_is_the_models(client: openai.OpenAI, model: TextGenerator) -> None:
    expected = model.generate(PROMPT, raw=True, max_tokens=12, temperature=0.8, seed=5)
    got = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0.8, seed=5)
    assert got.object == "text_completion"
    assert got.id.startswith("cmpl-")
    (choice,) = got.choices
    assert choice.index == 0
    assert choice.text == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert choice.logprobs is None
    assert got.usage is not None
    assert got.usage.prompt_tokens == expected.num_prompt_tokens == len(model.prompt_ids(PROMPT, raw=True))
    assert got.usage.total_tokens == expected.num_prompt_tokens + expected.num_tokens


def test_it_ends_after_16_tokens_by_itself(client: openai.OpenAI, model: TextGenerator) -> None:
    got = client.completions.create(model="tiny", prompt=PROMPT, logit_bias={"2": -100})
    expected = model.generate(PROMPT, raw=True, max_tokens=16, logit_bias=((2, -float("inf")),))
    assert got.choices[0].text == expected.text
    assert got.usage is not None
    assert got.usage.completion_tokens == expected.num_tokens
    assert expected.num_tokens <= 16


@pytest.mark.parametrize("as_ids", [False, True])
def test_several_prompts_with_several_answers(client: openai.OpenAI, model: TextGenerator, as_ids: bool) -> None:
    ids = [model.prompt_ids(text, raw=True) for text in (PROMPT, OTHER)]
    options: Any = {"max_tokens": 6, "temperature": 1.0, "seed": 9, "n": 2}
    prompt: Any = ids if as_ids else [PROMPT, OTHER]
    got = client.completions.create(model="tiny", prompt=prompt, **options)
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    alone = [client.completions.create(model="tiny", prompt=text, **options) for text in (PROMPT, OTHER)]
    assert [choice.text for choice in got.choices] == [choice.text for one in alone for choice in one.choices]
    for number, text in enumerate((PROMPT, OTHER)):
        first = model.generate(text, raw=True, max_tokens=6, temperature=1.0, seed=9)
        assert got.choices[2 * number].text == first.text
    assert got.usage is not None
    assert got.usage.prompt_tokens == sum(map(len, ids))
    assert got.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone if one.usage)


def test_a_prompt_of_ids(client: openai.OpenAI, model: TextGenerator) -> None:
    ids = model.prompt_ids(OTHER, raw=True)
    got = client.completions.create(model="tiny", prompt=ids, max_tokens=5, echo=True)
    assert got.choices[0].text == OTHER + model.generate(OTHER, raw=True, max_tokens=5).text


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "prompt": [PROMPT, OTHER], "max_tokens": 20, "temperature": 1.0, "seed": 3}
    options |= {"n": 2, "echo": True}
    whole = client.completions.create(**options)
    *parts, last = client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    texts = [""] * 4
    ends: list[str | None] = [None] * 4
    for part in parts:
        for choice in part.choices:
            assert ends[choice.index] is None
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason
            if choice.finish_reason:
                assert part.timings["predicted_n"] > 0  # type: ignore[attr-defined]
    assert texts == [choice.text for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    # What a prompt finds in the cache depends on which of the earlier answers ended last.
    details = whole.usage.prompt_tokens_details
    assert last.usage.model_copy(update={"prompt_tokens_details": details}) == whole.usage


def test_logprobs_are_the_models(client: openai.OpenAI, model: TextGenerator) -> None:
    options: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 1.0, "seed": 1}
    answer = model.generate(PROMPT, raw=True, max_tokens=24, temperature=1.0, seed=1, num_logprobs=3)
    (choice,) = client.completions.create(**options, logprobs=3).choices
    assert choice.text == answer.text
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [token.logprob for token in answer.tokens]
    assert logprobs.top_logprobs is not None
    for top, token in zip(logprobs.top_logprobs, answer.tokens, strict=True):
        pairs = [(token.token_id, token.logprob), *token.top_logprobs]
        assert len(top) == len({model.token_bytes(token_id) for token_id, _ in pairs})
        assert set(top.values()) <= {logprob for _, logprob in pairs}
    # the text before each offset is what the tokens before it say, but for a character that is not whole yet
    assert logprobs.text_offset is not None
    for number, offset in enumerate(logprobs.text_offset):
        said = b"".join(map(model.token_bytes, answer.token_ids[:number])).decode(errors="replace")
        assert said.startswith(answer.text[:offset])
        assert set(said[offset:]) <= {"\ufffd"}
    parts = list(client.completions.create(**options, logprobs=3, stream=True))
    streamed = [part.choices[0].logprobs for part in parts]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [entry for one in streamed if one for entry in getattr(one, name)]
        assert joined == getattr(logprobs, name)


def test_stop_and_penalties_reach_the_model(client: openai.OpenAI, model: TextGenerator) -> None:
    free = model.generate(PROMPT, raw=True, max_tokens=20)
    stop = free.text[4:6]
    got = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, stop=stop)
    assert got.choices[0].text == free.text[: free.text.index(stop)]
    assert got.choices[0].finish_reason == "stop"
    extra = {"repeat_penalty": 1.3, "min_p": 0.05, "top_k": 20}
    got = client.completions.create(model="tiny", prompt=PROMPT, temperature=1.0, seed=2, extra_body=extra)
    expected = model.generate(PROMPT, raw=True, max_tokens=16, temperature=1.0, seed=2, **extra)
    assert got.choices[0].text == expected.text


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["x"] * 257}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 1, "echo": True}, "echo"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_cannot_be_honoured_is_refused(client: openai.OpenAI, changed: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.post("/completions", body={"model": "tiny", "prompt": PROMPT, **changed}, cast_to=object)
    assert (raised.value.param or "").startswith(param)


def test_a_prompt_that_does_not_fit_refuses_all(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="tiny", prompt=[PROMPT, "a b c d " * 400])
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="token ids"):
        client.completions.create(model="tiny", prompt=[[99999]])
