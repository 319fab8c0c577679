"""The servers that serve.py measures: started, watched and stopped, each in a process of its own."""

import asyncio
import http.client
import json
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]

_START_S = 300.0
_STOP_S = 60.0
_POLL_S = 0.1
_LOG_LINES = 8  # of a server that failed


class ServerFailed(Exception):
    """Says why an engine is left out, with the last lines that its server printed."""


@dataclass
class Server:
    """A server that answers on 127.0.0.1."""

    process: "subprocess.Popen[bytes]"
    port: int
    start_s: float  # until /health said ready
    stop_s: float = 0.0
    was_killed: bool = False  # it did not end when it was asked to

    def get(self, path: str) -> Any:
        return self._request("GET", path, None)

    def post(self, path: str, value: object) -> Any:
        return self._request("POST", path, json.dumps(value).encode())

    def _request(self, method: str, path: str, body: bytes | None) -> Any:
        """The JSON of the answer. Raises ServerFailed unless its status is 200."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ServerFailed(f"{method} {path}: {error}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise ServerFailed(f"{method} {path}: status {response.status}: {text[:300].decode(errors='replace')}")
        return json.loads(text)


@contextmanager
def started(command: Sequence[str]) -> Iterator[Server]:
    """The server of `command`, which `--host` and `--port` are added to; stopped at the end. Raises ServerFailed."""
    port = _free_port()
    with tempfile.TemporaryFile() as log:
        begun_s = time.perf_counter()
        full = [*command, "--host", "127.0.0.1", "--port", str(port)]
        try:
            process = subprocess.Popen(full, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        except OSError as error:
            raise ServerFailed(f"{command[0]}: {error.strerror}") from error
        server = Server(process, port, 0.0)
        try:
            _wait_until_ready(server, begun_s)
            yield server
            if process.poll() is not None:
                raise ServerFailed(f"its process ended with status {process.returncode}")
        except ServerFailed as failure:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()[-_LOG_LINES:]
            raise ServerFailed(" | ".join([str(failure), *lines])) from failure
        finally:
            _stop(server)


def _wait_until_ready(server: Server, begun_s: float) -> None:
    last = "nothing"
    while time.perf_counter() - begun_s < _START_S:
        if server.process.poll() is not None:
            raise ServerFailed(f"its process ended with status {server.process.returncode} before it was ready")
        try:
            server.get("/health")
        except ServerFailed as failure:
            last = str(failure)
            time.sleep(_POLL_S)
        else:
            server.start_s = time.perf_counter() - begun_s
            return
    raise ServerFailed(f"not ready in {_START_S:.0f} s; the last answer: {last}")


def _stop(server: Server) -> None:
    begun_s = time.perf_counter()
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
    try:
        server.process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        server.was_killed = True
        server.process.kill()
        server.process.wait()
    server.stop_s = time.perf_counter() - begun_s


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Watch:
    """What a process and its children took, sampled until the task is cancelled."""

    pid: int
    interval_s: float
    samples: list[tuple[float, int, float]] = field(default_factory=list)  # moment, RSS bytes, CPU seconds

    async def run(self) -> None:
        while True:
            with suppress(psutil.NoSuchProcess):  # a server that died is told of by the requests
                self.samples.append((time.perf_counter(), *_usage(self.pid)))
            await asyncio.sleep(self.interval_s)

    def summary(self, start_s: float, end_s: float) -> dict[str, Any]:
        """Of the samples in the window; the slope is that of its second half, when pools have grown."""
        inside = [sample for sample in self.samples if start_s <= sample[0] <= end_s]
        late = [(moment_s, rss) for moment_s, rss, _ in inside if moment_s >= (start_s + end_s) / 2]
        if len(late) < 2:
            raise ServerFailed("too few samples of its memory: it died, or the window is too short")
        slope = statistics.linear_regression([moment_s for moment_s, _ in late], [rss for _, rss in late]).slope
        spent_s = (inside[-1][2] - inside[0][2]) / (inside[-1][0] - inside[0][0]) * (end_s - start_s)
        return {
            "server_cpu_s": spent_s,
            "rss_max_bytes": max(rss for _, rss, _ in self.samples),
            "rss_bytes_per_minute": slope * 60,
            "rss_bytes": [rss for _, rss, _ in inside],
            "rss_interval_s": self.interval_s,
        }


def _usage(pid: int) -> tuple[int, float]:
    """RSS bytes and CPU seconds of a process and its living children."""
    top = psutil.Process(pid)
    rss_bytes, cpu_s = 0, 0.0
    for process in (top, *top.children(recursive=True)):
        with suppress(psutil.NoSuchProcess), process.oneshot():
            times = process.cpu_times()
            rss_bytes += process.memory_info().rss
            cpu_s += times.user + times.system
    return rss_bytes, cpu_s
