"""What ops read and write."""

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from isotherm.program.ops import Op, QuantLinear, Value

_LAYER = re.compile(r"layers\.(\d+)\.")


def layer_of(weight: str) -> int | None:
    """The layer that a weight's name has; None: it is of none."""
    found = _LAYER.match(weight)
    return int(found[1]) if found else None


def outputs(op: Op) -> tuple[Value, ...]:
    """Values that `op` writes."""
    if isinstance(op, QuantLinear):
        return tuple(projection.out for projection in op.projections)
    return (op.out,)


def inputs(op: Op) -> tuple[Value, ...]:
    """Values that `op` reads."""
    written = outputs(op)
    return tuple(v for f in fields(op) if isinstance(v := getattr(op, f.name), Value) and v not in written)


def replace_inputs(op: Op, by: Mapping[Value, Value]) -> Op:
    """`op` with the values that it reads replaced where `by` names them."""
    read = by.keys() & set(inputs(op))
    changes: dict[str, Any] = {f.name: by[v] for f in fields(op) if (v := getattr(op, f.name)) in read}
    return replace(op, **changes)
