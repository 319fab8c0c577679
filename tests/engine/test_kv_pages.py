"""KV pages under random sequences, without a device: a dictionary of what each page was written with is the truth."""

from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isotherm.engine.kv_pages import KvPages, PagePool, SequencePages, page_key, pages_for, pages_needed
from isotherm.engine.kv_store import PageName
from isotherm.engine.stored_pages import StoredPages
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


@dataclass
class Disk:
    """In place of StoredPages: has what it kept, until it loses it; may turn out not to have what it said it has."""

    device: "Device"
    contents: dict[tuple[int, bytes], dict[int, tuple[int, ...]]] = field(default_factory=dict)
    damaged: set[bytes] = field(default_factory=set)
    num_read: int = 0

    def has(self, group: int, key: bytes) -> bool:
        return (group, key) in self.contents

    def read(self, name: PageName, page: int) -> bool:
        content = self.contents[name.group, name.key]
        if name.key in self.damaged:
            del self.contents[name.group, name.key]
            return False
        for slot in range(PAGE_TOKENS):
            self.device.slots[name.group, page, slot] = content[slot]
        self.num_read += 1
        return True

    def keep(self, names: list[PageName]) -> None:
        for name in names:
            page = self.device.kv.pools[name.group].page_of(name.key)
            if page is not None:
                slots = {slot: self.device.slots[name.group, page, slot] for slot in range(PAGE_TOKENS)}
                assert self.contents.setdefault((name.group, name.key), slots) == slots


@settings(max_examples=120, deadline=None)
@given(
    window=st.one_of(st.none(), st.integers(1, 200)),
    actions=st.lists(st.tuples(texts(400), st.sampled_from(["", "restart", "damage", "lose", "hold"])), max_size=14),
    hurries=st.booleans(),
    data=st.data(),
)
def test_what_comes_from_disk_is_what_its_text_wrote(
    window: int | None, actions: list[tuple[list[int], str]], hurries: bool, data: st.DataObject
) -> None:
    windows = (None, window)
    states = tuple(state(size) for size in windows)
    counts = tuple(pages_needed(spec, 512, BATCH) + 3 for spec in states)
    device = Device(KvPages(states, counts, 512), windows)
    disk = Disk(device)
    device.kv = kv = KvPages(states, counts, 512, cast(StoredPages, disk))
    held: SequencePages | None = None
    for text, event in actions:
        disk.damaged = set()
        if event == "restart":
            kv.forget()
            device.slots.clear()
            held = None
        elif event in ("damage", "lose") and disk.contents:
            chosen = data.draw(st.sets(st.sampled_from(sorted(disk.contents)), max_size=3))
            if event == "damage":
                disk.damaged = {key for _, key in chosen}
            for each in chosen if event == "lose" else ():
                del disk.contents[each]
        for _ in range(100):  # whatever the limit, each call reads a page or ends it
            before = disk.num_read
            if kv.fetch(text, 0.0 if hurries else None):
                break
            assert disk.num_read == before + 1
        else:
            pytest.fail("fetches for ever")
        sequence = kv.sequence()
        num_found = sequence.find_prefix(text)
        for start in range(num_found, len(text), BATCH):
            chunk = text[start : start + BATCH]
            if not sequence.reserve(len(chunk)):
                break
            device.compute(sequence, chunk)
        if event == "hold" and held is None:
            held = sequence
        else:
            sequence.release()
    if held:
        held.release()
    assert [pool.num_available for pool in kv.pools] == list(counts)


def with_disk(windows: tuple[int | None, ...], num_pages: int) -> tuple[Device, Disk]:
    states, counts = tuple(state(size) for size in windows), (num_pages,) * len(windows)
    device = Device(KvPages(states, counts, 512), windows)
    disk = Disk(device)
    device.kv = KvPages(states, counts, 512, cast(StoredPages, disk))
    return device, disk


