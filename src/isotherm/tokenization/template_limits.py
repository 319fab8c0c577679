"""Checks for what Jinja offers that makes much of little: each reserves its result in the budget, or refuses."""

import string
from collections.abc import Callable
from typing import Any

from isotherm.errors import TemplateError
from isotherm.tokenization.template_budget import MAX_DEPTH, VALUE_BYTES, TemplateBudget, check_int_bits

_MAX_INDENT = 16
_MAX_ROUND_DIGITS = 20
_MAX_ATTRIBUTE_DOTS = 3
_CHAR_BYTES = 4  # of the widest character
_COMPARED_PER_STEP = 32

# Their time grows with the length of the text times that of what is looked for.
_SEARCHES = frozenset(
    ["count", "find", "index", "lstrip", "partition", "replace", "rsplit", "rstrip", "split", "strip"]
)


def check_operator(budget: TemplateBudget, operator: str, left: object, right: object) -> None:
    """Before `left operator right`."""
    left_bytes, right_bytes = budget.glance(left), budget.glance(right)
    if operator == "+":
        budget.reserve(left_bytes + right_bytes)
    elif operator == "*":
        if isinstance(left, int) and isinstance(right, int):
            check_int_bits(left.bit_length() + right.bit_length())
        elif isinstance(left, int):
            budget.reserve(left * _repeated_bytes(right, right_bytes))
        elif isinstance(right, int):
            budget.reserve(right * _repeated_bytes(left, left_bytes))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        check_int_bits(left.bit_length() * max(right, 0))
    elif operator == "%" and isinstance(left, str):
        raise TemplateError("the chat template formats text with %, which is refused")


def _repeated_bytes(value: object, size: int) -> int:
    return len(value) * _CHAR_BYTES if isinstance(value, str) else size


def check_text_method(
    budget: TemplateBudget, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Before `text.name(*args, **kwargs)`; join is given a list."""
    budget.reserve(3 * budget.glance(text))  # capitals may take three times the room
    if name in _SEARCHES:
        longest = max((len(arg) for arg in (*args, *kwargs.values()) if isinstance(arg, str)), default=1)
        budget.step(len(text) * longest // _COMPARED_PER_STEP)
    if name == "replace":
        check_replace(budget, text, *args, **kwargs)
    elif name in ("split", "rsplit", "splitlines"):
        _check_split(budget, text, *args, **kwargs)
    elif name == "join" and args:
        check_join(budget, args[0], text)
    elif name == "format":
        _check_format(budget, text, (*args, *kwargs.values()))


def check_replace(budget: TemplateBudget, text: Any, old: Any, new: Any, count: int | None = None) -> None:
    _check_printed(budget, text)
    text, old, new = str(text), str(old), str(new)
    num_places = text.count(old) if old else len(text) + 1
    budget.reserve(_CHAR_BYTES * (len(text) + num_places * len(new)))


def check_join(budget: TemplateBudget, value: list[Any], d: Any = "", attribute: Any = None) -> None:
    for part in value:
        budget.print(part)
    budget.reserve(len(value) * budget.read(d))


def _check_split(
    budget: TemplateBudget, text: str, sep: Any = None, maxsplit: int = -1, keepends: bool = False
) -> None:
    num_pieces = text.count(sep) + 1 if isinstance(sep, str) and sep else len(text) // 2 + 1
    budget.reserve(VALUE_BYTES * num_pieces)


def _check_format(budget: TemplateBudget, text: str, values: tuple[Any, ...]) -> None:
    fields = [field for field in string.Formatter().parse(text) if field[1] is not None]
    if any(spec or conversion for _, _, spec, conversion in fields):
        raise TemplateError("the chat template uses a format with more than names between the braces, which is refused")
    for _ in fields:
        for value in values:
            budget.print(value)


def _check_indent(
    budget: TemplateBudget, text: Any, width: int | str = 4, first: bool = False, blank: bool = False
) -> None:
    num_chars = len(width) if isinstance(width, str) else width
    if isinstance(text, str):
        budget.reserve(_CHAR_BYTES * (len(text) + (text.count("\n") + 1) * num_chars))


def _check_printed(budget: TemplateBudget, value: Any, *args: Any, **kwargs: Any) -> None:
    if not isinstance(value, str):
        budget.print(value)


def _check_trim(budget: TemplateBudget, value: Any, chars: str | None = None) -> None:
    _check_printed(budget, value)
    budget.step(len(str(value)) * len(chars or "") // _COMPARED_PER_STEP)


def _check_list(budget: TemplateBudget, value: Any, *args: Any, **kwargs: Any) -> None:
    if isinstance(value, str):
        budget.reserve(VALUE_BYTES * len(value))


def _check_round(budget: TemplateBudget, value: Any, precision: int = 0, method: str = "common") -> None:
    if abs(precision) > _MAX_ROUND_DIGITS:
        raise TemplateError(f"the chat template rounds to {precision} digits, which is refused")


def _check_sum(budget: TemplateBudget, values: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise TemplateError("the chat template sums up values that are no numbers, which is refused")


def _check_tojson(
    budget: TemplateBudget,
    x: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> None:
    num_chars = len(indent) if isinstance(indent, str) else indent or 0
    if num_chars > _MAX_INDENT or sum(map(len, separators or ())) > _MAX_INDENT:
        raise TemplateError(f"the chat template spaces JSON by more than {_MAX_INDENT}, which is refused")
    budget.reserve(budget.read(x) // VALUE_BYTES * num_chars * MAX_DEPTH)
    budget.print(x)


def check_attribute(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Filters walk down a path of attributes for each value, unpaid."""
    place = _ATTRIBUTE_PLACES.get(name)
    path = kwargs.get("attribute", args[place] if place is not None and place < len(args) else "")
    if isinstance(path, str) and path.count(".") > _MAX_ATTRIBUTE_DOTS:
        raise TemplateError(f"the chat template has a path of more than {_MAX_ATTRIBUTE_DOTS} dots, which is refused")


# Where filters take the attribute among their positional arguments.
_ATTRIBUTE_PLACES = {"selectattr": 0, "rejectattr": 0, "sum": 0, "join": 1, "max": 1, "min": 1, "unique": 1, "sort": 2}

FILTER_CHECKS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("capitalize", "e", "escape", "lower", "safe", "string", "title", "upper"), _check_printed),
    "indent": _check_indent,
    "join": check_join,
    "list": _check_list,
    "replace": check_replace,
    "round": _check_round,
    "sort": _check_list,
    "sum": _check_sum,
    "tojson": _check_tojson,
    "trim": _check_trim,
}
