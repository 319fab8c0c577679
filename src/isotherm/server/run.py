"""Runs the server: binds, says so, and shuts down in order."""

import asyncio
import ipaddress
import logging
import signal
import socket
import ssl
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from isotherm.errors import OptionError
from isotherm.server.app import build_app
from isotherm.server.connection import connections
from isotherm.server.errors import ApiError
from isotherm.server.gate import Gate, Policy
from isotherm.server.logs import logging_to_stderr
from isotherm.server.shelf import Shelf
from isotherm.types import SamplingParams

_LOG = logging.getLogger("isotherm.server")
_MAX_CONNECTIONS = 2000
_BACKLOG = 2048
_IDLE_CONNECTION_S = 75


@dataclass(frozen=True)
class Binding:
    """Where to listen. shutdown_s: how long running answers may take to finish, once a signal came."""

    host: str = "127.0.0.1"
    port: int = 8080
    tls_cert: Path | None = None
    tls_key: Path | None = None
    shutdown_s: float = 30.0

    def check(self, has_key: bool) -> None:
        """Raises OptionError for an address that others can reach where no key is asked for, or files without TLS."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise OptionError("--tls-cert and --tls-key go together; give both or none")
        if self.tls_cert is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.tls_cert, self.tls_key)
            except OSError as error:  # SSLError is one
                files = f"--tls-cert {self.tls_cert} and --tls-key {self.tls_key}"
                raise OptionError(
                    f"{files} cannot be used: {error.strerror}; they are a certificate chain and its key, in PEM"
                ) from error
        if not has_key and not _is_loopback(self.host):
            raise OptionError(
                f"--host {self.host} lets other machines ask; set a key with --api-key (or ISOTHERM_API_KEY), "
                f"or leave --host out"
            )

    def open(self) -> socket.socket:
        """Raises OptionError where the address cannot be had."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self.host, self.port))
            listener.listen(_BACKLOG)
        except (OSError, OverflowError) as error:
            listener.close()
            reason = getattr(error, "strerror", None) or str(error)
            raise OptionError(f"cannot listen on {self.host}:{self.port}: {reason}; --port takes another") from error
        return listener


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(
    make_shelf: Callable[[], Shelf],
    first: str | None,
    binding: Binding,
    policy: Policy,
    sampling: SamplingParams,
    *,
    has_page: bool,
    log_json: bool,
) -> None:
    """Answers requests until a signal comes.

    first: the model that is loaded before the first request. has_page: whether `/` is the chat page.
    Raises OptionError for an address that cannot be had, and what loading `first` raises.
    """
    binding.check(bool(policy.api_keys))
    listener = binding.open()
    try:
        with logging_to_stderr(log_json), asyncio.Runner(loop_factory=_new_loop) as runner:
            runner.run(_Service(binding, policy, listener).run(make_shelf, first, sampling, has_page))
    finally:
        listener.close()


def _new_loop() -> asyncio.AbstractEventLoop:
    if sys.platform == "win32":
        return asyncio.new_event_loop()
    import uvloop

    return uvloop.new_event_loop()


class _Service:
    """One run of the server."""

    def __init__(self, binding: Binding, policy: Policy, listener: socket.socket) -> None:
        self._binding = binding
        self._policy = policy
        self._listener = listener
        self._num_signals = 0

    async def run(
        self, make_shelf: Callable[[], Shelf], first: str | None, sampling: SamplingParams, has_page: bool
    ) -> None:
        shelf = self._shelf = make_shelf()
        gate = Gate(build_app(shelf, sampling, has_page=has_page), policy=self._policy, metrics=shelf.metrics)
        server = self._server = _Server(_config(gate, self._binding, self._policy.client_s))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        starting = loop.create_task(self._load_first(first))
        try:
            host, port = self._listener.getsockname()[:2]
            scheme = "https" if self._binding.tls_cert else "http"
            shown = f"[{host}]" if ":" in host else host
            _LOG.info("listening on %s://%s:%d; Ctrl-C ends it", scheme, shown, port)
            await server.serve([self._listener])
            if starting.done():
                await starting  # raises what went wrong with the first model
        finally:
            starting.cancel()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
            await shelf.close()

    async def _load_first(self, first: str | None) -> None:
        if first is None:
            return
        self._shelf.is_starting = True
        try:
            async with self._shelf.borrow(first):
                self._shelf.is_starting = False
        except BaseException:
            self._server.should_exit = True
            raise

    def _stop(self) -> None:
        self._num_signals += 1
        server = self._server
        server.should_exit = True
        if self._num_signals > 1:
            server.force_exit = True
            self._shelf.abort(ApiError(503, "unavailable_error", "the server was stopped"))
            return
        _LOG.info("stopping once running answers are done; Ctrl-C again ends them")
        told = ApiError(503, "unavailable_error", "the server is shutting down")
        asyncio.get_running_loop().call_later(self._binding.shutdown_s, self._shelf.abort, told)


class _Server(uvicorn.Server):
    """Signals are the service's."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()


def _config(gate: Gate, binding: Binding, client_s: float) -> uvicorn.Config:
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    return uvicorn.Config(
        gate,
        http=connections(client_s),
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=_IDLE_CONNECTION_S,
        timeout_graceful_shutdown=int(binding.shutdown_s) + 5,
        ssl_certfile=binding.tls_cert,
        ssl_keyfile=binding.tls_key,
    )
