"""`isotherm ps`: the models that a running server has loaded."""

from datetime import UTC, datetime
from typing import Any

from isotherm.cli.console import notice, print_json, print_table
from isotherm.cli.flags import JsonOption, takes
from isotherm.cli.running_server import ADDRESS, RunningServer
from isotherm.cli.settings import Settings

_FOREVER_YEAR = 9999


@takes(*ADDRESS)
def ps(settings: Settings, as_json: JsonOption = False) -> None:
    """Lists the models that a running server has loaded."""
    models: list[dict[str, Any]] = RunningServer(settings).get("/api/ps")["models"]
    if as_json:
        print_json([_facts(model) for model in models])
    elif models:
        print_table(("NAME", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL"), [_row(model) for model in models])
    else:
        notice("no model is loaded; a request loads the one it names")


def _facts(model: dict[str, Any]) -> dict[str, Any]:
    until = _until(model)
    return {
        "name": model["name"],
        "size_bytes": model["size"],
        "gpu_bytes": model["size_vram"],
        "context_tokens": model["context_length"],
        "until": until.isoformat() if until else None,
    }


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    from isotherm.formats.fetching import size_text

    cpu_percent = 100 - round(100 * model["size_vram"] / max(1, model["size"]))
    return (
        str(model["name"]),
        size_text(model["size"]),
        f"{cpu_percent}% CPU",
        str(model["context_length"]),
        _until_text(_until(model)),
    )


def _until(model: dict[str, Any]) -> datetime | None:
    """None where it is never unloaded for want of requests."""
    until = datetime.fromisoformat(model["expires_at"])
    return None if until.year == _FOREVER_YEAR else until


def _until_text(until: datetime | None) -> str:
    if until is None:
        return "the server ends"
    seconds = max(0, round((until - datetime.now(UTC)).total_seconds()))
    return f"{seconds} s from now" if seconds < 120 else f"{round(seconds / 60)} min from now"
