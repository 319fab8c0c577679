"""Finds and opens a model for a command, with its news on stderr."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from isotherm.cli.console import TerminalReporter
from isotherm.cli.settings import Settings
from isotherm.errors import DownloadError, ModelNotFound

if TYPE_CHECKING:
    from isotherm.text import TextGenerator


@contextmanager
def loaded(model: str, settings: Settings) -> Iterator["TextGenerator"]:
    """The model, closed at the end. Raises what `isotherm.load` raises."""
    import isotherm

    with TerminalReporter() as reporter:
        generator = isotherm.load(model, options=settings.load_options, reporter=reporter)
    with generator:
        yield generator


def path_on_disk(model: str) -> Path:
    """The file that `model` names, if it is on this disk; nothing is fetched. Raises ModelNotFound."""
    from isotherm.formats.names import resolve

    try:
        return resolve(model, TerminalReporter(), offline=True)
    except DownloadError as error:
        raise ModelNotFound(f"{model} is not on this disk; `isotherm pull {model}` fetches it") from error
