"""Ollama's words for which models there are and which are loaded."""

import logging
import math
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

import isotherm
from isotherm.dialogue.reasoning import reasoning_block_of
from isotherm.errors import IsothermError
from isotherm.server.errors import ApiError, bad_request
from isotherm.server.fields import Strict
from isotherm.server.model_card import ModelCard
from isotherm.server.openapi import document
from isotherm.server.shelf import Shelf, Slot

router = APIRouter()

_LOG = logging.getLogger("isotherm.server")

# The Ollama whose API this is: with it came the last of our fields, `logprobs`. Clients refuse servers that are older
# than what they were made for.
_API_VERSION = "0.12.11"
_FOREVER = "9999-12-31T23:59:59Z"
_INSTEAD = {
    "pull": "`isotherm pull MODEL` fetches a model; start the server again to serve it",
    "push": "models are not published",
    "create": "give `isotherm serve` a GGUF file",
    "copy": "give `isotherm serve` a GGUF file, which goes by its own name",
    "delete": "`isotherm rm MODEL` deletes a model",
    "embed": "this version makes no embeddings",
    "embeddings": "this version makes no embeddings",
    "blobs/{digest:path}": "give `isotherm serve` a GGUF file",
}


class ShowRequest(Strict):
    model: Annotated[str, Field(max_length=512)] | None = None
    name: Annotated[str, Field(max_length=512)] | None = None  # what `model` was called once
    verbose: bool | None = None


_DETAILS = {
    "parent_model": str,
    "format": str,
    "family": str,
    "families": [str],
    "parameter_size": str,
    "quantization_level": str,
}
_LISTED = {"name": str, "model": str, "size?": int, "digest?": str, "modified_at?": str, "details?": _DETAILS}
_LOADED = {**_LISTED, "size_vram": int, "expires_at": str, "context_length": int}
_SHOWN = {
    "details": _DETAILS,
    "model_info": dict,
    "template": str,
    "capabilities": [str],
    "modified_at": str,
    "license?": str,
}


@router.head("/api/version", include_in_schema=False)
@router.get("/api/version", responses=document({"version": str, "isotherm": str}))
async def version() -> dict[str, str]:
    return {"version": _API_VERSION, "isotherm": isotherm.__version__}


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def alive() -> Response:
    """How clients ask whether anybody is there; where the chat page is served, it answers instead."""
    return Response("Isotherm is running", media_type="text/plain")


@router.get("/api/tags", responses=document({"models": [_LISTED]}))
async def tags(request: Request) -> dict[str, Any]:
    """The models that may be asked for."""
    shelf: Shelf = request.app.state.shelf
    return {"models": [await _listed(slot) for slot in shelf.slots.values()]}


@router.get("/api/ps", responses=document({"models": [_LOADED]}))
async def ps(request: Request) -> dict[str, Any]:
    """Those that are loaded."""
    shelf: Shelf = request.app.state.shelf
    return {"models": [await _loaded(slot) for slot in shelf.slots.values() if slot.worker]}


@router.post("/api/show", responses=document(_SHOWN))
async def show(body: ShowRequest, request: Request) -> dict[str, Any]:
    """What a model file says of itself."""
    shelf: Shelf = request.app.state.shelf
    name = body.model or body.name
    if not name:
        raise bad_request("model is missing", "model")
    card = await shelf.find(name).card()
    hidden = ("tokenizer.chat_template",)
    described: dict[str, Any] = {
        "details": _details(card),
        "model_info": {
            **{key: value for key, value in card.metadata.items() if key not in hidden},
            "general.parameter_count": card.num_parameters,
        },
        "template": card.chat_template or "",
        "capabilities": _capabilities(card),
        "modified_at": time_text(card.modified_at),
    }
    if "general.license" in card.metadata:
        described["license"] = str(card.metadata["general.license"])
    return described


def time_text(seconds: float) -> str:
    """RFC 3339 of seconds since the epoch."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


async def _listed(slot: Slot) -> dict[str, Any]:
    """A file that cannot be read is listed by its name: to ask for it says what is wrong."""
    named = {"name": slot.name, "model": slot.name}
    try:
        card = await slot.card()
    except IsothermError as error:
        _LOG.warning("%s: %s", slot.name, error)
        return named
    facts = {"size": card.size_bytes, "digest": card.digest, "modified_at": time_text(card.modified_at)}
    return {**named, **facts, "details": _details(card)}


async def _loaded(slot: Slot) -> dict[str, Any]:
    assert slot.worker
    model = slot.worker.model
    vram_bytes = model.facts.placement.num_bytes if model.facts.placement else 0
    ends_at = time.time() + slot.keep_alive_s if slot.num_users else slot.unload_at
    return {
        **await _listed(slot),
        "size": model.facts.memory.total_bytes + vram_bytes,
        "size_vram": vram_bytes,
        "expires_at": _FOREVER if math.isinf(ends_at) else time_text(ends_at),
        "context_length": model.context_tokens,
    }


def _details(card: ModelCard) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": card.family,
        "families": [card.family],
        "parameter_size": _count_text(card.num_parameters),
        "quantization_level": card.quantization,
    }


def _capabilities(card: ModelCard) -> list[str]:
    """Where a template knows no tools, they are told of in the first message."""
    if card.chat_template is None:
        return ["completion"]
    thinks = reasoning_block_of(card.chat_template) is not None
    return ["completion", "tools", *(["thinking"] if thinks else [])]


def _count_text(count: int) -> str:
    for size, unit, digits in ((1e9, "B", 1), (1e6, "M", 2), (1e3, "K", 2)):
        if count >= size:
            return f"{count / size:.{digits}f}{unit}"
    return str(count)


def _refusal(way: str) -> Callable[[Request], Awaitable[None]]:
    async def refuse(request: Request) -> None:
        raise ApiError(501, "unsupported_error", f"{request.url.path} is not supported here: {way}")

    return refuse


for _name, _way in _INSTEAD.items():
    router.add_api_route(f"/api/{_name}", _refusal(_way), methods=["HEAD", "POST", "DELETE"], include_in_schema=False)
