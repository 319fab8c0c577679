"""Fetches GGUF models from the Hugging Face hub into its ordinary cache, through `huggingface_hub`.

The library finds the files and their hashes and keeps the cache. The bytes are streamed here, over the library's own
HTTP session: the library starts anew after it was killed, and puts a file in the cache before anyone saw its hash.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from isotherm.errors import DownloadError, IsothermError, ModelNotFound
from isotherm.formats.fetching import (
    FetchReporter,
    disk_full,
    file_sha256,
    is_disk_full,
    one_process_at_a_time,
    require_free_space,
    size_text,
)
from isotherm.formats.folders import hub_cache_dir
from isotherm.formats.hub_cache import PARTIAL_SUFFIX, HubName, choose, group_models, model_name, repo_folder

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_CHUNK_BYTES = 1 << 16  # what is lost at most when a connection is
_MAX_IDLE_ATTEMPTS = 5  # in a row without one new byte
_RETRY_WAIT_S = 1.0
_METADATA_TIMEOUT_S = 20.0
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class _RemoteFile:
    repo: str
    commit: str
    file: str
    size_bytes: int
    oid: str  # SHA-256 of a file in large file storage, else git's SHA-1 of the blob: the name of the blob in the cache


@dataclass(frozen=True)
class _Listing:
    """What the hub says of a repository."""

    commit: str
    licence: str
    gguf_files: dict[str, _RemoteFile]


def is_offline() -> bool:
    """Whether the library's own switches forbid the network."""
    on = ("1", "ON", "YES", "TRUE")
    return any(os.environ.get(name, "").upper() in on for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def fetch_from_hub(name: HubName, reporter: FetchReporter, sha256: str | None = None) -> Path:
    """The model's (first) file in the cache, fetched unless it is there; every part of a split model comes along.

    `sha256`: the hash that the one file must have. Raises ModelNotFound (with what the repository has) and
    DownloadError. A fetch that was cut or killed goes on where it stopped when it is asked for again.
    """
    api = _api()
    listing = _list_repository(api, name.repo)
    parts = _choose_parts(name, listing, reporter)
    if sha256 is not None and [part.oid for part in parts] != [sha256]:
        raise DownloadError(
            f"{parts[0].file} in {name.repo} is not the known file: SHA-256 {parts[0].oid}, not {sha256}"
        )
    total_bytes = sum(part.size_bytes for part in parts)
    require_free_space(hub_cache_dir(), sum(_missing_bytes(part) for part in parts), str(name))
    reporter.notice(
        f"fetching {', '.join(part.file for part in parts)} ({size_text(total_bytes)}) "
        f"from {name.repo} on the Hugging Face hub. Licence: {listing.licence}"
    )
    done_bytes = 0
    for part in parts:
        _fetch_blob(api, part, _PartReporter(reporter, done_bytes, total_bytes))
        done_bytes += part.size_bytes
    reporter.progress(total_bytes, total_bytes)
    linked = [_link(api, part) for part in parts]
    return linked[0]


def _api() -> "HfApi":
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # the library reads it once, when it is first imported,
    from huggingface_hub import HfApi, constants

    constants.HF_HUB_DISABLE_TELEMETRY = True  # which may have been before
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


@contextmanager
def _explained(repo: str, needed_bytes: int = 0) -> Iterator[None]:
    """Turns what the library and the disk may raise into our errors."""
    foreign: tuple[type[Exception], ...] = (ValueError, *_transport_errors())
    try:
        yield
    except IsothermError:
        raise
    except foreign as error:
        raise _explain(error, repo, needed_bytes) from error


def _transport_errors() -> tuple[type[Exception], ...]:
    """OSError, which covers requests; since version 1 also the root of httpx, a base of the library's own error."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)))


def _explain(error: Exception, repo: str, needed_bytes: int) -> IsothermError:
    if is_disk_full(error):
        return disk_full(hub_cache_dir(), needed_bytes, repo)
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status in (401, 403):
        return DownloadError(
            f"the hub refuses {repo} ({status}): it is private, gated or not there. Check the name; for a gated model "
            f"accept its licence on its page on the hub, and set HF_TOKEN to a token of yours"
        )
    if status == 404:
        return ModelNotFound(f"the hub has no repository or file of this name: {repo}; check the spelling")
    if status is not None:
        return DownloadError(f"the hub answers {status} for {repo}; try again later")
    return DownloadError(f"cannot fetch {repo}: {type(error).__name__}: {error}")


def _list_repository(api: "HfApi", repo: str) -> _Listing:
    with _explained(repo):
        info = api.model_info(repo, files_metadata=True, timeout=_METADATA_TIMEOUT_S)
    commit = str(info.sha)
    if not _SHA1.fullmatch(commit):
        raise DownloadError(f"the hub names no commit of {repo}, but {commit!r}; is HF_ENDPOINT a Hugging Face hub?")
    files = {}
    for sibling in info.siblings or []:
        oid = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        if (
            isinstance(sibling.size, int)
            and sibling.size > 0
            and (_SHA256.fullmatch(oid or "") or _SHA1.fullmatch(oid or ""))
        ):
            files[sibling.rfilename] = _RemoteFile(repo, commit, sibling.rfilename, sibling.size, str(oid))
    licences = [tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")]
    return _Listing(commit, ", ".join(licences) or "not stated; see its page", files)


def _choose_parts(name: HubName, listing: _Listing, reporter: FetchReporter) -> list[_RemoteFile]:
    models = group_models(listing.gguf_files)
    chosen = choose(models, name.choice)
    if chosen is None:
        has = ", ".join(sorted(model_name(name.repo, model, models) for model in models))
        wanted = name.choice or "default quant"
        raise ModelNotFound(f"{name.repo} has no {wanted}; " + (f"it has: {has}" if has else "it has no GGUF file"))
    if name.choice is None:
        reporter.notice(f"{name.repo} was named without a quant; taking {model_name(name.repo, chosen, models)}")
    return [listing.gguf_files[file] for file in chosen.files]


@dataclass(frozen=True)
class _PartReporter:
    """Counts one file's bytes as a part of the whole."""

    whole: FetchReporter
    before_bytes: int
    total_bytes: int

    def notice(self, text: str) -> None:
        self.whole.notice(text)

    def progress(self, done_bytes: int, total_bytes: int | None) -> None:
        self.whole.progress(self.before_bytes + done_bytes, self.total_bytes)


def _fetch_blob(api: "HfApi", remote: _RemoteFile, reporter: FetchReporter) -> None:
    """Puts the file among the repository's blobs, under its hash, unless it is there."""
    blob, partial = _blob_paths(remote)
    lock = hub_cache_dir() / ".locks" / repo_folder(remote.repo).name / f"{remote.oid}.isotherm.lock"
    with _explained(remote.repo, remote.size_bytes), one_process_at_a_time(lock, remote.file, reporter):
        if blob.exists():
            return
        blob.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as out:
            _fill(api, remote, out, reporter)
        _check(remote, partial)
        partial.replace(blob)


def _blob_paths(remote: _RemoteFile) -> tuple[Path, Path]:
    """The file's place in the cache, and where it grows."""
    blobs = repo_folder(remote.repo) / "blobs"
    return blobs / remote.oid, blobs / f"{remote.oid}{PARTIAL_SUFFIX}"


def _missing_bytes(remote: _RemoteFile) -> int:
    blob, partial = _blob_paths(remote)
    if blob.exists():
        return 0
    return max(0, remote.size_bytes - (partial.stat().st_size if partial.exists() else 0))


def _fill(api: "HfApi", remote: _RemoteFile, out: BinaryIO, reporter: FetchReporter) -> None:
    """Appends until the file has its size; asks again for the rest when the connection is lost."""
    from huggingface_hub.errors import HfHubHTTPError

    if out.tell() > 0:
        reporter.notice(f"going on with {remote.file} at {size_text(out.tell())} of {size_text(remote.size_bytes)}")
    idle_attempts = 0
    while (start_bytes := out.tell()) < remote.size_bytes:
        reason = "the hub ended the connection"
        try:
            _append(api, remote, out, reporter)
        except _transport_errors() as error:
            if is_disk_full(error) or isinstance(error, HfHubHTTPError):
                raise
            reason = f"{type(error).__name__}: {error}"
        if out.tell() >= remote.size_bytes:
            return
        idle_attempts = 0 if out.tell() > start_bytes else idle_attempts + 1
        if idle_attempts == _MAX_IDLE_ATTEMPTS:
            raise DownloadError(
                f"{remote.file} stopped at {size_text(out.tell())} of {size_text(remote.size_bytes)} ({reason}); "
                f"what came is kept, and the same command goes on from there"
            )
        reporter.notice(f"connection lost at {size_text(out.tell())} ({reason}); asking for the rest")
        time.sleep(_RETRY_WAIT_S)


def _append(api: "HfApi", remote: _RemoteFile, out: BinaryIO, reporter: FetchReporter) -> None:
    with _stream(api, remote, out.tell()) as (is_rest, chunks):
        if not is_rest:  # the server does not know ranges and sends the whole file
            out.truncate(0)
            out.seek(0)
        for chunk in chunks:
            out.write(chunk[: remote.size_bytes - out.tell()])
            reporter.progress(out.tell(), remote.size_bytes)
            if out.tell() == remote.size_bytes:
                break
    out.flush()


@contextmanager
def _stream(api: "HfApi", remote: _RemoteFile, start_bytes: int) -> Iterator[tuple[bool, Iterator[bytes]]]:
    """Whether the server sends just the rest from `start_bytes`, and the bytes."""
    import huggingface_hub
    from huggingface_hub import constants, hf_hub_url

    utils: Any = huggingface_hub.utils  # one of two functions, by the library's version
    url = hf_hub_url(remote.repo, remote.file, revision=remote.commit, endpoint=api.endpoint)
    headers = {**utils.build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={start_bytes}-"}
    options: dict[str, Any] = {
        "headers": headers,
        "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT,
        "retry_on_exceptions": (),
        "retry_on_status_codes": (429, 500, 502, 503, 504),
        "max_retries": 3,
    }
    if hasattr(utils, "http_stream_backoff"):  # since version 1, over httpx; before, over requests
        with utils.http_stream_backoff("GET", url, **options) as response:
            utils.hf_raise_for_status(response)
            yield response.status_code == 206, response.iter_bytes(_CHUNK_BYTES)
    else:
        with utils.http_backoff("GET", url, stream=True, **options) as response:
            utils.hf_raise_for_status(response)
            yield response.status_code == 206, response.iter_content(_CHUNK_BYTES)


def _check(remote: _RemoteFile, partial: Path) -> None:
    got = file_sha256(partial) if _SHA256.fullmatch(remote.oid) else _git_sha1(partial)
    if got != remote.oid:
        partial.unlink()
        raise DownloadError(
            f"{remote.file} came from {remote.repo} with the wrong hash: {got}, expected {remote.oid}; it was deleted. "
            f"Try again, without a proxy or mirror if there is one"
        )


def _git_sha1(path: Path) -> str:
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _link(api: "HfApi", remote: _RemoteFile) -> Path:
    """Lets the library link the blob into the snapshot of `main` and note the revision."""
    from huggingface_hub import hf_hub_download

    with _explained(remote.repo, remote.size_bytes):
        linked = Path(hf_hub_download(remote.repo, remote.file, cache_dir=hub_cache_dir(), endpoint=api.endpoint))
    if remote.commit not in linked.parts:
        raise DownloadError(f"{remote.repo} was changed on the hub while it was fetched; ask for it again")
    return linked
