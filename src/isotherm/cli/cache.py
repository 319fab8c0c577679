"""`isotherm cache list` and `isotherm cache clear`: the packed models kept for quick starts."""

import time
from pathlib import Path

from isotherm.cli.console import notice, print_json, print_table
from isotherm.cli.flags import JsonOption


def packed_dir() -> Path:
    from isotherm.formats.folders import cache_dir

    return cache_dir() / "packed"


def list_packed(as_json: JsonOption = False) -> None:
    """Lists the packed models, least recently used first."""
    from isotherm.formats.fetching import size_text
    from isotherm.quantization.packed_cache import list_cache

    packed = list_cache(packed_dir())
    if as_json:
        print_json(
            [
                {
                    "path": str(model.path),
                    "size_bytes": model.num_bytes,
                    "last_used_s": model.last_used_s,
                    "is_valid": model.key is not None,
                }
                for model in packed
            ]
        )
        return
    if packed:
        rows = [
            (
                model.path.name,
                size_text(model.num_bytes),
                time.strftime("%Y-%m-%d %H:%M", time.localtime(model.last_used_s)),
                "ok" if model.key else "stale",
            )
            for model in packed
        ]
        print_table(("FILE", "SIZE", "LAST USED", "STATE"), rows)
    total_bytes = sum(model.num_bytes for model in packed)
    notice(f"{len(packed)} packed models, {size_text(total_bytes)}, in {packed_dir()}")


def clear_packed() -> None:
    """Deletes every packed model; the next start of each packs it again."""
    from isotherm.formats.fetching import size_text
    from isotherm.quantization.packed_cache import clear_cache

    notice(f"{size_text(clear_cache(packed_dir()))} came free in {packed_dir()}")
