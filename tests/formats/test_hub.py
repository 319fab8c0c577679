"""The hub client against a small fake hub on loopback, through HF_ENDPOINT."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest
from fake_hub import COMMIT, FakeHub, serve
from huggingface_hub import scan_cache_dir, try_to_load_from_cache
from hypothesis import given
from hypothesis import strategies as st

from isotherm.errors import DownloadError, IsothermError, ModelNotFound, OptionError
from isotherm.formats import hub as hub_client
from isotherm.formats.folders import cache_dir, config_file, hub_cache_dir, models_dir
from isotherm.formats.hub_cache import choose, group_models, parse_hub_name
from isotherm.formats.names import local_models, remove, resolve

REPO = "acme/Tiny-Chat-GGUF"
Q4, Q8 = "tiny-chat-q4_k_m.gguf", "tiny-chat-q8_0.gguf"
SPLIT = ["big/Big-F16-00001-of-00002.gguf", "big/Big-F16-00002-of-00002.gguf"]
RANDOM = random.Random(20240)
FILES = {name: RANDOM.randbytes(size) for name, size in [(Q4, 300_000), (Q8, 400_000), (SPLIT[0], 90_000)]}
FILES |= {SPLIT[1]: RANDOM.randbytes(70_000), "mmproj-tiny-f16.gguf": b"no language model", "README.md": b"# Tiny"}


class Recorder:
    def __init__(self) -> None:
        self.notices: list[str] = []
        self.seen: list[tuple[int, int | None]] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def progress(self, done_bytes: int, total_bytes: int | None) -> None:
        self.seen.append((done_bytes, total_bytes))


@pytest.fixture
def reporter() -> Recorder:
    return Recorder()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path / "isotherm"))
    monkeypatch.setattr(hub_client, "_RETRY_WAIT_S", 0.0)
    with serve(FakeHub(REPO, dict(FILES))) as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.endpoint)
        yield fake


def partials() -> list[Path]:
    return list(hub_cache_dir().rglob("*.isotherm-partial"))


# fetching


def test_fetches_into_the_ordinary_cache(hub: FakeHub, reporter: Recorder) -> None:
    path = resolve(f"{REPO}:Q8_0", reporter)
    assert path.read_bytes() == FILES[Q8]
    assert path == hub_cache_dir() / "models--acme--Tiny-Chat-GGUF" / "snapshots" / COMMIT / Q8
    assert try_to_load_from_cache(REPO, Q8, cache_dir=hub_cache_dir()) == str(path)
    assert not scan_cache_dir(hub_cache_dir()).warnings
    assert reporter.seen[-1] == (len(FILES[Q8]), len(FILES[Q8]))
    assert [done for done, _ in reporter.seen] == sorted(done for done, _ in reporter.seen)
    assert any("0.4 MB" in notice and "apache-2.0" in notice for notice in reporter.notices)


def test_what_is_here_asks_no_network(hub: FakeHub) -> None:
    path = resolve(f"{REPO}:q8_0")
    hub.requests.clear()
    assert resolve(f"{REPO}:Q8_0") == path
    assert not hub.requests


def test_default_quant_is_said(hub: FakeHub, reporter: Recorder) -> None:
    assert resolve(REPO, reporter).name == Q4
    assert any("Q4_K_M" in notice for notice in reporter.notices)
    assert resolve(REPO, reporter).name == Q4


def test_a_split_model_comes_whole(hub: FakeHub, reporter: Recorder) -> None:
    path = resolve(f"{REPO}:{SPLIT[0]}", reporter)
    assert resolve(f"{REPO}:F16") == path
    assert path.as_posix().endswith(SPLIT[0])
    assert path.read_bytes() == FILES[SPLIT[0]]
    assert path.with_name(SPLIT[1].split("/")[1]).read_bytes() == FILES[SPLIT[1]]
    assert reporter.seen[-1] == (160_000, 160_000)


def test_files_outside_large_storage_are_checked_by_git_hash(hub: FakeHub) -> None:
    hub.outside_large_storage = True
    assert resolve(f"{REPO}:Q8_0").read_bytes() == FILES[Q8]
    hub.sent_instead[Q4] = FILES[Q4][:-1] + b"?"
    with pytest.raises(DownloadError, match="wrong hash"):
        resolve(f"{REPO}:Q4_K_M")


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.redirect_to = hub.endpoint.replace("127.0.0.1", "localhost")
    assert resolve(f"{REPO}:Q8_0").read_bytes() == FILES[Q8]
    elsewhere = [request for request in hub.requests if request.path.startswith("/elsewhere/")]
    assert elsewhere
    assert all(request.authorization is None for request in elsewhere)
    assert any(request.authorization == "Bearer hf_secret" for request in hub.requests)


@pytest.mark.parametrize("before", ["", "import huggingface_hub.constants as c; c.HF_HUB_DISABLE_TELEMETRY = False; "])
def test_in_a_process_of_its_own_without_telemetry(hub: FakeHub, before: str) -> None:
    script = f"{before}from isotherm.formats.names import resolve; print(resolve({REPO + ':Q8_0'!r})); "
    script += "from huggingface_hub import constants; assert constants.HF_HUB_DISABLE_TELEMETRY"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).read_bytes() == FILES[Q8]
    assert done.stderr == ""
    assert {request.path.split("/")[1] for request in hub.requests} == {"api", "acme"}
    assert {request.path for request in hub.requests if "/api/" in request.path} == {f"/api/models/{REPO}"}
    assert not any(word in request.user_agent for request in hub.requests for word in ("torch", "agent/"))


# resuming


def test_goes_on_after_a_cut_connection(hub: FakeHub, reporter: Recorder) -> None:
    hub.cuts = [150_000, 100_000]
    assert resolve(f"{REPO}:Q8_0", reporter).read_bytes() == FILES[Q8]
    starts = hub.downloads(Q8)
    assert len(starts) == 3
    assert 0 == starts[0] < starts[1] <= 150_000
    assert starts[1] < starts[2] <= 250_000
    assert sum("connection lost" in notice for notice in reporter.notices) == 2


def test_gives_up_where_nothing_comes_and_goes_on_when_asked_again(hub: FakeHub, reporter: Recorder) -> None:
    hub.cuts = [200_000, 0, 0, 0, 0, 0]
    with pytest.raises(DownloadError, match="the same command goes on"):
        resolve(f"{REPO}:Q8_0")
    assert not hub.cuts
    (partial,) = partials()
    kept = partial.stat().st_size
    assert 0 < kept <= 200_000
    hub.requests.clear()
    assert resolve(f"{REPO}:Q8_0", reporter).read_bytes() == FILES[Q8]
    assert hub.downloads(Q8) == [kept]
    assert any("going on" in notice for notice in reporter.notices)
    assert not partials()


def test_a_server_without_ranges_sends_it_all_again(hub: FakeHub) -> None:
    hub.knows_ranges = False
    hub.cuts = [200_000]
    assert resolve(f"{REPO}:Q8_0").read_bytes() == FILES[Q8]


def test_a_reporter_that_raises_stops_the_fetch_and_what_came_is_kept(hub: FakeHub) -> None:
    class Interrupt(Recorder):
        def progress(self, done_bytes: int, total_bytes: int | None) -> None:
            if done_bytes > 100_000:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve(f"{REPO}:Q8_0", Interrupt())
    assert partials()[0].stat().st_size > 100_000
    assert resolve(f"{REPO}:Q8_0").read_bytes() == FILES[Q8]
    assert hub.downloads(Q8)[-1] > 100_000


KILLED_IN_THE_MIDDLE = """
import os, signal
from isotherm.formats.fetching import SilentReporter
from isotherm.formats.names import resolve

