"""Answers over HTTP as they come: server-sent events, or lines of JSON."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, Protocol

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from isotherm.server.ask import ClientLeft
from isotherm.server.errors import ApiError, api_error
from isotherm.server.gate import Receive, Scope, Send

SSE = "text/event-stream"
NDJSON = "application/x-ndjson"


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def event(value: Any, name: str | None = None) -> bytes:
    """One server-sent event with `value` as JSON."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {compact(value)}\n\n".encode()


class Running(Protocol):
    """An exchange that was entered, or several."""

    def cancel(self) -> None: ...

    async def __aexit__(self, *_: object) -> None: ...


class Watch:
    """Cancels an exchange when its client leaves. A context manager around the exchange's news."""

    def __init__(self, exchange: Running, receive: Receive) -> None:
        self._exchange = exchange
        self._receive = receive

    def __enter__(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._wait())

    def __exit__(self, *_: object) -> None:
        self._task.cancel()
        del self._task  # which holds, by the traceback of its end, this: a ring that only the collector would take

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._exchange.cancel()


class StreamedAnswer(Response):
    """An exchange that was entered, sent part by part and left at the end, whoever ends it."""

    def __init__(
        self,
        exchange: Running,
        parts: AsyncIterator[bytes],
        failure: Callable[[ApiError], bytes],
        media_type: str = SSE,
    ) -> None:
        """failure: the last part, where something goes wrong after the first."""
        super().__init__(media_type=media_type, headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._exchange = exchange
        self._parts = parts
        self._failure = failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            with Watch(self._exchange, receive), suppress(ClientLeft):
                await self._send_parts(scope, send)
        finally:
            await self._exchange.__aexit__()

    async def _send_parts(self, scope: Scope, send: Send) -> None:
        try:
            async for part in self._parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except (ClientLeft, TimeoutError):
            raise
        except Exception as error:
            described = api_error(error)
            scope["isotherm.log"].error = described.message
            await send({"type": "http.response.body", "body": self._failure(described), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def respond(
    exchange: Running,
    request: Request,
    whole: Callable[[], Awaitable[dict[str, Any]]],
    events: AsyncIterator[bytes] | None,
    failure: Callable[[ApiError], bytes],
    media_type: str = SSE,
) -> Response:
    """The answer to a request, as `events` where they are wanted, else whole. The exchange is left at the end."""
    if events is not None:
        return StreamedAnswer(exchange, events, failure, media_type)
    try:
        with Watch(exchange, request.receive):
            return JSONResponse(await whole())
    finally:
        await exchange.__aexit__()
