"""Ops as text, as the dump of a Program has them."""

from dataclasses import fields
from enum import Enum
from typing import Any

from isotherm.program.ops import NormWeights, Op, Projection, Trim, Value


def show(item: Any) -> str:
    """One op, or a part of one, as the text dump has it."""
    if isinstance(item, tuple):
        return "[" + ", ".join(show(part) for part in item) + "]"
    if isinstance(item, Enum):
        return str(item.value)
    if isinstance(item, float):
        return f"{item:.6g}"
    if isinstance(item, Value | NormWeights | Trim | str | int) or item is None:
        return str(item)
    if isinstance(item, Projection):
        bias = f" + {item.bias}" if item.bias else ""
        return f"{item.out}: {item.out.width} = {item.weight}{bias}"
    is_op = isinstance(item, Op)  # of which options that are not taken are left out
    shown = [f for f in fields(item) if f.name != "out" and not (is_op and getattr(item, f.name) is f.default)]
    return f"{type(item).__name__}({', '.join(f'{f.name}={show(getattr(item, f.name))}' for f in shown)})"