class Killer(SilentReporter):
    def progress(self, done_bytes, total_bytes):
        if done_bytes > 200_000:
            os.kill(os.getpid(), signal.SIGKILL)

resolve({name!r}, Killer())
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_a_killed_process_leaves_nothing_that_passes_for_a_model(hub: FakeHub) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED_IN_THE_MIDDLE.format(name=f"{REPO}:Q8_0")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert local_models() == []
    assert resolve(f"{REPO}:Q8_0").read_bytes() == FILES[Q8]
    assert hub.downloads(Q8)[-1] > 0


# faults


def test_wrong_bytes_never_enter_the_cache(hub: FakeHub) -> None:
    hub.sent_instead[Q8] = FILES[Q8][:1000] + b"!" + FILES[Q8][1001:]
    with pytest.raises(DownloadError, match=hashlib.sha256(FILES[Q8]).hexdigest()):
        resolve(f"{REPO}:Q8_0")
    assert local_models() == []
    assert not partials()
    hub.sent_instead.clear()
    assert resolve(f"{REPO}:Q8_0").read_bytes() == FILES[Q8]


def test_a_longer_answer_is_not_written_past_the_size(hub: FakeHub) -> None:
    hub.sent_instead[Q8] = FILES[Q8] + b"more" * 100_000
    assert resolve(f"{REPO}:Q8_0").read_bytes() == FILES[Q8]


