"""What one rendering of a chat template may use: work and memory, counted before they are used.

The count does not look at a clock, so that a template that passes on one machine passes on every one, however busy.
"""

import sys
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import TypeVar

from jinja2.utils import Namespace

from isotherm.errors import TemplateError

_T = TypeVar("_T")

# A step is 0.05 to 0.4 us. Both budgets grow with the input, so that a long chat is no attack.
_BASE_STEPS = 5_000_000
_STEPS_PER_VALUE = 2000
_STEPS_PER_BYTE = 4
_BASE_BYTES = 64 * 2**20
_BYTES_PER_BYTE = 32
_MAX_BYTES = 2**30

_READ_STEPS = 16  # per value
_GLANCE_STEPS = 4
_BYTES_PER_STEP = 16
_MAX_INT_BITS = 1024

# The least a value takes, with its place in a list.
VALUE_BYTES = 64

# Values nest no deeper where they are compared, hashed or printed: nothing recurses into the end of the C stack.
MAX_DEPTH = 100

# str() of a value that is no text, over the bytes `read` counts: escapes, quotes, commas.
_PRINTED_BYTES_PER_BYTE = 10


class TemplateBudget:
    """Raises TemplateError as soon as steps or bytes run out.

    Bytes count what was ever made, also what is garbage by now: memory in use is never more.
    """

    def __init__(self, given: object) -> None:
        """given: what the template is rendered with."""
        self._steps = sys.maxsize
        given_bytes = self.read(given)
        given_values = given_bytes // VALUE_BYTES
        self._steps = _BASE_STEPS + _STEPS_PER_VALUE * given_values + _STEPS_PER_BYTE * given_bytes
        # Some templates write a chat message by message into one text: quadratic, and honest.
        self._bytes = min(_BASE_BYTES + (_BYTES_PER_BYTE + given_values // 16) * given_bytes, _MAX_BYTES)

    def step(self, num_steps: int) -> None:
        self._steps -= num_steps
        if self._steps < 0:
            raise TemplateError("the chat template ran too long; it may loop without end")

    def reserve(self, num_bytes: int) -> None:
        """Before something of that size is made."""
        if num_bytes > self._bytes:
            raise TemplateError(f"the chat template asked for too much memory ({num_bytes} bytes)")

    def keep_bytes(self, num_bytes: int) -> None:
        self.reserve(num_bytes)
        self._bytes -= num_bytes

    def keep(self, value: _T) -> _T:
        """Pays for a value that has just been made, its parts not included but for texts."""
        self.keep_bytes(self.glance(value))
        return value

    def each(self, values: Iterable[_T]) -> Iterator[_T]:
        """The same values, kept as they come."""
        for value in values:
            yield self.keep(value)

    def print(self, value: object) -> None:
        """Pays for `str(value)` before it is made."""
        size = self.read(value)
        self.keep_bytes(size if isinstance(value, str) else _PRINTED_BYTES_PER_BYTE * size)

    def glance(self, value: object) -> int:
        """Pays for a look at `value` and its direct parts; their size in bytes."""
        size = self._own_bytes(value)
        for part in _parts(value):
            self.step(_GLANCE_STEPS)
            size += self._own_bytes(part)
        return size

    def read(self, value: object) -> int:
        """Pays for a walk over all of `value`; its size in bytes, shared parts as often as they would be printed."""
        if isinstance(value, str):
            return self._own_bytes(value)
        size = 0
        level: list[object] = [value]
        for _ in range(MAX_DEPTH):
            below: list[object] = []
            for item in level:
                self.step(_READ_STEPS)
                size += self._own_bytes(item)
                below += _parts(item)
            if not below:
                return size
            level = below
        raise TemplateError(f"the chat template met values that nest more than {MAX_DEPTH} deep")

    def _own_bytes(self, value: object) -> int:
        if isinstance(value, str):
            size = sys.getsizeof(value)
            self.step(size // _BYTES_PER_STEP)
            return VALUE_BYTES + size
        if isinstance(value, int):
            check_int_bits(value.bit_length())
        return VALUE_BYTES


def check_int_bits(num_bits: int) -> None:
    if num_bits > _MAX_INT_BITS:
        raise TemplateError(f"the chat template made a number of more than {_MAX_INT_BITS} bits")


def _parts(value: object) -> Iterable[object]:
    if value is None or isinstance(value, str | int | float):
        return ()
    if isinstance(value, Namespace):
        value = value._Namespace__attrs
    if isinstance(value, list | tuple | range | set | frozenset | KeysView | ValuesView | ItemsView):
        return value
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return ()
