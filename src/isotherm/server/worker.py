"""The thread that computes one model's answers, and the event loop's end of each."""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from isotherm.answer import Piece, TextStream
from isotherm.server.errors import ApiError
from isotherm.server.metrics import Meters
from isotherm.text import TextGenerator

# Tokens that come faster than this go out together: nobody sees it, and sending each alone would cost a small model a
# tenth of its speed.
_LEAST_INTERVAL_S = 0.03

_LOG = logging.getLogger("isotherm.server")


@dataclass(frozen=True)
class Progress:
    """How far a prompt is; num_done_tokens includes the cached ones."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_done_tokens: int
    elapsed_s: float


Update = Piece | Progress | Exception


class Inbox:
    """What has come for an exchange, in order, with the index of its answer. Used on the event loop only."""

    def __init__(self) -> None:
        self._items: deque[tuple[int, Any]] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, index: int, item: Any) -> None:
        self._items.append((index, item))
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> tuple[int, Any]:
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._items.popleft()


class Reply:
    """One answer on its way to a client. Its updates go to `inbox`, with its index, on the event loop."""

    def __init__(self, index: int, stream: TextStream, inbox: "Inbox", *, wants_progress: bool) -> None:
        self.index = index
        self.stream = stream
        self.inbox = inbox
        self.wants_progress = wants_progress
        self.is_cancelled = False
        self.started_s = time.perf_counter()
        self.last_token_s: float | None = None
        self.num_told_tokens = 0  # of the prompt, by the last Progress

    def cancel(self) -> None:
        """No part of it is computed after the step that runs now. Any thread may call it, and more than once."""
        self.is_cancelled = True


class Worker:
    """Owns a model. `close` may be called from any thread, the rest from the event loop."""

    def __init__(self, model: TextGenerator, loop: asyncio.AbstractEventLoop, meters: Meters, max_waiting: int) -> None:
        self.model = model
        self._loop = loop
        self._meters = meters
        self._max_answers = model.facts.parallel + max_waiting
        self._num_answers = 0  # asked for and not ended
        self._new: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        self._replies: list[Reply] = []  # the thread's
        self._asked: set[Reply] = set()  # the loop's
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="compute answers", daemon=True)
        self._thread.start()

    @contextmanager
    def place(self, num_answers: int) -> Iterator[None]:
        """A place in the queue for that many answers. Raises ApiError where it is full."""
        if self._num_answers + num_answers > self._max_answers:
            raise ApiError(
                429,
                "rate_limit_error",
                f"{self._num_answers} answers are computed or wait, at most {self._max_answers} may; try again later",
                code="queue_full",
                headers={"retry-after": "5"},
            )
        self._num_answers += num_answers
        try:
            yield
        finally:
            self._num_answers -= num_answers

    def start(self, reply: Reply) -> None:
        """From now on it is computed. Raises ApiError where the model was unloaded meanwhile."""
        if self._is_closed:
            reply.stream.close()
            raise ApiError(503, "unavailable_error", "the model was unloaded")
        self._asked.add(reply)
        self._new.put(reply)

    def leave(self, reply: Reply) -> None:
        """Nobody waits for it any more, ended or not."""
        reply.cancel()
        self._asked.discard(reply)

    def abort(self, error: ApiError) -> None:
        """Ends all answers, and tells whoever waits for one."""
        for reply in self._asked:
            if not reply.is_cancelled:
                reply.inbox.put(reply.index, error)
                reply.cancel()

    def close(self) -> None:
        """Ends the thread, once the step that runs is done, and gives the model's memory back."""
        self._is_closed = True
        self._new.put(None)
        self._thread.join()
        self.model.close()

    def _run(self) -> None:
        while self._take_new():
            try:
                self.model.step()
            except Exception as error:  # a fault of ours, which may have met any of them
                _LOG.exception("a step failed")
                news: list[tuple[Reply, Update]] = [(reply, error) for reply in self._replies]
                self._drop(self._replies)
            else:
                news = self._news()
            if news:
                self._loop.call_soon_threadsafe(_hand_over, news)

    def _take_new(self) -> bool:
        """Waits for an answer to compute where there is none; False at the end."""
        while not self._replies or not self._new.empty():
            reply = self._new.get()
            if reply is None:
                self._drop(self._replies)
                return False
            self._replies.append(reply)
        return True

    def _news(self) -> list[tuple[Reply, Update]]:
        news: list[tuple[Reply, Update]] = []
        ended = []
        for reply in self._replies:
            if reply.is_cancelled:
                ended.append(reply)
                continue
            try:
                update = self._update(reply)
            except Exception as error:
                update = error
            if update is not None:
                news.append((reply, update))
            if isinstance(update, Exception) or (isinstance(update, Piece) and update.answer):
                ended.append(reply)
        self._drop(ended)
        return news

    def _update(self, reply: Reply) -> Update | None:
        last_s = reply.last_token_s or 0.0
        if not reply.stream.has_ended and time.perf_counter() - last_s < _LEAST_INTERVAL_S:
            return None
        piece = reply.stream.poll()
        if piece is not None:
            reply.last_token_s = self._meters.tokens(len(piece.tokens), reply.started_s, reply.last_token_s)
            if piece.answer:
                self._meters.answer(piece.answer)
            return piece
        facts = reply.stream.facts
        if not reply.wants_progress or facts.num_prefilled_tokens == reply.num_told_tokens:
            return None
        reply.num_told_tokens = facts.num_prefilled_tokens
        elapsed_s = time.perf_counter() - reply.started_s
        return Progress(facts.num_prompt_tokens, facts.num_cached_tokens, facts.num_prefilled_tokens, elapsed_s)

    def _drop(self, ended: list[Reply]) -> None:
        for reply in ended:
            reply.stream.close()
        self._replies = [reply for reply in self._replies if reply not in ended]


def _hand_over(news: list[tuple[Reply, Update]]) -> None:
    for reply, update in news:
        if not reply.is_cancelled:
            reply.inbox.put(reply.index, update)
