"""The clients of benchmarks/serve.py: what they read does not depend on where the network cuts it."""

import asyncio
import http.client
import io
import itertools
import json
import math
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from benchmark_module import benchmark
from hypothesis import given
from hypothesis import strategies as st

load: Any = benchmark("load")

CUTS = st.lists(st.integers(min_value=0, max_value=400), max_size=20)
PAYLOADS = st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20))


def pieces(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    for start, end in itertools.pairwise([0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]):
        yield data[start:end]


class Socket:
    """What http.client needs of a socket."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def makefile(self, *_: object) -> io.BytesIO:
        return io.BytesIO(self.data)


def read(data: bytes, cuts: list[int]) -> tuple[int, bytes]:
    parser = load.ResponseParser()
    body = b"".join(parser.feed(piece) for piece in pieces(data, cuts))
    parser.end()
    return parser.status, body


@given(PAYLOADS, CUTS, st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_events_are_those_sent_wherever_they_are_cut(
    payloads: list[str], cuts: list[int], end: str, has_comments: bool
) -> None:
    comment = f": alive{end}{end}" if has_comments else ""
    stream = "".join(f"{comment}event: x{end}data: {payload}{end}{end}" for payload in payloads).encode()
    parser = load.SseParser()
    events = [event for piece in pieces(stream, cuts) for event in parser.feed(piece)]
    assert events == [payload.encode() for payload in payloads]


def test_lines_of_data_are_joined_and_a_field_without_a_blank_is_read() -> None:
    assert load.SseParser().feed(b"data:a\ndata: b\n\ndata: unfinished") == [b"a\nb"]


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), CUTS, st.sampled_from(["chunks", "length", "close"]))
def test_a_response_is_what_http_client_reads_wherever_it_is_cut(parts: list[bytes], cuts: list[int], by: str) -> None:
    body = b"".join(parts)
    head, sent = {
        "chunks": ("Transfer-Encoding: chunked\r\n", b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in [*parts, b""])),
        "length": (f"content-length:{len(body)}\r\n", body),
        "close": ("", body),
    }[by]
    data = f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{head}\r\n".encode() + sent
    truth = http.client.HTTPResponse(Socket(data))  # type: ignore[arg-type]
    truth.begin()
    assert read(data, cuts) == (truth.status, truth.read()) == (200, body)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Len",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nabc is no size\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
    ],
)
def test_half_a_response_is_an_error(data: bytes) -> None:
    with pytest.raises(load.ResponseBroken):
        read(data, [])


# --- against a server that says what it is told to ---

CHUNKS = [
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}, "finish_reason": None}]},
    {"choices": [{"index": 0, "delta": {"content": "Grüß"}, "finish_reason": None}]},
    {"choices": [{"index": 0, "delta": {"content": " dich"}, "finish_reason": None}]},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    {
        "choices": [],
        "usage": {
            "prompt_tokens": 9,
            "completion_tokens": 4,
            "total_tokens": 13,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
    },
]
STREAM = "".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in CHUNKS) + "data: [DONE]\n\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


def served(response: bytes, talk: Callable[[int], Awaitable[Any]]) -> Any:
    """What `talk` gives, with the port of a server that answers every request so."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.split(b"\r\n") if line.startswith(b"Content-Length"))
        await reader.readexactly(int(length.partition(b":")[2]))
        for start in range(0, len(response), 7):
            writer.write(response[start : start + 7])
            await writer.drain()
        writer.close()

    async def both() -> Any:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            return await talk(server.sockets[0].getsockname()[1])

    return asyncio.run(both())


def test_an_answer_has_text_tokens_and_times() -> None:
    answer = served(OK + STREAM.encode(), lambda port: load.ask(port, b"{}"))
    assert answer.error is None
    assert (answer.text, answer.finish_reason) == ("Grüß dich", "stop")
    assert (answer.prompt_tokens, answer.cached_tokens, answer.output_tokens) == (9, 3, 4)
    assert len(answer.chunks_s) == 2
    assert answer.started_s < answer.chunks_s[0] <= answer.chunks_s[1] <= answer.ended_s
    assert answer.tokens_before(math.inf) == 4
    assert answer.tokens_before(answer.started_s) == 0


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 9\r\n\r\ntry later", "status 503: try later"),
        (OK + STREAM.encode()[:200], "without a finish_reason"),
        (OK + STREAM.encode().replace(b"data: [DONE]", b""), "without a finish_reason"),
        (OK + b'data: {"error": {"message": "out of pages"}}\n\n', "out of pages"),
        (OK + b"data: {no json\n\n", "JSONDecodeError"),
        (OK + b'data: {"choices": [{}]}\n\n', "KeyError"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\ndata: ", "closed before"),
    ],
)
def test_what_is_wrong_is_told(response: bytes, error: str) -> None:
    assert error in served(response, lambda port: load.ask(port, b"{}")).error


def test_nobody_there_and_nobody_answering_are_told() -> None:
    assert "ConnectionRefused" in asyncio.run(load.ask(1, b"{}")).error
    assert "no whole answer" in served(OK, lambda port: load.ask(port, b"{}", timeout_s=0)).error


def test_clients_ask_again_until_the_end() -> None:
    window = served(
        OK + STREAM.encode(),
        lambda port: load.closed_loop(port, itertools.repeat(b"{}"), num_clients=3, duration_s=0.1),
    )
    summary = load.summary(window)
    assert summary["errors"] == {}
    assert len(window.answers) > 3
    assert 0 < summary["requests_in_window"] <= len(window.answers)
    whole = sum(answer.output_tokens for answer in window.answers)
    assert 0 < summary["output_tokens_per_s"] * summary["duration_s"] <= whole
    assert summary["prompt_tokens"]["p50"] == 9
    assert summary["cached_tokens_share"] == pytest.approx(1 / 3)


def test_failures_are_counted_and_end_nothing() -> None:
    window = served(
        b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n",
        lambda port: load.closed_loop(port, itertools.repeat(b"{}"), num_clients=2, duration_s=0.1),
    )
    summary = load.summary(window)
    assert summary["errors"] == {"status 503: ": len(window.answers)}
    assert summary["output_tokens_per_s"] == 0


@pytest.mark.parametrize(("share", "value"), [(0.5, 2), (0.95, 4), (0.0, 1), (1.0, 4)])
def test_percentile_is_a_sample(share: float, value: float) -> None:
    assert load.percentile([3, 1, 4, 2], share) == value
