"""Whole models on a GPU, or split between it and the CPU: the bits of the CPU alone, however the work is cut."""

import signal
from itertools import pairwise

import numpy as np
import pytest
from on_gpu import compile_on_gpu
from sketch import ISAS, assert_equal
from test_one_answer import LENGTH, among_strangers
from tiny import F32, MAX_POSITIONS, TinyModel, make_tiny, run, text_ids

from isotherm.backends.cpu.backend import CompiledCpu
from isotherm.backends.cpu.limits import CpuLimits
from isotherm.backends.gpu.placement import EVERYTHING, layer_of_ops, placed_ops
from isotherm.program import flow
from isotherm.program.recording import Phase
from isotherm.types import KvType, QuantType

SMALL = {"hidden_size": 64, "ffn_size": 96, "num_heads": 6, "num_kv_heads": 2, "head_dim": 16, "num_layers": 3}
FAMILIES = {"llama": QuantType.Q4_1, "qwen2": QuantType.Q5_0, "gemma3": QuantType.Q8_0, "qwen3": QuantType.F16}
QUICK = ("llama", "gemma3")  # the others are slow tests
CUTS = (0, 300, 301, 303, 511, 512, 513, LENGTH)


@pytest.fixture(
    scope="module", params=[pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAMILIES]
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder = tmp_path_factory.mktemp("tiny")
    return make_tiny(folder, request.param, FAMILIES[request.param], sliding_window=70, **SMALL)


@pytest.fixture(scope="module")
def expected(model: TinyModel) -> F32:
    return run(model.native("scalar", 1), model.batch(text_ids(LENGTH)))


def on_gpu(model: TinyModel, first_layer: int, kv_type: KvType = KvType.F16) -> CompiledCpu:
    program = model.lowered.keeping(kv_type)
    limits = CpuLimits(MAX_POSITIONS, (14,) * len(program.states), max_tokens=1024, max_head_rows=1024)
    return compile_on_gpu(program, model.packed, limits, placed_ops(program, first_layer))


@pytest.mark.parametrize("first_layer", [EVERYTHING, 1, 3, *(pytest.param(i, marks=pytest.mark.slow) for i in (0, 2))])
def test_placed_anywhere(model: TinyModel, expected: F32, first_layer: int) -> None:
    """Everything, all layers, some, the head alone: a long prompt in uneven chunks, its pages in falling order."""
    compiled = on_gpu(model, first_layer)
    pages = np.arange(10, dtype=np.int32)[::-1]
    for start, end in pairwise(CUTS):
        actual = run(compiled, model.batch(text_ids(LENGTH)[start:end], start, pages))
        assert_equal(actual, expected[start:end], f"positions {start} to {end}")


@pytest.mark.parametrize("strangers", [(3, 20), (20, 1)], ids=str)
def test_any_company(model: TinyModel, expected: F32, strangers: tuple[int, int]) -> None:
    compiled = on_gpu(model, EVERYTHING)
    pages = np.random.default_rng(0).permutation(14).astype(np.int32)
    for start, end in pairwise((0, 590, 595, LENGTH)):
        actual = run(compiled, among_strangers(model, start, end, pages, strangers))
        assert_equal(actual, expected[start:end], f"positions {start} to {end}")


def test_some_rows_of_a_batch(model: TinyModel, expected: F32) -> None:
    """The head for rows that are not the last, asked for a few at a time."""
    compiled = on_gpu(model, EVERYTHING)
    batch = model.batch(text_ids(LENGTH)[:100])
    compiled.forward(batch)
    for first, count in ((0, 1), (3, 50), (99, 1), (0, 100)):
        assert_equal(compiled.logits(first, count), expected[first : first + count], f"rows {first}, {count} of them")


@pytest.mark.parametrize("kv_type", KvType)
@pytest.mark.parametrize("first_layer", [EVERYTHING, 1])
def test_pages_move_between_placements(model: TinyModel, kv_type: KvType, first_layer: int) -> None:
    program = model.lowered.keeping(kv_type)
    limits = CpuLimits(MAX_POSITIONS, (14,) * len(program.states), max_tokens=1024, max_head_rows=1024)
    there, here = compile_on_gpu(program, model.packed, limits, ()), on_gpu(model, first_layer, kv_type)
    ids, pages = text_ids(200), np.array([5, 0, 3, 6], np.int32)
    wanted = run(there, model.batch(ids, pages=pages))[192:]
    assert here.page_layout == there.page_layout
    assert here.page_bytes == there.page_bytes
    for group in range(len(program.states)):
        for page in pages:
            data = there.read_page(group, int(page))
            here.write_page(group, int(page), data)
            np.testing.assert_array_equal(here.read_page(group, int(page)), data)
    assert_equal(run(here, model.batch(ids[192:], 192, pages)), wanted, "after the exchange")


def test_values_can_be_observed(model: TinyModel) -> None:
    """Every value that an op makes, on either side of a border."""
    batch = model.batch(text_ids(20))
    wanted = [value for op in model.lowered.ops[:-1] for value in flow.outputs(op)]
    seen: list[dict[int, F32]] = []
    for compiled in (model.native(ISAS[-1]), on_gpu(model, EVERYTHING), on_gpu(model, 2)):
        rows: dict[int, F32] = {}
        compiled.observe(batch, wanted, lambda value, shown, rows=rows: rows.__setitem__(value.index, shown))
        seen.append(rows)
    for other in seen[1:]:
        assert other.keys() == seen[0].keys()
        for index, rows in other.items():
            assert_equal(rows, seen[0][index], f"value {index}")


def test_steps_are_recorded_one_by_one(model: TinyModel) -> None:
    compiled = on_gpu(model, 1)
    batch = model.batch(text_ids(5))
    _, recording = compiled.record(lambda: run(compiled, batch), 2)
    lane = recording.marks[0]
    worked = {int(mark["step"]) for mark in lane if mark["phase"] == Phase.WORK}
    assert worked == set(range(len(model.lowered.ops)))
    assert (np.diff(lane["ns"]) >= 0).all()
    assert len(layer_of_ops(model.lowered)) == len(recording.steps)


def test_an_interrupt_stops_a_prompt(model: TinyModel, expected: F32) -> None:
    """It is raised between steps, long before the end; what comes after it is computed as ever."""
    compiled = on_gpu(model, EVERYTHING)
    batch = model.batch(text_ids(LENGTH))
    run(compiled, batch)  # kernels are compiled at their first launch
    end_s = compiled.busy_s + 60

    def go_on() -> None:
        while compiled.busy_s < end_s:
            compiled.forward(batch)

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            go_on()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert_equal(run(compiled, batch), expected, "after the interrupt")
