"""The page /openapi.json: what FastAPI cannot know of answers and errors."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from isotherm.server.errors import error_shape
from isotherm.server.streaming import NDJSON, SSE

# A shape is JSON in types: str, int, float, bool, dict (any object), None, [item], {"key": shape, "optional?": shape},
# (one, or another).
Shape = Any

_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", None: "null"}
_ERRORS = {
    "400": "The request is not valid, or cannot be honoured.",
    "401": "An API key is needed, or the one given is wrong.",
    "403": "This host or page may not ask.",
    "404": "There is no such model or address.",
    "413": "The body is too large.",
    "429": "The queue is full; `retry-after` says when to try again.",
    "4XX": "The request is refused for another reason.",
    "500": "The server failed.",
    "503": "The model is loaded, unloaded or does not fit now; `retry-after` may say when to try again.",
}

_EVENT = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}
_ITEMS = {SSE: {**_EVENT, "required": ["data"]}, NDJSON: {"type": "object"}}


def schema_of(shape: Shape) -> dict[str, Any]:
    """The JSON schema of a shape."""
    match shape:
        case [item]:
            return {"type": "array", "items": schema_of(item)}
        case tuple():
            return {"anyOf": [schema_of(one) for one in shape]}
        case dict() as fields:
            properties = {name.removesuffix("?"): schema_of(field) for name, field in fields.items()}
            required = [name for name in fields if not name.endswith("?")]
            return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": _NAMES[shape]}


def document(shape: Shape, *, stream: str | None = None) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers JSON of a shape, or a stream of that media type where it is asked for."""
    content: dict[str, Any] = {"application/json": {"schema": schema_of(shape)}}
    if stream:  # OpenAPI 3.2: itemSchema is of one event or line
        content[stream] = {"itemSchema": _ITEMS[stream]}
    return {200: {"description": "The answer.", "content": content}}


def describe_errors(app: FastAPI) -> None:
    """Puts the errors, which all routes share, into the app's page."""

    def page() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path, operations in app.openapi_schema["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)  # FastAPI's own; here it is 400
                    operation["responses"] |= _errors(path)
        return app.openapi_schema

    app.openapi = page  # type: ignore[method-assign]


def _errors(path: str) -> dict[str, Any]:
    content = {"application/json": {"schema": schema_of(error_shape(path))}}
    return {status: {"description": text, "content": content} for status, text in _ERRORS.items()}
