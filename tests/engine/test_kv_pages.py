"""KV pages under random sequences, without a device: a dictionary of what each page was written with is the truth."""

from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from isotherm.engine.kv_pages import KvPages, PagePool, SequencePages, page_key, pages_for, pages_needed
from isotherm.program.batch import FREED_PAGE
from isotherm.program.recorder import PAGE_TOKENS, StateKind, StateSpec

BATCH = 96


def state(window: int | None) -> StateSpec:
    return StateSpec(StateKind.KV if window is None else StateKind.KV_WINDOW, 2, 1, 16, window)


@dataclass
class Device:
    """Pages as a backend fills them: of each slot, the whole text up to its token."""

    kv: KvPages
    windows: tuple[int | None, ...]
    slots: dict[tuple[int, int, int], tuple[int, ...]] = field(default_factory=dict)

    def compute(self, sequence: SequencePages, ids: list[int]) -> None:
        """Writes `ids` and checks all that they see."""
        start = len(sequence.token_ids)
        text = [*sequence.token_ids, *ids]
        for group, window in enumerate(self.windows):
            pages = sequence.page_tables[group]
            for position in range(start, len(text)):
                page, slot = divmod(position, PAGE_TOKENS)
                assert pages[page] != FREED_PAGE
                self.slots[group, int(pages[page]), slot] = tuple(text[: position + 1])
            oldest = 0 if window is None else max(0, start + 1 - window)
            for position in range(oldest, len(text)):
                page, slot = divmod(position, PAGE_TOKENS)
                assert self.slots[group, int(pages[page]), slot] == tuple(text[: position + 1])
        sequence.commit(ids)


def texts(num_tokens: int) -> st.SearchStrategy[list[int]]:
    """Texts that often start alike: a few long runs of few tokens."""
    run = st.tuples(st.integers(0, 2), st.integers(1, 150))
    return st.lists(run, min_size=1, max_size=5).map(
        lambda runs: [token for token, length in runs for _ in range(length)][:num_tokens]
    )


@settings(max_examples=200, deadline=None)
@given(
    window=st.one_of(st.none(), st.integers(1, 200)),
    num_sequences=st.integers(1, 4),
    actions=st.lists(st.tuples(st.integers(0, 3), texts(400), st.booleans()), max_size=14),
)
def test_what_a_token_sees_is_what_its_text_wrote(
    window: int | None, num_sequences: int, actions: list[tuple[int, list[int], bool]]
) -> None:
    windows = (None, window)
    states = tuple(state(size) for size in windows)
    counts = tuple(pages_needed(spec, 512, BATCH) + 3 for spec in states)  # hardly room for two
    kv = KvPages(states, counts, 512)
    device = Device(kv, windows)
    running: dict[int, SequencePages] = {}
    for which, text, ends in actions:
        slot = which % num_sequences
        if slot in running:
            running.pop(slot).release()
        sequence = kv.sequence()
        num_found = sequence.find_prefix(text)
        assert num_found < len(text)
        assert sequence.token_ids == text[:num_found]
        for start in range(num_found, len(text), BATCH):
            chunk = text[start : start + BATCH]
            if not sequence.reserve(len(chunk)):
                break
            device.compute(sequence, chunk)
        if ends:
            sequence.release()
        else:
            running[slot] = sequence
    for sequence in running.values():
        sequence.release()
    assert [pool.num_available for pool in kv.pools] == list(counts)


def test_a_sequence_alone_always_has_room() -> None:
    for window in (None, 1, 64, 100, 500):
        spec = state(window)
        kv = KvPages((spec,), (pages_needed(spec, 512, BATCH),), 512)
        for _ in range(3):
            sequence = kv.sequence()
            ids = list(range(512))
            for start in range(sequence.find_prefix(ids), 512, BATCH):
                assert sequence.reserve(len(ids[start : start + BATCH]))
                sequence.commit(ids[start : start + BATCH])
            sequence.release()


def kept(kv: KvPages, text: list[int], after: list[int]) -> int:
    """How much of `after` is found once `text` was computed and has ended."""
    sequence = kv.sequence()
    for start in range(sequence.find_prefix(text), len(text), BATCH):
        assert sequence.reserve(len(text[start : start + BATCH]))
        sequence.commit(text[start : start + BATCH])
    sequence.release()
    found = kv.sequence()
    num_found = found.find_prefix(after)
    found.release()
    return num_found


def test_a_prefix_is_found_to_the_token_at_the_end_and_to_the_page_inside() -> None:
    spec = state(None)
    text = list(range(300))
    for after, expected in (
        ([*text, 7], 300),
        (text, 299),  # the last token is computed again
        ([*text[:290], 7, 8], 290),
        ([*text[:200], 7, 8], 192),
        ([7, *text], 0),
    ):
        assert kept(KvPages((spec,), (16,), 512), text, after) == expected


def test_a_window_needs_only_what_it_sees() -> None:
    states = (state(None), state(100))
    text = list(range(400))
    assert kept(KvPages(states, (16, 16), 512), text, [*text, 7]) == 400


def test_two_running_sequences_share_full_pages() -> None:
    kv = KvPages((state(None),), (16,), 512)
    one, two = kv.sequence(), kv.sequence()
    text = list(range(200))
    assert one.find_prefix(text) == 0
    assert one.reserve(200)
    one.commit(text)
    assert two.find_prefix([*text, 7]) == 192
    assert two.reserve(9)
    np.testing.assert_array_equal(one.page_tables[0][:3], two.page_tables[0][:3])
    assert one.page_tables[0][3] != two.page_tables[0][3]
    one.release()
    two.release()
    assert kv.pools[0].num_available == 16


def test_what_does_not_publish_leaves_nothing_behind() -> None:
    kv = KvPages((state(None),), (16,), 512)
    text = list(range(200))
    sequence = kv.sequence(publishes=False)
    assert sequence.reserve(200)
    sequence.commit(text)
    first = sequence.page_tables[0][:4].tolist()
    sequence.release()
    after = kv.sequence()
    assert after.find_prefix([*text, 7]) == 0
    assert after.reserve(200)
    assert sorted(after.page_tables[0][:4].tolist()) == sorted(first)  # the same memory, touched once


def test_the_start_of_texts_is_kept_longer_than_their_ends() -> None:
    pool = PagePool(3)
    keys = [page_key(b"", [index]) for index in range(3)]
    for key in keys:
        pool.publish(pool.take(), key)
    for page in (2, 1, 0):  # as a sequence releases its pages
        pool.release(page)
    pool.take()
    assert [pool.has(key) for key in keys] == [True, True, False]


def test_pages_needed_is_bounded_by_the_window() -> None:
    assert pages_needed(state(None), 8192, 512) == pages_for(8192)
    assert pages_needed(state(512), 32768, 512) == 17
    assert pages_needed(state(512), 600, 512) == pages_for(600)
