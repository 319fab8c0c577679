"""`isotherm eval`: how many questions of multiple choice a model answers right."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isotherm.cli.console import notice, print_json
from isotherm.cli.flags import JsonOption, ModelArgument, takes
from isotherm.cli.loading import loaded
from isotherm.cli.settings import Settings

if TYPE_CHECKING:
    from isotherm.evaluation.multiple_choice import MultipleChoiceResult

_ITEMS_PER_NOTICE = 10


@takes("ctx", "kv", "threads", "backend", "device", "vram", "sparse", "quality", "predictor", "cache_gib", "offline")
def evaluate(
    settings: Settings,
    model: ModelArgument,
    file: Annotated[
        Path,
        typer.Option("--file", "-f", metavar="ITEMS", help="Items to answer, JSON Lines in UTF-8.", show_default=False),
    ],
    num_items: Annotated[
        int | None,
        typer.Option(
            "--items", metavar="N", help="Items, from the start of the file; by default all.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Says how many questions of multiple choice a model answers right, HellaSwag say; higher is better."""
    from isotherm.evaluation.multiple_choice import multiple_choice, read_items

    items = read_items(file, num_items=num_items)
    if num_items is not None and len(items) < num_items:
        notice(f"{file} holds {len(items)} items, not {num_items}")
    with loaded(model, settings) as generator:
        result = multiple_choice(generator, items, on_item=_tell)
        name = generator.facts.name
    if as_json:
        print_json({"model": name, "backend": settings.backend, **asdict(result)})
        return
    print(
        f"accuracy {_percent(result.acc_norm)} % ± {_percent(result.acc_norm_standard_error)} "
        f"({result.num_items} items; per character), {_percent(result.acc)} % by plain sum"
    )


def _tell(so_far: "MultipleChoiceResult", num_items: int) -> None:
    if so_far.num_items % _ITEMS_PER_NOTICE == 0 or so_far.num_items == num_items:
        accuracy, error = _percent(so_far.acc_norm), _percent(so_far.acc_norm_standard_error)
        notice(f"item {so_far.num_items} of {num_items}: {accuracy} % ± {error}")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
