"""The scheduler without a device: whoever is added ends, with the tokens that it would have alone."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isotherm.engine.kv_pages import KvPages, PagePool, SequencePages, pages_needed
from isotherm.engine.scheduler import Job, Scheduler, Share
from isotherm.program.recorder import StateKind, StateSpec

CONTEXT = 400


def make(
    *, windows: tuple[int | None, ...] = (None,), spare_pages: int = 0, batch: int = 64, stall: int = 16, most: int = 8
) -> tuple[KvPages, Scheduler]:
    states = tuple(StateSpec(StateKind.KV if w is None else StateKind.KV_WINDOW, 1, 1, 16, w) for w in windows)
    counts = tuple(pages_needed(spec, CONTEXT, batch) + spare_pages for spec in states)
    kv = KvPages(states, counts, CONTEXT)
    return kv, Scheduler(kv, batch_tokens=batch, stall_tokens=stall, max_running=most)


def job(prompt: list[int], answer: int, priority: int = 0) -> Job:
    tokens = np.zeros(len(prompt) + answer, np.int32)
    tokens[: len(prompt)] = prompt
    return Job(tokens, len(prompt), priority)


def chosen(tokens: list[int]) -> int:
    """The invented model: the next token follows from all before it."""
    return hash(tuple(tokens)) % 3


def run(scheduler: Scheduler, shares: list[Share]) -> list[Job]:
    """Computes a step; gives the jobs that ended with it."""
    scheduler.commit(shares)
    ended = []
    for share in shares:
        if share.is_last:
            text = share.pages.token_ids
            assert text == share.job.tokens[: share.job.num_tokens].tolist()
            share.job.append(chosen(text))
            if share.job.num_tokens == len(share.job.tokens):
                scheduler.remove(share.job)
                ended.append(share.job)
    return ended


def alone(prompt: list[int], answer: int) -> list[int]:
    text = list(prompt)
    for _ in range(answer):
        text.append(chosen(text))
    return text


request_lists = st.lists(
    st.tuples(
        st.integers(0, 12),  # the step at which it comes
        st.lists(st.integers(0, 1), min_size=1, max_size=CONTEXT - 40),
        st.integers(1, 40),
        st.integers(-1, 1),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(
    requests=request_lists,
    window=st.one_of(st.none(), st.integers(1, 150)),
    spare_pages=st.integers(0, 12),
    most=st.integers(1, 8),
    cancelled=st.sets(st.integers(0, 7), max_size=3),
)
def test_every_job_ends_as_it_would_alone(
    requests: list[tuple[int, list[int], int, int]],
    window: int | None,
    spare_pages: int,
    most: int,
    cancelled: set[int],
) -> None:
    kv, scheduler = make(windows=(None, window), spare_pages=spare_pages, most=most)
    available = [pool.num_available for pool in kv.pools]
    jobs = {index: job(prompt, answer, priority) for index, (_, prompt, answer, priority) in enumerate(requests)}
    ended: list[Job] = []
    for step in range(4000):
        for index, (come, *_) in enumerate(requests):
            if come == step:
                scheduler.add(jobs[index])
            if index in cancelled and come + 5 == step:
                scheduler.remove(jobs[index])
        decoding = {each for each in jobs.values() if each.pages and each.num_missing == 1}
        shares = scheduler.plan()
        num_decoding = sum(share.job in decoding for share in shares)
        assert sum(len(share.token_ids) for share in shares) <= 64
        assert num_decoding == 0 or sum(len(share.token_ids) for share in shares) <= num_decoding + 16
        assert len({id(share.job) for share in shares}) == len(shares) <= most
        if not shares and step > 20:
            break
        ended += run(scheduler, shares)
    assert (scheduler.running(), scheduler.waiting()) == ([], [])
    for index, (_, prompt, answer, _) in enumerate(requests):
        if index not in cancelled:
            assert jobs[index] in ended
        if jobs[index] in ended:
            assert jobs[index].tokens.tolist() == alone(prompt, answer)
    assert [pool.num_available for pool in kv.pools] == available


def test_a_long_prompt_stalls_no_one_for_more_than_its_share() -> None:
    _, scheduler = make(spare_pages=10)
    short = job([1], 30)
    scheduler.add(short)
    run(scheduler, scheduler.plan())
    scheduler.add(job(list(range(300)), 1))
    for _ in range(10):
        shares = scheduler.plan()
        assert [(share.job is short, len(share.token_ids)) for share in shares] == [(True, 1), (False, 16)]
        run(scheduler, shares)


def test_a_prompt_alone_fills_the_batch() -> None:
    _, scheduler = make()
    scheduler.add(job(list(range(150)), 1))
    sizes = []
    while shares := scheduler.plan():
        sizes.append(sum(len(share.token_ids) for share in shares))
        run(scheduler, shares)
    assert sizes == [64, 64, 22]


def test_the_last_ranked_gives_its_pages_back_and_ends_all_the_same() -> None:
    _, scheduler = make(most=2)  # room for one context of 400
    first, second = job(list(range(190)), 200), job(list(range(1000, 1190)), 200)
    scheduler.add(first)
    scheduler.add(second)
    order = []
    while shares := scheduler.plan():
        order += run(scheduler, shares)
    assert order == [first, second]
    assert scheduler.num_preemptions > 0
    assert second.tokens.tolist() == alone(list(range(1000, 1190)), 200)


def test_one_that_decodes_waits_for_pages_of_a_prompt_of_higher_rank() -> None:
    _, scheduler = make(most=2)
    low, high = job(list(range(190)), 150, 0), job(list(range(1000, 1250)), 100, 1)
    scheduler.add(low)
    for _ in range(4):
        run(scheduler, scheduler.plan())
    scheduler.add(high)
    order = []
    while shares := scheduler.plan():
        order += run(scheduler, shares)
    assert order == [high, low]
    assert low.tokens.tolist() == alone(list(range(190)), 150)


def test_priority_goes_before_arrival() -> None:
    _, scheduler = make(most=1)
    jobs = [job([1, 2], 1, priority) for priority in (0, 1, 0, 2)]
    for each in jobs:
        scheduler.add(each)
    order: list[Job] = []
    while shares := scheduler.plan():
        order += run(scheduler, shares)
    assert order == [jobs[3], jobs[1], jobs[0], jobs[2]]


def test_an_interrupt_anywhere_in_a_plan_loses_no_page_and_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    kv, scheduler = make(most=3)
    jobs = {job(list(range(start, start + 100)), 60): list(range(start, start + 100)) for start in (0, 1000, 2000)}
    for each in jobs:
        scheduler.add(each)
    owners = {"take": PagePool, "release": PagePool, "share": PagePool, "commit": SequencePages}
    calls = dict.fromkeys(owners, 0)

    def interrupted(name: str) -> Callable[..., object]:
        original = getattr(owners[name], name)

        def call(*arguments: object) -> object:
            result = original(*arguments)
            calls[name] += 1
            if calls[name] % 11 == 10:
                raise KeyboardInterrupt
            return result

        return call

    for name, owner in owners.items():
        monkeypatch.setattr(owner, name, interrupted(name))
    for _ in range(4000):
        try:
            if not (shares := scheduler.plan()):
                break
            run(scheduler, shares)
        except KeyboardInterrupt:
            scheduler.start_over()
    assert (scheduler.running(), scheduler.waiting()) == ([], [])
    assert [pool.num_available for pool in kv.pools] == [7]
    assert all(each.tokens.tolist() == alone(prompt, 60) for each, prompt in jobs.items())


def test_a_step_whose_token_was_never_chosen_is_computed_again() -> None:
    _, scheduler = make()
    only = job(list(range(100)), 3)
    scheduler.add(only)
    scheduler.commit(scheduler.plan())
    scheduler.commit(scheduler.plan())  # and no token is appended
    (share,) = scheduler.plan()
    assert (share.token_ids, share.is_last) == ([99], True)
    while shares := scheduler.plan():
        run(scheduler, shares)
    assert only.tokens.tolist() == alone(list(range(100)), 3)


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_a_step_that_was_not_computed_is_planned_again(num_steps: int) -> None:
    _, scheduler = make()
    scheduler.add(job(list(range(100)), 3))
    for _ in range(num_steps):
        run(scheduler, scheduler.plan())
    before = scheduler.plan()
    again = scheduler.plan()
    assert [share.token_ids for share in before] == [share.token_ids for share in again]
