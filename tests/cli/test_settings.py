"""Settings: who wins, what is refused, and that the table agrees with the rooms that use it."""

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isotherm.cli.settings import (
    LOADING,
    SAMPLING,
    SERVING,
    SETTINGS,
    Setting,
    Settings,
    choose,
    effective,
    unknown_variables,
    value_text,
)
from isotherm.errors import OptionError
from isotherm.types import LoadOptions, SamplingParams

WriteConfig = Callable[[str], Path]


def _origin(name: str, flags: dict[str, str | bool | None]) -> tuple[object, str, str]:
    chosen = {one.setting.name: one for one in choose(flags)}[name]
    return chosen.value, chosen.origin, chosen.source


def test_flag_beats_environment_beats_file_beats_default(
    monkeypatch: pytest.MonkeyPatch, write_config: WriteConfig
) -> None:
    assert _origin("threads", {}) == (None, "default", "")
    path = write_config("threads = 2\n")
    assert _origin("threads", {}) == (2, "file", str(path))
    monkeypatch.setenv("ISOTHERM_THREADS", "3")
    assert _origin("threads", {}) == (3, "env", "ISOTHERM_THREADS")
    assert _origin("threads", {"threads": "4"}) == (4, "flag", "--threads")


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_can_come_from_everywhere(
    name: str, monkeypatch: pytest.MonkeyPatch, write_config: WriteConfig
) -> None:
    setting = SETTINGS[name]
    text = {"backend": "reference", "ctx": "2", "kv": "q8_0"}.get(name, "1")
    text = "true" if setting.rule.kind is bool else text
    in_toml = f'"{text}"' if setting.rule.kind is str else text
    path = write_config(f"{name} = {in_toml}\n")
    from_file, *origin = _origin(name, {})
    assert origin == ["file", str(path)]
    path.unlink()
    monkeypatch.setenv(setting.env_name, text)
    assert _origin(name, {}) == (from_file, "env", setting.env_name)
    monkeypatch.delenv(setting.env_name)
    assert _origin(name, {name: text})[0] == from_file
    assert type(from_file) is setting.rule.kind


def test_empty_variable_is_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOTHERM_CTX", "")
    assert effective({}).ctx is None


def test_none_undoes_what_the_file_says(write_config: WriteConfig) -> None:
    write_config("seed = 7\n")
    assert effective({}).seed == 7
    assert effective({"seed": "none"}).seed is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("threads", "0"),
        ("threads", "1.5"),
        ("threads", "many"),
        ("threads", "9" * 5000),
        ("ctx", "-1"),
        ("temperature", "nan"),
        ("temperature", "inf"),
        ("temperature", "-0.1"),
        ("temperature", "none"),
        ("top_p", "0"),
        ("top_p", "1.01"),
        ("backend", "gpu"),
        ("seed", "-1"),
        ("seed", str(2**64)),
    ],
)
def test_wrong_text_is_refused_by_source_and_by_what_is_allowed(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match=f"^{SETTINGS[name].flag} is .*; it must be "):
        effective({name: text})
    monkeypatch.setenv(SETTINGS[name].env_name, text)
    with pytest.raises(OptionError, match=f"^{SETTINGS[name].env_name} is "):
        effective({})


@pytest.mark.parametrize(
    "line",
    [
        'threads = "4"',
        "threads = 4.0",
        "threads = true",
        "temperature = true",
        'temperature = "hot"',
        "temperature = nan",
        f"temperature = 1{'0' * 400}",
        "offline = 1",
        "backend = 1",
        "[threads]",
        "threads = 1979-05-27",
    ],
)
def test_wrong_type_in_the_file_names_file_and_key(line: str, write_config: WriteConfig) -> None:
    path = write_config(line)
    with pytest.raises(OptionError) as caught:
        effective({})
    assert str(path) in str(caught.value)
    assert line.split()[0].strip("[]") in str(caught.value)


def test_whole_number_will_do_for_a_number(write_config: WriteConfig) -> None:
    write_config("temperature = 1\n")
    assert effective({}).temperature == 1.0


def test_unknown_key_names_the_near_and_the_known(write_config: WriteConfig) -> None:
    path = write_config("temprature = 1\n")
    with pytest.raises(OptionError) as caught:
        effective({})
    message = str(caught.value)
    assert str(path) in message
    assert "'temprature'" in message
    assert "did you mean temperature?" in message
    assert all(name in message for name in SETTINGS)


@pytest.mark.parametrize("content", [b"threads = ", b"\xff\xfe", b"a" * 10_000, b"a=" + b"[" * 100_000, b"x=1\nx=2"])
def test_damaged_file_is_a_typed_error(content: bytes, write_config: WriteConfig) -> None:
    path = write_config("")
    path.write_bytes(content)
    with pytest.raises(OptionError, match=r"config\.toml"):
        effective({})


def test_config_path_that_is_a_folder_is_a_typed_error(write_config: WriteConfig) -> None:
    path = write_config("")
    path.unlink()
    path.mkdir()
    with pytest.raises(OptionError, match="cannot be read"):
        effective({})


def test_misspelt_variable_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ISOTHERM_CACHE", "ISOTHERM_ISA", "ISOTHERM_DEBUG", "ISOTHERM_SHARED", "ISOTHERM_THREADS"):
        monkeypatch.setenv(name, "1")
    assert unknown_variables() == []
    monkeypatch.setenv("ISOTHERM_TEMPRATURE", "1")
    assert unknown_variables() == ["ISOTHERM_TEMPRATURE is no setting; did you mean ISOTHERM_TEMPERATURE?"]


_SETTING = st.sampled_from(sorted(SETTINGS)).map(SETTINGS.__getitem__)


@given(_SETTING, st.one_of(st.integers(), st.floats(), st.text(), st.booleans(), st.none()))
def test_whatever_is_accepted_is_typed_and_spelt_back(setting: Setting, value: object) -> None:
    try:
        checked = setting.check(value, "here")
    except OptionError:
        return
    assert type(checked) is setting.rule.kind
    assert setting.parse(value_text(checked), "here") == checked


@given(_SETTING, st.text())
def test_any_text_is_a_value_or_an_option_error(setting: Setting, text: str) -> None:
    value: object = None
    with suppress(OptionError):
        value = setting.parse(text, "here")
    assert value is None or type(value) is setting.rule.kind


def test_sampling_of_settings_is_that_of_the_engine() -> None:
    assert Settings().sampling == SamplingParams()
    untold = {field.name for field in dataclasses.fields(SamplingParams)} - set(SAMPLING)
    assert untold == {"logit_bias", "num_logprobs", "sequence"}


@pytest.mark.parametrize("name", SAMPLING)
def test_every_allowed_end_is_allowed_by_the_engine(name: str) -> None:
    from isotherm.engine.sampling import check_sampling

    rule = SETTINGS[name].rule
    assert rule.low is not None
    assert rule.high is not None
    for end in (rule.low, rule.high):
        value = end if rule.kind is float else int(end)
        if name == "seed":
            value = min(int(value), 2**64 - 1)
        check_sampling(Settings().changed({name: value}).sampling, vocab_size=10)


def test_table_agrees_with_the_loader() -> None:
    from isotherm import load_options

    assert Settings().load_options == LoadOptions()
    assert SETTINGS["backend"].rule.choices == load_options.BACKENDS
    assert SETTINGS["kv"].rule.choices == load_options.KV_TYPES
    assert set(LOADING) | set(SAMPLING) | set(SERVING) | {"max_tokens"} == set(SETTINGS)
