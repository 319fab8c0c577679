"""`isotherm run MODEL [PROMPT]`: one answer."""

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from isotherm.cli.console import check_text, notice, print_json, read_stdin, write_text
from isotherm.cli.flags import JsonOption, ModelArgument, takes
from isotherm.cli.loading import loaded
from isotherm.cli.settings import LOADING, SAMPLING, Settings
from isotherm.cli.speeds import answer_facts, context_note
from isotherm.errors import OptionError

if TYPE_CHECKING:
    from isotherm.text import Message


@takes("max_tokens", *SAMPLING, *LOADING)
def run(
    settings: Settings,
    model: ModelArgument,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What is piped in joins it.", show_default=False)
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message before the prompt.", show_default=False)
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End the answer before TEXT; repeatable.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Give the text as it is, without chat template.", show_default=False)
    ] = False,
    as_json: JsonOption = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print counts, durations and rates on stderr.", show_default=False)
    ] = False,
) -> None:
    """Answers one prompt, as it comes."""
    if raw and system is not None:
        raise OptionError("--system needs the chat template, which --raw leaves out; put the text into the prompt")
    request = _with_system(join_prompt(prompt, read_stdin(), raw=raw), system)
    with loaded(model, settings) as generator:
        pieces = generator.stream(
            request, max_tokens=settings.max_tokens, stop=stop or (), raw=raw, sampling=settings.sampling
        )
        answer = None
        with closing(pieces):
            for piece in pieces:
                answer = piece.answer
                if not as_json:
                    write_text(piece.text)
        assert answer is not None, "the last piece carries the answer"
        facts = answer_facts(generator, answer, load_s=generator.facts.load_s)
        if as_json:
            print_json(facts.as_json())
        elif not answer.text.endswith("\n"):
            write_text("\n")
        if note := context_note(generator, answer, "a larger --ctx makes room"):
            notice(note)
        if verbose:
            notice("\n".join(facts.lines()))


def join_prompt(prompt: str | None, piped: str | None, *, raw: bool) -> str:
    """PROMPT, an empty line, what was piped in; as it is where `raw`, else without line ends around it."""
    parts = [prompt and check_text(prompt, "PROMPT"), piped if raw or piped is None else piped.strip("\r\n")]
    text = "\n\n".join(part for part in parts if part)
    if not text:
        raise OptionError("there is no prompt; give PROMPT, pipe a text in, or talk with `isotherm chat`")
    return text


def _with_system(text: str, system: str | None) -> "str | Sequence[Message]":
    if system is None:
        return text
    system = check_text(system, "--system")
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]
