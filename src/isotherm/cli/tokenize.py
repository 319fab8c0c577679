"""`isotherm tokenize MODEL [TEXT]`: how a model sees a text."""

from typing import Annotated

import typer

from isotherm.cli.console import check_text, print_json, print_table, read_stdin
from isotherm.cli.flags import JsonOption, ModelArgument
from isotherm.cli.loading import path_on_disk
from isotherm.errors import OptionError


def tokenize(
    model: ModelArgument,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="By default what is piped in.", show_default=False)
    ] = None,
    special: Annotated[
        bool, typer.Option("--special", help="Add BOS and EOS where the model asks for them.", show_default=False)
    ] = False,
    count: Annotated[bool, typer.Option("--count", help="Print only how many there are.", show_default=False)] = False,
    as_json: JsonOption = False,
) -> None:
    """Prints the tokens of a text: id and piece. Control tokens may be spelled out, as in `run --raw`."""
    from isotherm.formats.checkpoint import open_checkpoint
    from isotherm.tokenization.tokenizer import build_tokenizer

    source = read_stdin() if text is None else check_text(text, "TEXT")
    if source is None:
        raise OptionError("there is no text; give TEXT, or pipe one in")
    with open_checkpoint(path_on_disk(model)) as checkpoint:
        tokenizer = build_tokenizer(checkpoint.tokenizer)
    ids = tokenizer.encode(source, add_special=special, parse_special=True)
    tokens = [(token, tokenizer.token_bytes(token)) for token in ids]
    if count:
        print_json({"num_tokens": len(ids)}) if as_json else print(len(ids))
    elif as_json:
        print_json([{"id": token, "piece": piece.decode(errors="replace")} for token, piece in tokens])
    else:
        print_table(("ID", "PIECE"), [(str(token), _quoted(piece)) for token, piece in tokens])


def _quoted(piece: bytes) -> str:
    """A part of a character has no text of its own: its bytes, then."""
    try:
        return repr(piece.decode())
    except UnicodeDecodeError:
        return repr(piece)
