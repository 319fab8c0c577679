"""The models of a server: loaded at first use, given back when idle or when another needs the memory."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from isotherm.errors import InsufficientMemory, ModelNotFound
from isotherm.server.errors import ApiError
from isotherm.server.metrics import Metrics
from isotherm.server.model_card import ModelCard
from isotherm.server.worker import Worker
from isotherm.text import TextGenerator

_LOG = logging.getLogger("isotherm.server")

FOREVER_S = float("inf")


@dataclass(eq=False)
class Slot:
    """One model that may be asked for.

    name: what clients call it. source: what `isotherm.load` takes. keep_alive_s: for which it stays without answers.
    read_card: raises what opening the file raises.
    """

    name: str
    source: str
    keep_alive_s: float
    read_card: Callable[[], ModelCard]
    worker: Worker | None = None
    num_users: int = 0
    used_at: float = 0.0  # seconds since the epoch
    unload_at: float = FOREVER_S
    created_s: int = field(default_factory=lambda: int(time.time()))
    leaves_when_idle: bool = False
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)
    _card: ModelCard | None = None

    async def card(self) -> ModelCard:
        """Read at the first question: a header takes a tenth of a second."""
        if self._card is None:
            self._card = await asyncio.to_thread(self.read_card)
        return self._card


class Shelf:
    """All of it runs on the event loop; loading and closing go to threads."""

    def __init__(
        self,
        loader: Callable[[str], TextGenerator],
        slots: Iterable[Slot],
        *,
        max_waiting: int,
    ) -> None:
        """loader: makes the model of a source; called in a thread, one at a time. max_waiting: answers of a model."""
        self.slots = {slot.name: slot for slot in slots}
        self.metrics = Metrics(self._loaded)
        self._loader = loader
        self._max_waiting = max_waiting
        self._loading = asyncio.Lock()
        self._is_closing = False
        self.is_starting = False  # the first model is being loaded
        self._unloading: set[asyncio.Task[None]] = set()  # the loop itself keeps only weak references

    def find(self, name: str) -> Slot:
        """Raises ModelNotFound, with the names there are; nothing is ever fetched because a request names it."""
        slot = self.slots.get(name) or self.slots.get(name.removesuffix(":latest"))
        if slot is None:
            here = ", ".join(self.slots) or "none"
            raise ModelNotFound(f"the model {name!r} is not served here; served: {here}")
        return slot

    @asynccontextmanager
    async def borrow(self, name: str, keep_alive_s: float | None = None) -> AsyncIterator[Worker]:
        """The worker of a model, which stays loaded meanwhile; raises what loading raises."""
        slot = self.find(name)
        slot.num_users += 1
        try:
            async with slot.lock:
                if slot.worker is None:
                    slot.worker = await self._load(slot)
            yield slot.worker
        finally:
            slot.num_users -= 1
            self._rest(slot, slot.keep_alive_s if keep_alive_s is None else keep_alive_s)

    async def release(self, slot: Slot) -> None:
        """Unloads it; where answers run, once they have ended."""
        if slot.num_users:
            slot.leaves_when_idle = True
        else:
            await self._unload_if_idle(slot)

    async def unload(self, slot: Slot) -> None:
        """Gives its memory back; answers that run end with an error."""
        if slot.timer:
            slot.timer.cancel()
        worker, slot.worker, slot.unload_at = slot.worker, None, FOREVER_S
        if worker is not None:
            worker.abort(ApiError(503, "unavailable_error", f"{slot.name} was unloaded"))
            await asyncio.to_thread(worker.close)
            _LOG.info("unloaded %s", slot.name)

    def abort(self, error: ApiError) -> None:
        for worker in self._workers():
            worker.abort(error)

    async def close(self) -> None:
        self._is_closing = True
        for slot in self.slots.values():
            await self.unload(slot)

    def _workers(self) -> Iterator[Worker]:
        return (slot.worker for slot in list(self.slots.values()) if slot.worker)

    def _loaded(self) -> list[tuple[str, TextGenerator]]:
        return [(slot.name, slot.worker.model) for slot in list(self.slots.values()) if slot.worker]

    def _rest(self, slot: Slot, keep_alive_s: float) -> None:
        """Nobody may be using it now: sets when it is unloaded."""
        if slot.leaves_when_idle:
            keep_alive_s = 0.0
            slot.leaves_when_idle = slot.num_users > 0
        slot.used_at = time.time()
        if slot.timer:
            slot.timer.cancel()
            slot.timer = None
        slot.unload_at = slot.used_at + keep_alive_s
        if slot.num_users or slot.worker is None or keep_alive_s == FOREVER_S:
            return
        slot.timer = asyncio.get_running_loop().call_later(keep_alive_s, self._unload_if_idle, slot)

    def _unload_if_idle(self, slot: Slot) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(self._leave(slot))
        self._unloading.add(task)
        task.add_done_callback(self._unloading.discard)
        return task

    async def _leave(self, slot: Slot) -> None:
        if slot.num_users == 0:  # nobody came since the task was made
            await self.unload(slot)

    async def _load(self, slot: Slot) -> Worker:
        async with self._loading:
            while True:
                if self._is_closing:
                    raise ApiError(503, "unavailable_error", "the server is shutting down")
                if self._unloading:  # whose memory may be needed
                    await asyncio.wait(self._unloading)
                try:
                    model = await asyncio.to_thread(self._loader, slot.source)
                except InsufficientMemory:
                    if not await self._make_room():
                        raise
                    continue
                if model.context_tokens < model.facts.wanted_context_tokens and await self._make_room():
                    model.close()
                    continue
                _LOG.info("%s", _loaded_line(slot.name, model))
                meters = self.metrics.meters(slot.name)
                return Worker(model, asyncio.get_running_loop(), meters, self._max_waiting)

    async def _make_room(self) -> bool:
        """Unloads the idle model whose last answer is oldest; False where none is idle."""
        idle = [slot for slot in self.slots.values() if slot.worker and not slot.num_users]
        if not idle:
            return False
        await self.unload(min(idle, key=lambda slot: slot.used_at))
        return True


def _loaded_line(name: str, model: TextGenerator) -> str:
    facts = model.facts
    return (
        f"loaded {name} in {facts.load_s:.2f} s: {facts.quantization}, {facts.isa}, {facts.num_threads} threads, "
        f"context {model.context_tokens}, {facts.parallel} answers at once; MB: {facts.memory.weights_bytes / 1e6:.0f} "
        f"weights, {facts.memory.kv_bytes / 1e6:.0f} keys and values"
    )
