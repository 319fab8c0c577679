"""The clients of serve.py: streamed OpenAI requests over HTTP/1.1, and what each of them sees of time.

One event loop and no library, because the clients share the server's cores: what they cost is part of every result.
"""

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

_PAUSE_AFTER_ERROR_S = 0.1  # a server that is gone is not asked a thousand times a second
_CHUNK_END_BYTES = 2  # CR LF after a chunk, which is not of the body
_FIELDS_OF_TEXT = ("content", "reasoning_content")


class ResponseBroken(Exception):
    """What came is no response, or not a whole one."""


class SseParser:
    """The `data` of server-sent events, fed as bytes arrive. Lines end with LF or CRLF."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        """The events that `data` completes."""
        events = []
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events


class ResponseParser:
    """One response of HTTP/1.1, fed as bytes arrive: its body by chunks, by length, or up to the end of the stream."""

    def __init__(self) -> None:
        self.status = 0
        self.is_complete = False
        self._rest = b""
        self._left: float = 0  # bytes of the chunk with its CR LF, or of the body; infinite: up to the stream's end
        self._has_chunks = False
        self._in_trailer = False

    def feed(self, data: bytes) -> bytes:
        """The bytes of the body in `data`. Raises ResponseBroken."""
        self._rest += data
        if not self.status and not self._read_head():
            return b""
        if self._has_chunks:
            return self._read_chunks()
        body = self._take(self._left)
        self.is_complete = self._left == 0
        return body

    def end(self) -> None:
        """The stream has ended. Raises ResponseBroken where more was to come."""
        if not (self.is_complete or (self.status and self._left == math.inf)):
            raise ResponseBroken("the connection closed before the response was whole")
        self.is_complete = True

    def _read_head(self) -> bool:
        head, separator, rest = self._rest.partition(b"\r\n\r\n")
        if not separator:
            return False
        first, *lines = head.decode("latin-1").split("\r\n")
        protocol, _, status = first.partition(" ")
        if not protocol.startswith("HTTP/1.") or not status[:3].isdecimal():
            raise ResponseBroken(f"not a response: {first[:80]!r}")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.status, self._rest = int(status[:3]), rest
        self._has_chunks = headers.get("transfer-encoding", "").lower() == "chunked"
        if not self._has_chunks:
            self._left = int(headers["content-length"]) if "content-length" in headers else math.inf
        return True

    def _take(self, num_bytes: float) -> bytes:
        """At most so many of those that are left."""
        size = int(min(num_bytes, len(self._rest)))
        taken, self._rest = self._rest[:size], self._rest[size:]
        self._left -= size
        return taken

    def _read_chunks(self) -> bytes:
        body = []
        while not self.is_complete:
            if self._left > _CHUNK_END_BYTES:
                body.append(self._take(self._left - _CHUNK_END_BYTES))
            if 0 < self._left <= _CHUNK_END_BYTES:
                self._take(self._left)
            if self._left or b"\n" not in self._rest:
                break
            line, _, self._rest = self._rest.partition(b"\n")
            self._read_size(line.strip())
        return b"".join(body)

    def _read_size(self, line: bytes) -> None:
        if self._in_trailer:
            self.is_complete = not line
            return
        try:
            size = int(line.partition(b";")[0], 16)
        except ValueError as error:
            raise ResponseBroken(f"not the size of a chunk: {line[:40]!r}") from error
        self._in_trailer = size == 0
        self._left = size + _CHUNK_END_BYTES if size else 0


@dataclass
class Answer:
    """One request as its client saw it; times by `time.perf_counter`."""

    started_s: float
    ended_s: float = math.nan
    chunks_s: list[float] = field(default_factory=list)  # when text arrived
    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Time to first token; an answer without text counts up to its end."""
        return (self.chunks_s[0] if self.chunks_s else self.ended_s) - self.started_s

    @property
    def decode_tokens_per_s(self) -> float:
        """Of the tokens after the first; nan where there is none."""
        spent_s = self.chunks_s[-1] - self.chunks_s[0] if self.chunks_s else 0.0
        return (self.output_tokens - 1) / spent_s if spent_s else math.nan

    def tokens_before(self, moment_s: float) -> float:
        """Output tokens that had arrived, where a chunk stands for an equal share of them."""
        if not self.chunks_s:
            return 0.0
        return self.output_tokens * sum(chunk_s <= moment_s for chunk_s in self.chunks_s) / len(self.chunks_s)


