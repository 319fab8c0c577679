"""A connection, until a request's header is whole: from there on the gate watches over it."""

import asyncio
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MAX_HEADER_BYTES = 64 << 10  # one read of the socket more may come in


class Connection(HttpToolsProtocol):
    """Ends itself where a header is too long, or takes longer than `header_s`; uvicorn would wait for ever."""

    def __init__(self, header_s: float, **given: Any) -> None:
        super().__init__(**given)
        self._header_s = header_s
        self._waiting: asyncio.TimerHandle | None = None  # for the rest of a header
        self._num_header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_wait()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._num_header_bytes = self._num_header_bytes + len(data) if self._waiting else 0
        if self._num_header_bytes > _MAX_HEADER_BYTES:
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._wait()

    def on_headers_complete(self) -> None:
        self._end_wait()
        super().on_headers_complete()

    def _wait(self) -> None:
        """From the start of a connection, or from the first byte of a later request."""
        if self._waiting is None:
            self._waiting = self.loop.call_later(self._header_s, self.transport.abort)

    def _end_wait(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


def connections(header_s: float) -> Any:
    """What uvicorn takes as `http`."""
    return partial(Connection, header_s)
