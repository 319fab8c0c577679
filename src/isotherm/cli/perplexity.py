"""`isotherm perplexity`: how well a model predicts a text."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isotherm.cli.console import notice, print_json
from isotherm.cli.flags import JsonOption, ModelArgument, takes
from isotherm.cli.loading import loaded
from isotherm.cli.settings import Settings
from isotherm.errors import OptionError

if TYPE_CHECKING:
    from isotherm.evaluation.perplexity import PerplexityResult


@takes("kv", "threads", "backend", "device", "vram", "sparse", "quality", "predictor", "cache_gib", "offline")
def perplexity(
    settings: Settings,
    model: ModelArgument,
    file: Annotated[
        Path, typer.Option("--file", "-f", metavar="FILE", help="Text to score, UTF-8.", show_default=False)
    ],
    window: Annotated[
        int, typer.Option("--ctx", "-c", metavar="TOKENS", help="Tokens of a window; its second half is scored.")
    ] = 512,
    chunks: Annotated[
        int, typer.Option("--chunks", metavar="N", help="Windows to score, from the start of the text.")
    ] = 16,
    as_json: JsonOption = False,
) -> None:
    """Says how well a model predicts a text, by llama.cpp's rule; lower is better."""
    from isotherm.evaluation.perplexity import perplexity as evaluate

    text = read_text(file)
    with loaded(model, replace(settings, ctx=window)) as generator:
        result = evaluate(generator, text, window_tokens=window, num_windows=chunks, on_window=_tell)
        name = generator.facts.name
    if result.num_windows < chunks:
        notice(f"the text holds {result.num_windows} windows of {window} tokens, not {chunks}")
    if as_json:
        print_json({"model": name, "backend": settings.backend, **asdict(result)})
        return
    print(
        f"perplexity {result.perplexity:.4f} ± {result.standard_error:.4f} "
        f"({result.num_tokens} tokens in {result.num_windows} windows)"
    )


def _tell(so_far: "PerplexityResult", num_windows: int) -> None:
    notice(f"window {so_far.num_windows} of {num_windows}: {so_far.perplexity:.4f} ± {so_far.standard_error:.4f}")


def read_text(path: Path) -> str:
    """Raises OptionError for what cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"{path} is not UTF-8 text (byte {error.start}); convert it, or pass another file") from error
