"""`isotherm perplexity`: how well a model predicts a text."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import isotherm
from isotherm.errors import OptionError
from isotherm.evaluation import perplexity as evaluation
from isotherm.evaluation.perplexity import PerplexityResult


def perplexity(
    model: Annotated[str, typer.Argument(help="Name or path of the model.")],
    file: Annotated[Path, typer.Option("--file", "-f", help="Text to score, UTF-8.")],
    ctx: Annotated[int, typer.Option("--ctx", "-c", help="Tokens of a window; its second half is scored.")] = 512,
    chunks: Annotated[int, typer.Option("--chunks", help="Windows to score, from the start of the text.")] = 16,
    threads: Annotated[int | None, typer.Option("--threads", "-t", help="Default: the physical cores.")] = None,
    backend: Annotated[str, typer.Option("--backend", help="cpu, or reference: float32, exact and slow.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """How well a model predicts a text, by llama.cpp's rule: lower is better."""
    text = _read_text(file)
    with isotherm.load(model, context_tokens=ctx, threads=threads, backend=backend) as generator:
        result = evaluation.perplexity(
            generator, text, window_tokens=ctx, num_windows=chunks, on_window=_print_progress
        )
    if result.num_windows < chunks:
        print(f"the text holds {result.num_windows} windows of {ctx} tokens, not {chunks}", file=sys.stderr)
    if as_json:
        print(json.dumps({"model": model, **asdict(result)}))
    else:
        print(
            f"perplexity {result.perplexity:.4f} ± {result.standard_error:.4f} "
            f"({result.num_tokens} tokens of {result.num_windows} windows)"
        )


def _print_progress(so_far: PerplexityResult, num_windows: int) -> None:
    line = f"window {so_far.num_windows} of {num_windows}: {so_far.perplexity:.4f} ± {so_far.standard_error:.4f}"
    print(line, file=sys.stderr, flush=True)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, or pass another file with -f"
        ) from error
