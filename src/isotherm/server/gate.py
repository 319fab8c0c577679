"""What every request passes first and last: who may ask, how much, how slowly; and its line in the log."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from isotherm.server.errors import ApiError, api_error, error_body
from isotherm.server.logs import RequestLog
from isotherm.server.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_LOG = logging.getLogger("isotherm.server")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_WITHOUT_KEY = ("/health", "/")  # and the page's own files, which hold nothing secret
_LOOKS = 4  # at a client that takes nothing, within its time


@dataclass(frozen=True)
class Policy:
    """Who may ask, and how much."""

    api_keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()  # of web pages elsewhere that may ask; "*": all of them
    max_body_bytes: int = 8 << 20
    client_s: float = 60.0  # for a client to send its header, then its body, and to take each part of an answer
    log_prompts: bool = False


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: App, *, policy: Policy, metrics: Metrics) -> None:
        self._app = app
        self._policy = policy
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        log = RequestLog(scope["method"], scope["path"])
        scope["isotherm.log"] = log
        scope["isotherm.log_prompts"] = self._policy.log_prompts
        _take_as_json(scope)
        started_s = time.perf_counter()
        response = _Response(send, log, self._cors(scope), self._policy.client_s)
        response.watch()
        try:
            self._admit(scope)
            if self._is_preflight(scope):
                await response.answer(204, b"")
            else:
                await self._app(scope, await self._whole_body(scope, receive), response.send)
        except ApiError as error:
            await response.fail(scope["path"], error)
        except TimeoutError:
            log.error = "the client took nothing of its answer for too long"
            raise
        except Exception as error:
            _LOG.exception("%s %s failed", log.method, log.path)
            await response.fail(scope["path"], api_error(error))
        finally:
            response.end_watch()
            log.seconds = round(time.perf_counter() - started_s, 4)
            route = scope.get("route")
            self._metrics.request(getattr(route, "path", "other"), log.status)
            _LOG.info("", extra={"request": log})

    def _admit(self, scope: Scope) -> None:
        """Raises ApiError for a request that may not ask at all."""
        host = _header(scope, b"host")
        if not self._policy.api_keys and _host_name(host) not in _LOOPBACK:
            # A page elsewhere can point its own name at this machine (DNS rebinding); without a key that would do.
            raise ApiError(403, "permission_error", f"the Host {host!r} is not this machine; use localhost, or a key")
        origin = _header(scope, b"origin")
        if origin and not self._allows(origin, scope):
            raise ApiError(403, "permission_error", f"pages of {origin} may not ask; --allow-origin lets them")
        if scope["path"] not in _WITHOUT_KEY and not self._is_preflight(scope):
            self._check_key(scope)

    def _check_key(self, scope: Scope) -> None:
        if not self._policy.api_keys:
            return
        given = _header(scope, b"authorization")
        given = given[7:].strip() if given[:7].lower() == "bearer " else _header(scope, b"x-api-key")
        # every key is compared, so that time tells nothing of which one is near
        matches = [hmac.compare_digest(given.encode(), key.encode()) for key in self._policy.api_keys]
        if not any(matches):
            what = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY, or x-api-key"
            raise ApiError(401, "authentication_error", what, code="invalid_api_key")

    def _allows(self, origin: str, scope: Scope) -> bool:
        same = origin.partition("://")[2] == _header(scope, b"host")
        return same or origin in self._policy.origins or "*" in self._policy.origins

    def _is_preflight(self, scope: Scope) -> bool:
        return scope["method"] == "OPTIONS" and bool(_header(scope, b"access-control-request-method"))

    def _cors(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        origin = _header(scope, b"origin")
        if not origin or not self._allows(origin, scope):
            return []
        allowed = [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"vary", b"origin"),
        ]
        if self._is_preflight(scope):
            headers = _header(scope, b"access-control-request-headers") or "authorization, content-type"
            allowed += [
                (b"access-control-allow-methods", b"GET, POST, DELETE"),
                (b"access-control-allow-headers", headers.encode("latin-1")),
                (b"access-control-max-age", b"600"),
            ]
        return allowed

    async def _whole_body(self, scope: Scope, receive: Receive) -> Receive:
        """Reads the body, within limits of size and time; then only tells of a client that leaves."""
        limit = self._policy.max_body_bytes
        too_large = ApiError(413, "invalid_request_error", f"the body is larger than {limit >> 20} MiB")
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._policy.client_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "invalid_request_error", "the client left before its body was here")
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise ApiError(
                408, "invalid_request_error", f"the body took longer than {self._policy.client_s:g} s"
            ) from None
        parts = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def rest() -> Message:
            return parts.pop() if parts else await receive()

        return rest


class _Response:
    """Passes an answer on, and remembers how far it is."""

    def __init__(self, send: Send, log: RequestLog, headers: list[tuple[bytes, bytes]], client_s: float) -> None:
        self._send = send
        self._log = log
        self._headers = headers
        self._client_s = client_s
        self._has_started = False
        self._has_ended = False
        self._sending_since_s: float | None = None
        self._is_taken_too_slowly = False
        self._task = asyncio.current_task()

    def watch(self) -> None:
        """Looks now and then whether the client takes what it is sent: cheaper than a time limit for every part."""
        since_s = self._sending_since_s
        if since_s is not None and time.monotonic() - since_s > self._client_s and self._task:
            self._is_taken_too_slowly = True
            self._task.cancel()
            return
        self._timer = asyncio.get_running_loop().call_later(self._client_s / _LOOKS, self.watch)

    def end_watch(self) -> None:
        self._timer.cancel()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._has_started = True
            self._log.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self._headers]
        self._sending_since_s = time.monotonic()
        try:
            await self._send(message)
        except asyncio.CancelledError:
            if self._is_taken_too_slowly:
                raise TimeoutError from None
            raise
        self._sending_since_s = None
        self._has_ended = message["type"] == "http.response.body" and not message.get("more_body")

    async def answer(self, status: int, body: bytes, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    async def fail(self, path: str, error: ApiError) -> None:
        """Where the answer has begun, its end is cut: the client sees that something is missing."""
        self._log.error = error.message
        if self._has_ended:
            return
        if self._has_started:
            raise error
        extra = tuple((name.encode(), value.encode()) for name, value in error.headers.items())
        body = json.dumps(error_body(path, error)).encode()
        await self.answer(error.status, body, ((b"content-type", b"application/json"), *extra))


def _take_as_json(scope: Scope) -> None:
    """Bodies are JSON, whatever their type says: curl calls them a form. (A page elsewhere is told by its Origin.)"""
    others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
    scope["headers"] = [*others, (b"content-type", b"application/json")]


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
