"""`isotherm stop MODEL`: a running server gives the memory of a model back."""

from typing import Annotated

import typer

from isotherm.cli.console import notice
from isotherm.cli.flags import takes
from isotherm.cli.running_server import ADDRESS, RunningServer
from isotherm.cli.settings import Settings


@takes(*ADDRESS)
def stop(
    settings: Settings,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A name that `isotherm ps` lists.", show_default=False)],
) -> None:
    """Unloads a model of a running server, once answers that run have ended; a request loads it again."""
    server = RunningServer(settings)
    was_loaded = model in _loaded(server)
    server.post("/api/generate", {"model": model, "keep_alive": 0})
    if not was_loaded:
        notice(f"{model} was not loaded")
    elif model in _loaded(server):
        notice(f"{model} is unloaded once its answers have ended")


def _loaded(server: RunningServer) -> list[str]:
    return [model["name"] for model in server.get("/api/ps")["models"]]
