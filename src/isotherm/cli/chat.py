"""`isotherm chat MODEL`: a conversation at the terminal."""

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isotherm.cli.console import check_text, notice, write_text
from isotherm.cli.flags import ModelArgument, takes
from isotherm.cli.loading import loaded
from isotherm.cli.saved_chat import CHAT_SETTINGS, SavedChat, Turn, load_chat, save_chat
from isotherm.cli.settings import LOADING, SAMPLING, SETTINGS, Settings, value_text
from isotherm.cli.speeds import answer_facts, context_note
from isotherm.errors import ContextOverflow, IsothermError, OptionError

if TYPE_CHECKING:
    from isotherm.text import Message, TextGenerator

_PROMPT = ">>> "
_MORE_PROMPT = "... "
_QUOTES = '"""'
_CLEAR_HINT = "/clear starts a new conversation"

HELP = f"""\
/set            shows the settings
/set NAME VALUE sets one: {", ".join(CHAT_SETTINGS)},
                system TEXT (none: no system message), verbose on|off
/clear          forgets the conversation
/save FILE      writes the conversation to FILE
/load FILE      goes on with the conversation in FILE
/bye            ends the chat; so do Ctrl-D and Ctrl-C twice
{_QUOTES}             starts and ends a message of several lines, or one that begins with /
Ctrl-C stops an answer; what was said of it stays in the conversation."""


@takes("max_tokens", *SAMPLING, *LOADING)
def chat(
    settings: Settings,
    model: ModelArgument,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message of the conversation.", show_default=False)
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print counts and rates after each answer.", show_default=False)
    ] = False,
) -> None:
    """Talks with a model. /help lists what can be done."""
    if system is not None:
        check_text(system, "--system")
    with loaded(model, settings) as generator:
        if not generator.has_chat_template:
            raise OptionError(f"{model} has no chat template; `isotherm run --raw` continues a text with it")
        session = Session(generator, model, settings, system, verbose)
        if sys.stdin.isatty():
            _edit_lines()
            facts = generator.facts
            notice(f"{model} in {facts.load_s:.2f} s, context of {generator.context_tokens} tokens; /help for help")
        talk(session, _ask)


@dataclass
class Session:
    """A conversation as it grows."""

    generator: "TextGenerator"
    model: str
    settings: Settings
    system: str | None = None
    verbose: bool = False
    turns: list[Turn] = field(default_factory=list)

    def answer(self, question: str) -> None:
        """Prints the answer as it comes. Ctrl-C stops it; without one word of an answer the question is forgotten."""
        asked = Turn("user", question)
        pieces = self.generator.stream(
            self._messages(asked), max_tokens=self.settings.max_tokens, sampling=self.settings.sampling
        )
        said, finished = "", None
        with closing(pieces):
            try:
                for piece in pieces:
                    said += piece.text
                    finished = piece.answer
                    write_text(piece.text)
            except KeyboardInterrupt:
                notice("")
        if finished is not None and not said.endswith("\n"):
            write_text("\n")
        if finished is not None or said:
            self.turns += [asked, Turn("assistant", said)]
        if finished is not None:
            if note := context_note(self.generator, finished, _CLEAR_HINT):
                notice(note)
            if self.verbose:
                notice("\n".join(answer_facts(self.generator, finished, load_s=0.0).lines()))

    def _messages(self, asked: Turn) -> "list[Message]":
        turns = [*([Turn("system", self.system)] if self.system else []), *self.turns, asked]
        return [{"role": turn.role, "content": turn.content} for turn in turns]


def talk(session: Session, ask: Callable[[str], str]) -> None:
    """Message after message, until /bye, the end of the input or a second Ctrl-C at the prompt."""
    was_interrupted = False
    while True:
        try:
            message = read_message(ask)
            was_interrupted = False
            if message is None or message.text.split() == ["/bye"]:
                return
            _respond(session, message)
        except KeyboardInterrupt:
            notice("")
            if was_interrupted:
                return
            was_interrupted = True
            notice("Ctrl-C again, Ctrl-D or /bye ends the chat")
        except ContextOverflow as error:
            notice(
                f"error: the conversation needs {error.num_tokens} tokens, and the context holds "
                f"{error.context_tokens}; {_CLEAR_HINT}, a larger --ctx makes room"
            )
        except IsothermError as error:
            notice(f"error: {error}")


