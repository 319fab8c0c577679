"""The cache folder with several processes at work, killed ones, and too little room."""

import multiprocessing
import os
import resource
import signal
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest

from isotherm.quantization import packed_file
from isotherm.quantization.packed_cache import (
    build_lock,
    clear_cache,
    enforce_cap,
    list_cache,
    open_or_build,
    remove_leftovers,
)
from isotherm.quantization.packed_file import (
    CacheMiss,
    CacheUnavailable,
    EntryKind,
    EntrySpec,
    PackedFile,
    PackedSink,
    PackedWriter,
    temporary_path,
)
from isotherm.types import QuantType

KEY = "model v1"
SPEC = EntrySpec("weights", EntryKind.VECTOR, (QuantType.F32,), (5000,))
VALUES = np.arange(5000, dtype=np.float32)
WAIT_S = 60
processes = multiprocessing.get_context("spawn")


def build(sink: PackedSink) -> None:
    sink.add(SPEC, [VALUES.view(np.uint8)])


def build_never(sink: PackedSink) -> None:
    pytest.fail("built again")


def silent(line: str) -> None:
    pytest.fail(f"unexpected notice: {line}")


def make(path: Path, *, used_s: float) -> Path:
    open_or_build(path, path.name, build, silent)
    os.utime(path, (used_s, used_s))
    return path


def test_the_second_start_builds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cache" / "model.p32"
    open_or_build(path, KEY, build, silent)
    packed = open_or_build(path, KEY, build_never, silent)
    np.testing.assert_array_equal(packed.array("weights"), VALUES)
    assert os.listdir(path.parent) == ["model.p32"]


def test_a_stale_file_is_packed_again_with_a_notice(tmp_path: Path) -> None:
    path = tmp_path / "model.p32"
    open_or_build(path, "old model", build, silent)
    notices: list[str] = []
    assert open_or_build(path, KEY, build, notices.append).key == KEY
    assert len(notices) == 1
    assert "packing again" in notices[0]
    assert isinstance(PackedFile.open(path, "old model"), CacheMiss)


def test_an_error_while_building_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.p32"
    open_or_build(path, "old model", build, silent)

    def fail(sink: PackedSink) -> None:
        build(sink)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_or_build(path, KEY, fail, lambda line: None)
    assert os.listdir(tmp_path) == ["model.p32"]
    assert isinstance(PackedFile.open(path, "old model"), PackedFile)


# --- two processes ------------------------------------------------------------------------------------------------


def race(path: Path, log: Path, other_waits: Event) -> None:
    """The one that builds waits in the middle until the other one has said that it waits."""

    def build_slowly(sink: PackedSink) -> None:
        with log.open("a") as file:
            file.write("built\n")
        assert other_waits.wait(WAIT_S)
        build(sink)

    def note(line: str) -> None:
        with log.open("a") as file:
            file.write("waited\n")
        other_waits.set()

    packed = open_or_build(path, KEY, build_slowly, note)
    assert packed.verify() == ()
    np.testing.assert_array_equal(packed.array("weights"), VALUES)


