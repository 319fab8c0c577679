"""Up to which share of neurons that fire they are computed alone: measured on this machine, while a model is loaded.

Steps alike in kind, weight types and shape are measured once, for one row of a batch and for as many as there may be.
What fires alone takes a + b * share; what is computed whole takes a time of its own: they meet at the break-even.
Weights are read from many layers in turn, and whole ones before those of few neurons, so that no cache gives any back,
as none does while a model runs.
"""

from collections import defaultdict
from collections.abc import Callable
from statistics import median

from isotherm import _native
from isotherm.program import ops
from isotherm.program.recorder import Program
from isotherm.quantization.packed_file import EntrySpec

_BY_ROWS = ops.SparseUp | ops.PredictedLinear | ops.SparseExpertUp
_BY_COLUMNS = ops.SparseDown | ops.ExpertDown
_SHARES = (0.1, 0.4)
_NUM_ROUNDS = 3
_ENOUGH_BYTES = 256 << 20  # of weights, read in turn: more than is left of a cache until it is their turn again
_CAUTION = 0.95  # of the time computed whole: what is no quicker beyond doubt is not worth it


def set_break_even(
    executor: "_native.Executor", program: Program, entry: Callable[[str], EntrySpec], share: float | None
) -> None:
    """entry: gives a packed weight by its name. share: None to measure it."""
    most_rows = executor.few_rows
    for steps in _alike(program, entry).values():
        width = _num_neurons(program.ops[steps[0]])
        low = high = share or 0.0
        if share is None:
            sample = _enough(steps, entry, program)
            low, high = (_break_even(executor, sample, rows, width) for rows in (1, most_rows))
        for rows in range(1, most_rows + 1):
            most_active = int((low + (high - low) * (rows - 1) / max(1, most_rows - 1)) * width)
            for step in steps:
                executor.set_most_active(step, rows, most_active)


def _alike(program: Program, entry: Callable[[str], EntrySpec]) -> dict[object, list[int]]:
    groups: dict[object, list[int]] = defaultdict(list)
    for index, op in enumerate(program.ops):
        if isinstance(op, _BY_ROWS | _BY_COLUMNS) and _has_neurons(op):
            spec = entry(op.weight)
            groups[type(op), spec.types, spec.shape].append(index)
    return groups


def _has_neurons(op: _BY_ROWS | _BY_COLUMNS) -> bool:
    match op:
        case ops.SparseUp() | ops.PredictedLinear():
            return op.by_rows
        case ops.ExpertDown():
            return op.by_neuron
        case _:
            return True


def _num_neurons(op: ops.Op) -> int:
    assert isinstance(op, _BY_ROWS | _BY_COLUMNS)
    return op.out.width if isinstance(op, _BY_ROWS) else op.x.width


def _enough(steps: list[int], entry: Callable[[str], EntrySpec], program: Program) -> list[int]:
    op = program.ops[steps[0]]
    assert isinstance(op, _BY_ROWS | _BY_COLUMNS)
    read_bytes = entry(op.weight).num_bytes
    if isinstance(op, ops.SparseExpertUp | ops.ExpertDown):
        read_bytes = read_bytes // op.experts.num_experts * op.experts.num_used
    return steps[: max(1, _ENOUGH_BYTES // read_bytes)]


def _break_even(executor: "_native.Executor", steps: list[int], num_rows: int, num_neurons: int) -> float:
    """The share of neurons, from 0 to 1."""

    def time_s(share: float, *, is_alone: bool) -> float:
        return sum(executor.time_neurons(step, num_rows, int(share * num_neurons), is_alone) for step in steps)

    rounds = []
    for number in range(_NUM_ROUNDS + 1):
        times = [time_s(share, is_alone=is_alone) for share in _SHARES for is_alone in (False, True)]
        if number:  # the first one brings pages in
            rounds.append(times)
    whole_s, low_s, _, high_s = (median(times) for times in zip(*rounds, strict=True))
    slope = (high_s - low_s) / (_SHARES[1] - _SHARES[0])
    if slope <= 0:  # noise: then it is as good as flat
        return _SHARES[1] if high_s < _CAUTION * whole_s else 0.0
    share: float = _SHARES[0] + (_CAUTION * whole_s - low_s) / slope
    return min(1.0, max(0.0, share))