@pytest.mark.parametrize(
    ("status", "code", "error", "words"),
    [
        (401, None, DownloadError, "HF_TOKEN"),
        (401, "GatedRepo", DownloadError, "accept its licence"),
        (403, "GatedRepo", DownloadError, "accept its licence"),
        (404, "RepoNotFound", ModelNotFound, "check the spelling"),
        (404, None, ModelNotFound, "check the spelling"),
        (418, None, DownloadError, "418"),
    ],
)
def test_refusals(hub: FakeHub, status: int, code: str | None, error: type[IsothermError], words: str) -> None:
    hub.status, hub.error_code = status, code
    with pytest.raises(error, match=words):
        resolve(REPO)


def test_a_hub_that_is_not_there(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=f"cannot fetch {REPO}"):
        resolve(REPO)


def test_a_listing_that_is_none(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeHub, "listing", lambda self: {"id": REPO, "sha": "../../etc", "siblings": []})
    with pytest.raises(DownloadError, match="HF_ENDPOINT"):
        resolve(REPO)


def test_what_the_repository_has(hub: FakeHub) -> None:
    with pytest.raises(ModelNotFound, match=r"no Q6_K; it has: .*:F16, .*:Q4_K_M, .*:Q8_0$"):
        resolve(f"{REPO}:Q6_K")
    hub.files = {"README.md": b"#"}
    with pytest.raises(ModelNotFound, match="it has no GGUF file"):
        resolve(REPO)


def test_too_little_room_is_seen_before_a_byte_is_sent(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - 300_000, 300_000))
    with pytest.raises(DownloadError, match=r"needs 0\.4 MB .* 0\.3 MB are free"):
        resolve(f"{REPO}:Q8_0")
    assert hub.downloads(Q8) == []


def test_a_disk_that_fills_up_meanwhile(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> IO[bytes]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub_client, "_append", lambda *arguments: full(Path()))
    with pytest.raises(DownloadError, match=r"needs 0\.4 MB on the disk of .*; make room"):
        resolve(f"{REPO}:Q8_0")
    assert len(hub.downloads(Q8)) == 0


# offline


@pytest.mark.parametrize("switch", ["argument", "HF_HUB_OFFLINE"])
def test_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    resolve(f"{REPO}:Q8_0")
    hub.requests.clear()
    if switch != "argument":
        monkeypatch.setenv(switch, "1")
    offline = switch == "argument"
    assert resolve(f"{REPO}:Q8_0", offline=offline).read_bytes() == FILES[Q8]
    assert resolve(REPO, offline=offline).name == Q8  # the only one that is here
    with pytest.raises(DownloadError, match=r"offline mode .*Q8_0"):
        resolve(f"{REPO}:Q4_K_M", offline=offline)
    with pytest.raises(DownloadError, match="nothing"):
        resolve("acme/Other-GGUF", offline=offline)
    assert not hub.requests


