"""Every setting in one table, and who decides it: flag > environment > config file > default."""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from isotherm.errors import OptionError
from isotherm.types import LoadOptions, SamplingParams

Value = bool | int | float | str | None
Origin = Literal["flag", "env", "file", "default"]

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")
_NONE = "none"
_GIB = 1 << 30
_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,3})?) ?([kKmMgG]i?[bB])")
_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_KV_SHARE = 1 / 8  # of free memory, what a server takes for keys and values by itself
_PREFIX = "ISOTHERM_"
_OTHER_VARIABLES = ("cache", "debug", "isa", "opencl")  # read where they are needed; see docs/cli.md


@dataclass(frozen=True)
class Rule:
    """What a setting may be. kind float takes whole numbers too."""

    kind: type[bool] | type[int] | type[float] | type[str]
    metavar: str
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    short_flag: str = ""
    is_secret: bool = False  # not to be printed


def _setting(default: Value, rule: Rule) -> Any:
    return field(default=default, metadata={"default": default, "rule": rule})


@dataclass(frozen=True)
class Settings:
    """The table. A field's name is its key in the config file, NAME in ISOTHERM_NAME and --NAME of a command."""

    ctx: int | None = _setting(
        None, Rule(int, "TOKENS", "Context length; by default the model's, cut to what memory holds.", low=2)
    )
    kv: str = _setting(
        "f16",
        Rule(str, "TYPE", "Keys and values: f16, or q8_0 in half the memory.", choices=("f16", "q8_0")),
    )
    threads: int | None = _setting(
        None, Rule(int, "N", "Threads; by default the physical cores this process may use.", low=1, high=1024)
    )
    backend: str = _setting(
        "cpu",
        Rule(str, "NAME", "cpu, or reference: NumPy in float32, exact and slow.", choices=("cpu", "reference")),
    )
    device: str = _setting(
        "auto", Rule(str, "NAME", "auto, cpu, gpu or gpu:N as `isotherm doctor` lists them: what helps the CPU.")
    )
    vram: str | None = _setting(
        None, Rule(str, "SIZE", "Memory of the GPU to use, as 4GiB; by default nine tenths of it.")
    )
    sparse: bool = _setting(
        True, Rule(bool, "", "Compute only the neurons that fire, where that is quicker; answers are the same.")
    )
    quality: str = _setting(
        "exact",
        Rule(
            str, "BUDGET", "exact, or a budget such as kl=0.01 or ppl=+1%: the rule that `isotherm tune` chose for it."
        ),
    )
    predictor: str | None = _setting(
        None, Rule(str, "FILE", "Of `isotherm train-predictor`: neurons it takes not to fire are left out; lossy.")
    )
    cache_gib: float = _setting(
        64.0,
        Rule(float, "GIB", "Disk for packed models, which start quicker; 0 keeps none.", low=0.0, high=1e6),
    )
    kv_dir: str | None = _setting(
        None, Rule(str, "FOLDER", "Keep keys and values there: a prompt that starts alike starts quicker.")
    )
    kv_disk_gib: float = _setting(16.0, Rule(float, "GIB", "Disk that --kv-dir may take.", low=0.0, high=1e6))
    offline: bool = _setting(False, Rule(bool, "", "Never use the network."))
    max_tokens: int | None = _setting(
        None, Rule(int, "N", "Longest answer in tokens; by default what the context holds.", low=1, short_flag="-n")
    )
    temperature: float = _setting(
        SamplingParams.temperature, Rule(float, "T", "Randomness; 0 takes the likeliest token.", low=0.0, high=100.0)
    )
    top_k: int = _setting(
        SamplingParams.top_k, Rule(int, "K", "Choose among the K likeliest tokens; 0 is off.", low=0, high=2**31 - 1)
    )
    top_p: float = _setting(
        SamplingParams.top_p, Rule(float, "P", "Keep the likeliest that sum up to P; 1 is off.", low=1e-6, high=1.0)
    )
    min_p: float = _setting(
        SamplingParams.min_p, Rule(float, "P", "Drop what is below P of the likeliest; 0 is off.", low=0.0, high=1.0)
    )
    repeat_penalty: float = _setting(
        SamplingParams.repeat_penalty,
        Rule(float, "X", "Divide the score of repeated tokens; 1 is off.", low=0.01, high=100.0),
    )
    presence_penalty: float = _setting(
        SamplingParams.presence_penalty,
        Rule(float, "X", "Subtract from tokens that occurred; 0 is off.", low=-100.0, high=100.0),
    )
    frequency_penalty: float = _setting(
        SamplingParams.frequency_penalty,
        Rule(float, "X", "Subtract for each time a token occurred; 0 is off.", low=-100.0, high=100.0),
    )
    penalty_tokens: int = _setting(
        SamplingParams.penalty_tokens,
        Rule(int, "N", "How many last tokens the penalties see; -1: all.", low=-1, high=2**31 - 1),
    )
    seed: int | None = _setting(
        None, Rule(int, "N", "Same seed, same answer; by default a fresh one.", low=0, high=2**64 - 1)
    )
    host: str = _setting("127.0.0.1", Rule(str, "ADDRESS", "Address to listen on; one that others reach needs a key."))
    port: int = _setting(8080, Rule(int, "N", "Listen on this port; 0 takes a free one.", low=0, high=65535))
    api_key: str | None = _setting(
        None, Rule(str, "KEY", "Ask for this key; ISOTHERM_API_KEY hides it.", is_secret=True)
    )
    allow_origin: str | None = _setting(None, Rule(str, "ORIGINS", "Web pages that may ask, by comma; * for all."))
    tls_cert: str | None = _setting(None, Rule(str, "FILE", "Certificate chain in PEM, for https."))
    tls_key: str | None = _setting(None, Rule(str, "FILE", "Its private key."))
    parallel: int = _setting(8, Rule(int, "N", "Answers of a model that are computed together.", low=1, high=256))
    max_waiting: int = _setting(256, Rule(int, "N", "Answers that may wait; more are refused.", low=0, high=10**6))
    kv_gib: float | None = _setting(
        None,
        Rule(
            float,
            "GIB",
            "Memory of keys and values, past ones too; by default 1/8 of what is free, or of a GPU that helps.",
            low=0.0,
            high=1e6,
        ),
    )
    keep_alive_s: float = _setting(
        300.0, Rule(float, "SECONDS", "Unload a model that was not named this long after its last answer.", low=0.0)
    )
    shutdown_s: float = _setting(30.0, Rule(float, "SECONDS", "Time for running answers to end at the end.", low=0.0))
    client_s: float = _setting(
        60.0, Rule(float, "SECONDS", "Time for a client to send its request, or to take a part of an answer.", low=0.1)
    )
    max_body_mib: float = _setting(8.0, Rule(float, "MIB", "Largest body of a request.", low=0.001, high=4096.0))
    page: bool = _setting(True, Rule(bool, "", "Serve a chat page at /."))
    log_json: bool = _setting(False, Rule(bool, "", "Log lines as JSON."))
    log_prompts: bool = _setting(False, Rule(bool, "", "Log prompts too."))

    @property
    def load_options(self) -> LoadOptions:
        return LoadOptions(
            context_tokens=self.ctx,
            threads=self.threads,
            backend=self.backend,
            cache_bytes=int(self.cache_gib * _GIB),
            offline=self.offline,
            kv=self.kv,
            sparse=self.sparse,
            quality=self.quality,
            predictor=self.predictor,
            kv_dir=self.kv_dir,
            kv_disk_bytes=int(self.kv_disk_gib * _GIB),
            device=self.device,
            vram_bytes=None if self.vram is None else _size_bytes(self.vram),
        )

    @property
    def serving_options(self) -> LoadOptions:
        """Those of a server."""
        kv_bytes = None if self.kv_gib is None else int(self.kv_gib * _GIB)
        return replace(self.load_options, parallel=self.parallel, kv_bytes=kv_bytes, kv_share=_KV_SHARE)

    def changed(self, values: Mapping[str, Any]) -> "Settings":
        """With checked values of some settings in place of these."""
        return replace(self, **values)

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(**{name: getattr(self, name) for name in SAMPLING})


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    name: str
    default: Value
    rule: Rule

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env_name(self) -> str:
        return _PREFIX + self.name.upper()

    def parse(self, text: str, source: str) -> Value:
        """The value that `text` spells; `none` where the default is none. Raises OptionError that names `source`."""
        lowered = text.strip().lower()
        if lowered == _NONE and self.default is None:
            return None
        try:
            if self.rule.kind is bool:
                return (_FALSE + _TRUE).index(lowered) >= len(_FALSE)
            return self.check(self.rule.kind(text.strip()), source)
        except OptionError:
            raise
        except ValueError:
            raise self._refusal(text, source) from None

    def check(self, value: object, source: str) -> Value:
        """`value`, typed. Raises OptionError for another type or a value out of range."""
        kind, low, high = self.rule.kind, self.rule.low, self.rule.high
        if kind is float and type(value) is int:
            try:
                value = float(value)
            except OverflowError:
                raise self._refusal(value, source) from None
        if type(value) is not kind:
            raise self._refusal(value, source)
        if isinstance(value, str):
            is_odd = not value or value != value.strip() or (self.default is None and value.lower() == _NONE)
            if is_odd or (self.rule.choices and value not in self.rule.choices):
                raise self._refusal(value, source)
            return value
        assert isinstance(value, int | float)
        # written so that NaN fails
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            raise self._refusal(value, source)
        return value

    def _refusal(self, value: object, source: str) -> OptionError:
        return OptionError(f"{source} is {value!r}; it must be {self._allowed()}")

    def _allowed(self) -> str:
        rule = self.rule
        if rule.kind is bool:
            return "true or false"
        if rule.choices:
            return " or ".join(rule.choices)
        noun = {int: "a whole number", float: "a number", str: "text"}[rule.kind]
        if rule.high is not None:
            return f"{noun} from {rule.low:.12g} to {rule.high:.12g}"
        return f"{noun} of at least {rule.low:.12g}" if rule.low is not None else noun


