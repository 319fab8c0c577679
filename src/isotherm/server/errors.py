"""What goes wrong, as status and body in the shape that the clients of each API expect."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from isotherm.errors import (
    ContextOverflow,
    DownloadError,
    InsufficientMemory,
    IsothermError,
    MessageError,
    ModelNotFound,
    OptionError,
    TemplateError,
)

Body = dict[str, Any]


@dataclass
class ApiError(Exception):
    """kind: `type` of OpenAI's errors, as llama.cpp's server extends them. extra: further keys of the error."""

    status: int
    kind: str
    message: str
    param: str | None = None
    code: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, "invalid_request_error", message, param)


def api_error(error: Exception) -> ApiError:
    """What a client is told of any exception; of a fault of ours only that there was one."""
    match error:
        case ApiError():
            return error
        case ContextOverflow():
            sizes = {"n_prompt_tokens": error.num_tokens - 1, "n_ctx": error.context_tokens}
            code = "context_length_exceeded"
            return ApiError(400, "exceed_context_size_error", str(error), "messages", code, sizes)
        case ModelNotFound() | DownloadError():
            return ApiError(404, "not_found_error", str(error), "model", "model_not_found")
        case MessageError():
            return bad_request(str(error), error.field)
        case OptionError() | TemplateError():
            return bad_request(str(error))
        case InsufficientMemory():
            return ApiError(503, "unavailable_error", str(error), headers={"retry-after": "30"})
        case IsothermError():
            return ApiError(500, "server_error", str(error))
    return ApiError(500, "server_error", "the server failed; its log says more")


def openai_body(error: ApiError) -> Body:
    described = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
    return {"error": {**described, **error.extra}}


_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def anthropic_body(error: ApiError) -> Body:
    kind = _ANTHROPIC_KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def ollama_body(error: ApiError) -> Body:
    return {"error": error.message}


_ERROR = {"message": str, "type": str, "param": (str, None), "code": (str, None)}
_OPENAI = (openai_body, {"error": {**_ERROR, "n_prompt_tokens?": int, "n_ctx?": int}})
_OTHERS: tuple[tuple[str, tuple[Callable[[ApiError], Body], Body]], ...] = (
    ("/v1/messages", (anthropic_body, {"type": str, "error": {"type": str, "message": str}})),
    ("/api/", (ollama_body, {"error": str})),
)


def _form(path: str) -> tuple[Callable[[ApiError], Body], Body]:
    return next((form for prefix, form in _OTHERS if path.startswith(prefix)), _OPENAI)


def error_body(path: str, error: ApiError) -> Body:
    """The body of `error` for a request of `path`."""
    return _form(path)[0](error)


def error_shape(path: str) -> Body:
    """What `error_body` gives, as a shape of `openapi`."""
    return _form(path)[1]
