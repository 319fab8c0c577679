"""A conversation as a file: written whole or not at all, and believed only after it was checked."""

import json
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isotherm.cli.settings import SAMPLING, SETTINGS, Value
from isotherm.errors import OptionError

_FORMAT = "isotherm-chat"
_VERSION = 1
_MAX_FILE_BYTES = 64 << 20
_ROLES = ("user", "assistant")

CHAT_SETTINGS = (*SAMPLING, "max_tokens")


@dataclass(frozen=True)
class Turn:
    """One message. role: user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class SavedChat:
    model: str
    system: str | None
    settings: tuple[tuple[str, Value], ...]  # of CHAT_SETTINGS
    turns: tuple[Turn, ...]


def save_chat(path: Path, chat: SavedChat) -> None:
    """Raises OptionError where `path` cannot be written, or is some other file."""
    text = json.dumps(
        {
            "format": _FORMAT,
            "version": _VERSION,
            "model": chat.model,
            "system": chat.system,
            "settings": dict(chat.settings),
            "messages": [{"role": turn.role, "content": turn.content} for turn in chat.turns],
        },
        indent=1,
    )
    try:
        if path.exists():
            _require_ours(path)
        _write_whole(path, text)
    except OptionError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise OptionError(f"{path} cannot be written: {error}") from error


def load_chat(path: Path) -> SavedChat:
    """Raises OptionError for a file that is not there, is damaged, or is no conversation."""
    try:
        if not path.is_file():
            raise OptionError(f"there is no file {path}")
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise OptionError(f"{path} is larger than {_MAX_FILE_BYTES >> 20} MiB; it is no conversation")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OptionError:
        raise
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path} is damaged, or no conversation: {error}") from error
    return _Reader(path).chat(content)


@dataclass(frozen=True)
class _Reader:
    """Believes nothing in the file."""

    path: Path

    def chat(self, content: object) -> SavedChat:
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise OptionError(f"{self.path} is no conversation that `/save` wrote")
        if content.get("version") != _VERSION:
            raise OptionError(f"{self.path}: version {content.get('version')!r}; this program reads {_VERSION}")
        system = content.get("system")
        return SavedChat(
            model=self._text(content.get("model"), "model"),
            system=None if system is None else self._text(system, "system"),
            settings=self._settings(content.get("settings")),
            turns=self._turns(content.get("messages")),
        )

    def _turns(self, messages: object) -> tuple[Turn, ...]:
        if not isinstance(messages, list):
            raise self._wrong("messages", "a list")
        turns = []
        for index, message in enumerate(messages):
            expected = _ROLES[index % 2]
            if not isinstance(message, dict) or message.get("role") != expected:
                raise self._wrong(f"messages[{index}]", f"a message of the {expected}")
            turns.append(Turn(expected, self._text(message.get("content"), f"messages[{index}].content")))
        if len(turns) % 2:
            raise self._wrong("messages", "pairs of a question and its answer")
        return tuple(turns)

    def _settings(self, values: Any) -> tuple[tuple[str, Value], ...]:
        if not isinstance(values, dict) or not set(values) <= set(CHAT_SETTINGS):
            raise self._wrong("settings", f"a table of {', '.join(CHAT_SETTINGS)}")
        return tuple(
            (
                name,
                None
                if value is None and SETTINGS[name].default is None
                else SETTINGS[name].check(value, f"{self.path}: {name}"),
            )
            for name, value in values.items()
        )

    def _text(self, value: object, where: str) -> str:
        if not isinstance(value, str):
            raise self._wrong(where, "text")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self._wrong(where, "valid Unicode") from None
        return value

    def _wrong(self, where: str, expected: str) -> OptionError:
        return OptionError(f"{self.path} is damaged: {where} must be {expected}")


def _require_ours(path: Path) -> None:
    """A slip of the hand must not cost a file that is something else."""
    try:
        load_chat(path)
    except OptionError as error:
        raise OptionError(f"{path} exists and is no saved conversation; choose another name") from error


def _write_whole(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
