"""Who may ask, and how the server begins and ends."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import openai
import pytest
from serving import Serving

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "the rain"}], "max_tokens": 4}


@pytest.fixture
def chat_url(server: Serving) -> str:
    return f"{server.url}/v1/chat/completions"


def test_another_host_is_refused(chat_url: str) -> None:
    got = httpx.post(chat_url, json=CHAT, headers={"host": "evil.example:80"})
    assert got.status_code == 403
    assert got.json()["error"]["type"] == "permission_error"
    for host in ("localhost", "127.0.0.1:99", "[::1]:8080"):
        assert httpx.post(chat_url, json=CHAT, headers={"host": host}).status_code == 200


def test_pages_elsewhere_are_refused(chat_url: str, server: Serving) -> None:
    for origin in ("https://evil.example", "null", f"http://localhost:{server.port + 1}"):
        assert httpx.post(chat_url, json=CHAT, headers={"origin": origin}).status_code == 403
    own = httpx.post(chat_url, json=CHAT, headers={"origin": server.url})
    assert own.status_code == 200


def test_a_body_too_large_is_refused(chat_url: str, server: Serving) -> None:
    got = httpx.post(chat_url, content=b'{"model":"' + b"x" * (10 << 20) + b'"}')
    assert got.status_code == 413

    def chunks() -> object:
        for _ in range(20):
            yield b"x" * (1 << 20)

    got = httpx.post(chat_url, content=chunks())  # type: ignore[arg-type]
    assert got.status_code == 413
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b'{"model":' + b"[" * 100_000])
def test_a_body_that_is_no_request(chat_url: str, body: bytes) -> None:
    got = httpx.post(chat_url, content=body)
    assert got.status_code == 400
    assert got.json()["error"]["type"] == "invalid_request_error"


def test_unknown_addresses_and_methods(server: Serving) -> None:
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{server.url}/v1/chat/completions").status_code == 405


def test_a_key_is_asked_for(tiny: Path, tmp_path: Path) -> None:
    page = {"origin": "http://page.example", "access-control-request-method": "POST"}
    arguments = [str(tiny), "--allow-origin", "http://page.example"]
    with Serving(arguments, tmp_path, {"ISOTHERM_API_KEY": "sesame"}) as server:
        server.wait_healthy()
        url = f"{server.url}/v1/chat/completions"
        refused = httpx.post(url, json=CHAT)
        assert refused.status_code == 401
        assert refused.json()["error"]["type"] == "authentication_error"
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()
        for header in ({"authorization": "Bearer sesame"}, {"x-api-key": "sesame"}):
            assert httpx.post(url, json=CHAT, headers=header).status_code == 200
        asked = httpx.options(url, headers=page)
        assert asked.status_code == 204
        assert asked.headers["access-control-allow-origin"] == "http://page.example"
        assert not [line for line in server.lines if "sesame" in line]
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--tls-cert", "x.pem"], "--tls-key"),
        (["--host", "192.0.2.1", "--api-key", "x"], "listen"),
    ],
)
def test_what_is_not_safe_is_refused(tiny: Path, arguments: list[str], says: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "isotherm", "serve", str(tiny), *arguments], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 2
    assert says in run.stderr


def test_nothing_to_serve(tmp_path: Path) -> None:
    empty = {"ISOTHERM_CACHE": str(tmp_path), "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    command = [sys.executable, "-m", "isotherm", "serve"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **empty})
    assert run.returncode == 1
    assert "isotherm serve smollm2" in run.stderr


def test_a_port_in_use(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "isotherm", "serve", str(tiny), "--port", port]
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert "already in use" in run.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_running_answers_finish_at_the_end(tiny: Path, tmp_path: Path, number: int) -> None:
    with Serving([str(tiny)], tmp_path) as server:
        server.wait_healthy()
        body = {**CHAT, "max_tokens": 400, "stream": True, "logit_bias": {"2": -100}}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(number)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert server.process.wait(30) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


def test_a_client_that_leaves_stops_its_answer(server: Serving) -> None:
    body = {**CHAT, "max_tokens": 480, "stream": True, "messages": [{"role": "user", "content": "leaving"}]}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
    assert "(cancelled)" in server.wait_line("(cancelled)")
    gauges = httpx.get(f"{server.url}/metrics").text
    assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in gauges


def test_many_connections_at_once(server: Serving) -> None:
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(1000)]
    try:
        assert httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=60).status_code == 200
    finally:
        for connection in idle:
            connection.close()


def test_a_full_queue_says_so(tiny: Path, tmp_path: Path) -> None:
    with Serving([str(tiny), "--parallel", "1", "--max-waiting", "0"], tmp_path) as server:
        server.wait_healthy()
        url = f"{server.url}/v1/chat/completions"
        codes = []

        def ask() -> None:
            codes.append(httpx.post(url, json={**CHAT, "max_tokens": 300}, timeout=60).status_code)

        askers = [threading.Thread(target=ask) for _ in range(6)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        assert set(codes) == {200, 429}
        assert httpx.post(url, json=CHAT).status_code == 200
