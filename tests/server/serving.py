"""A real server in a process of its own, for real clients."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import httpx

_STARTED = re.compile(r"listening on (https?)://([^ ;]+):(\d+)")
START_S = 60


@dataclass
class Serving:
    """`isotherm serve ARGUMENTS --port 0`, as a context manager; killed at the end where it still runs."""

    arguments: list[str]
    home: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    port: int = 0
    scheme: str = "http"

    def __enter__(self) -> Self:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ISOTHERM_", "HF_"))}
        kept |= {"XDG_CONFIG_HOME": str(self.home / "config"), "HF_HOME": str(self.home / "huggingface")}
        kept |= {"ISOTHERM_CACHE": str(self.home / "cache"), **self.environment}
        command = [sys.executable, "-m", "isotherm", "serve", *self.arguments, "--port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, env=kept, text=True, encoding="utf-8")
        self._started = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._started.wait(START_S), "\n".join(self.lines)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        self._reader.join(10)

    @property
    def url(self) -> str:
        return f"{self.scheme}://localhost:{self.port}"

    def wait_healthy(self) -> Self:
        deadline = time.monotonic() + START_S
        while httpx.get(f"{self.url}/health").status_code != 200:
            assert time.monotonic() < deadline, "\n".join(self.lines)
            time.sleep(0.02)
        return self

    def stop(self, number: int = signal.SIGINT) -> int:
        """Sends a signal and waits for the end; the exit code."""
        self.process.send_signal(number)
        code = self.process.wait(60)
        self._reader.join(10)
        return code

    def wait_line(self, text: str) -> str:
        """The first line of the log that has `text`, once it is there."""
        deadline = time.monotonic() + 30
        while True:
            found = [line for line in list(self.lines) if text in line]
            if found:
                return found[0]
            assert time.monotonic() < deadline, "\n".join(self.lines)
            time.sleep(0.01)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if found := _STARTED.search(line):
                self.scheme, _, port = found.groups()
                self.port = int(port)
                self._started.set()
        self._started.set()
