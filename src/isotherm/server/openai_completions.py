"""OpenAI's older /v1/completions: prompts as they are, without a chat template."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from typing import Annotated, Any, Self

from fastapi import APIRouter, Request, Response
from pydantic import Field

from isotherm.dialogue.parts import Content
from isotherm.engine.sampling import SampledToken
from isotherm.server.ask import Ask, Delta, Exchange, News, Outcome, Quiet
from isotherm.server.errors import ApiError, bad_request, openai_body
from isotherm.server.gate import Scope
from isotherm.server.openai_chat import progress
from isotherm.server.openai_fields import HEAD, MIN_LOGPROB, TIMINGS, USAGE, SamplingFields, timings, usage
from isotherm.server.openapi import document
from isotherm.server.output_format import ResponseFormat, StructuredOutputs, grammar_of
from isotherm.server.shelf import Shelf
from isotherm.server.streaming import SSE, event, respond
from isotherm.server.worker import Progress
from isotherm.text import TextGenerator

router = APIRouter()

_MAX_PROMPTS = 256
_MAX_TOP_LOGPROBS = 5
_DEFAULT_MAX_TOKENS = 16  # OpenAI's

TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Prompts = (
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1, max_length=_MAX_PROMPTS)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=_MAX_PROMPTS)]
)


class CompletionRequest(SamplingFields):
    """The body of /v1/completions."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=_MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None
    response_format: ResponseFormat | None = None  # vLLM's here
    grammar: str | None = None  # GBNF, llama.cpp's
    structured_outputs: StructuredOutputs | None = None

    def check(self) -> None:
        """Raises ApiError for what cannot be honoured."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise bad_request("best_of: answers are not ranked here; leave it out, or ask for n", "best_of")
        if self.suffix is not None:
            raise bad_request("suffix: text is not filled into gaps here; leave it out", "suffix")
        if self.echo and self.logprobs is not None:
            raise bad_request("echo with logprobs: those of a prompt are not computed; leave one of them out", "echo")

    def prompts(self) -> list[str | tuple[int, ...]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [tuple(self.prompt)]
        return [one if isinstance(one, str) else tuple(one) for one in self.prompt]


_LOGPROBS = {"tokens": [str], "token_logprobs": [float], "top_logprobs": [dict], "text_offset": [int]}
_CHOICE = {"index": int, "text": str, "logprobs": (_LOGPROBS, None), "finish_reason": str}
_COMPLETION = {**HEAD, "choices": [_CHOICE], "usage": USAGE, "timings?": TIMINGS}


@router.post("/v1/completions", responses=document(_COMPLETION, stream=SSE))
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Goes on from one prompt or several; choice `i` of prompt `p` has the index `p * n + i`."""
    body.check()
    streams = body.streams()
    asks = [
        Ask(
            body.model,
            prompt,
            body.sampling(request.app.state.sampling, body.logprobs or 0),
            body.max_tokens or _DEFAULT_MAX_TOKENS,
            body.stops(),
            body.n or 1,
            body.priority,
            body.return_progress,
            grammar=grammar_of(body.response_format, body.grammar, body.structured_outputs),
            is_exact=body.exact,
        )
        for prompt in body.prompts()
    ]
    batch = _Batch(request.app.state.shelf, asks, request.scope)
    return await respond(batch, request, partial(_Completion, body), streams=streams)


class _Batch:
    """The exchanges of one request, a prompt each, side by side; an async context manager."""

    def __init__(self, shelf: Shelf, asks: list[Ask], scope: Scope) -> None:
        self.exchanges = [Exchange(shelf, ask, scope) for ask in asks]
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            for exchange in self.exchanges:
                await self._stack.enter_async_context(exchange)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def cancel(self) -> None:
        for exchange in self.exchanges:
            exchange.cancel()

    @property
    def outcomes(self) -> list[Outcome]:
        return [outcome for exchange in self.exchanges for outcome in exchange.outcomes]

    async def news(self) -> AsyncIterator[tuple[int, News]]:
        """What comes, with the index of its choice, until all have ended. Raises what went wrong first."""
        inbox: asyncio.Queue[tuple[int, News] | Exception | None] = asyncio.Queue()

        async def forward(first: int, exchange: Exchange) -> None:
            try:
                async for index, news in exchange.news():
                    inbox.put_nowait((first + index, news))
                inbox.put_nowait(None)
            except Exception as error:
                inbox.put_nowait(error)

        num_answers = self.exchanges[0].ask.num_answers
        numbered = enumerate(self.exchanges)
        tasks = [asyncio.create_task(forward(number * num_answers, exchange)) for number, exchange in numbered]
        num_running = len(tasks)
        try:
            while num_running:
                news = await inbox.get()
                if isinstance(news, Exception):
                    raise news
                if news is None:
                    num_running -= 1
                else:
                    yield news
        finally:
            for task in tasks:
                task.cancel()

    def usage(self) -> dict[str, Any]:
        """OpenAI's, summed over the prompts."""
        each = [usage(len(exchange.prompt_ids), exchange.answers) for exchange in self.exchanges]
        total = {name: sum(one[name] for one in each) for name in each[0] if name.endswith("tokens")}
        cached = sum(one["prompt_tokens_details"]["cached_tokens"] for one in each)
        return {**total, "prompt_tokens_details": {"cached_tokens": cached}}


