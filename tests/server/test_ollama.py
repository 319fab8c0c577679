"""Ollama's API, asked by the `ollama` package; answers are held against the model itself."""

import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gguf
import httpx
import ollama
import pytest
from serving import Serving
from tiny_models import write_tiny

import isotherm
from isotherm.text import TextGenerator
from isotherm.types import Grammar, QuantType

MESSAGES: Any = [{"role": "system", "content": "the sea"}, {"role": "user", "content": "the rain in spain"}]
OPTIONS = {"num_predict": 12}


@pytest.fixture(scope="module")
def client(server: Serving) -> ollama.Client:
    return ollama.Client(server.url)


@pytest.fixture(scope="module")
def model(tiny: Path) -> Iterator[TextGenerator]:
    with isotherm.load(tiny, cache_bytes=0) as loaded:
        yield loaded


def test_an_answer_is_the_models(client: ollama.Client, model: TextGenerator) -> None:
    sampling: Any = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 5, "repeat_penalty": 1.2}
    more: Any = {"presence_penalty": 0.5, "frequency_penalty": 0.25}
    expected = model.generate(MESSAGES, max_tokens=12, penalty_tokens=32, **sampling, **more)
    options = {**OPTIONS, **sampling, **more, "repeat_last_n": 32}
    got = client.chat("tiny", MESSAGES, options=options)
    assert got.message.role == "assistant"
    assert got.message.content == expected.text
    assert got.model == "tiny"
    assert got.done
    assert got.done_reason == expected.finish_reason
    assert (got.prompt_eval_count, got.eval_count) == (expected.num_prompt_tokens, expected.num_tokens)
    durations = (got.load_duration, got.prompt_eval_duration, got.eval_duration)
    assert all(part and part > 0 for part in durations)
    assert got.total_duration
    assert sum(part or 0 for part in durations) < 2 * got.total_duration < 120e9


def test_one_prompt(client: ollama.Client, model: TextGenerator) -> None:
    user: Any = MESSAGES[1]["content"]
    assert client.generate("tiny", user, options=OPTIONS).response == model.generate(user, max_tokens=12).text
    got = client.generate("tiny", user, system="the sea", options=OPTIONS)
    assert got.response == model.generate(MESSAGES, max_tokens=12).text
    raw = client.generate("tiny", user, raw=True, options=OPTIONS)
    assert raw.response == model.generate(user, max_tokens=12, raw=True).text
    assert raw.response != got.response


def test_streams_add_up(client: ollama.Client, server: Serving) -> None:
    options = {"num_predict": 20, "seed": 3, "temperature": 1.0}
    whole = client.chat("tiny", MESSAGES, options=options)
    *parts, last = client.chat("tiny", MESSAGES, options=options, stream=True)
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert not any(part.done for part in parts)
    assert (last.done, last.done_reason, last.message.content) == (True, whole.done_reason, "")
    assert last.eval_count == whole.eval_count
    body = {"model": "tiny", "prompt": "the rain", "options": OPTIONS}
    got = httpx.post(f"{server.url}/api/generate", json=body)  # streams unless it is told not to
    assert got.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in got.text.splitlines()]
    expected = client.generate("tiny", "the rain", options=OPTIONS).response
    assert "".join(line["response"] for line in lines) == expected
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]


def test_stop_and_logprobs(client: ollama.Client, model: TextGenerator) -> None:
    free = model.generate(MESSAGES, max_tokens=12, num_logprobs=2)
    stop = free.text[4:6]
    got = client.chat("tiny", MESSAGES, options={**OPTIONS, "stop": [stop]})
    assert got.message.content == free.text[: free.text.index(stop)]
    assert got.done_reason == "stop"
    whole = client.chat("tiny", MESSAGES, options=OPTIONS, logprobs=True, top_logprobs=2)
    assert whole.logprobs is not None
    assert [one.logprob for one in whole.logprobs] == [token.logprob for token in free.tokens]
    assert [len(one.top_logprobs or ()) for one in whole.logprobs] == [2] * len(free.tokens)
    parts = client.chat("tiny", MESSAGES, options=OPTIONS, logprobs=True, stream=True)
    streamed = [one.logprob for part in parts for one in part.logprobs or ()]
    assert streamed == [token.logprob for token in free.tokens]


