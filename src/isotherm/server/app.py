"""The application: routes, and the shapes of errors."""

import json
import reprlib
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import isotherm
from isotherm.errors import IsothermError
from isotherm.server import (
    anthropic,
    ollama,
    ollama_models,
    openai_chat,
    openai_completions,
    openai_responses,
    page,
    status,
    tokens,
)
from isotherm.server.ask import ClientLeft
from isotherm.server.errors import ApiError, api_error, bad_request, error_body
from isotherm.server.openapi import describe_errors
from isotherm.server.shelf import Shelf
from isotherm.types import SamplingParams

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring = 3, 200
_CLIENT_LEFT = 499  # in the log alone, as nginx writes it


def build_app(shelf: Shelf, sampling: SamplingParams, *, has_page: bool) -> FastAPI:
    """sampling: for what a request does not say. has_page: whether `/` is the chat page."""
    app = FastAPI(title="Isotherm", version=isotherm.__version__, docs_url=None, redoc_url=None)
    app.state.shelf = shelf
    app.state.sampling = sampling
    if has_page:
        app.include_router(page.page_router())  # before those who answer at / too
    for room in (openai_chat, openai_completions, openai_responses, tokens, anthropic, ollama, ollama_models, status):
        app.include_router(room.router)
    app.add_exception_handler(ClientLeft, _answer_nobody)
    for kind in (ApiError, IsothermError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer_error)
    describe_errors(app)
    return app


async def _answer_nobody(request: Request, _: Exception) -> Response:
    return Response(status_code=_CLIENT_LEFT)


async def _answer_error(request: Request, error: Exception) -> Response:
    described = _described(error)
    request.scope["isotherm.log"].error = described.message
    body = error_body(request.url.path, described)
    # what a request spelled may be quoted, lone surrogates too, which have no UTF-8: ASCII has escapes for them
    return Response(json.dumps(body), described.status, dict(described.headers), "application/json")


def _described(error: Exception) -> ApiError:
    match error:
        case RequestValidationError():
            return _invalid(error.errors()[0])
        case HTTPException(status_code=404):
            return ApiError(404, "not_found_error", "there is no such address here; /v1/models names the models")
        case HTTPException():
            return ApiError(error.status_code, "invalid_request_error", str(error.detail), headers=error.headers or {})
    return api_error(error)


def _invalid(first: dict[str, Any]) -> ApiError:
    """The first thing that is wrong with a body: where, what, and what came."""
    where = ".".join(str(step) for step in first["loc"][1:])
    if first["type"] == "json_invalid":
        return bad_request(f"the body is no JSON: {first['ctx']['error']} at {where}")
    if first["type"] == "extra_forbidden":
        return bad_request(f"{where}: this field is not known here, and is not ignored; leave it out", where)
    given = _SHORT.repr(first.get("input"))
    return bad_request(f"{where or 'body'}: {first['msg']}; given: {given}", where or None)
