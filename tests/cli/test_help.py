"""The command line as a contract: a change of any command, option or text shows up here as a diff.

`python tests/cli/test_help.py > tests/cli/command_line.txt` (with src on PYTHONPATH) accepts a change. The text is
made of the parameters, not of what `--help` prints, which each version of typer lays out in its own way.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from isotherm.cli import main
from isotherm.cli.app import CACHE_COMMANDS, COMMANDS, build_app
from isotherm.cli.chat import COMMANDS as CHAT_COMMANDS
from isotherm.cli.saved_chat import CHAT_SETTINGS
from isotherm.cli.settings import SETTINGS

SNAPSHOT = Path(__file__).with_name("command_line.txt")
ALL = [[name] for name in COMMANDS] + [["cache", name] for name in CACHE_COMMANDS]


def described() -> Iterator[str]:
    root: Any = typer.main.get_command(build_app())
    for path in ([], *ALL):
        command = root
        for name in path:
            command = command.commands[name]
        yield " ".join(["isotherm", *path])
        yield f"    {command.help}"
        for parameter in command.params:
            names = " ".join([*parameter.opts, *parameter.secondary_opts])
            shown = parameter.metavar or "" if parameter.param_type_name == "option" else ""
            label = parameter.metavar if parameter.param_type_name == "argument" else f"{names} {shown}".rstrip()
            yield f"    {label}: {getattr(parameter, 'help', '') or ''}"
        yield ""


def test_command_line_is_the_snapshot() -> None:
    assert "\n".join(described()) + "\n" == SNAPSHOT.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [[], *ALL, ["cache"]], ids=" ".join)
def test_every_help_is_plain_and_fits(path: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*path, "--help"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith(f"Usage: {' '.join(['isotherm', *path])} ")
    assert captured.out.isascii()
    assert max(map(len, captured.out.splitlines())) <= 100


def test_every_parameter_has_help() -> None:
    silent = [line for line in described() if line.endswith(": ")]
    assert silent == []


def test_pages_name_every_command_and_setting() -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "cli.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"`{name}" not in page] == []
    assert [name for name in SETTINGS if f"`{name}`" not in page] == []
    chat_page = (docs / "chat.md").read_text(encoding="utf-8")
    assert [name for name in (*CHAT_COMMANDS, *CHAT_SETTINGS) if f"`{name}" not in chat_page] == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert main(["--show-completion", shell]) == 0
    assert "_ISOTHERM_COMPLETE" in capsys.readouterr().out


def test_completion_offers_commands_and_models(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_ISOTHERM_COMPLETE", "complete_bash")
    for typed, offered in (("isotherm per", "perplexity"), ("isotherm run smol", "smollm2")):
        monkeypatch.setenv("COMP_WORDS", typed)
        monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
        assert main([]) == 0
        assert capsys.readouterr().out.split() == [offered]


if __name__ == "__main__":
    sys.stdout.write("\n".join(described()) + "\n")
