"""Up to which share neurons that fire are computed alone: what is measured decides, and never the answer."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sketch import ISAS, assert_equal, chain
from test_sparse import sketch_ffn

from isotherm import _native
from isotherm.backends.cpu.backend import CpuBackend
from isotherm.backends.cpu.break_even import set_break_even
from isotherm.backends.cpu.limits import CpuLimits
from isotherm.backends.cpu.packing import pack_program
from isotherm.quantization.packed_file import PackedMemory
from isotherm.types import Activation, QuantType

FEW_ROWS = 4


class Timed:
    """An executor whose times are a + b * share alone, and a constant whole; twice that for each further row."""

    few_rows = FEW_ROWS

    def __init__(self, start_s: float, slope_s: float, whole_s: float) -> None:
        self.times = (start_s, slope_s, whole_s)
        self.bounds: dict[tuple[int, int], int] = {}

    def time_neurons(self, step: int, num_rows: int, num_active: int, is_alone: bool) -> float:
        start_s, slope_s, whole_s = self.times
        return (start_s + slope_s * num_active / 512 * num_rows) if is_alone else whole_s

    def set_most_active(self, step: int, num_rows: int, most_active: int) -> None:
        self.bounds[step, num_rows] = most_active


def bounds(timed: Any, share: float | None = None) -> dict[tuple[int, int], int]:
    finished = sketch_ffn(QuantType.Q4_0, QuantType.Q4_0, 0.1, Activation.RELU, is_sparse=True)
    memory = PackedMemory()
    pack_program(finished.program, finished.tensors, memory)
    set_break_even(timed, finished.program, memory.entry, share)
    found: dict[tuple[int, int], int] = timed.bounds
    return found


@given(start=st.floats(0.0, 0.3), slope=st.floats(0.5, 3.0))
def test_where_both_take_the_same_time(start: float, slope: float) -> None:
    found = bounds(Timed(start, slope, 1.0))
    assert {rows for _, rows in found} == set(range(1, FEW_ROWS + 1))
    assert len({step for step, _ in found}) == 2
    expected = min(1.0, (0.95 - start) / slope)
    assert all(abs(found[key] / 512 - expected) < 0.02 for key in found if key[1] == 1)
    assert all(found[step, 1] >= found[step, 2] >= found[step, 4] for step, _ in found)


def test_never_and_always() -> None:
    assert set(bounds(Timed(2.0, 1.0, 1.0)).values()) == {0}
    assert set(bounds(Timed(0.0, 0.1, 1.0)).values()) == {512}
    assert set(bounds(Timed(2.0, 0.0, 1.0)).values()) == {0}


def test_a_share_that_is_given_is_not_measured() -> None:
    class Untimed(Timed):
        def time_neurons(self, *_: Any) -> float:
            raise AssertionError("measured")

    assert set(bounds(Untimed(0, 0, 0), 0.25).values()) == {128}


@pytest.mark.parametrize("isa", ISAS)
def test_measuring_leaves_answers_alone(isa: str) -> None:
    finished = sketch_ffn(QuantType.Q4_0, QuantType.Q4_0, 0.1, Activation.RELU, is_sparse=True)
    memory = PackedMemory()
    pack_program(finished.program, finished.tensors, memory)
    limits = CpuLimits(2048, (), max_tokens=12, max_head_rows=12)
    compiled = CpuBackend(memory, isa=isa, num_threads=2).compile(finished.program, limits)
    compiled.forward(chain(12, num_states=0))
    assert_equal(compiled.logits(0, 12), finished.reference(chain(12, num_states=0)), isa)


def test_native_refuses_what_is_no_step_of_neurons() -> None:
    finished = sketch_ffn(QuantType.Q4_0, QuantType.Q4_0, 0.1, Activation.RELU, is_sparse=True)
    executor: _native.Executor = finished.compile(ISAS[-1])._executor
    kinds = [type(op).__name__ for op in finished.program.ops]
    down = kinds.index("SparseDown")
    assert executor.time_neurons(down, 1, 50, True) > 0
    for step, rows, active in ((0, 1, 1), (-1, 1, 1), (len(kinds), 1, 1), (down, 0, 1), (down, 99, 1), (down, 1, -1)):
        with pytest.raises(ValueError, match=r"step of neurons|rows|neurons"):
            executor.time_neurons(step, rows, active, True)
        with pytest.raises(ValueError, match=r"step of neurons|rows|neurons"):
            executor.set_most_active(step, rows, active)
    assert np.isfinite(executor.time_neurons(down, 1, 10**6, False))