# list and remove


def test_list_and_remove_exactly_one(hub: FakeHub) -> None:
    for quant in ("Q4_K_M", "Q8_0", "F16"):
        resolve(f"{REPO}:{quant}")
    listed = {model.name: model for model in local_models()}
    assert {name: model.size_bytes for name, model in listed.items()} == {
        f"{REPO}:F16": 160_000,
        f"{REPO}:Q4_K_M": 300_000,
        f"{REPO}:Q8_0": 400_000,
    }
    with pytest.raises(OptionError, match="several models; say which"):
        remove(REPO)
    assert remove(f"{REPO}:Q8_0") == 400_000
    assert remove(str(listed[f"{REPO}:F16"].path)) == 160_000
    assert [model.name for model in local_models()] == [f"{REPO}:Q4_K_M"]
    assert resolve(f"{REPO}:Q4_K_M", offline=True).read_bytes() == FILES[Q4]
    assert remove(REPO) == 300_000
    assert local_models() == []
    assert not (hub_cache_dir() / "models--acme--Tiny-Chat-GGUF").exists()
    with pytest.raises(ModelNotFound, match="not on this disk"):
        remove(REPO)


def test_a_blob_that_another_model_shares_is_kept(hub: FakeHub) -> None:
    hub.files["same-bytes-q5_0.gguf"] = FILES[Q8]
    resolve(f"{REPO}:Q8_0")
    resolve(f"{REPO}:Q5_0")
    assert remove(f"{REPO}:Q8_0") == 0
    assert resolve(f"{REPO}:Q5_0", offline=True).read_bytes() == FILES[Q8]


def test_a_copy_of_the_repository_is_left_alone(hub: FakeHub) -> None:
    resolve(f"{REPO}:Q8_0")
    hub.repo = "mirror/Tiny-Chat-GGUF"  # the same commits under another name
    copy = resolve(f"{hub.repo}:Q8_0")
    assert remove(f"{REPO}:Q8_0") == 400_000
    assert [model.path for model in local_models()] == [copy]
    assert copy.read_bytes() == FILES[Q8]


def test_a_file_outside_the_caches_is_not_removed(hub: FakeHub, tmp_path: Path) -> None:
    precious = tmp_path / "mine.gguf"
    precious.write_bytes(b"GGUF")
    with pytest.raises(OptionError, match="delete it yourself"):
        remove(str(precious))
    assert precious.exists()


def test_what_an_unfinished_fetch_left_can_be_removed(hub: FakeHub) -> None:
    hub.cuts = [200_000, 0, 0, 0, 0, 0]
    with pytest.raises(DownloadError):
        resolve(f"{REPO}:Q8_0")
    assert remove(f"{REPO}:Q8_0") > 0
    assert not partials()
    with pytest.raises(ModelNotFound, match="not on this disk"):
        remove(f"{REPO}:Q8_0")


def test_other_files_of_the_cache_are_left_alone(hub: FakeHub) -> None:
    path = resolve(f"{REPO}:Q8_0")
    readme = path.with_name("README.md")
    readme.write_text("fetched by another program")
    half = path.with_name("half-00001-of-00002.gguf")
    half.write_bytes(b"one part")
    assert [model.name for model in local_models()] == [f"{REPO}:Q8_0"]
    assert remove(f"{REPO}:Q8_0") == 400_000
    assert readme.exists()
    assert half.exists()
    assert not list(path.parents[2].glob("blobs/*"))


