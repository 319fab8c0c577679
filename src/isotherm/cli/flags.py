"""How commands get the flags of settings, and the arguments that several of them share."""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Concatenate, ParamSpec, TypeVar

import typer

from isotherm.cli.settings import SETTINGS, Setting, Settings, effective, value_text

P = ParamSpec("P")
T = TypeVar("T")

SETTINGS_NOTE = "Settings can also come from ISOTHERM_<NAME> and the config file; see `isotherm config`."


def takes(*names: str) -> Callable[[Callable[Concatenate[Settings, P], None]], Callable[..., None]]:
    """Gives a command the flags of the named settings; the command gets the effective Settings as first argument."""
    return reads(effective, *names)


def reads(
    reader: Callable[[Mapping[str, str | bool | None]], T], *names: str
) -> Callable[[Callable[Concatenate[T, P], None]], Callable[..., None]]:
    """Gives a command the flags of the named settings; its first argument is what `reader` makes of those given."""

    def decorate(command: Callable[Concatenate[T, P], None]) -> Callable[..., None]:
        def with_flags(*args: P.args, **kwargs: P.kwargs) -> None:
            flags: dict[str, Any] = {name: kwargs.pop(name, None) for name in names}
            command(reader(flags), *args, **kwargs)

        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        parameters = [*own, *(_flag(SETTINGS[name]) for name in names)]
        with_flags.__name__ = command.__name__
        with_flags.__doc__ = command.__doc__
        with_flags.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        vars(with_flags)["__signature__"] = inspect.Signature(parameters)
        return with_flags

    return decorate


def gathers(
    maker: Callable[..., T],
) -> Callable[[Callable[Concatenate[Settings, T, P], None]], Callable[Concatenate[Settings, P], None]]:
    """Gives a command the parameters of `maker` as flags; after its Settings it gets what `maker` makes of them."""

    def decorate(command: Callable[Concatenate[Settings, T, P], None]) -> Callable[Concatenate[Settings, P], None]:
        gathered = inspect.signature(maker).parameters

        def with_gathered(settings: Settings, /, *args: P.args, **kwargs: P.kwargs) -> None:
            made = maker(**{name: kwargs.pop(name) for name in gathered})
            command(settings, made, *args, **kwargs)

        first, _, *own = inspect.signature(command).parameters.values()
        parameters = sorted([*gathered.values(), *own], key=lambda parameter: parameter.default is not parameter.empty)
        with_gathered.__name__ = command.__name__
        with_gathered.__doc__ = command.__doc__
        vars(with_gathered)["__signature__"] = inspect.Signature([first, *parameters])
        return with_gathered

    return decorate


def _flag(setting: Setting) -> inspect.Parameter:
    """Text, so that flag, variable and `/set` go through one parser and one message."""
    declared = [setting.rule.short_flag] if setting.rule.short_flag else []
    if setting.rule.kind is bool:
        declared.append(f"{setting.flag}/--no-{setting.flag.removeprefix('--')}")
        option = typer.Option(*declared, help=setting.rule.help, show_default=False)
        annotation: object = Annotated[bool | None, option]
    else:
        default = "" if setting.default is None else f" [{value_text(setting.default)}]"
        option = typer.Option(
            setting.flag,
            *declared,
            metavar=setting.rule.metavar,
            help=setting.rule.help + default,
            show_default=False,
        )
        annotation = Annotated[str | None, option]
    return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def complete_model(incomplete: str) -> list[str]:
    from isotherm.formats.aliases import ALIASES
    from isotherm.formats.names import local_models

    names = sorted({*ALIASES, *(model.name for model in local_models())})
    return [name for name in names if name.startswith(incomplete)]


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A GGUF file or its folder, an alias, or org/repo[:QUANT] of the Hugging Face hub.",
        autocompletion=complete_model,
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.", show_default=False)]
