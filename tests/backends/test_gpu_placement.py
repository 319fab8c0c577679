"""What fits a GPU: counted before anything is allocated, and exactly what is allocated then."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from on_gpu import open_gpu
from tiny import TinyModel, make_tiny

from isotherm.backends.cpu.limits import CpuLimits
from isotherm.backends.gpu.device import GpuBuffer, OpenGpu
from isotherm.backends.gpu.placement import (
    EVERYTHING,
    Placement,
    Room,
    compile_placed,
    cpu_part,
    layer_of_ops,
    place,
    placed_ops,
    room_of,
)
from isotherm.backends.gpu.sources import Tiling
from isotherm.program import ops
from isotherm.types import QuantType

ENDLESS = 1 << 60
LIMITS = CpuLimits(512, (8, 8), max_tokens=64, max_head_rows=64)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny(tmp_path_factory.mktemp("tiny"), "gemma3", QuantType.Q4_0, num_layers=4, tied_head=False)


def placed(model: TinyModel, num_bytes: int, largest: int = ENDLESS) -> Placement | None:
    limits = CpuLimits(512, (8,) * len(model.lowered.states), max_tokens=64, max_head_rows=64)
    return place(model.lowered, model.packed.entry, limits, Room(num_bytes, largest, Tiling()))


def test_all_layers_where_there_is_room(gemma: TinyModel) -> None:
    found = placed(gemma, ENDLESS)
    assert found is not None
    assert (found.first_layer, found.num_layers) == (EVERYTHING, 4)
    assert placed_ops(gemma.lowered, EVERYTHING) == frozenset(range(len(gemma.lowered.ops)))


def test_none_where_not_even_the_head_fits(gemma: TinyModel) -> None:
    assert placed(gemma, 4096) is None


def test_no_buffer_is_larger_than_a_driver_takes(gemma: TinyModel) -> None:
    """The largest of all are the pages of a layer: a byte less, and no layer is placed."""
    pages_bytes = gemma.lowered.states[0].page_bytes // gemma.lowered.states[0].num_layers * 8
    whole, head = placed(gemma, ENDLESS, pages_bytes), placed(gemma, ENDLESS, pages_bytes - 1)
    assert whole is not None
    assert head is not None
    assert (whole.first_layer, head.first_layer) == (EVERYTHING, 4)


@given(num_bytes=st.integers(0, 4 << 20))
def test_more_room_never_places_less(gemma: TinyModel, num_bytes: int) -> None:
    """What is placed fits, and one byte less than it takes does not hold it."""
    found = placed(gemma, num_bytes)
    if found is None:
        return
    assert found.num_bytes <= num_bytes
    less = placed(gemma, found.num_bytes - 1)
    assert less is None or less.first_layer > found.first_layer
    assert placed(gemma, found.num_bytes) == found


@pytest.mark.parametrize("first_layer", [EVERYTHING, 0, 2, 4])
def test_what_is_counted_is_what_is_allocated(gemma: TinyModel, first_layer: int) -> None:
    class Counting(OpenGpu):
        num_bytes = 0

        def allocate(self, num_bytes: int) -> GpuBuffer:
            self.num_bytes += -(-num_bytes // 4096) * 4096
            return super().allocate(num_bytes)

    open_gpu()
    gpu = Counting(0, None)
    wanted = Placement(first_layer, 0, 0)
    compiler = compile_placed(gpu, gemma.lowered, wanted, gemma.packed, LIMITS)
    for index in sorted(placed_ops(gemma.lowered, first_layer)):
        compiler.step(index)
    found = place(gemma.lowered, gemma.packed.entry, LIMITS, Room(gpu.num_bytes, ENDLESS, Tiling()))
    assert found is not None
    assert (found.first_layer, found.num_bytes) == (first_layer, gpu.num_bytes)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    """Its bytes are there once."""
    tied, untied = (make_tiny(tmp_path, "llama", QuantType.Q4_0, tied_head=is_tied) for is_tied in (True, False))
    less, more = placed(tied, ENDLESS), placed(untied, ENDLESS)
    assert less is not None
    assert more is not None
    embed_bytes = tied.packed.entry("embed").num_bytes
    assert more.num_bytes - less.num_bytes == -(-embed_bytes // 4096) * 4096


def test_layers_without_kernels_stay_on_the_cpu(tmp_path: Path) -> None:
    """Experts are the CPU's, and with them all layers before them."""
    mixtral = make_tiny(tmp_path, "llama", QuantType.Q4_0, num_experts=4)
    found = placed(mixtral, ENDLESS)
    assert found is not None
    assert (found.first_layer, found.num_layers) == (2, 0)
    head = mixtral.lowered.ops[-1]
    assert placed_ops(mixtral.lowered, 2) == {len(mixtral.lowered.ops) - 1}
    assert isinstance(head, ops.QuantLinear)


def test_the_cpu_keeps_what_is_left(gemma: TinyModel) -> None:
    own = cpu_part(gemma.lowered, Placement(1, 3, 0))
    assert layer_of_ops(gemma.lowered)[: len(own.ops)] == [-1, *[0] * (len(own.ops) - 1)]
    assert [state.num_layers for state in own.states] == [0, 1]  # the first layer is a local one
    assert cpu_part(gemma.lowered, None) == gemma.lowered


def test_room_of_a_device() -> None:
    gpu = open_gpu()
    memory_bytes = gpu.facts.memory_bytes
    assert room_of(gpu, None).num_bytes == int(0.9 * memory_bytes)
    assert room_of(gpu, 1000).num_bytes == 1000
    assert room_of(gpu, 2 * memory_bytes).num_bytes == memory_bytes
