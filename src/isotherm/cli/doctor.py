"""`isotherm doctor`: what this machine offers, whether the caches are sound, and what slows things down here."""

from dataclasses import asdict
from typing import Annotated

import typer

from isotherm.cli.console import print_json
from isotherm.cli.flags import JsonOption


def doctor(
    report: Annotated[
        bool,
        typer.Option("--report", help="Print one Markdown block for an issue, without names.", show_default=False),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measures this machine, verifies the packed models, and says what slows things down here."""
    from isotherm.cli import diagnosis

    found = diagnosis.examine()
    if as_json:
        facts = asdict(found) | {"warnings": diagnosis.warnings(found)}
        print_json(diagnosis.without_names_in(facts) if report else facts)
    elif report:
        text = diagnosis.without_names(diagnosis.to_text(found, with_models=False))
        print(f"### isotherm doctor\n\n```text\n{text}\n```")
    else:
        print(diagnosis.to_text(found, with_models=True))