def test_of_two_processes_one_builds_and_the_other_waits(tmp_path: Path) -> None:
    path, log, other_waits = tmp_path / "model.p32", tmp_path / "log", processes.Event()
    racers = [processes.Process(target=race, args=(path, log, other_waits)) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(WAIT_S)
    assert [racer.exitcode for racer in racers] == [0, 0]
    assert sorted(log.read_text().split()) == ["built", "waited"]
    assert sorted(os.listdir(tmp_path)) == ["log", "model.p32"]


def die_while_writing(path: Path) -> None:
    packed_file._WRITE_BYTES = 4096
    with build_lock(path, silent), PackedWriter(path, KEY) as writer:
        build(writer)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_writer_leaves_nothing_that_is_believed(tmp_path: Path) -> None:
    path, other = tmp_path / "model.p32", tmp_path / "other.p32"
    writer = processes.Process(target=die_while_writing, args=(path,))
    writer.start()
    writer.join(WAIT_S)
    assert writer.exitcode == -signal.SIGKILL
    assert temporary_path(path).stat().st_size >= 4096
    assert isinstance(PackedFile.open(path, KEY), CacheMiss)
    assert isinstance(PackedFile.open(temporary_path(path), KEY), CacheMiss)
    assert list_cache(tmp_path) == []
    open_or_build(other, KEY, build, silent)  # the next writer of any model sweeps
    assert os.listdir(tmp_path) == ["other.p32"]
    open_or_build(path, KEY, build, silent)


def write_under_a_limit(path: Path) -> None:
    """Exit codes: 3 CacheUnavailable as it should be."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    try:
        open_or_build(path, KEY, build, silent)
    except CacheUnavailable:
        os._exit(3)


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    writer = processes.Process(target=write_under_a_limit, args=(tmp_path / "model.p32",))
    writer.start()
    writer.join(WAIT_S)
    assert writer.exitcode == 3
    assert os.listdir(tmp_path) == []


# --- locks, leftovers, room -----------------------------------------------------------------------------------------


def test_leftovers_of_a_living_writer_stay(tmp_path: Path) -> None:
    path = tmp_path / "model.p32"
    with build_lock(path, silent), PackedWriter(path, KEY) as writer:
        build(writer)
        num_bytes = temporary_path(path).stat().st_size
        assert remove_leftovers(tmp_path) == 0
        assert clear_cache(tmp_path) == 0
        assert temporary_path(path).stat().st_size == num_bytes
        writer.commit()
    assert isinstance(PackedFile.open(path, KEY), PackedFile)


def test_leftovers_without_a_writer_go(tmp_path: Path) -> None:
    temporary_path(tmp_path / "model.p32").write_bytes(bytes(1000))
    (tmp_path / "more.p32.lock").touch()
    (tmp_path / "notes.tmp").touch()
    assert remove_leftovers(tmp_path) == 1000
    assert os.listdir(tmp_path) == ["notes.tmp"]


@pytest.mark.parametrize("obstacle", ["file_for_folder", "folder_for_lock", "link_for_lock"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, obstacle: str) -> None:
    folder = tmp_path / "cache"
    if obstacle == "file_for_folder":
        folder.touch()
    else:
        folder.mkdir()
    if obstacle == "folder_for_lock":
        (folder / "model.p32.lock").mkdir()
    if obstacle == "link_for_lock":
        (folder / "model.p32.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheUnavailable, match="cache"):
        open_or_build(folder / "model.p32", KEY, build_never, silent)


def test_the_list_of_the_cache(tmp_path: Path) -> None:
    assert list_cache(tmp_path / "none") == []
    young, old = make(tmp_path / "young.p32", used_s=200), make(tmp_path / "old.p32", used_s=100)
    broken = tmp_path / "broken.p32"
    broken.write_bytes(b"x")
    os.utime(broken, (50, 50))
    models = list_cache(tmp_path)
    assert [model.path for model in models] == [broken, old, young]
    assert [model.key for model in models] == [None, "old.p32", "young.p32"]
    assert [model.num_bytes for model in models] == [1, old.stat().st_size, young.stat().st_size]
    assert [model.last_used_s for model in models] == [50, 100, 200]


def test_clearing_the_cache(tmp_path: Path) -> None:
    path = make(tmp_path / "model.p32", used_s=1)
    num_bytes = path.stat().st_size
    packed = PackedFile.open(path, path.name)
    assert isinstance(packed, PackedFile)
    temporary_path(tmp_path / "other.p32").write_bytes(bytes(10))
    assert clear_cache(tmp_path) == num_bytes + 10
    assert os.listdir(tmp_path) == []
    np.testing.assert_array_equal(packed.array("weights"), VALUES)
    assert clear_cache(tmp_path / "none") == 0


@pytest.mark.parametrize(
    ("files_that_fit", "expected"),
    [(9, []), (3, []), (2, ["first"]), (1, ["first", "second"]), (0, ["first", "second"])],
)
def test_the_cap_takes_the_least_recently_used_and_spares_the_kept(
    tmp_path: Path, files_that_fit: int, expected: list[str]
) -> None:
    keep = make(tmp_path / "keepx.p32", used_s=0)
    names = [make(tmp_path / f"{name}.p32", used_s=used_s) for used_s, name in enumerate(["first", "second"], 1)]
    size_bytes = max(path.stat().st_size for path in [keep, *names])
    removed = enforce_cap(tmp_path, files_that_fit * size_bytes, keep=keep)
    assert [model.path.stem for model in removed] == expected
    assert keep.exists()
    assert len(list_cache(tmp_path)) == 3 - len(expected)
