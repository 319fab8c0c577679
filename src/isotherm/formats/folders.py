"""Where files live on this machine. The environment is read at every call, never at import."""

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """ISOTHERM_CACHE, else `isotherm` beside the Hugging Face cache: ~/.cache/isotherm by default."""
    return _path_from_env("ISOTHERM_CACHE") or _hub_home().parent / "isotherm"


def models_dir() -> Path:
    """Model files that were fetched by alias; they may be deleted and are then fetched again."""
    return cache_dir() / "models"


def hub_cache_dir() -> Path:
    """The Hugging Face cache of repositories, by the rules of `huggingface_hub.constants`."""
    return _path_from_env("HF_HUB_CACHE") or _path_from_env("HUGGINGFACE_HUB_CACHE") or _hub_home() / "hub"


def config_file() -> Path:
    """config.toml; it need not exist."""
    home = _path_from_env("XDG_CONFIG_HOME")
    if home is None and sys.platform == "win32":
        home = _path_from_env("APPDATA")
    return (home or Path.home() / ".config") / "isotherm" / "config.toml"


def _hub_home() -> Path:
    return _path_from_env("HF_HOME") or (_path_from_env("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"


def _path_from_env(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(os.path.expandvars(value)).expanduser().absolute() if value else None
