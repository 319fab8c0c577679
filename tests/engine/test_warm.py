"""Conversations that go on from disk: the answer is that of a model which computes everything, bit for bit."""

import errno
import gc
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import write_tiny

import isotherm
from isotherm.answer import Answer
from isotherm.engine import kv_store, scheduler
from isotherm.engine.kv_store import KvStore, StoreCounts
from isotherm.errors import OptionError
from isotherm.formats.fetching import SilentReporter
from isotherm.text import TextGenerator
from isotherm.types import QuantType

TEXT = "the rain in spain falls on the sand and " * 16  # some 330 tokens
FAMILIES = ["llama", "gemma3"]


def write(folder: Path, family: str, **sizes: Any) -> Path:
    """With both kinds of layers in gemma3, and a window of one page and a half."""
    metadata = {"gemma3.attention.sliding_window_pattern": 2} if family == "gemma3" else None
    sizes = {"sliding_window": 100, "hidden_size": 64, "ffn_size": 128, "head_dim": 32} | sizes
    return write_tiny(folder / f"{family}.gguf", family, QuantType.Q8_0, metadata=metadata, **sizes)


@pytest.fixture(scope="module", params=FAMILIES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tiny"), request.param)


def load(path: Path, kv_dir: Path | None = None, **options: Any) -> TextGenerator:
    return isotherm.load(path, cache_bytes=0, threads=2, kv_dir=kv_dir, **options)


def ask(model: TextGenerator, text: str = TEXT, **options: Any) -> Answer:
    return model.generate(text, raw=True, num_logprobs=3, **{"max_tokens": 12, **options})


class Notices(SilentReporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def notice(self, text: str) -> None:
        self.lines.append(text)


def counts(model: TextGenerator) -> StoreCounts:
    found = model.store_counts
    assert found is not None
    return found


def forget(model: TextGenerator) -> None:
    """As after a restart: pages are on disk or nowhere."""
    engine = model._open_engine()
    engine.close()
    engine._kv.forget()


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_a_conversation_goes_on_after_a_restart(path: Path, tmp_path: Path, kv: str) -> None:
    with load(path, kv=kv) as model:
        first, second = ask(model), ask(model, TEXT + "the sea " * 9)
    with load(path, tmp_path, kv=kv) as model:
        assert ask(model).tokens == first.tokens
    with load(path, tmp_path, kv=kv) as model:
        again = ask(model, TEXT + "the sea " * 9)
        num_pages = first.num_prompt_tokens // 64
        assert again.num_cached_tokens == 64 * num_pages
        assert again.tokens == second.tokens
        assert counts(model).pages_read == num_pages + (2 if "gemma3" in path.name else 0)
    with load(path, tmp_path, kv=kv) as model:
        assert ask(model).tokens == first.tokens


def test_a_conversation_goes_on_in_another_process(path: Path, tmp_path: Path) -> None:
    with load(path, tmp_path) as model:
        first = ask(model)
    code = (
        "import isotherm, sys\n"
        f"with isotherm.load({str(path)!r}, cache_bytes=0, threads=1, kv_dir={str(tmp_path)!r}) as model:\n"
        f"    answer = model.generate({TEXT!r}, raw=True, max_tokens=12)\n"
        "    print(answer.num_cached_tokens, *answer.token_ids)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    num_cached, *token_ids = map(int, run.stdout.split())
    assert num_cached >= first.num_prompt_tokens - 64
    assert tuple(token_ids) == first.token_ids


def test_a_long_answer_that_is_thrown_away_leaves_its_prompt(tmp_path: Path) -> None:
    """With windows too, which the answer has passed: who thinks aloud is asked on without the thoughts."""
    path = write(tmp_path, "gemma3")
    with load(path) as model:
        expected = ask(model, TEXT + "and so on")
        bias = tuple((token, -float("inf")) for token in model._tokenizer.end_ids)
    with load(path, tmp_path / "kv") as model:
        ask(model, max_tokens=150, logit_bias=bias)
    with load(path, tmp_path / "kv") as model:
        answer = ask(model, TEXT + "and so on")
        assert answer.num_cached_tokens >= expected.num_prompt_tokens - 2 * 64
        assert answer.tokens == expected.tokens


@dataclass(frozen=True)
class Kept:
    """A model whose pages for TEXT are in files, and the answer."""

    model: TextGenerator
    files: dict[Path, bytes]
    answer: Answer


@pytest.fixture(scope="module", params=FAMILIES)
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    folder = tmp_path_factory.mktemp("kept")
    with load(write(folder, request.param), folder / "kv") as model:
        answer = ask(model)
        forget(model)
        yield Kept(model, {file: file.read_bytes() for file in sorted((folder / "kv").rglob("*.kv"))}, answer)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damages=st.lists(st.tuples(st.integers(0), st.integers(0), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_damaged_page_changes_no_answer(kept: Kept, damages: list[tuple[int, int, int]]) -> None:
    model, expected = kept.model, kept.answer
    for file, whole in kept.files.items():
        file.write_bytes(whole)
    for which, at, change in damages:  # flips bits of a byte, or cuts the file there
        file = list(kept.files)[which % len(kept.files)]
        data = file.read_bytes()
        at %= len(data) or 1
        file.write_bytes(data[:at] + bytes([data[at] ^ change]) + data[at + 1 :] if change and data else data[:at])
    for _ in range(len(damages) + 1):  # a page behind one that is damaged is not read before that is mended
        assert ask(model).tokens == expected.tokens
        forget(model)
    assert {file: file.read_bytes() for file in kept.files} == kept.files
    assert ask(model).num_cached_tokens >= expected.num_prompt_tokens - 64
    forget(model)


def test_what_another_model_type_or_arithmetic_made_is_not_there(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv_dir = tmp_path / "kv"
    with load(path, kv_dir) as model:
        ask(model)
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other", path.stem, seed=1)
    for options in ({"path": other}, {"path": path, "kv": "q8_0"}, {"path": path, "backend": "reference"}):
        with load(**options, kv_dir=kv_dir) as model:
            assert ask(model, max_tokens=1).num_cached_tokens == 0
    monkeypatch.setattr(kv_store, "ARITHMETIC_VERSION", kv_store.ARITHMETIC_VERSION + 1)
    with load(path, kv_dir) as model:
        assert ask(model).num_cached_tokens == 0
    assert len(list(kv_dir.iterdir())) == 5


def test_a_cap_below_one_page_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="kv_disk_bytes is 100"):
        load(path, tmp_path, kv_disk_bytes=100)


def test_clients_together_with_memory_for_few_and_a_disk_for_few(path: Path, tmp_path: Path) -> None:
    """Pages are read, written, given away and removed all the time, and each answer is the one of a lone request."""
    words = ["the rain ", "in spain ", "on the sand ", "and the sea "]
    prompts = [words[seed % 4] * 30 + words[seed // 4 % 4] * (seed % 9) for seed in range(24)]
    with load(path, context_tokens=320) as model:
        alone = [ask(model, prompt, seed=seed, temperature=0.9).tokens for seed, prompt in enumerate(prompts)]
    together: dict[int, Any] = {}
    with load(path, tmp_path, context_tokens=320, kv_disk_bytes=300_000) as model:

        def client(number: int) -> None:
            for seed in range(number, 24, 4):
                together[seed] = ask(model, prompts[seed], seed=seed, temperature=0.9).tokens

        threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert counts(model).pages_read > 0
    assert [together[seed] for seed in range(24)] == alone
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.kv")) <= 300_000


def test_a_slow_disk_writes_what_memory_still_has_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names wait while their pages are given to other texts: those are skipped, and none is written under them."""
    path, kv_dir = write(tmp_path, "llama"), tmp_path / "kv"
    others = [f"{word} " * 60 for word in ("sea the", "land", "wind")]
    with load(path, context_tokens=512) as model:
        expected = [ask(model, text).tokens for text in (TEXT, *others)]
    turns = threading.Semaphore(0)
    original = KvStore.write

    def slow(store: KvStore, *arguments: Any) -> None:
        assert turns.acquire(timeout=60)
        original(store, *arguments)

    monkeypatch.setattr(KvStore, "write", slow)
    with load(path, kv_dir, context_tokens=512) as model:
        for text in (TEXT, *others):
            ask(model, text)
        turns.release(100)
        forget(model)
        assert counts(model).pages_skipped > 0
        assert counts(model).pages_written > 0
        for text, tokens in zip((TEXT, *others), expected, strict=True):
            assert ask(model, text).tokens == tokens
            forget(model)
        assert counts(model).pages_read > 0


def test_an_answer_in_progress_waits_for_few_pages_at_a_time(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(path, tmp_path) as model:
        expected = ask(model)
    monkeypatch.setattr(scheduler, "_FETCH_S", 0.0)
    with load(path, tmp_path) as model:
        bias = tuple((token, -float("inf")) for token in model._tokenizer.end_ids)
        decoding = model.stream("land", raw=True, logit_bias=bias, max_tokens=100)
        next(decoding)
        answers: list[Answer] = []
        waiting = threading.Thread(target=lambda: answers.append(ask(model)))
        waiting.start()
        reads = [0]
        while not answers:
            next(decoding)
            reads.append(counts(model).pages_read)
        waiting.join()
        assert reads[-1] >= expected.num_prompt_tokens // 64
        assert max(np.diff(reads)) < reads[-1]  # the two threads take turns: how many steps lie between is chance
        assert answers[0].tokens == expected.tokens


def test_an_interrupt_while_pages_are_read_loses_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(path, tmp_path) as model:
        expected = ask(model)
    original, calls = KvStore.read, []

    def interrupted(store: KvStore, *arguments: Any) -> bool:
        result = original(store, *arguments)
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(KvStore, "read", interrupted)
    with load(path, tmp_path) as model:
        pools = model._open_engine()._kv.pools
        available = [pool.num_available for pool in pools]
        with pytest.raises(KeyboardInterrupt):
            ask(model)
        answer = ask(model)
        assert answer.tokens == expected.tokens
        assert answer.num_cached_tokens > 0
        model._open_engine().release_ended()
        assert [pool.num_available for pool in model._open_engine()._kv.pools] == available


def test_a_full_disk_stops_no_answer(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(path) as model:
        expected = [ask(model, text).tokens for text in (TEXT, "land and sea")]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(KvStore, "_write", full)
    reporter = Notices()
    with isotherm.load(path, cache_bytes=0, kv_dir=tmp_path, reporter=reporter) as model:
        assert [ask(model, text).tokens for text in (TEXT, "land and sea")] == expected
        forget(model)
        assert ask(model).tokens == expected[0]
        assert counts(model).pages_written == 0
    assert [line for line in reporter.lines if "No space left" in line] == reporter.lines
    assert len(reporter.lines) == 1


def test_pages_are_written_while_nobody_asks(path: Path, tmp_path: Path) -> None:
    model = load(path, tmp_path)
    answer = ask(model)
    deadline = time.monotonic() + 30
    while counts(model).pages_written < answer.num_prompt_tokens // 64:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_engine_that_nobody_holds_goes_with_its_thread(path: Path, tmp_path: Path) -> None:
    model = load(path, tmp_path)
    ask(model)
    engine = weakref.ref(model._open_engine())
    thread = model._open_engine()._stored._thread  # type: ignore[union-attr]
    del model
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()
    assert engine() is None


def test_a_forked_child_writes_too(path: Path, tmp_path: Path) -> None:
    with load(path, tmp_path) as model:
        expected = ask(model, "the sea " * 40)
        forget(model)
        shutil.rmtree(tmp_path)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                same = ask(model, "the sea " * 40).tokens == expected.tokens
                model.close()
                status = 0 if same and any(tmp_path.rglob("*.kv")) else 2
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_real_conversations_go_on_after_a_restart(real_model: Any, tmp_path: Path, name: str) -> None:
    path = real_model(name)
    prompt = "A prism splits light into its colours. " * 120
    options = {"max_tokens": 40, "num_logprobs": 5, "raw": True}
    with isotherm.load(path, context_tokens=2048) as model:
        one = model.generate(prompt, **options)
    with isotherm.load(path, context_tokens=2048) as model:
        two = model.generate(f"{prompt}{one.text} And a lens?", **options)
    with isotherm.load(path, context_tokens=2048, kv_dir=tmp_path) as model:
        assert model.generate(prompt, **options).tokens == one.tokens
    with isotherm.load(path, context_tokens=2048, kv_dir=tmp_path) as model:
        warm = model.generate(f"{prompt}{one.text} And a lens?", **options)
        assert warm.num_cached_tokens >= one.num_prompt_tokens - 64
        assert warm.tokens == two.tokens
