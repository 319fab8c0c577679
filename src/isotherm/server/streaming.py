"""Answers over HTTP as they come: server-sent events, or lines of JSON."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from typing import Any, Protocol, TypeVar

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


class Running(AbstractAsyncContextManager[Any], Protocol):
    """An exchange, or several."""

    def cancel(self) -> None: ...


_Running = TypeVar("_Running", bound=Running)


class Wording(Protocol):
    """An exchange in the words of one API: whole, or as the parts of a stream."""

    async def whole(self) -> dict[str, Any]: ...

    def parts(self) -> AsyncIterator[bytes]: ...

    def failure(self, error: ApiError) -> bytes:
        """The last part, where something goes wrong after the first."""


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
    """An exchange sent part by part."""

    def __init__(self, exchange: Running, wording: Wording, leaving: AsyncExitStack, media_type: str) -> None:
        """leaving: is closed at the end, whoever ends it."""
        super().__init__(media_type=media_type, headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._exchange = exchange
        self._wording = wording
        self._leaving = leaving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._leaving:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            with Watch(self._exchange, receive), suppress(ClientLeft):
                await self._send_parts(scope, send)

    async def _send_parts(self, scope: Scope, send: Send) -> None:
        try:
            async for part in self._wording.parts():
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except (ClientLeft, TimeoutError):
            raise
        except Exception as error:
            described = api_error(error)
            scope["isotherm.log"].error = described.message
            await send({"type": "http.response.body", "body": self._wording.failure(described), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def respond(
    exchange: _Running,
    request: Request,
    word: Callable[[_Running], Wording],
    *,
    streams: bool,
    media_type: str = SSE,
) -> Response:
    """Enters the exchange, and answers `request` in the words that `word` finds for it; the exchange is then left.

    Raises what entering it raises.
    """
    async with AsyncExitStack() as leaving:
        await leaving.enter_async_context(exchange)
        wording = word(exchange)
        if streams:
            return StreamedAnswer(exchange, wording, leaving.pop_all(), media_type)
        with Watch(exchange, request.receive):
            return JSONResponse(await wording.whole())
