"""Saved conversations: round trip, whole or not at all, and nothing believed unchecked."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isotherm.cli.saved_chat import CHAT_SETTINGS, SavedChat, Turn, load_chat, save_chat
from isotherm.cli.settings import Settings
from isotherm.errors import OptionError

DEFAULTS = tuple((name, getattr(Settings(), name)) for name in CHAT_SETTINGS)
CHAT = SavedChat("m", "Be brief.", DEFAULTS, (Turn("user", "Hi ☃"), Turn("assistant", "Hello")))

_TEXT = st.text(st.characters(codec="utf-8"))
_TURNS = st.lists(st.tuples(_TEXT, _TEXT)).map(
    lambda pairs: tuple(turn for q, a in pairs for turn in (Turn("user", q), Turn("assistant", a)))
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_reuses_tmp_path = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)


@_reuses_tmp_path
@given(model=_TEXT, system=st.none() | _TEXT, turns=_TURNS)
def test_round_trip(tmp_path: Path, model: str, system: str | None, turns: tuple[Turn, ...]) -> None:
    chat = SavedChat(model, system, DEFAULTS, turns)
    save_chat(tmp_path / "chat.json", chat)
    assert load_chat(tmp_path / "chat.json") == chat


def test_file_is_private_and_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    save_chat(path, CHAT)
    assert path.stat().st_mode & 0o077 == 0
    content = json.loads(path.read_text())
    assert content["messages"] == [{"role": "user", "content": "Hi ☃"}, {"role": "assistant", "content": "Hello"}]


def test_every_truncation_is_a_typed_error(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    save_chat(path, CHAT)
    whole = path.read_bytes()
    for size in range(len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(OptionError, match=r"chat\.json"):
            load_chat(path)


@_reuses_tmp_path
@given(key=st.sampled_from(["format", "version", "model", "system", "settings", "messages"]), value=_JSON)
def test_any_other_content_is_a_chat_or_a_typed_error(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "chat.json"
    path.unlink(missing_ok=True)
    save_chat(path, CHAT)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with suppress(OptionError):
        assert isinstance(load_chat(path), SavedChat)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "first"}],
        [{"role": "user", "content": "no answer"}],
        [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}],
        [{"role": "user", "content": 1}, {"role": "assistant", "content": "y"}],
        [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "y"}],
        [["user", "x"], ["assistant", "y"]],
        {"role": "user", "content": "x"},
    ],
)
def test_wrong_messages_are_named(tmp_path: Path, messages: Any) -> None:
    path = tmp_path / "chat.json"
    save_chat(path, CHAT)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"messages": messages}))
    with pytest.raises(OptionError, match=r"is damaged: messages"):
        load_chat(path)


@pytest.mark.parametrize("settings", [{"threads": 1}, {"temperature": "hot"}, {"temperature": -1}, {"top_k": None}, []])
def test_wrong_settings_are_refused(tmp_path: Path, settings: Any) -> None:
    path = tmp_path / "chat.json"
    save_chat(path, CHAT)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": settings}))
    with pytest.raises(OptionError, match=r"chat\.json"):
        load_chat(path)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"null"])
def test_other_files_are_typed_errors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    with pytest.raises(OptionError, match=r"chat\.json"):
        load_chat(path)


def test_folder_and_missing_file_are_typed_errors(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json", tmp_path / "nul\0"):
        with pytest.raises(OptionError):
            load_chat(path)


def test_another_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("precious")
    with pytest.raises(OptionError, match="choose another name"):
        save_chat(path, CHAT)
    assert path.read_text() == "precious"


@pytest.mark.parametrize("name", ["missing/chat.json", "nul\0", "x" * 300])
def test_impossible_names_are_typed_errors(tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match="cannot be written"):
        save_chat(tmp_path / name, CHAT)


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chat.json"
    save_chat(path, CHAT)

    def fail(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OptionError, match="No space left"):
        save_chat(path, SavedChat("other", None, DEFAULTS, ()))
    assert load_chat(path) == CHAT
    assert os.listdir(tmp_path) == ["chat.json"]