def _size_bytes(text: str) -> int:
    """Raises OptionError for what is no size."""
    match = _SIZE.fullmatch(text)
    num_bytes = int(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if not 1 <= num_bytes < 1 << 62:
        raise OptionError(f"vram is {text!r}; it must be a size such as 4GiB, 4GB or 512MiB")
    return num_bytes


def value_text(value: Value) -> str:
    """As `Setting.parse` reads it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value).removesuffix(".0")


SETTINGS: dict[str, Setting] = {column.name: Setting(column.name, **column.metadata) for column in fields(Settings)}
SERVING = (
    "host",
    "port",
    "api_key",
    "allow_origin",
    "tls_cert",
    "tls_key",
    "parallel",
    "max_waiting",
    "kv_gib",
    "keep_alive_s",
    "shutdown_s",
    "client_s",
    "max_body_mib",
    "page",
    "log_json",
    "log_prompts",
)
LOADING = (
    *("ctx", "kv", "threads", "backend", "device", "vram", "sparse", "quality", "predictor", "cache_gib"),
    *("kv_dir", "kv_disk_gib", "offline"),
)
SAMPLING = tuple(column.name for column in fields(SamplingParams) if column.name in SETTINGS)


@dataclass(frozen=True)
class Chosen:
    """A setting's value, and who decided it. source: the flag, variable or file; empty for the default."""

    setting: Setting
    value: Any
    origin: Origin
    source: str = ""


def choose(flags: Mapping[str, str | bool | None]) -> list[Chosen]:
    """Each setting's value in the order of the table. `flags`: as given on the command line, None where not given.

    Raises OptionError for a value that is wrong, wherever it stands, and for a config file that is.
    """
    from isotherm.formats.folders import config_file

    path = config_file()
    from_file = _read_config(path)
    return [_choose(setting, flags.get(setting.name), from_file, path) for setting in SETTINGS.values()]


def effective(flags: Mapping[str, str | bool | None]) -> Settings:
    """Raises what `choose` raises."""
    return Settings(**{chosen.setting.name: chosen.value for chosen in choose(flags)})


def unknown_variables() -> list[str]:
    """A line for each ISOTHERM_ variable that looks like a misspelt setting."""
    lines = []
    for variable in sorted(os.environ):
        name = variable.removeprefix(_PREFIX).lower()
        if variable.startswith(_PREFIX) and name not in SETTINGS and name not in _OTHER_VARIABLES:
            near = difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.75)
            lines += [f"{variable} is no setting; did you mean {SETTINGS[found].env_name}?" for found in near]
    return lines


def _choose(setting: Setting, flag: str | bool | None, from_file: Mapping[str, object], path: Path) -> Chosen:
    if isinstance(flag, bool):
        return Chosen(setting, flag, "flag", setting.flag)
    if flag is not None:
        return Chosen(setting, setting.parse(flag, setting.flag), "flag", setting.flag)
    if text := os.environ.get(setting.env_name):
        return Chosen(setting, setting.parse(text, setting.env_name), "env", setting.env_name)
    if setting.name in from_file:
        value = setting.check(from_file[setting.name], f"{path}: {setting.name}")
        return Chosen(setting, value, "file", str(path))
    return Chosen(setting, setting.default, "default")


def _read_config(path: Path) -> dict[str, object]:
    """The file's keys, all known; empty where there is no file."""
    if not path.exists():
        return {}
    import tomllib

    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"the config file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise OptionError(f"{path} is not valid TOML: {error}; mend it, or move it away") from error
    for key in values:
        if key not in SETTINGS:
            near = difflib.get_close_matches(key, SETTINGS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise OptionError(f"{path}: unknown key {key!r}; {hint}known: {', '.join(SETTINGS)}")
    return values