def compute(device: Device, text: list[int], num_prompt: int) -> None:
    sequence = device.kv.sequence()
    for start in range(sequence.find_prefix(text[:num_prompt]), len(text), 80):
        assert sequence.reserve(len(text[start : start + 80]))
        device.compute(sequence, text[start : start + 80])
    sequence.release()


def found_on_disk(device: Device, text: list[int]) -> int:
    assert device.kv.fetch(text, None)
    sequence = device.kv.sequence()
    num_found = sequence.find_prefix(text)
    sequence.release()
    return num_found


def test_a_text_is_found_on_disk_after_a_restart() -> None:
    device, disk = with_disk((None, 100), 16)
    text = list(range(400))
    compute(device, text, 200)
    assert len([key for group, key in disk.contents if group == 0]) == 6
    assert len([key for group, key in disk.contents if group == 1]) == 2 + 2  # what prompt and answer see at their ends
    for after, expected in (([*text, 7], 384), ([*text[:250], 7], 192), ([*text[:330], 7], 192), ([7, *text], 0)):
        device.kv.forget()
        assert found_on_disk(device, after) == expected
    device.kv.forget()
    disk.num_read = 0
    assert found_on_disk(device, text[:193]) == 192
    assert disk.num_read == 3 + 2
    device.kv.forget()
    assert found_on_disk(device, text[:192]) == 0  # the last token is computed anew, and no window ends before it
    assert disk.num_read == 5


def test_where_a_page_of_a_window_is_damaged_the_next_shorter_prefix_counts() -> None:
    device, disk = with_disk((None, 100), 16)
    text = list(range(400))
    compute(device, text, 200)
    device.kv.forget()
    disk.damaged = {[key for group, key in disk.contents if group == 1][-1]}
    assert found_on_disk(device, text) == 192


def test_what_memory_has_of_a_text_makes_no_room_for_the_rest_of_it() -> None:
    device, disk = with_disk((None,), 6)
    text, other = list(range(384)), list(range(1000, 1190))
    compute(device, text, 384)
    device.kv.forget()
    assert found_on_disk(device, text[:193]) == 192
    compute(device, other, 190)  # newer, and in three pages
    disk.num_read = 0
    assert found_on_disk(device, text) == 320
    assert disk.num_read == 2


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


@settings(max_examples=200, deadline=None)
@given(window=st.one_of(st.none(), st.integers(1, 200)), follow=st.lists(texts(400), min_size=1, max_size=6))
def test_a_sequence_that_went_back_sees_its_own_text_and_has_room(window: int | None, follow: list[list[int]]) -> None:
    windows = (None, window)
    states = tuple(state(size) for size in windows)
    counts = tuple(pages_needed(spec, 512, BATCH) for spec in states)
    device = Device(KvPages(states, counts, 512), windows)
    sequence = device.kv.sequence(publishes=False)
    for text in follow:
        common = next((i for i in range(len(text)) if sequence.token_ids[i : i + 1] != [text[i]]), len(text))
        num_left = sequence.go_back(common)
        assert num_left in ((common,) if window is None else (common, 0))
        assert sequence.token_ids == text[:num_left]
        for start in range(num_left, len(text), BATCH):
            chunk = text[start : start + BATCH]
            assert sequence.reserve(len(chunk))
            device.compute(sequence, chunk)
    sequence.release()
    assert [pool.num_available for pool in device.kv.pools] == list(counts)


def test_going_back_within_a_window_keeps_what_is_left() -> None:
    kv = KvPages((state(100),), (16,), 512)
    sequence = kv.sequence(publishes=False)
    for num_new, wanted, num_left in ((300, 210, 210), (80, 230, 230), (150, 195, 0)):
        assert sequence.reserve(num_new)  # slides to what position 0, 210 and 230 see: pages 0, 1 and 2
        sequence.commit([7] * num_new)
        assert sequence.go_back(wanted) == num_left


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