# names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/repo", ("org/repo", None)),
        ("org/repo:Q8_0", ("org/repo", "Q8_0")),
        ("org/repo:sub/file.gguf", ("org/repo", "sub/file.gguf")),
        ("org/../repo", None),
        ("org/repo:../x", None),
        ("org/re--po", None),
        ("-org/repo", None),
        ("org/repo:", None),
        ("org/repo:A b (1).gguf", ("org/repo", "A b (1).gguf")),
        ("org/re..po", None),
        ("org", None),
        ("a/b/c", None),
    ],
)
def test_parse_hub_name(name: str, expected: tuple[str, str | None] | None) -> None:
    parsed = parse_hub_name(name)
    assert (parsed and (parsed.repo, parsed.choice)) == expected


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("Q4_K_M", "M-Q4_K_M.gguf"),
        ("q4_k_m", "M-Q4_K_M.gguf"),
        ("Q4_K", None),  # is no short form of Q4_K_M
        ("Q4_0", "sub/M.Q4_0.gguf"),
        ("M.Q4_0", "sub/M.Q4_0.gguf"),
        ("sub/M.Q4_0.gguf", "sub/M.Q4_0.gguf"),
        ("F16", "M-f16-00001-of-00002.gguf"),
        ("IQ4_XS", "m_iq4_xs.gguf"),
        ("Q5_K_M", None),
        (None, "M-Q4_K_M.gguf"),
    ],
)
def test_choose(choice: str | None, expected: str | None) -> None:
    files = ["M-Q4_K_M.gguf", "M-Q4_K_S.gguf", "sub/M.Q4_0.gguf", "M-f16-00001-of-00002.gguf"]
    files += ["M-f16-00002-of-00002.gguf", "m_iq4_xs.gguf", "M-Q5_K_M-00001-of-00002.gguf", "mmproj-M-Q8_0.gguf"]
    chosen = choose(group_models(files), choice)
    assert (chosen and chosen.files[0]) == expected


def test_the_only_model_is_the_default() -> None:
    only = group_models(["README.md", "m-q8_0.gguf"])
    assert choose(only, None) == only[0]
    assert choose(only, "Q4_K_M") is None


@given(st.lists(st.text(max_size=30).map(lambda text: text + ".gguf"), max_size=8))
def test_hostile_listings_yield_only_safe_relative_names(files: list[str]) -> None:
    hostile = [
        *files,
        "../../x.gguf",
        "/etc/x.gguf",
        "a/../b.gguf",
        "c:x.gguf",
        "a\\b.gguf",
        "\n.gguf",
        ".gguf",
        "./y.gguf",
    ]
    for model in group_models(hostile):
        for file in model.files:
            assert (Path("/safe") / file).is_relative_to("/safe")
            assert not {"..", "."} & set(file.split("/"))
            assert "\\" not in file
            assert ":" not in file


@given(st.text(max_size=60))
def test_any_name_is_refused_with_our_error(name: str) -> None:
    with suppress(ModelNotFound, DownloadError):
        assert resolve(name, offline=True).exists()


# folders


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in (
        "ISOTHERM_CACHE",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
    ):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert models_dir() == tmp_path / ".cache" / "isotherm" / "models"
    assert hub_cache_dir() == tmp_path / ".cache" / "huggingface" / "hub"
    assert config_file() == tmp_path / ".config" / "isotherm" / "config.toml"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "isotherm"
    monkeypatch.setenv("HF_HOME", "$XDG_CACHE_HOME/models/hf")
    assert cache_dir() == tmp_path / "xdg" / "models" / "isotherm"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert hub_cache_dir() == tmp_path / "elsewhere"
    monkeypatch.setenv("ISOTHERM_CACHE", "")
    assert cache_dir() == tmp_path / "xdg" / "models" / "isotherm"
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "conf"))
    assert config_file() == tmp_path / "conf" / "isotherm" / "config.toml"


def test_the_hub_library_agrees_on_its_cache() -> None:
    script = (
        "import json; from huggingface_hub import constants; from isotherm.formats.folders import hub_cache_dir;"
        "print(json.dumps([constants.HF_HUB_CACHE, str(hub_cache_dir())]))"
    )
    for variables in (
        {},
        {"HF_HOME": "~/x"},
        {"XDG_CACHE_HOME": "/tmp/c"},
        {"HF_HUB_CACHE": "/tmp/h", "HF_HOME": "/y"},
    ):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE", "XDG_"))}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment | variables, capture_output=True, text=True, check=True
        )
        library, ours = json.loads(done.stdout)
        assert library == ours
