"""KV pages: which page of a state group holds which tokens, and which sequences share it.

A page that is full never changes again. It is published under a key that names its tokens and all tokens before it, so
that any sequence that starts alike holds the same page. A page that nobody holds stays published until it is needed.
The last page of a sequence that ended is not full: who goes on from there claims it, and writes on.
Full pages of sequences that ended are kept on disk too, where a store is given.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from isotherm.engine.kv_store import PageName
from isotherm.engine.stored_pages import StoredPages
from isotherm.program.batch import FREED_PAGE
from isotherm.program.recorder import PAGE_TOKENS, StateSpec

# Keys of what comes before the first page: a trimmed sequence has other keys and values for the same tokens.
_ROOTS = {False: b"", True: b"trimmed"}
_MAX_TAILS = 1024


def pages_for(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_TOKENS)


def pages_needed(state: StateSpec, context_tokens: int, batch_tokens: int) -> int:
    """Pages that one sequence of `context_tokens` needs at most, computed `batch_tokens` at a time."""
    if state.window is None or state.window + batch_tokens >= context_tokens:
        return pages_for(context_tokens)
    # A batch sees window - 1 positions before its first token; neither end need lie on a page's border.
    return min(pages_for(context_tokens), pages_for(state.window + batch_tokens) + 1)


def oldest_visible(window: int | None, num_tokens: int) -> int:
    """Index of the first page that the token after `num_tokens` sees."""
    return 0 if window is None else max(0, num_tokens + 1 - window) // PAGE_TOKENS


def page_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Names one page's tokens after those that `parent` names."""
    return blake2b(np.array(token_ids, np.int32).tobytes(), key=parent, digest_size=16).digest()


