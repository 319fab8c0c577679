"""Heads of requests: how large, how slow."""

import asyncio
import socket
from typing import Any

import httpx
import pytest
import uvicorn
from serving import Serving
from uvicorn.server import ServerState

from isotherm.server import connection
from isotherm.server.connection import MAX_HEAD_BYTES, Connection


def test_a_large_head_is_refused(server: Serving) -> None:
    url = f"{server.url}/health"
    assert httpx.get(url, headers={"x-note": "a" * (MAX_HEAD_BYTES - 1000)}).status_code == 200
    assert httpx.get(url, headers={"x-note": "a" * MAX_HEAD_BYTES}).status_code == 400
    assert httpx.get(url, headers={f"x-{index}": "a" * 100 for index in range(700)}).status_code == 400
    assert httpx.get(url, params={"q": "a" * (MAX_HEAD_BYTES - 100)}).status_code == 400  # httpx adds fields


@pytest.mark.parametrize("start", [b"GET /", b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: "])
def test_an_endless_head_is_cut(server: Serving, start: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(start)
        with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
            client.sendall(b"a" * (64 << 20))
    assert httpx.get(f"{server.url}/health").status_code == 200


async def _hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.mark.parametrize(
    ("sent", "got"),
    [
        (b"", b""),
        (b"GET / HTTP/1.1\r\nhost: x\r\n", b""),
        (b"GET / HTTP/1.1\r\nhost: x\r\n\r\nGET /", b"hello"),
    ],
    ids=["nothing", "half", "one and a half"],
)
def test_a_head_that_does_not_come_ends_the_connection(
    sent: bytes, got: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.1)

    async def ask() -> bytes:
        config = uvicorn.Config(_hello, http=Connection, ws="none", lifespan="off", log_config=None)
        config.load()
        loop = asyncio.get_running_loop()
        listening = await loop.create_server(
            lambda: Connection(config, ServerState(), {}),  # type: ignore[arg-type]
            "127.0.0.1",
            0,
        )
        reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname()[:2])
        writer.write(sent)
        answer = await asyncio.wait_for(reader.read(), 30)
        writer.close()
        listening.close()
        return answer

    answer = asyncio.run(ask())
    assert answer.endswith(got)
    assert bool(answer) == bool(got)
