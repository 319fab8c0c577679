"""Typed look-ups in GGUF metadata: a missing key, a wrong type and a wild value are each a ModelFileError."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from isotherm.errors import ModelFileError

# Arrays of numbers and booleans stay NumPy arrays; arrays of strings and of arrays are tuples.
MetadataValue: TypeAlias = bool | int | float | str | NDArray[Any] | tuple["MetadataValue", ...]

_SHOWN_CHARACTERS = 80


def quoted(value: object) -> str:
    """`repr`, cut to a readable length: control characters from a file never reach a terminal."""
    if isinstance(value, tuple):
        return f"an array of {len(value)} values"
    text = repr(value[:_SHOWN_CHARACTERS] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


@dataclass(frozen=True)
class Metadata:
    """The key-value pairs of the file at `path`. A method given `default` returns it where the key is absent."""

    path: Path
    values: Mapping[str, MetadataValue]

    def has(self, key: str) -> bool:
        return key in self.values

    def string(self, key: str, *, default: str | None = None) -> str:
        value = self._get(key, default)
        return value if isinstance(value, str) else self._wrong(key, value, "a string")

    def boolean(self, key: str, *, default: bool | None = None) -> bool:
        value = self._get(key, default)
        return value if isinstance(value, bool) else self._wrong(key, value, "true or false")

    def integer(self, key: str, *, low: int, high: int, default: int | None = None) -> int:
        """An integer in [low, high]."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self._wrong(key, value, f"an integer from {low} to {high}")
        return value

    def uniform_integer(self, key: str, *, low: int, high: int, default: int | None = None) -> int:
        """An integer in [low, high], or an array (one per layer) that repeats one such integer."""
        value = self._get(key, default)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size > 0 and (value == value[0]).all():
            value = int(value[0])
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self._wrong(key, value, f"one integer from {low} to {high} for all layers")
        return value

    def number(self, key: str, *, low: float, high: float, default: float | None = None) -> float:
        """A finite number in [low, high]."""
        value = self._get(key, default)
        expected = f"a number from {low:g} to {high:g}"
        if not isinstance(value, int | float) or isinstance(value, bool):
            self._wrong(key, value, expected)
        if not math.isfinite(value) or not low <= value <= high:
            self._wrong(key, value, expected)
        return float(value)

    def strings(self, key: str) -> tuple[str, ...]:
        value = self._get(key, None)
        # the items of an array in a file are of one kind
        if not isinstance(value, tuple) or (value and not isinstance(value[0], str)):
            self._wrong(key, value, "an array of strings")
        return cast("tuple[str, ...]", value)

    def integers(self, key: str) -> NDArray[Any]:
        value = self._get(key, None)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            self._wrong(key, value, "an array of integers")
        return value

    def floats(self, key: str) -> NDArray[Any]:
        """An array of finite numbers."""
        value = self._get(key, None)
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or not np.isfinite(value).all():
            self._wrong(key, value, "an array of finite numbers")
        return value

    def scalars(self) -> dict[str, bool | int | float | str]:
        """Everything but arrays, for a person to read."""
        return {key: value for key, value in self.values.items() if isinstance(value, bool | int | float | str)}

    def _get(self, key: str, default: MetadataValue | None) -> MetadataValue:
        value = self.values.get(key, default)
        if value is None:
            raise ModelFileError(f"{self.path}: key {key} is missing; the file is damaged or not a whole model")
        return value

    def _wrong(self, key: str, value: MetadataValue, expected: str) -> NoReturn:
        raise ModelFileError(f"{self.path}: key {key} is {quoted(value)}, expected {expected}")