class PagePool:
    """The pages of one state group: each is held by sequences, or kept for who may come, or free."""

    def __init__(self, num_pages: int) -> None:
        self._free = list(range(num_pages - 1, -1, -1))  # lowest id first out
        self._num_holders = [0] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # published and held by none, the next to go first

    @property
    def num_available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._kept)

    @property
    def usage(self) -> float:
        """The part of all pages that sequences hold."""
        return 1 - self.num_available / len(self._num_holders)

    def take(self) -> int:
        """A page to write to. What was kept longest goes where none is free."""
        if not self._free:
            page, _ = self._kept.popitem(last=False)
            self._withdraw(page)
            self._free.append(page)
        page = self._free.pop()
        self._num_holders[page] = 1
        return page

    def has(self, key: bytes) -> bool:
        return key in self._page_of

    def is_kept(self, key: bytes) -> bool:
        """Whether the page of `key` is there and nobody holds it: `claim` takes it out of `num_available`."""
        return self._page_of.get(key) in self._kept

    def page_of(self, key: bytes) -> int | None:
        return self._page_of.get(key)

    def share(self, key: bytes) -> int:
        """The page that was published under `key`, to read."""
        page = self._page_of[key]
        self._kept.pop(page, None)
        self._num_holders[page] += 1
        return page

    def claim(self, key: bytes) -> int:
        """The kept page that was published under `key`, to write to; no longer published."""
        page = self.share(key)
        assert self._num_holders[page] == 1
        self._withdraw(page)
        return page

    def publish(self, page: int, key: bytes) -> None:
        """Nothing happens where another page has the same tokens: it is as good, and this one goes with its holder."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def release(self, page: int) -> None:
        self._num_holders[page] -= 1
        assert self._num_holders[page] >= 0
        if self._num_holders[page]:
            return
        if page in self._key_of:
            self._kept[page] = None
        else:
            self._free.append(page)

    def _withdraw(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]


@dataclass
class _Table:
    """One sequence's pages of one state group.

    [0, first)  passed by the window   |   [first, end) held   |   [end, ..) not yet taken
    """

    pool: PagePool
    window: int | None
    pages: NDArray[np.int32]
    first: int = 0
    end: int = 0

    def slide(self, num_tokens: int) -> None:
        for index in range(self.first, min(self.end, oldest_visible(self.window, num_tokens))):
            self.release(index)
            self.first = index + 1

    def release(self, index: int) -> None:
        self.pool.release(int(self.pages[index]))
        self.pages[index] = FREED_PAGE


@dataclass(frozen=True)
class _Tail:
    """The tokens of a kept page that is not full."""

    key: bytes
    token_ids: tuple[int, ...]


class KvPages:
    """All pages of a model, by state group, and what is known of the ends of past sequences."""

    def __init__(
        self,
        states: tuple[StateSpec, ...],
        num_pages: tuple[int, ...],
        context_tokens: int,
        stored: StoredPages | None = None,
    ) -> None:
        self._num_pages = num_pages
        self._windows = tuple(state.window for state in states)
        self._context_tokens = context_tokens
        self._stored = stored
        self.forget()

    def forget(self) -> None:
        """All pages are free and nothing is published. Sequences made before must not be used any more."""
        self.pools = tuple(PagePool(count) for count in self._num_pages)
        self._tails: OrderedDict[bytes, _Tail] = OrderedDict()  # by the key of the page before

    def sequence(self, *, publishes: bool = True, is_trimmed: bool = False) -> "SequencePages":
        """An empty sequence; one that does not publish leaves nothing for others to find.

        is_trimmed: it shares pages with its like alone.
        """
        return SequencePages(self, publishes, is_trimmed)

    def tables(self) -> tuple[_Table, ...]:
        size = pages_for(self._context_tokens)
        return tuple(
            _Table(pool, window, np.full(size, FREED_PAGE, np.int32))
            for pool, window in zip(self.pools, self._windows, strict=True)
        )

    def tail(self, parent: bytes) -> _Tail | None:
        """The end that follows `parent`, if its pages are still kept."""
        found = self._tails.get(parent)
        if found and not all(pool.is_kept(found.key) for pool in self.pools):
            del self._tails[parent]
            return None
        return found

    def keep_tail(self, parent: bytes, tail: _Tail) -> None:
        self._tails[parent] = tail
        self._tails.move_to_end(parent)
        if len(self._tails) > _MAX_TAILS:
            self._tails.popitem(last=False)

    def longest_prefix(self, token_ids: Sequence[int], root: bytes, has: Callable[[int, bytes], bool]) -> list[bytes]:
        """Keys of the most leading full pages after which each group has what the next token sees.

        root: of the sequence. has: whether a state group has the page of a key.
        """
        keys: list[bytes] = []
        whole = [group for group, window in enumerate(self._windows) if window is None]
        for start in range(0, len(token_ids) - PAGE_TOKENS + 1, PAGE_TOKENS):
            key = page_key(keys[-1] if keys else root, token_ids[start : start + PAGE_TOKENS])
            if not all(has(group, key) for group in whole):
                break
            keys.append(key)
        sliding = [(group, window) for group, window in enumerate(self._windows) if window is not None]
        num_pages = len(keys)
        while not all(
            has(group, key)
            for group, window in sliding
            for key in keys[oldest_visible(window, num_pages * PAGE_TOKENS) : num_pages]
        ):
            num_pages -= 1
        return keys[:num_pages]

    def _visible(self, keys: Sequence[bytes]) -> list[PageName]:
        """What the token after these pages sees, of every group, by index."""
        first = [oldest_visible(window, len(keys) * PAGE_TOKENS) for window in self._windows]
        return [
            PageName(group, key, index)
            for index, key in enumerate(keys)
            for group in range(len(first))
            if index >= first[group]
        ]

    # --- pages on disk ----------------------------------------------------------------------------------------------

    def keep_on_disk(self, keys: Sequence[bytes], num_prompt_pages: int) -> None:
        """Of a sequence that ended: what the next one sees, whether it goes on from its end or from its prompt's."""
        if self._stored:
            names = {*self._visible(keys), *self._visible(keys[:num_prompt_pages])}
            self._stored.keep(sorted(names, key=lambda name: (name.index, name.group)))

    def fetch(self, token_ids: Sequence[int], limit_s: float | None, *, is_trimmed: bool = False) -> bool:
        """Publishes what the disk has of the prefix that `find_prefix` looks for.

        False: `limit_s` is over, and there may be more. One page is read whatever the limit.
        """
        if self._stored is None:
            return True
        stored, on_disk, root = self._stored, dict[tuple[int, bytes], bool](), _ROOTS[is_trimmed]

        def has(group: int, key: bytes) -> bool:
            if self.pools[group].has(key):
                return True
            if (group, key) not in on_disk:
                on_disk[group, key] = stored.has(group, key)
            return on_disk[group, key]

        end_s = None if limit_s is None else time.monotonic() + limit_s
        while True:
            names = self._visible(self.longest_prefix(token_ids[: len(token_ids) - 1], root, has))
            missing = [name for name in names if not self.pools[name.group].has(name.key)]
            if not missing:
                return True
            # Those that are there are held meanwhile: `take` could give their memory to the others.
            there = [name for name in names if self.pools[name.group].has(name.key)]
            held = [(name, self.pools[name.group].share(name.key)) for name in there]
            damaged = self._read(missing, held, end_s)
            for name, page in sorted(held, key=lambda each: -each[0].index):
                self.pools[name.group].release(page)
            if damaged is None:
                return end_s is None or time.monotonic() < end_s
            on_disk[damaged.group, damaged.key] = False

    def _read(
        self, names: Iterable[PageName], held: list[tuple[PageName, int]], end_s: float | None
    ) -> PageName | None:
        """Reads these pages while there is memory and time for them; the one that the disk turns out not to have."""
        assert self._stored is not None
        for name in names:
            pool = self.pools[name.group]
            if not pool.num_available:
                break
            page = pool.take()
            held.append((name, page))
            if not self._stored.read(name, page):
                return name
            pool.publish(page, name.key)
            if end_s is not None and time.monotonic() >= end_s:
                break
        return None


