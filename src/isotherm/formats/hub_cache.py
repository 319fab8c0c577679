"""GGUF models in the Hugging Face cache on this disk, and how `org/repo[:QUANT]` picks one. No network.

The layout is the one that `huggingface_hub` documents: models--ORG--NAME/{blobs, refs, snapshots/COMMIT/FILE}, where
a file of a snapshot is a link to its blob (a copy where links are not to be had).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from isotherm.formats.folders import hub_cache_dir

DEFAULT_QUANT = "Q4_K_M"
PARTIAL_SUFFIX = ".isotherm-partial"  # of a blob that is still being fetched

_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
_HUB_NAME = re.compile(rf"(?P<repo>{_WORD}/{_WORD})(?::(?P<choice>[^:\\\s][^:\\]*))?")
_SAFE_FILE = re.compile(r"[^/\\:\x00-\x1f]+(?:/[^/\\:\x00-\x1f]+)*")
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")
_QUANT = re.compile(
    r"(?<![A-Za-z0-9])(?:UD-)?(?:I?Q\d\w*|TQ\d_\d|BF16|F16|F32|(?:MX|NV)FP4)(?![A-Za-z0-9])", re.IGNORECASE
)


@dataclass(frozen=True)
class HubName:
    """`org/repo`, and which of its models: a quant (`Q8_0`), a file, or None for the default."""

    repo: str
    choice: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}:{self.choice}" if self.choice else self.repo


@dataclass(frozen=True)
class GgufModel:
    """One model of a repository: its file, or all parts of a split one in order."""

    files: tuple[str, ...]

    @property
    def stem(self) -> str:
        """The file's path in the repository without `.gguf` and without the number of the part."""
        stem = self.files[0][: -len(".gguf")]
        part = _PART.fullmatch(stem)
        return part["stem"] if part else stem

    @property
    def quant(self) -> str | None:
        found = _QUANT.findall(self.stem)
        return found[-1].upper() if found else None


@dataclass(frozen=True)
class CachedModel:
    name: str  # goes through `parse_hub_name` and `choose` back to this model
    repo: str
    model: GgufModel
    snapshots: tuple[Path, ...]  # the revisions that hold it; `main` first, then the newest
    size_bytes: int

    @property
    def path(self) -> Path:
        return self.snapshots[0] / self.model.files[0]


def parse_hub_name(name: str) -> HubName | None:
    found = _HUB_NAME.fullmatch(name)
    if not found or ".." in re.split("[/:]", name) or ".." in found["repo"] or "--" in found["repo"]:
        return None
    return HubName(found["repo"], found["choice"])


def group_models(files: Iterable[str]) -> list[GgufModel]:
    """The models among a repository's file names; leaves out split models with a part missing and odd names."""
    singles: list[GgufModel] = []
    parts: dict[tuple[str, int], dict[int, str]] = {}
    for file in sorted(files):
        if not _is_model_file(file):
            continue
        part = _PART.fullmatch(file[: -len(".gguf")])
        if part is None:
            singles.append(GgufModel((file,)))
        else:
            parts.setdefault((part["stem"], int(part["count"])), {})[int(part["number"])] = file
    split = [
        GgufModel(tuple(numbered[number] for number in sorted(numbered)))
        for (_, count), numbered in parts.items()
        if len(numbered) == count and min(numbered) == 1 and max(numbered) == count
    ]
    return singles + split


def choose(models: Sequence[GgufModel], choice: str | None) -> GgufModel | None:
    """The model that `choice` names, by quant or file; None: the default quant, or the only model there is.

    Of several that fit (a quant of two sizes) the one in fewer files and with the shorter name.
    """
    fits = [model for model in models if _fits(model, choice or DEFAULT_QUANT)]
    if not fits and choice is None and len(models) == 1:
        return models[0]
    return min(fits, key=lambda model: (len(model.files), len(model.stem), model.stem), default=None)


def model_name(repo: str, model: GgufModel, models: Sequence[GgufModel]) -> str:
    """The short name where the quant singles the model out among `models`, else the name with its file."""
    short = model.quant if model.quant and choose(models, model.quant) == model else model.files[0]
    return f"{repo}:{short}"


def repo_folder(repo: str) -> Path:
    return hub_cache_dir() / f"models--{repo.replace('/', '--')}"


