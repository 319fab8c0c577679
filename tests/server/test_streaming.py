"""An exchange is left, whatever happens once it was entered."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Self

import pytest
from fastapi import Request

from isotherm.server.errors import ApiError
from isotherm.server.streaming import Wording, respond


class Recorded:
    """An exchange that only tells what was done with it."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def cancel(self) -> None:
        self.told.append("cancelled")

    async def __aenter__(self) -> Self:
        self.told.append("entered")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.told.append("left")


class Failing:
    """Words that fail: whole ones, or behind the first part."""

    async def whole(self) -> dict[str, Any]:
        raise RuntimeError("no words")

    async def parts(self) -> AsyncIterator[bytes]:
        yield b"first"
        raise RuntimeError("no more words")

    def failure(self, error: ApiError) -> bytes:
        return b"last"


async def never() -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


def request() -> Request:
    log = type("Log", (), {"error": None})()
    return Request({"type": "http", "isotherm.log": log}, never)


@pytest.mark.parametrize("streams", [False, True])
def test_words_that_cannot_be_found(streams: bool) -> None:
    def speechless(_: Recorded) -> Wording:
        raise RuntimeError("no words")

    exchange = Recorded()
    with pytest.raises(RuntimeError, match="no words"):
        asyncio.run(respond(exchange, request(), speechless, streams=streams))
    assert exchange.told == ["entered", "left"]


def test_a_whole_answer_that_fails() -> None:
    exchange = Recorded()
    with pytest.raises(RuntimeError, match="no words"):
        asyncio.run(respond(exchange, request(), lambda _: Failing(), streams=False))
    assert exchange.told == ["entered", "left"]


@pytest.mark.parametrize("breaks_at", [None, 0, 1, 3])
def test_a_stream(breaks_at: int | None) -> None:
    """breaks_at: the message that the client's connection does not take."""
    exchange, asked, sent = Recorded(), request(), list[Any]()

    async def send(message: Any) -> None:
        if len(sent) == breaks_at:
            raise ConnectionError
        sent.append(message.get("body"))

    async def answer() -> None:
        response = await respond(exchange, asked, lambda _: Failing(), streams=True)
        assert exchange.told == ["entered"]
        await response(asked.scope, never, send)

    if breaks_at is None:
        asyncio.run(answer())
        assert sent == [None, b"first", b"last", b""]
    else:
        with pytest.raises(ConnectionError):
            asyncio.run(answer())
    assert exchange.told == ["entered", "left"]
