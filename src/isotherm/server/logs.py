"""What the server says on stderr: a line for each request, and for what happens besides."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

_LOG = logging.getLogger("isotherm.server")


@dataclass
class RequestLog:
    """What the log says of one request; the handlers fill in what they know."""

    method: str
    path: str
    status: int = 0
    seconds: float = 0.0
    model: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    answer_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    prompt: str | None = field(default=None, repr=False)  # only where it is asked for

    def line(self) -> str:
        path = json.dumps(self.path)[1:-1]  # %0a in it must not begin a line
        parts = [f"{self.method} {path} {self.status} {self.seconds:.3f} s"]
        if self.model:
            parts.append(self.model)
        if self.prompt_tokens is not None:
            parts.append(f"prompt {self.prompt_tokens} ({self.cached_tokens or 0} cached)")
        if self.finish_reason is not None:
            parts.append(f"answer {self.answer_tokens or 0} ({self.finish_reason})")
        if self.error:
            parts.append(f"error: {self.error}")
        if self.prompt is not None:
            parts.append(json.dumps(self.prompt, ensure_ascii=False))
        return "  ".join(parts)

    def known(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


class _Lines(logging.Formatter):
    """A line, or a JSON object, for each record; a request's facts come in its attribute `request`."""

    def __init__(self, as_json: bool) -> None:
        super().__init__("%(message)s")
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        request: RequestLog | None = getattr(record, "request", None)
        if not self._as_json:
            return request.line() if request else super().format(record)
        facts = request.known() if request else {"message": super().format(record)}
        return json.dumps({"time": record.created, "level": record.levelname.lower(), **facts}, ensure_ascii=False)


@contextmanager
def logging_to_stderr(as_json: bool) -> Iterator[None]:
    """While it lasts, the server's log goes to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines(as_json))
    level, propagates = _LOG.level, _LOG.propagate
    _LOG.addHandler(handler)
    _LOG.setLevel(logging.INFO)
    _LOG.propagate = False
    try:
        yield
    finally:
        _LOG.removeHandler(handler)
        _LOG.setLevel(level)
        _LOG.propagate = propagates