def cached_models(repo: str | None = None) -> list[CachedModel]:
    """The complete GGUF models in the cache, of one repository or of all."""
    folders = [repo_folder(repo)] if repo else sorted(hub_cache_dir().glob("models--*--*"))
    return [model for folder in folders for model in _models_in(folder)]


def find_cached(name: HubName) -> CachedModel | None:
    cached = {entry.model: entry for entry in cached_models(name.repo)}
    chosen = choose(list(cached), name.choice)
    return cached[chosen] if chosen else None


def remove_cached(entry: CachedModel) -> int:
    """Deletes this model from every revision, and a blob with its last link; bytes that came free.

    Where the repository holds nothing else, all of it goes, by the library's own rule.
    """
    folder = repo_folder(entry.repo)
    own = {snapshot / file for snapshot in entry.snapshots for file in entry.model.files}
    others = {path for path in folder.glob("snapshots/*/**/*") if not path.is_dir()} - own
    if not others:
        return _remove_repository(folder)
    blobs = {path.resolve() for path in own} - {path.resolve() for path in others}
    doomed = {blob for blob in blobs if blob.is_relative_to(folder.resolve())}
    freed_bytes = sum(blob.stat().st_size for blob in doomed)
    for path in own | doomed:
        path.unlink(missing_ok=True)  # without links the file is its own blob
    return freed_bytes


def remove_partials(repo: str) -> int:
    """Deletes what fetches that were cut short left of the repository; bytes that came free."""
    partials = list(repo_folder(repo).glob(f"blobs/*{PARTIAL_SUFFIX}"))
    freed_bytes = sum(path.stat().st_size for path in partials)
    for path in partials:
        path.unlink()
    return freed_bytes


def _remove_repository(folder: Path) -> int:
    from huggingface_hub import scan_cache_dir

    cache = scan_cache_dir(hub_cache_dir())
    repos = frozenset(repo for repo in cache.repos if repo.repo_path.name == folder.name)
    if not repos:
        raise OSError(f"huggingface_hub does not recognise {folder} as a repository; delete that folder yourself")
    # the library finds revisions by hash alone, and a copy of a repository has the same hashes
    strategy = replace(cache, repos=repos).delete_revisions(
        *(revision.commit_hash for repo in repos for revision in repo.revisions)
    )
    strategy.execute()
    return int(strategy.expected_freed_size)


def _models_in(folder: Path) -> list[CachedModel]:
    holders: dict[GgufModel, list[Path]] = {}
    for snapshot in _snapshots(folder):
        files = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
        for model in group_models(files):
            holders.setdefault(model, []).append(snapshot)
    repo = folder.name.removeprefix("models--").replace("--", "/", 1)
    return [
        CachedModel(
            name=model_name(repo, model, list(holders)),
            repo=repo,
            model=model,
            snapshots=tuple(snapshots),
            size_bytes=_size_bytes(model, snapshots),
        )
        for model, snapshots in holders.items()
    ]


def _snapshots(folder: Path) -> list[Path]:
    main = folder / "refs" / "main"
    commit = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    found = [path for path in (folder / "snapshots").glob("*") if path.is_dir()]
    return sorted(found, key=lambda path: (path.name == commit, path.stat().st_mtime), reverse=True)


def _size_bytes(model: GgufModel, snapshots: Sequence[Path]) -> int:
    blobs = {(snapshot / file).resolve() for snapshot in snapshots for file in model.files}
    return sum(blob.stat().st_size for blob in blobs)


def _is_model_file(file: str) -> bool:
    """A projector (`mmproj`) of a multimodal model is a GGUF, but no language model."""
    base = file.rsplit("/", 1)[-1].lower()
    is_safe = _SAFE_FILE.fullmatch(file) is not None and not {".", ".."} & set(file.split("/"))
    return is_safe and base.endswith(".gguf") and base != ".gguf" and not base.startswith("mmproj")


def _fits(model: GgufModel, choice: str) -> bool:
    wanted, stem = choice.lower(), model.stem.lower()
    file = model.files[0].lower()
    if wanted in (file, file.rsplit("/", 1)[-1], stem, stem.rsplit("/", 1)[-1]):
        return True
    return re.search(rf"(?<![a-z0-9]){re.escape(wanted)}(?![a-z0-9_])", stem) is not None
