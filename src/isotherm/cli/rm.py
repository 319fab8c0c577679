"""`isotherm rm MODEL...`: deletes models, and what was packed of them."""

from pathlib import Path
from typing import Annotated

import typer

from isotherm.cli.console import notice
from isotherm.cli.flags import complete_model


def rm(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Names that `isotherm list` shows.",
            autocompletion=complete_model,
            show_default=False,
        ),
    ],
) -> None:
    """Deletes fetched models. A file of your own, outside the caches, is never deleted."""
    from isotherm.formats.fetching import size_text
    from isotherm.formats.names import remove

    for model in models:
        packed = _packed_of(model)
        freed_bytes = remove(model)
        for path in packed:
            freed_bytes += path.stat().st_size
            path.unlink()
        notice(f"deleted {model}, {size_text(freed_bytes)} came free")


def _packed_of(model: str) -> list[Path]:
    """Packed forms of the model: their keys start with its identity."""
    from isotherm.cli.cache import packed_dir
    from isotherm.cli.loading import path_on_disk
    from isotherm.errors import IsothermError
    from isotherm.formats.checkpoint import open_checkpoint
    from isotherm.quantization.packed_cache import list_cache

    try:
        with open_checkpoint(path_on_disk(model)) as checkpoint:
            identity = checkpoint.identity
    except IsothermError:  # what cannot be opened was never packed; `remove` says whether it is there at all
        return []
    return [packed.path for packed in list_cache(packed_dir()) if packed.key and packed.key.split()[0] == identity]
