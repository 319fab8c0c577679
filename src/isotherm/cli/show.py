"""`isotherm show MODEL`: what a model file says of itself. Reads the header only, and fetches nothing."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from isotherm.cli.console import print_json, print_table, write_text
from isotherm.cli.flags import JsonOption, ModelArgument
from isotherm.cli.loading import path_on_disk
from isotherm.errors import OptionError

if TYPE_CHECKING:
    from isotherm.formats.checkpoint import Checkpoint


def show(
    model: ModelArgument,
    template: Annotated[
        bool, typer.Option("--template", help="Print the chat template instead.", show_default=False)
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Shows what a model on this disk is: family, size, quantisation, context, licence."""
    from isotherm.formats.checkpoint import open_checkpoint

    with open_checkpoint(path_on_disk(model)) as checkpoint:
        if template:
            if checkpoint.tokenizer.chat_template is None:
                raise OptionError(f"{model} has no chat template; `isotherm run` gives it the prompt as it is")
            write_text(checkpoint.tokenizer.chat_template + "\n")
        elif as_json:
            print_json(_facts(checkpoint) | {"metadata": dict(checkpoint.metadata)})
        else:
            print_table(("FACT", "VALUE"), [(name, _text(name, fact)) for name, fact in _facts(checkpoint).items()])


def _facts(checkpoint: "Checkpoint") -> dict[str, Any]:
    config = checkpoint.config
    return {
        "name": config.name,
        "path": str(checkpoint.path),
        "family": config.family,
        "num_parameters": checkpoint.num_parameters,
        "num_active_parameters": checkpoint.num_active_parameters,
        "quantization": checkpoint.quantization,
        "weights_bytes": checkpoint.num_bytes,
        "context_tokens": config.context_tokens,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_size": config.ffn_size,
        "num_experts": config.experts and config.experts.num_experts,
        "num_experts_used": config.experts and config.experts.num_used,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "sliding_window": config.sliding_window,
        "tokenizer": f"{checkpoint.tokenizer.model} ({checkpoint.tokenizer.pre})",
        "has_chat_template": checkpoint.tokenizer.chat_template is not None,
        "licence": checkpoint.metadata.get("general.license"),
    }


def _text(name: str, fact: Any) -> str:
    from isotherm.formats.fetching import size_text

    if fact is None:
        return "not stated" if name == "licence" else "none"
    if isinstance(fact, bool):
        return "yes" if fact else "no"
    if name.endswith("_bytes"):
        return size_text(fact)
    if name in ("num_parameters", "num_active_parameters"):
        return f"{fact / 1e9:.2f} billion" if fact >= 1e9 else f"{fact / 1e6:.1f} million"
    return str(fact)
