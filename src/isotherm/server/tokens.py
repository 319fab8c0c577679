"""/tokenize and /detokenize: how a model sees a text, in the forms of llama.cpp's server and of vLLM's."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag

from isotherm.errors import ModelNotFound
from isotherm.server.ask import Ask, prompt_ids
from isotherm.server.fields import Strict
from isotherm.server.openapi import document
from isotherm.server.shelf import Shelf
from isotherm.text import TextGenerator
from isotherm.types import SamplingParams

router = APIRouter()

_MAX_TOKENS = 1 << 20


class _ModelField(Strict):
    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None  # the first one served, where it is silent

    def name(self, shelf: Shelf) -> str:
        name = self.model or next(iter(shelf.slots), None)
        if name is None:
            raise ModelNotFound("no model is served here")
        return name


class TokenizeContent(_ModelField):
    """llama.cpp's form."""

    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False

    def answer(self, model: TextGenerator) -> dict[str, Any]:
        ids = model.tokenize(self.content, add_special=self.add_special, parse_special=self.parse_special)
        if not self.with_pieces:
            return {"tokens": ids}
        return {"tokens": [{"id": token, "piece": _piece(model.token_bytes(token))} for token in ids]}


class TokenizePrompt(_ModelField):
    """vLLM's form for text."""

    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False

    def answer(self, model: TextGenerator) -> dict[str, Any]:
        ids = model.tokenize(self.prompt, add_special=self.add_special_tokens)
        return _counted(model, ids, self.return_token_strs)


class TokenizeMessages(_ModelField):
    """vLLM's form for a conversation, which goes through the chat template as in /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    return_token_strs: bool = False

    def answer(self, model: TextGenerator) -> dict[str, Any]:
        ids = prompt_ids(model, Ask("", tuple(self.messages), SamplingParams()))
        return _counted(model, list(ids), self.return_token_strs)


def _form(body: Any) -> str:
    names = ("prompt", "messages") if isinstance(body, dict) else ()
    return next((name for name in names if name in body), "content")


TokenizeRequest = Annotated[
    Annotated[TokenizeContent, Tag("content")]
    | Annotated[TokenizePrompt, Tag("prompt")]
    | Annotated[TokenizeMessages, Tag("messages")],
    Discriminator(_form),
]


class DetokenizeRequest(_ModelField):
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=_MAX_TOKENS)]


_TOKENS = {"tokens": [(int, {"id": int, "piece": (str, [int])})]}
_COUNT = {"count": int, "max_model_len": int, "tokens": [int], "token_strs?": [str]}


@router.post("/tokenize", responses=document((_TOKENS, _COUNT)))
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """The tokens of a text, `content` or `prompt`, or of a conversation, `messages`."""
    async with request.app.state.shelf.borrow(body.name(request.app.state.shelf)) as worker:
        return await asyncio.to_thread(body.answer, worker.model)


@router.post("/detokenize", responses=document({"content": str}))
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
    """The text of tokens; control tokens as they are spelled."""
    async with request.app.state.shelf.borrow(body.name(request.app.state.shelf)) as worker:
        text = await asyncio.to_thread(worker.model.detokenize, body.tokens, show_special=True)
    return {"content": text}


def _counted(model: TextGenerator, ids: list[int], with_strings: bool) -> dict[str, Any]:
    described = {"count": len(ids), "max_model_len": model.context_tokens, "tokens": ids}
    if not with_strings:
        return described
    return {**described, "token_strs": [model.token_bytes(token).decode(errors="replace") for token in ids]}


def _piece(data: bytes) -> str | list[int]:
    """A token that is only part of a character as its bytes."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)
