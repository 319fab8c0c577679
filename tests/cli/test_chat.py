"""`isotherm chat`: a scripted person talks with a scripted model."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from fake_model import FakeModel, contents

from isotherm.cli import main
from isotherm.cli.chat import Entered, Session, read_message, talk
from isotherm.cli.saved_chat import CHAT_SETTINGS
from isotherm.cli.settings import Settings
from isotherm.errors import ContextOverflow, TemplateError

Capture = pytest.CaptureFixture[str]
Line = str | BaseException


def _person(lines: Sequence[Line]) -> Callable[[str], str]:
    """Says these lines, then hangs up; an exception is what the person did instead."""
    rest = list(lines)

    def ask(_prompt: str) -> str:
        line = rest.pop(0) if rest else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    return ask


def _chat(model: FakeModel, *lines: Line, system: str | None = None) -> Session:
    session = Session(model, "fake", Settings(), system)  # type: ignore[arg-type]
    talk(session, _person(lines))
    return session


def test_conversation_grows(fake: FakeModel, capsys: Capture) -> None:
    fake.answers = (("One",), ("Two",))
    session = _chat(fake, "first", "", "  ", "second", system="Be brief.")
    assert contents(fake.asked[0].prompt) == [("system", "Be brief."), ("user", "first")]
    assert contents(fake.asked[1].prompt) == [
        ("system", "Be brief."),
        ("user", "first"),
        ("assistant", "One"),
        ("user", "second"),
    ]
    assert [turn.content for turn in session.turns] == ["first", "One", "second", "Two"]
    assert capsys.readouterr() == ("One\nTwo\n", "")


def test_ctrl_c_stops_the_answer_only(fake: FakeModel, capsys: Capture) -> None:
    fake.answers = (("One ", KeyboardInterrupt()), ("Two",))
    session = _chat(fake, "first", "second")
    assert [turn.content for turn in session.turns] == ["first", "One ", "second", "Two"]
    assert fake.closed_streams == 2
    assert capsys.readouterr() == ("One Two\n", "\n")


def test_answer_stopped_before_its_first_word_never_was(fake: FakeModel) -> None:
    fake.answers = ((KeyboardInterrupt(),), ("Two",))
    _chat(fake, "first", "second")
    assert contents(fake.asked[1].prompt) == [("user", "second")]


def test_second_ctrl_c_at_the_prompt_ends(fake: FakeModel, capsys: Capture) -> None:
    _chat(fake, KeyboardInterrupt(), "still here", KeyboardInterrupt(), KeyboardInterrupt(), "never said")
    assert [contents(asked.prompt) for asked in fake.asked] == [[("user", "still here")]]
    assert capsys.readouterr().err.count("Ctrl-C again") == 2


def test_bye_ends(fake: FakeModel) -> None:
    _chat(fake, "/bye", "never said")
    assert fake.asked == []


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (['"""one', "two", 'three"""'], "one\ntwo\nthree"),
        (['"""', "one", "", "two", '"""'], "one\n\ntwo"),
        (['"""/etc/hosts is what?"""'], "/etc/hosts is what?"),
        (['""""""'], ""),
    ],
)
def test_message_of_several_lines(lines: list[Line], text: str) -> None:
    assert read_message(_person(lines)) == Entered(text, is_quoted=True)


def test_unfinished_message_is_not_sent(fake: FakeModel) -> None:
    _chat(fake, '"""one', "two")
    _chat(fake, '"""one', KeyboardInterrupt(), "after")
    assert [contents(asked.prompt) for asked in fake.asked] == [[("user", "after")]]


def test_quoted_message_may_look_like_a_command(fake: FakeModel) -> None:
    _chat(fake, '"""/clear"""')
    assert contents(fake.asked[0].prompt) == [("user", "/clear")]


def test_overflow_is_told_with_numbers_and_the_way_out(fake: FakeModel, capsys: Capture) -> None:
    fake.answers = (("One",), (ContextOverflow("full", num_tokens=140, context_tokens=128),), ("Three",))
    session = _chat(fake, "first", "second", "/clear", "third")
    error = capsys.readouterr().err.splitlines()[0]
    assert error.startswith("error: ")
    assert all(part in error for part in ("140", "128", "/clear", "--ctx"))
    assert [turn.content for turn in session.turns] == ["third", "Three"]


