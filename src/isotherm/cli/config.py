"""`isotherm config`: every setting, its value and who decided it."""

import os
from dataclasses import asdict, dataclass

from isotherm.cli.console import notice, print_json, print_table
from isotherm.cli.flags import JsonOption, reads
from isotherm.cli.settings import SETTINGS, Chosen, Value, choose, unknown_variables, value_text

_SECRET = "(set, and not shown)"


@dataclass(frozen=True)
class _Row:
    name: str
    value: Value
    origin: str
    source: str


@reads(choose, *SETTINGS)
def config(chosen: list[Chosen], as_json: JsonOption = False) -> None:
    """Shows each setting and where its value comes from: flag, environment, config file or default."""
    rows = [_Row(one.setting.name, _shown(one), one.origin, one.source) for one in chosen] + _places()
    for line in unknown_variables():
        notice(line)
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        print_table(
            ("NAME", "VALUE", "ORIGIN", "SOURCE"), [(r.name, value_text(r.value), r.origin, r.source) for r in rows]
        )


def _shown(chosen: Chosen) -> Value:
    return _SECRET if chosen.setting.rule.is_secret and chosen.value is not None else chosen.value


def _places() -> list[_Row]:
    """What only the environment decides. Raises UnsupportedCpu."""
    from isotherm.backends.cpu.isa import choose_isa
    from isotherm.formats.folders import cache_dir, config_file, hub_cache_dir

    return [
        _from_env("isa", choose_isa(), "ISOTHERM_ISA"),
        _from_env("cache", str(cache_dir()), "ISOTHERM_CACHE", "HF_HOME", "XDG_CACHE_HOME"),
        _from_env(
            "hub_cache", str(hub_cache_dir()), "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"
        ),
        _from_env("config_file", str(config_file()), "XDG_CONFIG_HOME"),
    ]


def _from_env(name: str, value: str, *variables: str) -> _Row:
    """variables: those that may have decided `value`, the strongest first."""
    deciding = next((variable for variable in variables if os.environ.get(variable)), None)
    return _Row(name, value, "env" if deciding else "default", deciding or "")