class _Completion:
    """A batch in OpenAI's words."""

    def __init__(self, body: CompletionRequest, batch: _Batch) -> None:
        self._batch = batch
        self._includes_usage = body.includes_usage
        self._wants_logprobs = body.logprobs is not None
        self._num_answers = body.n or 1
        self._prompts = [_text(exchange) for exchange in batch.exchanges] if body.echo else None
        self._logprobs = [_Logprobs(exchange.model) for exchange in batch.exchanges for _ in exchange.outcomes]
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }

    async def whole(self) -> dict[str, Any]:
        async for _ in self._batch.news():
            pass
        choices = []
        for index, outcome in enumerate(self._batch.outcomes):
            assert outcome.answer is not None
            text = self._echo(index) + outcome.content
            choices.append(self._choice(index, text, outcome.answer.tokens, outcome.finish_reason))
        described = {**self._head, "choices": choices, "usage": self._batch.usage()}
        if len(self._batch.exchanges) == 1:  # of several, the times of one would mislead
            described["timings"] = timings(self._batch.exchanges[0].answers[0])
        return described

    async def parts(self) -> AsyncIterator[bytes]:
        head = {**self._head, "usage": None} if self._includes_usage else self._head
        for index in range(len(self._batch.outcomes) if self._prompts else 0):
            yield event({**head, "choices": [self._choice(index, self._echo(index), (), None)]})
        async for index, news in self._batch.news():
            match news:
                case Quiet():
                    yield b": still at work\n\n"
                case Progress():
                    yield event({**head, "choices": [], "prompt_progress": {"index": index, **progress(news)}})
                case Delta():
                    text = "".join(part.text for part in news.parts if isinstance(part, Content))
                    if text or news.answer or (self._wants_logprobs and news.tokens):
                        more = {"timings": timings(news.answer)} if news.answer else {}
                        choice = self._choice(index, text, news.tokens, news.finish_reason)
                        yield event({**head, **more, "choices": [choice]})
        if self._includes_usage:
            yield event({**head, "choices": [], "usage": self._batch.usage()})
        yield b"data: [DONE]\n\n"

    def failure(self, error: ApiError) -> bytes:
        return event(openai_body(error))

    def _echo(self, index: int) -> str:
        return self._prompts[index // self._num_answers] if self._prompts else ""

    def _choice(
        self, index: int, text: str, tokens: tuple[SampledToken, ...], finish_reason: str | None
    ) -> dict[str, Any]:
        logprobs = self._logprobs[index].take(tokens) if self._wants_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _text(exchange: Exchange) -> str:
    prompt = exchange.ask.prompt
    return prompt if isinstance(prompt, str) else exchange.model.detokenize(exchange.prompt_ids, show_special=True)


class _Logprobs:
    """OpenAI's `logprobs` of one answer, as its tokens come."""

    def __init__(self, model: TextGenerator) -> None:
        self._model = model
        self._detokenizer = model.detokenizer()
        self._num_chars = 0

    def take(self, tokens: tuple[SampledToken, ...]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._num_chars)
            self._num_chars += len(self._detokenizer.push(token.token_id))
        return {
            "tokens": [self._spelled(token.token_id) for token in tokens],
            "token_logprobs": [max(token.logprob, MIN_LOGPROB) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: SampledToken) -> dict[str, float]:
        """The chosen token is always among them. Of tokens that are spelled alike the likeliest counts."""
        top: dict[str, float] = {}
        for token_id, logprob in ((token.token_id, token.logprob), *token.top_logprobs):
            top.setdefault(self._spelled(token_id), max(logprob, MIN_LOGPROB))
        return top

    def _spelled(self, token_id: int) -> str:
        """As OpenAI does: a token that is only part of a character by its bytes, so that no two are spelled alike."""
        data = self._model.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