@dataclass(frozen=True)
class Entered:
    text: str
    is_quoted: bool


def read_message(ask: Callable[[str], str]) -> Entered | None:
    """One line, or several between triple quotes; None at the end of the input. Raises KeyboardInterrupt."""
    try:
        line = ask(_PROMPT)
        if not line.startswith(_QUOTES):
            return Entered(line.strip(), is_quoted=False)
        text = line.removeprefix(_QUOTES)
        while not text.endswith(_QUOTES):
            text += "\n" + ask(_MORE_PROMPT)
    except EOFError:
        return None
    return Entered(text.removesuffix(_QUOTES).strip("\n"), is_quoted=True)


def _respond(session: Session, message: Entered) -> None:
    if not message.text:
        return
    if message.is_quoted or not message.text.startswith("/"):
        session.answer(check_text(message.text, "the message"))
        return
    name, _, argument = message.text.partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        raise OptionError(f"there is no {name}; /help lists what there is, {_QUOTES} quotes a message with /")
    command(session, argument.strip())


def _help(_session: Session, _argument: str) -> None:
    notice(HELP)


def _set(session: Session, argument: str) -> None:
    name, _, text = argument.partition(" ")
    text = text.strip()
    if not name:
        for setting in CHAT_SETTINGS:
            notice(f"{setting} {value_text(getattr(session.settings, setting))}")
        notice(f"system {session.system or 'none'}")
        notice(f"verbose {'on' if session.verbose else 'off'}")
    elif not text:
        raise OptionError(f"/set {name} needs a value; /set alone shows what there is")
    elif name == "system":
        session.system = None if text == "none" else check_text(text, "system")
    elif name == "verbose" and text in ("on", "off"):
        session.verbose = text == "on"
    elif name in CHAT_SETTINGS:
        session.settings = session.settings.changed({name: SETTINGS[name].parse(text, name)})
    else:
        raise OptionError(f"/set {argument}; known: {', '.join(CHAT_SETTINGS)}, system TEXT, verbose on|off")


def _clear(session: Session, _argument: str) -> None:
    session.turns.clear()
    notice("the conversation is forgotten")


def _save(session: Session, argument: str) -> None:
    values = tuple((name, getattr(session.settings, name)) for name in CHAT_SETTINGS)
    path = _path(argument, "/save")
    save_chat(path, SavedChat(session.model, session.system, values, tuple(session.turns)))
    notice(f"{len(session.turns)} messages saved in {path}")


def _load(session: Session, argument: str) -> None:
    path = _path(argument, "/load")
    saved = load_chat(path)
    session.settings = session.settings.changed(dict(saved.settings))
    session.system = saved.system
    session.turns = list(saved.turns)
    notice(f"going on after {len(session.turns)} messages of {path}")
    if saved.model != session.model:
        notice(f"they were said with {saved.model}; {session.model} goes on")


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise OptionError(f"{command} needs the name of a file")
    return Path(argument).expanduser()


COMMANDS: dict[str, Callable[[Session, str], None]] = {
    "/help": _help,
    "/set": _set,
    "/clear": _clear,
    "/save": _save,
    "/load": _load,
}


def _ask(prompt: str) -> str:
    """A line. The prompt goes to the terminal only: stdout may be a file, stdin a pipe."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input(prompt)
    if sys.stdin.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
    return input()


def _edit_lines() -> None:
    """Arrow keys and the lines of this chat, where Python has them; they are never written to a file."""
    try:
        import readline  # noqa: F401  # to import it is to use it
    except ImportError:
        notice("this Python has no readline: no arrow keys")
