"""Clients, connections and files that do what they should not: the server goes on, and others notice nothing."""

import asyncio
import json
import re
import socket
import ssl
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import Serving
from tiny_models import write_tiny

import isotherm
from isotherm.types import QuantType

CLIENT_S = 1.0
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
ENDLESS = "{% for a in range(10000) %}{% for b in range(10000) %}{% for c in range(10000) %}{{ messages[0].content }}"
ENDLESS += "{% endfor %}" * 3
PROMPT = {"model": "tiny", "prompt": "the rain", "max_tokens": 4}
NO_END = {"logit_bias": {"0": -100, "2": -100}}  # answers go on to their limit


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server that waits for no client, with a long context."""
    folder = tmp_path_factory.mktemp("hasty")
    metadata = {"tokenizer.chat_template": TEMPLATE}
    path = write_tiny(folder / "tiny.gguf", "llama", QuantType.Q4_0, metadata=metadata, context_tokens=16384)
    arguments = [str(path), "--client-s", str(CLIENT_S), "--kv-gib", "0.2", "--threads", "2"]
    with Serving(arguments, folder) as running:
        yield running.wait_healthy()


def connect(server: Serving, receive_bytes: int | None = None) -> socket.socket:
    made = socket.socket()
    if receive_bytes:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    made.settimeout(30)
    made.connect(("127.0.0.1", server.port))
    return made


def raw(path: str, body: Any) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


def metric(server: Serving, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    found = re.search(rf'(?m)^{re.escape(name)}{{model_name="tiny"}} (\S+)$', text)
    return float(found[1]) if found else 0.0


def wait_idle(server: Serving) -> None:
    deadline = time.monotonic() + 30
    while metric(server, "vllm:num_requests_running") + metric(server, "vllm:num_requests_waiting"):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def works(server: Serving) -> bool:
    return httpx.post(f"{server.url}/v1/completions", json=PROMPT, timeout=60).status_code == 200


def read_all(made: socket.socket) -> bytes:
    """What comes until the other end closes."""
    received = bytearray()
    with suppress(ConnectionResetError):
        while part := made.recv(65536):
            received += part
    return bytes(received)


def send_until_cut(made: socket.socket, parts: Iterable[bytes], pause_s: float = 0.0) -> None:
    try:
        for part in parts:
            made.sendall(part)
            time.sleep(pause_s)
    except (BrokenPipeError, ConnectionResetError):
        return
    pytest.fail("the connection was not cut")


# --- clients that leave ---


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/chat/completions"])
def test_a_client_that_leaves_mid_stream(hasty: Serving, path: str) -> None:
    text = {"/v1/completions": "prompt", "/v1/responses": "input"}.get(path)
    asked: Any = {text: "the rain"} if text else {"messages": [{"role": "user", "content": "the rain"}]}
    body = {"model": "tiny", "stream": True, **asked, **({} if text == "input" else NO_END)}
    if text == "prompt":
        body["max_tokens"] = 16000
    with httpx.stream("POST", f"{hasty.url}{path}", json=body) as response:
        lines = response.iter_lines()
        for _ in range(6):
            next(lines)
    wait_idle(hasty)
    computed = metric(hasty, "vllm:generation_tokens_total")
    assert works(hasty)
    assert 0 < computed < 16000
    assert metric(hasty, "vllm:generation_tokens_total") <= computed + PROMPT["max_tokens"]  # type: ignore[operator]
    hasty.wait_line(f"POST {path} 200")


def test_a_client_that_leaves_mid_prompt(hasty: Serving) -> None:
    prompt = [100 + number % 97 for number in range(16000)]
    body = {**PROMPT, "prompt": prompt, "stream": True, "return_progress": True}
    before = metric(hasty, "vllm:prompt_tokens_total"), metric(hasty, "vllm:generation_tokens_total")
    with httpx.stream("POST", f"{hasty.url}/v1/completions", json=body, timeout=60) as response:
        event = next(line for line in response.iter_lines() if line.startswith("data: "))
        told = json.loads(event.removeprefix("data: "))["prompt_progress"]
    assert told["processed"] < told["total"] == len(prompt)
    wait_idle(hasty)
    after = metric(hasty, "vllm:prompt_tokens_total"), metric(hasty, "vllm:generation_tokens_total")
    assert after == before  # it had no first token
    assert works(hasty)


def test_a_client_that_leaves_with_several_prompts(hasty: Serving) -> None:
    body = {**PROMPT, "prompt": ["a", "b", "c"], "n": 2, "max_tokens": 16000, **NO_END}
    with connect(hasty) as made:
        made.sendall(raw("/v1/completions", body))
        deadline = time.monotonic() + 30
        while not metric(hasty, "vllm:num_requests_running"):
            assert time.monotonic() < deadline
    wait_idle(hasty)


# --- clients that are slow ---


def test_a_client_that_does_not_read(hasty: Serving) -> None:
    """20 MB are more than the buffers of a connection take."""
    messages = [{"role": "user", "content": "the rain"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 10_000, "logprobs": True, "top_logprobs": 20}
    with connect(hasty, 4096) as made:
        made.sendall(raw("/v1/chat/completions", {**body, **NO_END, "stream": True}))
        hasty.wait_line("the client took nothing of its answer for too long")
        wait_idle(hasty)
        assert works(hasty)
        assert b"[DONE]" not in read_all(made)


def test_slow_headers_and_bodies_are_cut(hasty: Serving) -> None:
    starts = (b"", b"\r\n", b"POST /v1/completions HTTP/1.1\r\nhost: loc", b"GET /health HTTP/1.1\r\na: b\r\n")
    begun = time.monotonic()
    connections = [connect(hasty) for _ in starts]
    for made, start in zip(connections, starts, strict=True):
        made.sendall(start)
    slow_body = connect(hasty)
    slow_body.sendall(raw("/v1/completions", PROMPT)[:-5])
    assert works(hasty)
    assert [read_all(made) for made in connections] == [b""] * len(starts)
    answer = read_all(slow_body)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"took longer than 1 s" in answer
    assert time.monotonic() - begun >= CLIENT_S
    for made in (*connections, slow_body):
        made.close()


def test_a_header_in_drops_is_cut(hasty: Serving) -> None:
    """Each byte that comes must not begin the wait anew; nor may a first request that was whole."""
    with connect(hasty) as made:
        made.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert made.recv(65536).startswith(b"HTTP/1.1 200")
        send_until_cut(made, [b"x"] * 200, 0.05)


def test_a_refused_body_may_not_drip(hasty: Serving) -> None:
    with connect(hasty) as made:
        made.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999\r\n\r\n")
        assert made.recv(65536).startswith(b"HTTP/1.1 413")
        send_until_cut(made, [b"x"] * 200, 0.05)


def test_an_endless_header_is_cut(hasty: Serving) -> None:
    fields = (b"x-%06d: %b\r\n" % (number, b"x" * 1000) for number in range(100_000))
    with connect(hasty) as made:
        send_until_cut(made, chain([b"GET /health HTTP/1.1\r\n"], fields))
    assert works(hasty)


def test_a_path_writes_no_line_of_the_log(hasty: Serving) -> None:
    httpx.get(f"{hasty.url}/v1/x%0aPOST%20/forged%20200")
    hasty.wait_line("/v1/x\\nPOST /forged 200 404")
    assert not [line for line in hasty.lines if line.startswith("POST /forged")]


# --- many, and malformed ---


def test_a_thousand_connections_with_a_request_each(hasty: Serving) -> None:
    async def ask() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", hasty.port)
        writer.write(raw("/v1/completions", {**PROMPT, "max_tokens": 1}))
        status = int((await reader.readline()).split()[1])
        await reader.read()
        writer.close()
        return status

    async def ask_all() -> list[int]:
        return await asyncio.gather(*(ask() for _ in range(1000)))

    statuses = asyncio.run(ask_all())
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 256  # as many as may wait
    assert works(hasty)


BODIES = {
    "/v1/completions": PROMPT,
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/responses": {"model": "tiny", "input": "x", "max_output_tokens": 1},
    "/tokenize": {"content": "x"},
    "/detokenize": {"tokens": [65, 66]},
}
ODD = ["NaN", "-Infinity", "1e999", "-1e-999", "9" * 400, "9" * 5000, '"\\ud800"', '"\\u0000"', "[" * 900 + "]" * 900]
ODD += ['{"\\udfff": NaN}', '{"type": "\\ud800"}', "null", "-0.0", "2.0", '"' + "x" * 3000 + '"', '{"a": 1, "a": 2}']

PIECES = [b"{", b"[", b'"', b"\\u", b"NaN", b"\xed\xa0\x80", b"\0"]


@pytest.mark.parametrize("path", BODIES)
def test_odd_values_anywhere_are_no_fault_of_ours(server: Serving, path: str) -> None:
    others = ["temperature", "seed", "stop", "logit_bias", "response_format", "text", "tools", "\\ud800"]
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for name in [*BODIES[path], *others]:
            for value in ODD:
                fields = [f'"{key}": {json.dumps(own)}' for key, own in BODIES[path].items() if key != name]
                body = "{" + ", ".join([*fields, f'"{name}": {value}']) + "}"
                check_answer(client.post(path, content=body.encode()))


def check_answer(got: httpx.Response) -> None:
    assert got.status_code in (200, 400, 404), got.text
    if got.status_code != 200:
        assert got.json()["error"]["message"]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_malformed_bodies(server: Serving, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(BODIES)))
    body = json.dumps(BODIES[path]).encode()
    start = data.draw(st.integers(0, len(body)))
    end = data.draw(st.integers(start, len(body)))
    middle = data.draw(st.binary(max_size=12) | st.sampled_from(PIECES))
    check_answer(httpx.post(f"{server.url}{path}", content=body[:start] + middle + body[end:], timeout=60))


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"type": "object", "properties": {"a": {"$ref": "#"}, "b": {"$ref": "#"}}, "required": ["a", "b"]},
        {"$ref": "file:///etc/passwd"},
        {"$ref": "http://localhost/x"},
        {"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**9}},
        {"enum": list(range(20_000))},
    ],
    ids=["itself", "ring", "tree", "file", "address", "large", "long"],
)
def test_hostile_schemas(server: Serving, schema: Any) -> None:
    format_ = {"type": "json_schema", "name": "x", "schema": schema}
    body = {"model": "tiny", "input": "x", "max_output_tokens": 8, "text": {"format": format_}}
    check_answer(httpx.post(f"{server.url}/v1/responses", json=body, timeout=30))
    assert works(server)


# --- models ---


def test_a_template_that_does_not_end(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "llama", QuantType.Q4_0, metadata={"tokenizer.chat_template": ENDLESS})
    with Serving([str(path), "--threads", "1"], tmp_path) as server:
        server.wait_healthy()
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
        got = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert got.status_code == 400
        assert "template" in got.json()["error"]["message"]
        assert works(server)


def test_a_model_file_that_is_replaced(tmp_path: Path) -> None:
    """What is loaded goes on; the next load has what is there then."""
    path, other = tmp_path / "tiny.gguf", tmp_path / "other.gguf"
    write_tiny(path, "llama", QuantType.Q4_0)
    write_tiny(other, "llama", QuantType.Q4_0, seed=1)
    with isotherm.load(path, cache_bytes=0) as old, isotherm.load(other, cache_bytes=0) as new:
        expected = [model.generate("the rain", raw=True, max_tokens=4).text for model in (old, new)]
    assert expected[0] != expected[1]

    def answer(server: Serving) -> str:
        got = httpx.post(f"{server.url}/v1/completions", json=PROMPT, timeout=60)
        return str(got.json()["choices"][0]["text"])

    def unload(server: Serving) -> None:
        got = httpx.post(f"{server.url}/api/generate", json={"model": "tiny", "keep_alive": 0})
        assert got.json()["done_reason"] == "unload"

    with Serving([str(path), "--threads", "1"], tmp_path) as server:
        server.wait_healthy()
        assert answer(server) == expected[0]
        other.replace(path)
        assert answer(server) == expected[0]
        unload(server)
        assert answer(server) == expected[1]
        path.write_bytes(b"GGUF, or not")
        assert answer(server) == expected[1]
        unload(server)
        refused = httpx.post(f"{server.url}/v1/completions", json=PROMPT, timeout=60)
        assert refused.status_code == 500
        assert "tiny.gguf" in refused.json()["error"]["message"]
        write_tiny(path, "llama", QuantType.Q4_0)
        assert answer(server) == expected[0]


# --- TLS ---


def test_tls_by_certificate_files(tiny: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    for name, blobs in (("cert.pem", certificate.cert_chain_pems), ("key.pem", [certificate.private_key_pem])):
        (tmp_path / name).write_bytes(b"".join(blob.bytes() for blob in blobs))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    arguments = [str(tiny), "--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem")]
    with Serving([*arguments, "--client-s", "1"], tmp_path) as server, httpx.Client(verify=context) as client:
        assert server.scheme == "https"
        models = client.get(f"{server.url}/v1/models").json()
        assert [model["id"] for model in models["data"]] == ["tiny"]
        with pytest.raises(httpx.ConnectError):  # a stranger to us
            httpx.get(f"{server.url}/health")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://localhost:{server.port}/health")
        with connect(server):  # no handshake
            assert client.post(f"{server.url}/v1/completions", json=PROMPT, timeout=60).status_code == 200
            begun = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - begun < 20  # it waits for no one to say good-bye
