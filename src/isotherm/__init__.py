"""Isotherm runs language models on one person's machine, and says why it is fast or slow.

with isotherm.load("smollm2") as model:
    print(model.generate("Why is the sky blue?", max_tokens=64).text)
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isotherm.types import Grammar, LoadOptions, SamplingParams

if TYPE_CHECKING:
    from isotherm.formats.fetching import FetchReporter
    from isotherm.text import TextGenerator

__all__ = ["Grammar", "LoadOptions", "SamplingParams", "__version__", "load"]

__version__ = "0.1.0"


def load(
    name_or_path: str | Path,
    *,
    options: LoadOptions | None = None,
    reporter: "FetchReporter | None" = None,
    **fields: Any,
) -> "TextGenerator":
    """A model ready to answer, a context manager.

    name_or_path: a GGUF file, an alias such as "smollm2", or "org/repo[:QUANT]" on the hub. Fields of LoadOptions may
    be given by name: `load("smollm2", context_tokens=2048)`. reporter hears what is fetched or cut.
    Raises ModelNotFound, DownloadError, ModelFileError, UnsupportedModel, InsufficientMemory, OptionError,
    UnsupportedCpu; TypeError for an option that does not exist.
    """
    from isotherm import assemble  # heavy: a bare import of the package stays quick

    return assemble.load(name_or_path, replace(options or LoadOptions(), **fields), reporter)
