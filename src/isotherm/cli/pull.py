"""`isotherm pull MODEL`: fetches a model now, to be used later or offline."""

from isotherm.cli.console import TerminalReporter, print_json
from isotherm.cli.flags import JsonOption, ModelArgument, takes
from isotherm.cli.settings import Settings


@takes("offline")
def pull(settings: Settings, model: ModelArgument, as_json: JsonOption = False) -> None:
    """Fetches a model, and prints where it is. A fetch that was cut goes on where it stopped."""
    from isotherm.formats.names import resolve

    with TerminalReporter() as reporter:
        path = resolve(model, reporter, offline=settings.offline)
    if as_json:
        print_json({"name": model, "path": str(path)})
    else:
        print(path)
