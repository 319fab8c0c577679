"""Asks a server of ours that runs, over HTTP."""

import http.client
import ipaddress
import json
import ssl
import urllib.error
import urllib.request
from typing import Any

from isotherm.cli.settings import Settings
from isotherm.errors import ModelNotFound, OptionError, ServerError

ADDRESS = ("host", "port", "api_key", "tls_cert")

_TIMEOUT_S = 30.0
_MAX_ANSWER_BYTES = 16 << 20


class RunningServer:
    """The server that the settings of this machine speak of."""

    def __init__(self, settings: Settings) -> None:
        scheme = "https" if settings.tls_cert else "http"
        self.url = f"{scheme}://{_reachable(settings.host)}:{settings.port}"
        self._api_key = settings.api_key
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]  # it is near
        if settings.tls_cert:
            handlers.append(urllib.request.HTTPSHandler(context=_trusting(settings.tls_cert)))
        self._opener = urllib.request.build_opener(*handlers)

    def get(self, path: str) -> dict[str, Any]:
        """Raises ServerError where no server of ours answers; ModelNotFound and OptionError for what it refuses."""
        return self._ask(path, None)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Raises what `get` raises."""
        return self._ask(path, json.dumps(body).encode())

    def _ask(self, path: str, body: bytes | None) -> dict[str, Any]:
        headers = {"content-type": "application/json"}
        if self._api_key:
            headers["authorization"] = f"Bearer {self._api_key}"
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            with self._opener.open(request, timeout=_TIMEOUT_S) as response:
                return self._object(response.read(_MAX_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error.code, self._object(error.read(_MAX_ANSWER_BYTES))) from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise ServerError(
                f"no server answers at {self.url} ({reason}); `isotherm serve` starts one, --host and --port find it"
            ) from error

    def _object(self, data: bytes) -> dict[str, Any]:
        try:
            value = json.loads(data)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ServerError(f"what answers at {self.url} is not `isotherm serve`; --host and --port find it")
        return value

    def _refusal(self, status: int, body: dict[str, Any]) -> Exception:
        reason = f"the server at {self.url} says: {body.get('error')}"
        match status:
            case 404:
                return ModelNotFound(reason)
            case 400 | 401 | 403:
                return OptionError(reason)
        return ServerError(reason)


def _reachable(host: str) -> str:
    """A server that listens on every address is asked on this machine's own."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return "[::1]" if address.version == 6 else "127.0.0.1"
    return f"[{host}]" if address.version == 6 else host


def _trusting(certificate: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=certificate)
    except (OSError, ssl.SSLError) as error:
        raise OptionError(f"--tls-cert {certificate} cannot be read: {error}") from error
