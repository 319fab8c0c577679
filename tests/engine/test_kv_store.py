"""Pages on disk: damaged, foreign, too many, with several processes at work, killed ones and a full disk."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isotherm.engine import kv_store
from isotherm.engine.kv_store import U8, KvStore, PageName, StoreCounts
from isotherm.errors import OptionError

WAIT_S = 60
PAGE_BYTES = 5000
IDENTITY = bytes(range(16))
processes = multiprocessing.get_context("spawn")


def name(index: int, group: int = 0) -> PageName:
    return PageName(group, bytes([index % 251, group]) * 8, index)


def page(index: int, group: int = 0) -> U8:
    return np.random.default_rng([index, group]).integers(0, 256, PAGE_BYTES, dtype=np.uint8)


def silent(line: str) -> None:
    pytest.fail(f"unexpected notice: {line}")


def open_store(folder: Path, *, cap_pages: int = 1000) -> KvStore:
    return KvStore(folder, IDENTITY, cap_pages * (PAGE_BYTES + 200), silent)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def found(store: KvStore, index: int, group: int = 0) -> bool:
    out = np.zeros(PAGE_BYTES, np.uint8)
    if not store.read(name(index, group), out):
        return False
    np.testing.assert_array_equal(out, page(index, group))
    return True


def test_what_was_written_is_read_by_another_store(tmp_path: Path) -> None:
    store = open_store(tmp_path / "deep" / "kv")
    assert not store.has(0, name(3).key)
    assert not found(store, 3)
    assert not store.touch(name(3))
    store.write(name(3), page(3))
    again = open_store(tmp_path / "deep" / "kv")
    assert again.has(0, name(3).key)
    assert again.touch(name(3))
    assert found(again, 3)
    assert not found(again, 3, group=1)
    assert store.counts == StoreCounts(pages_written=1, bytes_written=PAGE_BYTES)
    assert again.counts == StoreCounts(pages_read=1, bytes_read=PAGE_BYTES)
    (path,) = files(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_page_of_another_identity_is_not_there_nor_believed_when_moved(tmp_path: Path) -> None:
    open_store(tmp_path).write(name(1), page(1))
    notices: list[str] = []
    other = KvStore(tmp_path, bytes(16), 1 << 30, notices.append)
    assert not found(other, 1)
    (path,) = files(tmp_path)
    path.rename(tmp_path / bytes(16).hex() / path.name)
    assert not found(other, 1)
    assert "its head is not" in notices[0]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_is_damaged_is_not_believed_and_goes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    notices: list[str] = []
    store = KvStore(folder, IDENTITY, 1 << 30, notices.append)
    store.write(name(1), page(1))
    (path,) = files(folder)
    whole = path.read_bytes()
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "zero", "other page"]))
    head = len(whole) - PAGE_BYTES
    at = data.draw(st.one_of(st.integers(0, head), st.integers(0, len(whole) - 1)))
    if kind == "flip":
        damaged = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    elif kind == "cut":
        damaged = whole[:at]
    elif kind == "grow":
        damaged = whole + data.draw(st.binary(min_size=1, max_size=100))
    elif kind == "zero":  # as after a power cut: the length reached the disk, the bytes did not
        damaged = whole[:at] + bytes(len(whole) - at)
    else:
        store.write(name(2), page(2))
        other = next(each for each in files(folder) if each != path)
        damaged = other.read_bytes()
        other.unlink()
    path.write_bytes(damaged)
    if damaged == whole:
        assert found(store, 1)
    else:
        assert not found(store, 1)
        assert len(notices) == store.counts.pages_damaged == 1
        assert not path.exists()
        store.write(name(1), page(1))
        assert found(store, 1)


def test_what_is_no_file_neither_hangs_nor_is_followed(tmp_path: Path) -> None:
    notices: list[str] = []
    store = KvStore(tmp_path, IDENTITY, 1 << 30, notices.append)
    elsewhere = tmp_path / "elsewhere"
    store.write(name(1), page(1))
    (path,) = files(tmp_path)
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert not found(store, 1)
    path.unlink()
    os.mkfifo(path)
    assert not found(store, 1)
    path.mkdir()
    assert not found(store, 1)
    assert len(notices) == 3
    store.notice = notices.append
    store.write(name(1), page(1))  # cannot take the folder's place
    assert "not kept" in notices[3]


def test_a_page_that_cannot_be_read_now_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notices: list[str] = []
    store = KvStore(tmp_path, IDENTITY, 1 << 30, notices.append)
    store.write(name(1), page(1))

    def no_more_files(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", no_more_files)
        assert not found(store, 1)
    assert "Too many open files" in notices[0]
    assert found(store, 1)
    assert store.counts.pages_damaged == 0


def test_another_format_version_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store(tmp_path).write(name(1), page(1))
    monkeypatch.setattr(kv_store, "FORMAT_VERSION", kv_store.FORMAT_VERSION + 1)
    assert not found(KvStore(tmp_path, IDENTITY, 1 << 30, [].append), 1)


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="--kv-dir"):
        open_store(tmp_path / "file")


# --- the cap ---


def total_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


@pytest.mark.parametrize("cap_pages", [1, 5, 40])
def test_the_cap_holds_after_every_write(tmp_path: Path, cap_pages: int) -> None:
    store = open_store(tmp_path, cap_pages=cap_pages)
    for index in range(100):
        store.write(name(index), page(index))
        assert total_bytes(tmp_path) <= cap_pages * (PAGE_BYTES + 200)
        assert found(store, index)
    assert len(files(tmp_path)) >= max(1, cap_pages * 13 // 16)


def test_the_least_recently_used_go_first_and_ends_before_starts(tmp_path: Path) -> None:
    store = open_store(tmp_path, cap_pages=16)
    for index in range(14):
        store.write(name(index), page(index))
    past = time.time() - 1000
    for index in range(14):
        os.utime(store._path(0, name(index).key), (past + index, past + index))
    assert store.touch(name(2))
    assert found(store, 5)
    for index in range(20, 30):
        store.write(name(index), page(index))
    kept = [index for index in range(14) if found(store, index)]
    assert kept == sorted({2, 5, *range(14 - (len(kept) - 2), 14)})
    assert len(kept) < 8
    for path in files(tmp_path):
        path.unlink()
    store = open_store(tmp_path, cap_pages=16)
    for index in range(16):
        store.write(name(index), page(index))
    for index in range(16):
        store.touch(name(index))  # as a conversation is used: its start first
    for index in range(100, 104):
        store.write(name(index, 1), page(index, 1))
    kept = [index for index in range(16) if found(store, index)]
    assert kept == list(range(len(kept)))
    assert len(kept) < 16


def test_the_cap_counts_all_identities_and_touches_nothing_else(tmp_path: Path) -> None:
    old = KvStore(tmp_path, bytes(16), 1 << 30, silent)
    for index in range(10):
        old.write(name(index), page(index))
    for path in files(tmp_path):
        os.utime(path, (1, 1))
    mine = [tmp_path / "notes.txt", tmp_path / bytes(16).hex() / "notes.kv", tmp_path / "photos" / f"0-{'0' * 32}.kv"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100_000))
    store = open_store(tmp_path, cap_pages=5)
    store.write(name(1), page(1))
    assert all(path.exists() for path in mine)
    assert total_bytes(tmp_path) - 300_000 <= 5 * (PAGE_BYTES + 200)
    assert found(store, 1)


# --- processes ---


def work(folder: Path, seed: int) -> None:
    """Writes, reads and removes as one of several; what it reads is checked."""
    store = open_store(folder, cap_pages=12)
    rng = np.random.default_rng(seed)
    num_found = 0
    for _ in range(300):
        index = int(rng.integers(0, 16))
        if not store.touch(name(index)):
            store.write(name(index), page(index))
        num_found += found(store, int(rng.integers(0, 16)))
    assert num_found > 0
    assert store.counts.pages_damaged == 0


def test_processes_share_a_folder(tmp_path: Path) -> None:
    both = [processes.Process(target=work, args=(tmp_path, seed)) for seed in range(3)]
    for process in both:
        process.start()
    for process in both:
        process.join(WAIT_S)
    assert [process.exitcode for process in both] == [0, 0, 0]
    assert all(path.suffix == ".kv" for path in files(tmp_path))
    assert total_bytes(tmp_path) <= (12 + 3) * (PAGE_BYTES + 200)


def write_for_ever(folder: Path, is_writing: Event) -> None:
    def replace(*_: object) -> None:
        is_writing.set()
        time.sleep(WAIT_S)

    os.replace = replace
    open_store(folder).write(name(1), page(1))


def test_a_write_that_was_killed_leaves_nothing_and_one_that_lives_is_left_alone(tmp_path: Path) -> None:
    is_writing = processes.Event()
    process = processes.Process(target=write_for_ever, args=(tmp_path, is_writing))
    process.start()
    assert is_writing.wait(WAIT_S)
    store = open_store(tmp_path)
    (leftover,) = files(tmp_path)
    assert leftover.suffix == ".tmp"
    assert not found(store, 1)
    process.kill()
    process.join(WAIT_S)
    assert process.exitcode == -signal.SIGKILL
    assert not found(open_store(tmp_path), 1)
    assert files(tmp_path) == []


# --- a full disk ---


def test_a_full_disk_is_told_once_and_left_alone_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notices: list[str] = []
    store = KvStore(tmp_path, IDENTITY, 1 << 30, notices.append)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for index in range(5):
            store.write(name(index), page(index))
    assert len(notices) == 1
    assert "No space left" in notices[0]
    assert files(tmp_path) == []
    store.write(name(6), page(6))  # still in the pause
    assert not found(store, 6)
    assert store.counts == StoreCounts(pages_skipped=6)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    store.write(name(6), page(6))
    assert found(store, 6)


def test_a_disk_that_stays_full_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notices: list[str] = []
    store = KvStore(tmp_path, IDENTITY, 1 << 30, notices.append)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    original = os.write

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for write, num_notices in ((full, 1), (full, 1), (original, 1), (full, 2)):
        now[0] += 61
        monkeypatch.setattr(os, "write", write)
        store.write(name(1), page(1))
        assert len(notices) == num_notices


def test_a_folder_that_was_removed_is_made_again(tmp_path: Path) -> None:
    store = open_store(tmp_path / "kv")
    for index in range(3):
        shutil.rmtree(tmp_path / "kv")
        assert not found(store, index)
        store.write(name(index), page(index))
        assert found(store, index)


def write_within_limit(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE_BYTES // 2, PAGE_BYTES // 2))
    notices: list[str] = []
    store = KvStore(folder, IDENTITY, 1 << 30, notices.append)
    store.write(name(1), page(1))
    assert len(notices) == 1
    assert "too large" in notices[0]
    assert not found(store, 1)


def test_a_file_that_may_not_grow_is_no_file(tmp_path: Path) -> None:
    process = processes.Process(target=write_within_limit, args=(tmp_path,))
    process.start()
    process.join(WAIT_S)
    assert process.exitcode == 0
    assert files(tmp_path) == []
