"""Isotherm runs language models on one person's machine, and says why it is fast or slow.

with isotherm.load("smollm2") as model:
    print(model.generate("Why is the sky blue?", max_tokens=64).text)
"""

from pathlib import Path
from typing import TYPE_CHECKING

from isotherm.types import SamplingParams

if TYPE_CHECKING:
    from isotherm.formats.fetching import FetchReporter
    from isotherm.text import TextGenerator

__all__ = ["SamplingParams", "__version__", "load"]

__version__ = "0.1.0"


def load(
    name_or_path: str | Path,
    *,
    context_tokens: int | None = None,
    threads: int | None = None,
    backend: str = "cpu",
    cache_bytes: int | None = None,
    offline: bool = False,
    kv: str = "f16",
    reporter: "FetchReporter | None" = None,
) -> "TextGenerator":
    """A model ready to answer, a context manager.

    name_or_path: a GGUF file, an alias such as "smollm2", or "org/repo[:QUANT]" on the hub.
    context_tokens: None for the model's own, cut to what memory holds. threads: None for the physical cores that this
    process may use. backend: "cpu", or "reference": float32 in NumPy, slow and the truth. cache_bytes: how much of
    the disk packed models may take, 0 for none. offline: nothing is fetched. kv: keys and values as "f16",
    or as "q8_0", which takes half the memory. reporter hears what is fetched or cut.
    Raises ModelNotFound, DownloadError, ModelFileError, UnsupportedModel, InsufficientMemory, OptionError,
    UnsupportedCpu.
    """
    from isotherm import assemble  # heavy: a bare import of the package stays quick

    options = assemble.LoadOptions(
        context_tokens,
        threads,
        backend,
        assemble.DEFAULT_CACHE_BYTES if cache_bytes is None else cache_bytes,
        offline,
        kv,
    )
    return assemble.load(name_or_path, options, reporter)
