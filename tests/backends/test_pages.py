"""KV pages taken out of one compiled Program and put into another: what comes after them is the same, bit for bit."""

import numpy as np
import pytest
from sketch import ISAS
from tiny import TinyModel, make_tiny, run, text_ids

from isotherm.backends.cpu.backend import CompiledCpu, CpuBackend
from isotherm.backends.cpu.limits import CpuLimits
from isotherm.types import KvType, QuantType

LENGTH = 200  # three full pages and some


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    sizes = {"hidden_size": 64, "ffn_size": 128, "num_layers": 3, "head_dim": 48, "sliding_window": 150}
    return make_tiny(tmp_path_factory.mktemp("tiny"), request.param, QuantType.Q8_0, **sizes)


def compiled(tiny: TinyModel, kv_type: KvType, isa: str) -> CompiledCpu:
    program = tiny.lowered.keeping(kv_type)
    limits = CpuLimits(512, (8,) * len(program.states), max_tokens=256, max_head_rows=256)
    return CpuBackend(tiny.packed, isa=isa, num_threads=2).compile(program, limits)


@pytest.mark.parametrize("kv_type", KvType)
def test_pages_move_between_programs_and_instruction_sets(tiny: TinyModel, kv_type: KvType) -> None:
    first, second = compiled(tiny, kv_type, ISAS[0]), compiled(tiny, kv_type, ISAS[-1])
    there, here = np.array([5, 0, 3, 6], np.int32), np.array([2, 7, 4, 1], np.int32)
    ids = text_ids(LENGTH)
    expected = run(first, tiny.batch(ids, pages=there))[192:]
    assert first.page_bytes == tuple(state.page_bytes for state in tiny.lowered.keeping(kv_type).states)
    for group in range(len(tiny.lowered.states)):
        tables = (there[::-1], here[::-1]) if group % 2 else (there, here)  # as TinyModel.sequence has them
        for source, target in zip(*tables, strict=True):
            data = first.read_page(group, int(source))
            assert data.shape == (first.page_bytes[group],)
            second.write_page(group, int(target), data)
            np.testing.assert_array_equal(second.read_page(group, int(target)), data)
    np.testing.assert_array_equal(run(second, tiny.batch(ids[192:], 192, here)), expected)


def test_one_page_is_written_and_no_other(tiny: TinyModel) -> None:
    model = compiled(tiny, KvType.F16, ISAS[-1])
    rng = np.random.default_rng(1)
    pages = [rng.integers(0, 256, model.page_bytes[0], dtype=np.uint8) for _ in range(8)]
    for page in (3, 0, 7, 1, 2, 6, 5, 4, 3):
        model.write_page(0, page, pages[page])
    for page in range(8):
        np.testing.assert_array_equal(model.read_page(0, page), pages[page])


def test_a_page_is_layers_then_heads_then_keys_and_values(tiny: TinyModel) -> None:
    """Against the reference backend, whose cache is plain arrays of the same numbers."""
    native, reference = compiled(tiny, KvType.F16, ISAS[-1]), tiny.reference()
    ids = text_ids(64)
    run(native, tiny.batch(ids))
    run(reference, tiny.batch(ids))
    for group, state in enumerate(tiny.lowered.states):
        shape = (state.num_layers, state.num_kv_heads, 2, state.head_dim * 64)
        halves = native.read_page(group, 0).view(np.float16).reshape(shape)
        keys = halves[:, :, 0].reshape(state.num_layers, state.num_kv_heads, state.head_dim, 64)
        values = halves[:, :, 1].reshape(state.num_layers, state.num_kv_heads, 64, state.head_dim)
        plain = reference.read_page(group, 0).view(np.float32)
        plain = plain.reshape(state.num_layers, 2, 64, state.num_kv_heads, state.head_dim)
        np.testing.assert_array_equal(keys.transpose(0, 3, 1, 2), plain[:, 0])
        np.testing.assert_array_equal(values.transpose(0, 2, 1, 3), plain[:, 1])


def test_pages_of_the_reference_move_too(tiny: TinyModel) -> None:
    first, second = tiny.reference(), tiny.reference()
    ids = text_ids(100)
    expected = run(first, tiny.batch(ids))[64:]
    for group in range(len(tiny.lowered.states)):
        for page in range(2):
            second.write_page(group, page, first.read_page(group, page))
    np.testing.assert_array_equal(run(second, tiny.batch(ids[64:], 64)), expected)


@pytest.mark.parametrize(
    ("group", "page", "more"), [(-1, 0, 0), (9, 0, 0), (0, -1, 0), (0, 8, 0), (0, 0, 1), (0, 0, -1)]
)
def test_what_is_no_page_is_refused(tiny: TinyModel, group: int, page: int, more: int) -> None:
    model = compiled(tiny, KvType.F16, ISAS[-1])
    data = np.zeros(model.page_bytes[0] + more, np.uint8)
    with pytest.raises(ValueError, match=r"page|state group"):
        model._executor.write_page(group, page, data)
    with pytest.raises(ValueError, match=r"page|state group"):
        model._executor.read_page(group, page, data)
