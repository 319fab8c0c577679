"""A connection, where the gate cannot watch over it: before a header is whole, and when all is said."""

import asyncio
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MAX_HEADER_BYTES = 64 << 10  # one read of the socket more may come in
_AFTER_GATE_S = 1.0


class Connection(HttpToolsProtocol):
    """Ends itself where uvicorn would wait for ever: a header is too long, or it, the rest of a body that was refused,
    or an answer that nobody takes, needs longer than `client_s`.
    """

    def __init__(self, client_s: float, **given: Any) -> None:
        super().__init__(**given)
        self._client_s = client_s
        self._waiting: asyncio.TimerHandle | None = None  # for what is to come
        self._sending: asyncio.TimerHandle | None = None  # until what was written is taken
        self._is_in_header = True
        self._num_header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_wait()
        self._end_send()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._num_header_bytes = self._num_header_bytes + len(data) if self._is_in_header else 0
        if self._num_header_bytes > _MAX_HEADER_BYTES:
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_header = True
        self._wait()

    def on_headers_complete(self) -> None:
        self._is_in_header = False
        self._end_wait()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        if self.cycle.more_body:
            self._wait()
        super().on_response_complete()

    def on_message_complete(self) -> None:
        self._end_wait()
        super().on_message_complete()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():  # TLS would wait half a minute for a client to say good-bye
            self.loop.call_later(_AFTER_GATE_S, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        # the gate, which can say why, comes first; but what it closes still waits to be taken
        self._sending = self.loop.call_later(self._client_s + _AFTER_GATE_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._end_send()
        super().resume_writing()

    def _end_send(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None

    def _wait(self) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(self._client_s, self.transport.abort)

    def _end_wait(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


def connections(client_s: float) -> Any:
    """What uvicorn takes as `http`."""
    return partial(Connection, client_s)
