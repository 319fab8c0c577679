"""KV pages: which page of a state group holds which positions of a sequence."""

import numpy as np
from numpy.typing import NDArray

from isotherm.program.batch import FREED_PAGE
from isotherm.program.recorder import PAGE_TOKENS, StateSpec


def pages_for(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_TOKENS)


def pages_needed(state: StateSpec, context_tokens: int, batch_tokens: int) -> int:
    """Pages that one sequence of `context_tokens` needs at most, computed `batch_tokens` at a time."""
    if state.window is None or state.window + batch_tokens >= context_tokens:
        return pages_for(context_tokens)
    # A batch sees window - 1 positions before its first token; neither end need lie on a page's border.
    return min(pages_for(context_tokens), pages_for(state.window + batch_tokens) + 1)


class PagePool:
    """The pages of one state group that no sequence holds, lowest id first out."""

    def __init__(self, num_pages: int) -> None:
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        assert self._free, "the pool was sized for the context"
        return self._free.pop()

    def give_back(self, page: int) -> None:
        assert page not in self._free
        self._free.append(page)


class PageTable:
    """One sequence's pages of one state group.

    [0, first)  freed: a window has passed   |   [first, end) held   |   [end, ..) not yet taken
    """

    def __init__(self, pool: PagePool, window: int | None, context_tokens: int) -> None:
        self._pool = pool
        self._window = window
        self._first = 0
        self._end = 0
        self.pages: NDArray[np.int32] = np.full(pages_for(context_tokens), FREED_PAGE, np.int32)

    def extend(self, num_tokens: int) -> None:
        """Takes pages until `num_tokens` positions have one."""
        for index in range(self._end, pages_for(num_tokens)):
            self.pages[index] = self._pool.take()
            self._end = index + 1

    def slide(self, num_tokens: int) -> None:
        """Frees the pages that no token after the first `num_tokens` can see."""
        if self._window is None:
            return
        oldest_seen = max(0, num_tokens + 1 - self._window)
        for index in range(self._first, min(self._end, oldest_seen // PAGE_TOKENS)):
            self._release(index)
            self._first = index + 1

    def can_truncate(self, num_tokens: int) -> bool:
        """Whether what the token after the first `num_tokens` would see is still held."""
        oldest_seen = 0 if self._window is None else max(0, num_tokens + 1 - self._window)
        return oldest_seen // PAGE_TOKENS >= self._first

    def truncate(self, num_tokens: int) -> None:
        """Gives back the pages after the first `num_tokens` positions; all of them where these are not held."""
        keep = pages_for(num_tokens) if self.can_truncate(num_tokens) else 0
        for index in range(max(keep, self._first), self._end):
            self._release(index)
        self._end = max(keep, self._first)
        if keep == 0:
            self._first = self._end = 0

    def _release(self, index: int) -> None:
        self._pool.give_back(int(self.pages[index]))
        self.pages[index] = FREED_PAGE


class CachedSequence:
    """A sequence's tokens whose keys and values the pages hold, and the tables of those pages."""

    def __init__(self, states: tuple[StateSpec, ...], context_tokens: int, batch_tokens: int) -> None:
        self.token_ids: list[int] = []
        self._tables = tuple(
            PageTable(PagePool(pages_needed(state, context_tokens, batch_tokens)), state.window, context_tokens)
            for state in states
        )

    @property
    def page_tables(self) -> tuple[NDArray[np.int32], ...]:
        return tuple(table.pages for table in self._tables)

    def keep_prefix(self, token_ids: list[int]) -> int:
        """Drops all but the longest prefix that `token_ids` starts with and the pages can give; returns its length.

        The last of `token_ids` is never counted as cached: computing it gives the first logits.
        """
        shared = 0
        for ours, theirs in zip(self.token_ids, token_ids[:-1], strict=False):
            if ours != theirs:
                break
            shared += 1
        if not all(table.can_truncate(shared) for table in self._tables):
            shared = 0
        for table in self._tables:
            table.truncate(shared)
        del self.token_ids[shared:]
        return shared

    def reserve(self, num_new: int) -> None:
        """Pages for the next `num_new` tokens; frees those that windows have passed."""
        for table in self._tables:
            table.slide(len(self.token_ids))
            table.extend(len(self.token_ids) + num_new)

    def commit(self, token_ids: list[int]) -> None:
        """These tokens were computed: their keys and values stand in the reserved pages."""
        self.token_ids.extend(token_ids)
