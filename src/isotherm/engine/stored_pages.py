"""Between the pages of an engine and those on disk: read by who plans a step, written by a thread of its own."""

import threading
import weakref
from collections.abc import Iterable
from enum import Enum
from queue import SimpleQueue
from typing import Protocol

import numpy as np

from isotherm.engine.kv_store import U8, KvStore, PageName, StoreCounts
from isotherm.program.backend import CompiledProgram

_MAX_QUEUED = 1 << 16  # names of pages


class PageOwner(Protocol):
    """What the thread that writes asks of the engine."""

    def release_ended(self) -> None:
        """Sequences that ended let go of their pages, unless the next step sees to it."""

    def copy_page(self, name: PageName) -> U8 | None:
        """The page's bytes; None where its memory was given to another."""


class StoredPages:
    """What waits to be written are names, not bytes: a page is copied when its turn comes, if memory still has it.

    The thread holds no engine that nobody else holds, and ends with it.
    """

    def __init__(self, store: KvStore, compiled: CompiledProgram, owner: PageOwner) -> None:
        self._store = store
        self._compiled = compiled
        self._buffers = tuple(np.empty(num_bytes, np.uint8) for num_bytes in compiled.page_bytes)
        self._owner = weakref.ref(owner)
        self._start()

    def _start(self) -> None:
        self._queue: _Queue = SimpleQueue()
        owner = self._owner()
        assert owner is not None
        weakref.finalize(owner, self._queue.put, _Order.STOP)
        self._thread = threading.Thread(
            target=_write_pages, args=(self._queue, self._store, self._owner), name="write KV pages", daemon=True
        )
        self._thread.start()

    def _start_if_forked(self) -> None:
        if not self._thread.is_alive():
            self._start()

    @property
    def counts(self) -> StoreCounts:
        return self._store.counts

    def has(self, group: int, key: bytes) -> bool:
        return self._store.has(group, key)

    def read(self, name: PageName, page: int) -> bool:
        """Fills the engine's `page`; False, and nothing is changed, where the disk has none that is whole."""
        buffer = self._buffers[name.group]
        if not self._store.read(name, buffer):
            return False
        self._compiled.write_page(name.group, page, buffer)
        return True

    def keep(self, names: Iterable[PageName]) -> None:
        """These are to be on disk, in this order; those that are count as used."""
        self._start_if_forked()
        for name in names:
            if self._queue.qsize() < _MAX_QUEUED:
                self._queue.put(name)
            else:
                self._store.skip(1)

    def sequence_ended(self) -> None:
        """Its pages are to be let go of. A finaliser may call this at any time: it takes no lock."""
        self._queue.put(_Order.RELEASE)

    def flush(self, timeout_s: float) -> None:
        """Waits until all that `keep` named is written; tells where that takes longer."""
        self._start_if_forked()
        done = threading.Event()
        self._queue.put(done)
        if not done.wait(timeout_s):
            self._store.notice(f"the disk is slow: not all keys and values were written within {timeout_s:g} s")


class _Order(Enum):
    RELEASE = "a sequence ended"
    STOP = "the engine is gone"


_Queue = SimpleQueue[PageName | threading.Event | _Order]


def _write_pages(queue: _Queue, store: KvStore, owner: "weakref.ref[PageOwner]") -> None:
    while (item := queue.get()) is not _Order.STOP:
        if isinstance(item, threading.Event):
            item.set()
            continue
        engine = owner()
        if engine is None:
            return
        if isinstance(item, _Order):
            engine.release_ended()
        elif not store.touch(item):
            page = engine.copy_page(item)
            if page is None:
                store.skip(1)
            else:
                store.write(item, page)
        del engine  # while this waits for the next, nobody else may hold it
