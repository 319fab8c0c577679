"""`isotherm list`: the models on this disk."""

from isotherm.cli.console import notice, print_json, print_table
from isotherm.cli.flags import JsonOption


def list_models(as_json: JsonOption = False) -> None:
    """Lists the models that were fetched, by alias or from the Hugging Face hub."""
    from isotherm.formats.aliases import ALIASES
    from isotherm.formats.fetching import size_text
    from isotherm.formats.names import local_models

    models = local_models()
    if as_json:
        print_json(
            [
                {"name": model.name, "size_bytes": model.size_bytes, "source": model.source, "path": str(model.path)}
                for model in models
            ]
        )
        return
    if models:
        rows = [(model.name, size_text(model.size_bytes), model.source, str(model.path)) for model in models]
        print_table(("NAME", "SIZE", "SOURCE", "PATH"), rows)
    missing = [name for name in ALIASES if name not in {model.name for model in models}]
    if missing:
        notice(f"`isotherm pull NAME` fetches: {', '.join(missing)}, or org/repo[:QUANT]")
