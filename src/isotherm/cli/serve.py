"""`isotherm serve [MODEL...]`: the HTTP server."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isotherm.cli.console import TerminalReporter
from isotherm.cli.flags import complete_model, takes
from isotherm.cli.loading import path_on_disk
from isotherm.cli.settings import LOADING, SAMPLING, SERVING, Settings
from isotherm.errors import ModelNotFound

if TYPE_CHECKING:
    from isotherm.server.model_card import ModelCard
    from isotherm.text import TextGenerator


@takes(*SERVING, *SAMPLING, *LOADING)
def serve(
    settings: Settings,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL...]",
            help="Models to serve, the first loaded at once; by default every model on this disk, each at first use.",
            autocompletion=complete_model,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Answers the clients of OpenAI, Anthropic and Ollama over HTTP."""
    from isotherm.formats.names import local_models
    from isotherm.server.gate import Policy
    from isotherm.server.run import Binding, serve
    from isotherm.server.shelf import FOREVER_S, Shelf, Slot

    binding = Binding(
        settings.host,
        settings.port,
        _path(settings.tls_cert),
        _path(settings.tls_key),
        settings.shutdown_s,
    )
    policy = Policy(
        api_keys=(settings.api_key,) if settings.api_key else (),
        origins=tuple(origin.strip() for origin in (settings.allow_origin or "").split(",") if origin.strip()),
        max_body_bytes=int(settings.max_body_mib * 2**20),
        client_s=settings.client_s,
        log_prompts=settings.log_prompts,
    )
    named = [Slot(_served_name(name), name, FOREVER_S, partial(_card, name)) for name in models or ()]
    slots = named or [
        Slot(model.name, model.name, settings.keep_alive_s, partial(_card, model.name)) for model in local_models()
    ]

    if not slots:
        raise ModelNotFound("no model is on this disk; `isotherm serve smollm2` fetches one and serves it")

    def load(source: str) -> "TextGenerator":
        import isotherm

        with TerminalReporter() as reporter:
            return isotherm.load(source, options=settings.serving_options, reporter=reporter)

    def shelf() -> Shelf:
        return Shelf(load, slots, max_waiting=settings.max_waiting)

    serve(
        shelf,
        named[0].name if named else None,
        binding,
        policy,
        settings.sampling,
        has_page=settings.page,
        log_json=settings.log_json,
    )


def _card(source: str) -> "ModelCard":
    from isotherm.formats.checkpoint import open_checkpoint
    from isotherm.server.model_card import ModelCard

    with open_checkpoint(path_on_disk(source)) as checkpoint:
        return ModelCard(
            family=checkpoint.config.family,
            num_parameters=checkpoint.num_parameters,
            quantization=checkpoint.quantization,
            size_bytes=checkpoint.num_bytes,
            digest=checkpoint.identity,
            modified_at=checkpoint.path.stat().st_mtime,
            chat_template=checkpoint.tokenizer.chat_template,
            metadata=checkpoint.metadata,
        )


def _served_name(source: str) -> str:
    """What clients call a model: a file is known by its own name, without its folder."""
    path = Path(source)
    return path.stem if path.suffix.lower() == ".gguf" and path.exists() else source


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