@pytest.mark.parametrize("form", ["json", {"type": "array", "items": {"type": "integer"}, "minItems": 2}])
def test_an_answer_in_a_form(client: ollama.Client, model: TextGenerator, form: Any) -> None:
    kept = Grammar("json_object") if form == "json" else Grammar("json_schema", json.dumps(form))
    got = client.chat("tiny", MESSAGES, options=OPTIONS, format=form)
    assert got.message.content == model.generate(MESSAGES, max_tokens=12, grammar=kept).text


@pytest.mark.parametrize(
    ("path", "changed", "names"),
    [
        ("chat", {"messages": [*MESSAGES, {"role": "assistant", "content": "The"}]}, "messages"),
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "images"),
        ("chat", {"messages": [{"role": "tool", "content": "x"}]}, "follows no call"),
        ("chat", {"messages": [{"role": "robot", "content": "x"}]}, "role"),
        ("chat", {"template": "{{ .Prompt }}"}, "template"),
        ("chat", {"think": "high"}, "think"),
        ("chat", {"keep_alive": "soon"}, "keep_alive"),
        ("chat", {"keep_alive": True}, "keep_alive"),
        ("chat", {"format": "xml"}, "format"),
        ("chat", {"top_logprobs": 3}, "top_logprobs"),
        ("chat", {"options": {"num_ctx": 4096}}, "num_ctx is 4096, the model is loaded with a context of 512"),
        ("chat", {"options": {"num_predict": 0}}, "num_predict"),
        ("chat", {"options": {"temperature": -1}}, "temperature"),
        ("chat", {"options": {"mirostat": 2}}, "mirostat"),
        ("chat", {"options": {"typical_p": 0.5}}, "typical_p"),
        ("chat", {"options": {"num_thread": 2}}, "num_thread"),
        ("chat", {"options": {"num_gpu": 99}}, "num_gpu"),
        ("chat", {"options": {"stop": [""]}}, "stop"),
        ("chat", {"options": {"low_vram": True}}, "low_vram"),
        ("chat", {"other": 1}, "other"),
        ("generate", {"suffix": "end"}, "suffix"),
        ("generate", {"context": [1, 2]}, "context"),
        ("generate", {"template": "x"}, "template"),
        ("generate", {"images": ["aGk="]}, "images"),
        ("generate", {"raw": True, "system": "x"}, "system"),
        ("generate", {"raw": True, "think": False}, "think"),
    ],
)
def test_what_cannot_be_honoured_is_refused(server: Serving, path: str, changed: dict[str, Any], names: str) -> None:
    prompt: Any = {"messages": MESSAGES} if path == "chat" else {"prompt": "the rain"}
    got = httpx.post(f"{server.url}/api/{path}", json={"model": "tiny", **prompt, **changed})
    assert got.status_code == 400
    assert list(got.json()) == ["error"]
    assert names in got.json()["error"]


def test_what_asks_for_nothing_is_taken(server: Serving, client: ollama.Client) -> None:
    neutral = {"mirostat": 0, "typical_p": 1.0, "num_thread": 0, "num_gpu": 0, "num_keep": 4, "num_ctx": 64}
    empty = {"suffix": "", "template": "", "context": [], "images": [], "system": "", "format": ""}
    body = {"model": "tiny:latest", "prompt": "the rain", "stream": False, **empty}
    got = httpx.post(f"{server.url}/api/generate", json={**body, "options": {**OPTIONS, **neutral}})
    assert got.json()["response"] == client.generate("tiny", "the rain", options=OPTIONS).response