class SequencePages:
    """One sequence's tokens whose keys and values are in pages, and the tables of those pages."""

    def __init__(self, kv: KvPages, publishes: bool, is_trimmed: bool) -> None:
        self._kv = kv
        self._root = _ROOTS[is_trimmed]
        self.is_trimmed = is_trimmed
        self._publishes = publishes
        self._tables = kv.tables()
        self._keys: list[bytes] = []  # of the full pages
        self._num_prompt_pages = 0
        self.token_ids: list[int] = []

    @property
    def page_tables(self) -> tuple[NDArray[np.int32], ...]:
        return tuple(table.pages for table in self._tables)

    def find_prefix(self, token_ids: Sequence[int]) -> int:
        """Holds the longest prefix of `token_ids` that pages have; returns its length. For an empty sequence.

        The last of `token_ids` is never taken as computed: computing it gives the first logits.
        """
        assert not self.token_ids
        keys = self._keys = self._kv.longest_prefix(
            token_ids[: len(token_ids) - 1], self._root, lambda group, key: self._tables[group].pool.has(key)
        )
        self._num_prompt_pages = len(token_ids) // PAGE_TOKENS
        self.token_ids = list(token_ids[: len(keys) * PAGE_TOKENS])
        for table in self._tables:
            table.first, table.end = oldest_visible(table.window, len(self.token_ids)), len(keys)
            for index in range(table.first, len(keys)):
                table.pages[index] = table.pool.share(keys[index])
        self._claim_tail(token_ids)
        return len(self.token_ids)

    def reserve(self, num_new: int) -> bool:
        """Pages for the next `num_new` tokens, of every group or of none; frees those that windows have passed."""
        num_tokens = len(self.token_ids)
        for table in self._tables:
            table.slide(num_tokens)
        wanted = pages_for(num_tokens + num_new)
        if all(wanted <= table.end for table in self._tables):
            return True
        if any(wanted - table.end > table.pool.num_available for table in self._tables):
            return False
        for table in self._tables:
            for index in range(table.end, wanted):
                table.pages[index] = table.pool.take()
            table.end = max(table.end, wanted)
        return True

    def commit(self, token_ids: Sequence[int]) -> None:
        """These tokens were computed into the reserved pages; pages that they filled are published."""
        self.token_ids.extend(token_ids)
        if not self._publishes:
            return
        for index in range(len(self._keys), len(self.token_ids) // PAGE_TOKENS):
            ids = self.token_ids[index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS]
            self._keys.append(page_key(self._parent(), ids))
            for table in self._tables:
                if index >= table.first:
                    table.pool.publish(int(table.pages[index]), self._keys[-1])

    def go_back(self, num_tokens: int) -> int:
        """Forgets the tokens from `num_tokens` on; returns how many are left, for a sequence that does not publish.

        None are where a window has passed what the next token would see.
        """
        assert not self._publishes
        if any(table.first > oldest_visible(table.window, num_tokens) for table in self._tables):
            self.release()
        del self.token_ids[num_tokens:]
        return len(self.token_ids)

    def release(self) -> None:
        """Lets go of all pages, deepest first: what many sequences start with is kept longest."""
        num_full, rest = divmod(len(self.token_ids), PAGE_TOKENS)
        if rest and self._publishes:
            ids = tuple(self.token_ids[num_full * PAGE_TOKENS :])
            tail = _Tail(page_key(self._parent(), ids), ids)
            for table in self._tables:
                table.pool.publish(int(table.pages[num_full]), tail.key)
            self._kv.keep_tail(self._parent(), tail)
        self._kv.keep_on_disk(self._keys, self._num_prompt_pages)
        for table in self._tables:
            for index in range(table.end - 1, table.first - 1, -1):
                table.release(index)
            table.first = table.end = 0
        self._keys, self.token_ids = [], []

    def _parent(self) -> bytes:
        return self._keys[-1] if self._keys else self._root

    def _claim_tail(self, token_ids: Sequence[int]) -> None:
        start, limit = len(self.token_ids), len(token_ids) - 1
        tail = self._kv.tail(self._parent())
        shared = 0
        while tail and shared < len(tail.token_ids) and start + shared < limit:
            if tail.token_ids[shared] != token_ids[start + shared]:
                break
            shared += 1
        if not tail or not shared:
            return
        for table in self._tables:
            table.pages[table.end] = table.pool.claim(tail.key)
            table.end += 1
        self.token_ids.extend(token_ids[start : start + shared])
