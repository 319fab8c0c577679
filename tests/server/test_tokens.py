"""/tokenize and /detokenize against the model's own tokenizer."""

from typing import Any

import httpx
import pytest
from serving import Serving

from isotherm.text import TextGenerator

TEXT = "the rain <|end|> in spain: żółć \U0001f327"


def ask(server: Serving, path: str, body: Any) -> Any:
    got = httpx.post(f"{server.url}{path}", json=body)
    assert got.status_code == 200, got.text
    return got.json()


@pytest.mark.parametrize("add_special", [False, True])
@pytest.mark.parametrize("parse_special", [False, True])
def test_content(server: Serving, model: TextGenerator, add_special: bool, parse_special: bool) -> None:
    text = TEXT + model.token_bytes(2).decode()
    options = {"add_special": add_special, "parse_special": parse_special}
    got = ask(server, "/tokenize", {"content": text, **options})
    assert got == {"tokens": model.tokenize(text, **options)}
    assert (2 in got["tokens"]) == parse_special
    back = ask(server, "/detokenize", {"tokens": got["tokens"], "model": "tiny"})
    assert back["content"].endswith(text)


def test_pieces(server: Serving, model: TextGenerator) -> None:
    got = ask(server, "/tokenize", {"content": TEXT, "with_pieces": True})["tokens"]
    assert [one["id"] for one in got] == model.tokenize(TEXT)
    pieces = [one["piece"].encode() if isinstance(one["piece"], str) else bytes(one["piece"]) for one in got]
    assert b"".join(pieces) == TEXT.encode()
    assert any(isinstance(one["piece"], list) for one in got)


def test_the_forms_of_vllm(server: Serving, model: TextGenerator) -> None:
    ids = model.tokenize(TEXT, add_special=True)
    got = ask(server, "/tokenize", {"model": "tiny", "prompt": TEXT, "return_token_strs": True})
    assert got["tokens"] == ids
    assert got["count"] == len(ids)
    assert got["max_model_len"] == model.context_tokens
    assert [text.encode() for text in got["token_strs"] if "\ufffd" not in text] == [
        data for data in map(model.token_bytes, ids) if "\ufffd" not in data.decode(errors="replace")
    ]
    messages: Any = [{"role": "user", "content": TEXT}]
    got = ask(server, "/tokenize", {"messages": messages})
    assert got["tokens"] == model.prompt_ids(messages)
    assert "token_strs" not in got


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"content": "x", "prompt": "x"}),
        ("/tokenize", {"content": 1}),
        ("/tokenize", {"prompt": "x", "with_pieces": True}),
        ("/tokenize", {"messages": []}),
        ("/tokenize", []),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [10**6]}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/detokenize", {"tokens": [1] * (2**20 + 1)}),
    ],
)
def test_what_is_no_request(server: Serving, path: str, body: Any) -> None:
    got = httpx.post(f"{server.url}{path}", json=body)
    assert got.status_code == 400
    assert got.json()["error"]["type"] == "invalid_request_error"


def test_another_model_is_not_found(server: Serving) -> None:
    for path, body in (("/tokenize", {"content": "x"}), ("/detokenize", {"tokens": []})):
        assert httpx.post(f"{server.url}{path}", json={**body, "model": "other"}).status_code == 404


def test_the_version(server: Serving) -> None:
    import isotherm

    assert httpx.get(f"{server.url}/version").json() == {"version": isotherm.__version__}
