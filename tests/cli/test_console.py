"""What a person at a terminal sees, and what a pipe does not."""

import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isotherm.cli.console import TerminalReporter, print_table, printable

Capture = pytest.CaptureFixture[str]

_COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")


@given(st.text())
def test_printable_changes_controls_only(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text)
    for before, after in zip(text, shown, strict=True):
        is_control = before not in "\t\n" and (before < " " or "\x7f" <= before <= "\x9f")
        assert after == ("\ufffd" if is_control else before)


def test_a_cell_stays_in_its_row(capsys: Capture) -> None:
    print_table(("NAME", "SIZE"), [("a\nb\x1b[2J", "1"), ("long name", "2")])
    assert capsys.readouterr().out.splitlines() == ["NAME       SIZE", "a\ufffdb\ufffd[2J    1", "long name  2"]


def test_no_bar_in_a_pipe(capsys: Capture) -> None:
    with TerminalReporter() as reporter:
        reporter.notice("fetching")
        reporter.progress(1, 10)
    assert capsys.readouterr() == ("", "fetching\n")


@pytest.mark.parametrize("no_color", [False, True])
def test_bar_on_a_terminal(no_color: bool, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    with TerminalReporter() as reporter:
        reporter.progress(0, None)
        reporter.progress(3_000_000, 10_000_000)
        reporter.notice("connection lost")
        reporter.progress(10_000_000, 10_000_000)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "3.0/10.0 MB" in captured.err
    assert "connection lost" in captured.err
    assert bool(_COLOUR.search(captured.err)) is not no_color
    assert captured.err.rindex("\x1b[?25h") > captured.err.rindex("\x1b[?25l"), "the cursor is shown again"
