"""The command line: one file per command. Nothing heavy is imported before a command needs it."""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `isotherm ARGUMENTS` (by default the process's own) and returns its exit code."""
    try:
        from isotherm.cli.app import run_app
        from isotherm.cli.errors import exit_code_of
    except KeyboardInterrupt:  # before there was anything to end
        return 130
    return exit_code_of(lambda: run_app(arguments))
