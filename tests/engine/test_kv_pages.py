"""KV pages: invariants under random requests, without a device."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from isotherm.engine.kv_pages import CachedSequence, PagePool, PageTable, pages_for, pages_needed
from isotherm.program.batch import FREED_PAGE
from isotherm.program.recorder import PAGE_TOKENS, StateKind, StateSpec


def state(window: int | None) -> StateSpec:
    return StateSpec(StateKind.KV if window is None else StateKind.KV_WINDOW, 2, 1, 16, window)


def visible_pages(num_tokens: int, num_new: int, window: int | None) -> range:
    """Page indices that the next `num_new` tokens after `num_tokens` read or write: the rule, spelled out."""
    oldest = 0 if window is None else max(0, num_tokens + 1 - window)
    return range(oldest // PAGE_TOKENS, (num_tokens + num_new - 1) // PAGE_TOKENS + 1)


@settings(max_examples=200, deadline=None)
@given(
    window=st.one_of(st.none(), st.integers(1, 700)),
    context_tokens=st.integers(65, 3000),
    batch_tokens=st.integers(1, 512),
    # Share of a full batch that comes next; a step may cut the sequence to a share of its length.
    steps=st.lists(st.tuples(st.floats(0, 1), st.one_of(st.none(), st.floats(0, 1))), max_size=20),
)
def test_every_visible_position_has_a_page_of_its_own(
    window: int | None, context_tokens: int, batch_tokens: int, steps: list[tuple[float, float | None]]
) -> None:
    pool = PagePool(pages_needed(state(window), context_tokens, batch_tokens))
    table = PageTable(pool, window, context_tokens)
    num_pages, num_tokens = pool.num_free, 0
    for share, cut in steps:
        num_new = min(max(1, round(share * batch_tokens)), context_tokens - num_tokens)
        if num_new == 0:
            break
        table.slide(num_tokens)
        table.extend(num_tokens + num_new)  # PagePool asserts that it never runs dry
        held = [int(table.pages[index]) for index in visible_pages(num_tokens, num_new, window)]
        assert FREED_PAGE not in held
        assert len(set(held)) == len(held)
        assert np.count_nonzero(table.pages != FREED_PAGE) + pool.num_free == num_pages
        num_tokens += num_new
        if cut is not None:
            shorter = round(cut * num_tokens)
            num_tokens = shorter if table.can_truncate(shorter) else 0
            table.truncate(shorter)
            assert np.count_nonzero(table.pages != FREED_PAGE) + pool.num_free == num_pages
    table.truncate(0)
    assert pool.num_free == num_pages


def test_a_window_frees_what_it_has_passed() -> None:
    pool = PagePool(100)
    table = PageTable(pool, 128, 4096)
    table.extend(1024)
    table.slide(1024)  # the next token, at position 1024, sees 897 to 1024: page 14 on
    assert list(np.flatnonzero(table.pages != FREED_PAGE)) == [14, 15]
    assert table.can_truncate(1023)
    assert not table.can_truncate(512)


@settings(max_examples=100, deadline=None)
@given(
    window=st.one_of(st.none(), st.integers(1, 200)),
    prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=300), min_size=2, max_size=6),
)
def test_a_kept_prefix_is_a_common_prefix_and_leaves_one_token_to_compute(
    window: int | None, prompts: list[list[int]]
) -> None:
    sequence = CachedSequence((state(None), state(window)), context_tokens=300, batch_tokens=64)
    for prompt in prompts:
        before = list(sequence.token_ids)
        cached = sequence.keep_prefix(prompt)
        assert cached < len(prompt)
        assert sequence.token_ids == before[:cached] == prompt[:cached]
        for start in range(cached, len(prompt), 64):
            chunk = prompt[start : start + 64]
            sequence.reserve(len(chunk))
            for table, size in zip(sequence.page_tables, (None, window), strict=True):
                assert all(table[index] != FREED_PAGE for index in visible_pages(start, len(chunk), size))
            sequence.commit(chunk)


def test_pages_needed_is_bounded_by_the_window() -> None:
    assert pages_needed(state(None), 8192, 512) == pages_for(8192)
    assert pages_needed(state(512), 32768, 512) == 17
    assert pages_needed(state(512), 600, 512) == pages_for(600)
