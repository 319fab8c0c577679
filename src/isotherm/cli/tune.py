"""`isotherm tune`: chooses the fastest lossy rule within a budget of quality."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isotherm.cli.console import TerminalReporter, notice, print_json, print_table
from isotherm.cli.flags import JsonOption, ModelArgument, takes
from isotherm.cli.loading import loaded
from isotherm.cli.perplexity import read_text
from isotherm.cli.settings import Settings
from isotherm.errors import OptionError
from isotherm.load_options import EXACT, parse_budget

if TYPE_CHECKING:
    from isotherm.load_options import Budget
    from isotherm.quality.choice import LayerTrims
    from isotherm.quality.tuning import Plan, Tuned
    from isotherm.text import TextGenerator

_CONTEXT_TOKENS = 512  # of a window


@takes("threads", "quality", "cache_gib", "offline")
def tune(
    settings: Settings,
    model: ModelArgument,
    text: Annotated[
        Path, typer.Option("--text", metavar="FILE", help="Text to calibrate on, UTF-8.", show_default=False)
    ],
    held_out: Annotated[
        Path | None,
        typer.Option("--held-out", metavar="FILE", help="Text to measure on; by default the last quarter of --text."),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option("--rule", metavar="NAME", help="Try this rule alone; may be given again. By default all."),
    ] = None,
    items: Annotated[
        Path | None,
        typer.Option("--items", metavar="FILE", help="Multiple choice to score too, as `isotherm eval` does."),
    ] = None,
    chunks: Annotated[int, typer.Option("--chunks", metavar="N", help="Windows to measure on.")] = 4,
    as_json: JsonOption = False,
) -> None:
    """Finds the fastest lossy rule within the budget that --quality names, and keeps it for this model."""
    budget = parse_budget(settings.quality)
    if budget is None:
        raise OptionError("--quality names the budget to tune for, such as kl=0.01 or ppl=+1%")
    plan = _plan(budget, text, held_out, _Options(rule, items, chunks))
    settings = replace(settings, quality=EXACT, predictor=None, device="cpu", ctx=_CONTEXT_TOKENS)
    path, tuned = _tune(plan, model, settings)
    if as_json:
        print_json({"file": str(path), **_as_json(tuned)})
        return
    _print(tuned)
    notice(f"kept in {path}; `isotherm run {model} --quality {budget}` uses it")


@dataclass(frozen=True)
class _Options:
    rules: list[str] | None
    items: Path | None
    num_windows: int


def _plan(budget: "Budget", text: Path, held_out: Path | None, options: _Options) -> "Plan":
    from isotherm.evaluation.multiple_choice import read_items
    from isotherm.quality.rules import Rule
    from isotherm.quality.tuning import Plan

    known = {rule.value: rule for rule in Rule}
    for name in options.rules or ():
        if name not in known:
            raise OptionError(f"rule {name!r}; known: {', '.join(known)}")
    content = read_text(text)
    cut = len(content) * 3 // 4
    measured = content[cut:] if held_out is None else read_text(held_out)
    return Plan(
        budget=budget,
        rules=tuple(known[name] for name in options.rules or known),
        text=content[:cut] if held_out is None else content,
        held_out=measured,
        num_windows=options.num_windows,
        items=() if options.items is None else tuple(read_items(options.items)),
    )


def _tune(plan: "Plan", model: str, settings: Settings) -> tuple[Path, "Tuned"]:
    """What was chosen, and the file that keeps it."""
    from isotherm.formats.checkpoint import open_checkpoint
    from isotherm.formats.folders import cache_dir
    from isotherm.formats.names import resolve
    from isotherm.models import FAMILIES
    from isotherm.quality.choice import Choice, choice_path
    from isotherm.quality.tuning import tune as run

    with TerminalReporter() as reporter:
        source = resolve(model, reporter, offline=settings.offline)
    with tempfile.TemporaryDirectory() as folder, open_checkpoint(source) as checkpoint:

        @contextmanager
        def load(layers: Sequence["LayerTrims"] | None) -> Iterator["TextGenerator"]:
            file = Path(folder) / "candidate.npz"
            if layers is not None:
                Choice("candidate", "candidate", tuple(layers), None).save(file)
            quality = EXACT if layers is None else str(file)
            with loaded(str(source), replace(settings, quality=quality)) as generator:
                yield generator

        recorded = FAMILIES[checkpoint.config.family](checkpoint.config)
        tuned = run(plan, load, recorded, checkpoint.tensors, notice)
        path = choice_path(cache_dir(), checkpoint.identity, tuned.choice.budget)
    tuned.choice.save(path)
    return path, tuned


def _print(tuned: "Tuned") -> None:
    rows = []
    for candidate in tuned.candidates:
        measured = candidate.measured
        speed = "" if measured.speed is None else f"{measured.speed:.2f}x"
        rows.append(
            (
                candidate.rule.value,
                f"{candidate.share:.1%}",
                f"{measured.skipped:.1%}",
                f"{measured.kl:.4f} ± {measured.kl_error:.4f}",
                f"{measured.perplexity:.4f}",
                speed,
            )
        )
    print_table(("RULE", "NEURONS LEFT OUT", "WEIGHTS SKIPPED", "KL", "PERPLEXITY", "DECODE"), rows)
    choice = tuned.choice
    if choice.rule is None or choice.measured is None:
        print(f"{choice.budget}: nothing is faster than the exact model here, which is what it stands for now")
        return
    print(f"{choice.budget}: {choice.rule}, {choice.measured.speed:.2f}x in decode")
    if choice.measured.accuracy is not None and choice.measured.exact_accuracy is not None:
        print(f"multiple choice: {choice.measured.accuracy:.1%} right, {choice.measured.exact_accuracy:.1%} exact")


def _as_json(tuned: "Tuned") -> dict[str, object]:
    return {
        "budget": tuned.choice.budget,
        "rule": tuned.choice.rule,
        "measured": None if tuned.choice.measured is None else asdict(tuned.choice.measured),
        "candidates": [
            {"rule": candidate.rule.value, "shares": candidate.shares, **asdict(candidate.measured)}
            for candidate in tuned.candidates
        ],
    }
