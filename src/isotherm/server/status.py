"""How the server is: health, metrics, and which models it has."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

import isotherm
from isotherm.server.errors import ApiError
from isotherm.server.openapi import document
from isotherm.server.shelf import Shelf, Slot

router = APIRouter()


_MODEL = {"id": str, "object": str, "created": int, "owned_by": str, "max_model_len?": int}


@router.get("/health", responses=document({"status": str}))
async def health(request: Request) -> dict[str, str]:
    """200 once requests are answered, 503 while the first model is loaded."""
    if request.app.state.shelf.is_starting:
        raise ApiError(503, "unavailable_error", "the model is being loaded")
    return {"status": "ok"}


@router.get("/version", responses=document({"version": str}))
async def version() -> dict[str, str]:
    """Which version of Isotherm this is."""
    return {"version": isotherm.__version__}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus's text form."""
    return Response(request.app.state.shelf.metrics.text(), media_type="text/plain; version=0.0.4")


@router.get("/v1/models", responses=document({"object": str, "data": [_MODEL]}))
async def models(request: Request) -> dict[str, Any]:
    """The models that may be asked for."""
    shelf: Shelf = request.app.state.shelf
    return {"object": "list", "data": [_model(slot) for slot in shelf.slots.values()]}


@router.get("/v1/models/{name:path}", responses=document(_MODEL))
async def model(name: str, request: Request) -> dict[str, Any]:
    """One of them."""
    shelf: Shelf = request.app.state.shelf
    return _model(shelf.find(name))


def _model(slot: Slot) -> dict[str, Any]:
    described: dict[str, Any] = {"id": slot.name, "object": "model", "created": slot.created_s, "owned_by": "isotherm"}
    if slot.worker:
        described["max_model_len"] = slot.worker.model.context_tokens
    return described