def test_other_errors_leave_the_conversation_usable(fake: FakeModel, capsys: Capture) -> None:
    fake.answers = ((TemplateError("no system role"),), ("Two",))
    session = _chat(fake, "first", "second")
    assert capsys.readouterr() == ("Two\n", "error: no system role\n")
    assert [turn.content for turn in session.turns] == ["second", "Two"]


def test_cut_answer_is_told(fake: FakeModel, capsys: Capture) -> None:
    fake.finish_reason, fake.context_tokens = "length", 12
    _chat(fake, "first")
    assert "context of 12 tokens is full; /clear" in capsys.readouterr().err


@pytest.mark.parametrize("name", CHAT_SETTINGS)
def test_set_changes_every_setting(fake: FakeModel, name: str) -> None:
    session = _chat(fake, f"/set {name} 1", "Hi")
    assert getattr(session.settings, name) == 1
    asked = fake.asked[0]
    assert (asked.max_tokens if name == "max_tokens" else getattr(asked.sampling, name)) == 1


def test_set_system_and_verbose(fake: FakeModel, capsys: Capture) -> None:
    session = _chat(fake, "/set system Be  brief.", "/set verbose on", "Hi", "/set system none", "/set verbose off")
    assert contents(fake.asked[0].prompt)[0] == ("system", "Be  brief.")
    assert "eval rate" in capsys.readouterr().err
    assert (session.system, session.verbose) == (None, False)


def test_set_alone_shows_all(fake: FakeModel, capsys: Capture) -> None:
    _chat(fake, "/set")
    shown = dict(line.split(" ", 1) for line in capsys.readouterr().err.splitlines())
    assert set(shown) == {*CHAT_SETTINGS, "system", "verbose"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/set temperature hot", "temperature is 'hot'; it must be a number from 0 to 100"),
        ("/set temperature", "needs a value"),
        ("/set threads 4", "known: temperature"),
        ("/set verbose maybe", "verbose on|off"),
        ("/save", "needs the name of a file"),
        ("/load", "needs the name of a file"),
        ("/load /no/such/file", "there is no file"),
        ("/stop", "there is no /stop; /help lists"),
        ("/usr/bin/env is what?", "quotes a message with /"),
        ("\ud800", "the message is not UTF-8"),
    ],
)
def test_slips_are_one_line_and_cost_nothing(fake: FakeModel, line: str, said: str, capsys: Capture) -> None:
    session = _chat(fake, line)
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert session.settings == Settings()
    assert fake.asked == []


def test_help_names_every_command(fake: FakeModel, capsys: Capture) -> None:
    from isotherm.cli.chat import COMMANDS

    _chat(fake, "/help")
    said = capsys.readouterr().err
    assert all(name in said for name in {*COMMANDS, "/bye"} - {"/help"})
    assert all(name in said for name in CHAT_SETTINGS)


def test_save_and_load_go_on_where_we_were(fake: FakeModel, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "my chat.json"
    before = _chat(fake, "Hi", "/set temperature 0.5", "/set system Be brief.", f"/save {file}")
    after = Session(fake, "another", Settings())  # type: ignore[arg-type]
    talk(after, _person([f"/load {file}"]))
    assert (after.turns, after.system, after.settings) == (before.turns, before.system, before.settings)
    assert "they were said with fake; another goes on" in capsys.readouterr().err


def test_damaged_file_changes_nothing(fake: FakeModel, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "chat.json"
    file.write_text('{"format": "isotherm-chat", "version": 1, "mess')
    session = _chat(fake, "Hi", f"/load {file}")
    assert [turn.content for turn in session.turns] == ["Hi", "Hello there"]
    assert capsys.readouterr().err.startswith(f"error: {file} is damaged")


def test_command_loads_talks_and_closes(fake: FakeModel, pipe_in: Callable[[bytes], None], capsys: Capture) -> None:
    pipe_in("Grüße\n/bye\n".encode())
    assert main(["chat", "m", "--system", "Be brief.", "--temperature", "0.5", "-n", "5"]) == 0
    assert contents(fake.asked[0].prompt) == [("system", "Be brief."), ("user", "Grüße")]
    assert (fake.asked[0].max_tokens, fake.asked[0].sampling.temperature) == (5, 0.5)
    assert capsys.readouterr() == ("Hello there\n", "")
    assert fake.is_closed


def test_model_without_template_points_to_run(fake: FakeModel, capsys: Capture) -> None:
    fake.has_chat_template = False
    assert main(["chat", "m"]) == 2
    assert "isotherm run --raw" in capsys.readouterr().err
