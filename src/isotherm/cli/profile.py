"""`isotherm profile`: which neurons of a model fire."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isotherm.cli.console import notice, print_json
from isotherm.cli.flags import JsonOption, ModelArgument, takes
from isotherm.cli.loading import loaded
from isotherm.cli.perplexity import read_text
from isotherm.cli.settings import Settings

if TYPE_CHECKING:
    from isotherm.sparsity.neuron_stats import NeuronStats
    from isotherm.sparsity.profile import Profiler
    from isotherm.sparsity.summary import Summary

_SAVE_S = 20.0  # between two times that what was counted goes to disk


@takes("threads", "cache_gib", "offline")
def profile(
    settings: Settings,
    model: ModelArgument,
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="Text to run, UTF-8.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="STATS", help="File for what is counted.", show_default=False),
    ],
    window: Annotated[int, typer.Option("--ctx", "-c", metavar="TOKENS", help="Tokens of a window.")] = 512,
    chunks: Annotated[int, typer.Option("--chunks", metavar="N", help="Windows, from the start of the text.")] = 64,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="DIR", help="Folder for pictures of it.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Runs a text and counts how often each neuron fires; goes on with STATS where it was cut short."""
    from isotherm.evaluation.windows import cut_windows
    from isotherm.formats.checkpoint import open_checkpoint
    from isotherm.sparsity.profile import Profiler
    from isotherm.sparsity.summary import summarise

    content = read_text(text)
    with (
        loaded(model, replace(settings, ctx=window, quality="exact", predictor=None, device="cpu")) as generator,
        open_checkpoint(generator.facts.path) as checkpoint,
    ):
        windows = [cut.token_ids for cut in cut_windows(generator, content, window, chunks)]
        if len(windows) < chunks:
            notice(f"the text holds {len(windows)} windows of {window} tokens, not {chunks}")
        profiler = Profiler(generator, checkpoint.tensors, checkpoint.identity)
        stats = _count(profiler, windows, out)
    if plot is not None:
        from isotherm.sparsity.plots import plot as draw

        notice(f"wrote {', '.join(str(path) for path in draw(stats, plot))}")
    summary = summarise(stats)
    if as_json:
        print_json({"model": stats.profiled.model, "num_tokens": stats.profiled.num_tokens, **asdict(summary)})
    else:
        _print(stats, summary)


def _count(profiler: "Profiler", windows: Sequence[Sequence[int]], out: Path) -> "NeuronStats":
    from isotherm.errors import StatsFileError
    from isotherm.sparsity.neuron_stats import load_stats
    from isotherm.sparsity.profile import profile as run

    stats = profiler.start(windows)
    if out.exists():
        try:
            before = load_stats(out)
        except StatsFileError as error:
            notice(f"{error}: starting anew")
        else:
            if replace(before.profiled, num_windows=0) == stats.profiled:
                stats = before
                notice(f"{out}: going on after {before.profiled.num_windows} of {len(windows)} windows")
            else:
                notice(f"{out} is of another model or text, and is written anew")
    saved_s = time.monotonic()

    def on_window(so_far: "NeuronStats") -> None:
        nonlocal saved_s
        if sys.stderr.isatty() or so_far.profiled.num_windows % 16 == 0:
            notice(f"window {so_far.profiled.num_windows} of {len(windows)}")
        if time.monotonic() - saved_s > _SAVE_S:
            so_far.save(out)
            saved_s = time.monotonic()

    stats = run(profiler, stats, windows, on_window)
    stats.save(out)
    return stats


def _print(stats: "NeuronStats", summary: "Summary") -> None:
    profiled = stats.profiled
    print(f"{profiled.model}, {profiled.activation.value}, {profiled.num_tokens} tokens\n")
    print("layer  active  never  zero codes   80 % of firings by   80 % of output by")
    for row in summary.layers:
        print(
            f"{row.layer:5}  {row.active:6.1%}  {row.never:5.1%}  {row.zero_codes:10.1%}"
            f"  {row.hot_firings:19.1%}  {row.hot_contributions:18.1%}"
        )
    print(
        f"  all  {summary.active:6.1%}  {'':5}  {'':10}  {summary.hot_firings:19.1%}  {summary.hot_contributions:18.1%}"
    )