def test_other_errors(client: ollama.Client, server: Serving) -> None:
    with pytest.raises(ollama.ResponseError, match="served: tiny") as raised:
        client.chat("llama3.2", MESSAGES)
    assert raised.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="too many"):
        client.generate("tiny", "a b c d " * 400)
    for ask, says in (
        (lambda: client.pull("smollm2"), "isotherm pull"),
        (lambda: client.push("smollm2"), "not published"),
        (lambda: client.create("x", from_="tiny"), "isotherm serve"),
        (lambda: client.copy("tiny", "x"), "isotherm serve"),
        (lambda: client.delete("tiny"), "isotherm rm"),
        (lambda: client.embed("tiny", "x"), "embeddings"),
        (lambda: client.embeddings("tiny", "x"), "embeddings"),
    ):
        with pytest.raises(ollama.ResponseError, match=says) as raised:
            ask()
        assert raised.value.status_code == 501
    assert list(httpx.get(f"{server.url}/api/nothing").json()) == ["error"]
    assert httpx.head(server.url).status_code == 200


def test_what_a_model_is(client: ollama.Client, tiny: Path) -> None:
    reader = gguf.GGUFReader(tiny)
    (listed,) = client.list().models
    details = listed.details
    assert listed.model == "tiny"
    assert details is not None
    assert (details.format, details.family, details.quantization_level) == ("gguf", "llama", "Q4_0")
    num_parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert details.parameter_size == f"{num_parameters / 1e6:.2f}M"
    assert listed.size == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert listed.modified_at is not None
    assert listed.modified_at == datetime.fromtimestamp(tiny.stat().st_mtime, UTC)
    shown = client.show("tiny")
    assert shown.details == details
    assert shown.capabilities == ["completion", "tools"]
    assert shown.license == "cc0-1.0"
    field = reader.get_field("tokenizer.chat_template")
    assert field is not None
    assert shown.template == field.contents()
    info: Any = shown.modelinfo
    assert (info["general.architecture"], info["llama.context_length"]) == ("llama", 512)
    assert info["general.parameter_count"] == num_parameters
    with pytest.raises(ollama.ResponseError, match="served: tiny"):
        client.show("nothing")


def test_version(server: Serving) -> None:
    got = httpx.get(f"{server.url}/api/version").json()
    assert got["isotherm"] == isotherm.__version__
    assert [int(number) for number in got["version"].split(".")] > [0, 6, 4]  # what VS Code asks for


def test_keep_alive(tmp_path: Path) -> None:
    """A model is loaded by the first request, or an empty one, and leaves when it is told to."""
    plain = write_tiny(tmp_path / "plain.gguf", "llama", QuantType.Q8_0)
    other = write_tiny(tmp_path / "other.gguf", "qwen2", QuantType.Q8_0)
    with Serving([str(plain), str(other)], tmp_path) as server:
        server.wait_healthy()
        client = ollama.Client(server.url)

        def loaded() -> dict[str, Any]:
            return {model.model or "": model for model in client.ps().models}

        assert set(loaded()) == {"plain"}
        entry = loaded()["plain"]
        assert (entry.size_vram, entry.context_length) == (0, 512)
        assert entry.size > plain.stat().st_size  # keys and values too
        assert entry.expires_at.year == 9999
        with isotherm.load(plain, cache_bytes=0) as model:  # without a template a prompt is taken as it is
            expected = model.generate("the rain", max_tokens=4).text
        assert client.generate("plain", "the rain", options={"num_predict": 4}).response == expected
        with pytest.raises(ollama.ResponseError, match="template"):
            client.generate("plain", "the rain", system="x")
        got = client.chat("other", [], keep_alive="10m")
        assert (got.done, got.done_reason) == (True, "load")
        assert set(loaded()) == {"plain", "other"}
        assert loaded()["other"].expires_at.year != 9999
        assert client.generate("plain", keep_alive=0).done_reason == "unload"
        assert set(loaded()) == {"other"}
        client.generate("other", "the rain", options={"num_predict": 2}, keep_alive=0)
        wait_until(lambda: not loaded())
        client.generate("other", "the rain", options={"num_predict": 2}, keep_alive=-1)
        assert loaded()["other"].expires_at.year == 9999
        stream = client.generate("other", "the rain", options={"num_predict": 400}, stream=True)
        next(stream)
        assert client.generate("other", keep_alive=0).done_reason == "unload"
        *_, last = stream
        assert last.done  # what runs ends first
        wait_until(lambda: not loaded())


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)
