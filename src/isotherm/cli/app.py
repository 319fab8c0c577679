"""Puts the commands together."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from isotherm.cli.bench import bench
from isotherm.cli.cache import clear_packed, list_packed
from isotherm.cli.chat import chat
from isotherm.cli.config import config
from isotherm.cli.doctor import doctor
from isotherm.cli.errors import DEBUG_VARIABLE, USAGE
from isotherm.cli.eval import evaluate
from isotherm.cli.flags import SETTINGS_NOTE
from isotherm.cli.list_models import list_models
from isotherm.cli.perplexity import perplexity
from isotherm.cli.profile import profile
from isotherm.cli.ps import ps
from isotherm.cli.pull import pull
from isotherm.cli.rm import rm
from isotherm.cli.run import run
from isotherm.cli.serve import serve
from isotherm.cli.show import show
from isotherm.cli.stop import stop
from isotherm.cli.tokenize import tokenize
from isotherm.cli.train_predictor import train_predictor
from isotherm.cli.tune import tune
from isotherm.cli.version import version_text

COMMANDS: dict[str, Callable[..., None]] = {
    "run": run,
    "chat": chat,
    "serve": serve,
    "ps": ps,
    "stop": stop,
    "pull": pull,
    "list": list_models,
    "show": show,
    "rm": rm,
    "tokenize": tokenize,
    "bench": bench,
    "perplexity": perplexity,
    "eval": evaluate,
    "profile": profile,
    "train-predictor": train_predictor,
    "tune": tune,
    "doctor": doctor,
    "config": config,
}
CACHE_COMMANDS: dict[str, Callable[..., None]] = {"list": list_packed, "clear": clear_packed}
ALSO_CALLED = {"list": "ls"}

_MAX_HELP_WIDTH = 100


def run_app(arguments: Sequence[str] | None = None) -> object:
    """An exit code, or None for 0. What goes wrong is raised, for `exit_code_of`."""
    return build_app()(args=arguments, prog_name="isotherm", standalone_mode=False)


def build_app() -> typer.Typer:
    context = {"help_option_names": ["-h", "--help"], "max_content_width": _MAX_HELP_WIDTH}
    # Plain help: the same in a pipe and on a terminal, and a second quicker than a drawn one on a slow machine.
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=context)
    app.callback(invoke_without_command=True, epilog=SETTINGS_NOTE)(_isotherm)
    for name, command in COMMANDS.items():
        app.command(name)(command)
        if name in ALSO_CALLED:
            app.command(ALSO_CALLED[name], hidden=True)(command)
    cache_app = typer.Typer(rich_markup_mode=None, help="Lists or clears the packed models kept for quick starts.")
    for name, command in CACHE_COMMANDS.items():
        cache_app.command(name)(command)
    app.add_typer(cache_app, name="cache")
    return app


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(version_text())
        raise typer.Exit


def _set_debug(is_wanted: bool) -> None:
    if is_wanted:
        os.environ[DEBUG_VARIABLE] = "1"


def _isotherm(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print version, commit and instruction set.",
            callback=_print_version,
            is_eager=True,
            show_default=False,
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error came from.", callback=_set_debug, show_default=False)
    ] = False,
) -> None:
    """Runs language models on this machine."""
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(USAGE)