class _Exchange(asyncio.Protocol):
    """Sends one request and fills one Answer; the future ends with it."""

    def __init__(self, request: bytes, answer: Answer, done: "asyncio.Future[None]") -> None:
        self._request, self._answer, self._done = request, answer, done
        self._response, self._events, self._error_body = ResponseParser(), SseParser(), b""
        self._is_done_said = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        try:
            body = self._response.feed(data)
            if self._response.status == 200:
                for event in self._events.feed(body):
                    self._read_event(event, now_s)
            else:
                self._error_body += body
            if self._response.is_complete:
                self._finish()
        except (ResponseBroken, ValueError, LookupError, TypeError) as error:
            self._finish(f"{type(error).__name__}: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done.done():
            return
        try:
            self._response.end()
            self._finish()
        except ResponseBroken as error:
            self._finish(str(exc or error))

    def _read_event(self, event: bytes, now_s: float) -> None:
        if event == b"[DONE]":
            self._is_done_said = True
            return
        chunk: dict[str, Any] = json.loads(event)
        answer = self._answer
        if "error" in chunk:
            raise ResponseBroken(str(chunk["error"]))
        if usage := chunk.get("usage"):
            answer.prompt_tokens, answer.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        for choice in chunk["choices"]:
            text = "".join(choice["delta"].get(name) or "" for name in _FIELDS_OF_TEXT)
            if text:
                answer.chunks_s.append(now_s)
                answer.text += text
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason

    def _finish(self, error: str | None = None) -> None:
        if self._done.done():
            return
        if error is None and self._response.status != 200:
            error = f"status {self._response.status}: {self._error_body.decode(errors='replace')[:300]}"
        elif error is None and not (self._is_done_said and self._answer.finish_reason):
            error = "the stream ended without a finish_reason and [DONE]"
        self._answer.error = error
        self._done.set_result(None)


async def ask(port: int, body: bytes, timeout_s: float = 600.0) -> Answer:
    """One chat request on a connection of its own, which its time includes. What goes wrong is the answer's `error`."""
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Accept: text/event-stream\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    answer, done = Answer(time.perf_counter()), loop.create_future()
    transport = None
    try:
        async with asyncio.timeout(timeout_s):
            transport, _ = await loop.create_connection(
                lambda: _Exchange(head.encode() + body, answer, done), "127.0.0.1", port
            )
            await done
    except TimeoutError:
        answer.error = f"no whole answer in {timeout_s:.0f} s"
    except OSError as error:
        answer.error = f"{type(error).__name__}: {error.strerror}"
    finally:
        if transport is not None:
            transport.abort()
    answer.ended_s = time.perf_counter()
    return answer


@dataclass(frozen=True)
class Window:
    """What clients saw who each asked again when they were answered."""

    answers: list[Answer]  # of everything that was started before the end
    started_s: float  # when every client had its first answer
    ended_s: float
    warmup_s: float
    client_cpu_s: float  # of this process in the window


async def closed_loop(port: int, bodies: Iterator[bytes], num_clients: int, duration_s: float) -> Window:
    """Clients that ask the next body when they are answered, until `duration_s` after the first answer of the last.

    What runs at the end is waited for, so that no slow answer is missing.
    """
    answers: list[Answer] = []
    warm = asyncio.Event()
    begun_s = time.perf_counter()
    num_waiting, end_s = num_clients, math.inf
    started_s = cpu_s = math.nan

    async def client() -> None:
        nonlocal num_waiting, end_s, started_s, cpu_s
        is_first = True
        while time.perf_counter() < end_s:
            answer = await ask(port, next(bodies))
            answers.append(answer)
            if is_first:
                is_first = False
                num_waiting -= 1
                if not num_waiting:
                    started_s, cpu_s = time.perf_counter(), time.process_time()
                    end_s = started_s + duration_s
                    warm.set()
            if answer.error is not None:
                await asyncio.sleep(_PAUSE_AFTER_ERROR_S)

    async def clock() -> float:
        await warm.wait()
        await asyncio.sleep(duration_s)
        return time.process_time() - cpu_s

    async with asyncio.TaskGroup() as group:
        spent = group.create_task(clock())
        for _ in range(num_clients):
            group.create_task(client())
    return Window(answers, started_s, end_s, started_s - begun_s, spent.result())


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least `share` of them do not exceed; nan of none."""
    if not samples:
        return math.nan
    return sorted(samples)[max(0, math.ceil(share * len(samples)) - 1)]


def summary(window: Window) -> dict[str, Any]:
    """Counts, rates and percentiles of a window; latencies are of the requests that started in it."""
    start_s, end_s = window.started_s, window.ended_s
    duration_s = end_s - start_s
    whole = [answer for answer in window.answers if answer.error is None]
    mine = [answer for answer in whole if start_s <= answer.started_s]
    ttfts_s = [answer.ttft_s for answer in mine]
    gaps_s = [b - a for answer in whole for a, b in pairwise(answer.chunks_s) if start_s <= a and b <= end_s]
    outputs = sum(answer.tokens_before(end_s) - answer.tokens_before(start_s) for answer in whole)
    prompts = [answer for answer in whole if start_s <= answer.started_s + answer.ttft_s <= end_s]
    prompt_tokens = sum(answer.prompt_tokens for answer in prompts)
    sizes = [answer.prompt_tokens for answer in mine]
    return {
        "duration_s": duration_s,
        "warmup_s": window.warmup_s,
        "requests": len(window.answers),
        "requests_in_window": len(mine),
        "errors": dict(Counter(answer.error for answer in window.answers if answer.error is not None)),
        "output_tokens_per_s": outputs / duration_s,
        "prompt_tokens_per_s": prompt_tokens / duration_s,
        "cached_tokens_share": sum(answer.cached_tokens for answer in prompts) / max(1, prompt_tokens),
        "ttft_s": {f"p{share}": percentile(ttfts_s, share / 100) for share in (50, 95)},
        "inter_token_s": {f"p{share}": percentile(gaps_s, share / 100) for share in (50, 95, 99)},
        "prompt_tokens": {f"p{share}": percentile(sizes, share / 100) for share in (5, 50, 95)},
        "output_tokens": {f"p{share}": percentile([a.output_tokens for a in mine], share / 100) for share in (5, 50)},
        "client_cpu_s": window.client_cpu_s,
    }
