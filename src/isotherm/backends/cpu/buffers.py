"""Which values share a buffer: a value's buffer is free for the next of its width once its last reader has run."""

from dataclasses import dataclass

from isotherm.program import flow, ops
from isotherm.program.ops import Value
from isotherm.program.recorder import Program


@dataclass(frozen=True)
class BufferPlan:
    """widths: of the buffers, by index; the last one holds the logits. at: the buffer of each value."""

    widths: tuple[int, ...]
    at: dict[Value, int]


def plan_buffers(program: Program) -> BufferPlan:
    last_reader = {value: i for i, op in enumerate(program.ops) for value in flow.inputs(op)}
    widths: list[int] = []
    at: dict[Value, int] = {}
    free: dict[int, list[int]] = {}
    for index, op in enumerate(program.ops):
        for value in flow.outputs(op):
            unused = free.get(value.width)
            if unused and value != program.logits:
                at[value] = unused.pop()
            else:
                at[value] = len(widths)
                widths.append(value.width)
        if isinstance(op, ops.SelectRows):  # the head runs once per block of rows: what it selects from stays
            continue
        for value in set(flow.inputs(op)):
            if last_reader[value] == index:
                free.setdefault(value.width, []).append(at[value])
    assert at[program.logits] == len(widths) - 1
    return BufferPlan(tuple(widths), at)
