"""A context costs layers on a GPU: it gives way to them, unless somebody asked for it."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import write_tiny

from isotherm.backends.cpu.limits import CpuLimits
from isotherm.backends.cpu.packing import packed_entries
from isotherm.backends.gpu.placement import Room, place
from isotherm.backends.gpu.sources import Tiling
from isotherm.engine.kv_pages import pages_for
from isotherm.fitting import Fit, Fitting
from isotherm.formats.checkpoint import Checkpoint, open_checkpoint
from isotherm.models import FAMILIES
from isotherm.program.lowering import lower
from isotherm.types import LoadOptions, QuantType

LONGEST = 65536
NO_END = 1 << 60


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path: Path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    checkpoint = open_checkpoint(write_tiny(path, "llama", QuantType.Q4_0, num_layers=8))
    return replace(checkpoint, config=replace(checkpoint.config, context_tokens=LONGEST))


def bytes_for(model: Checkpoint, context_tokens: int, layers_on_gpu: int = 8) -> int:
    """Of a GPU that takes so many layers with this context, and no more."""
    program = lower(FAMILIES[model.config.family](model.config))
    entry = {spec.name: spec for spec, _ in packed_entries(program, model.tensors)}.__getitem__
    limits = CpuLimits(context_tokens, (pages_for(context_tokens),), max_tokens=512)
    room = Room(NO_END, NO_END, Tiling())
    whole = place(program, entry, limits, room)
    assert whole is not None
    low, high = 0, whole.num_bytes
    while low < high:
        middle = (low + high) // 2
        found = place(program, entry, limits, replace(room, num_bytes=middle))
        low, high = (low, middle) if found and found.num_layers >= layers_on_gpu else (middle + 1, high)
    return low


def fit(model: Checkpoint, gpu_bytes: int | None, options: LoadOptions) -> tuple[Fit, list[str]]:
    told: list[str] = []
    program = FAMILIES[model.config.family](model.config)
    room = None if gpu_bytes is None else Room(gpu_bytes, NO_END, Tiling())
    return Fitting(model.config, program, model.tensors, options, 2, room).fit(told.append), told


@pytest.mark.parametrize("context_tokens", [LONGEST, LONGEST // 2, 8192])
def test_the_longest_context_with_which_all_layers_fit(tiny: Checkpoint, context_tokens: int) -> None:
    found, told = fit(tiny, bytes_for(tiny, context_tokens), LoadOptions())
    assert found.context_tokens == context_tokens
    assert found.placement is not None
    assert found.placement.num_layers == 8
    cut = [f"context cut from {LONGEST} to {context_tokens} tokens: the GPU takes 8 layers instead of"]
    assert [line[: len(cut[0])] for line in told] == (cut if context_tokens < LONGEST else [])


def test_a_context_that_was_asked_for_is_kept(tiny: Checkpoint) -> None:
    found, told = fit(tiny, bytes_for(tiny, 8192), LoadOptions(context_tokens=LONGEST))
    assert found.context_tokens == LONGEST
    assert found.placement is not None
    assert found.placement.num_layers < 8
    assert not told


def test_a_layer_more_is_not_worth_a_context(tiny: Checkpoint) -> None:
    """One of eight layers instead of none: a token is an eighth quicker at best."""
    found, told = fit(tiny, bytes_for(tiny, 8192, 1), LoadOptions())
    assert found.context_tokens == LONGEST
    assert not told


def test_without_a_gpu_nothing_gives_way(tiny: Checkpoint) -> None:
    found, told = fit(tiny, None, LoadOptions())
    assert found.context_tokens == LONGEST
    assert not told


def test_a_share_is_of_the_smaller_memory(tiny: Checkpoint) -> None:
    """Of a GPU's only where it has layers; what was asked for is taken."""
    shared = LoadOptions(context_tokens=512, parallel=256, kv_share=0.125)
    page_bytes = sum(state.page_bytes for state in fit(tiny, None, shared)[0].program.states)
    gpu_bytes = bytes_for(tiny, 4096) + 8 * 100 * page_bytes
    small, large, asked = (
        fit(tiny, room, options)[0].limits.num_pages
        for room, options in [
            (gpu_bytes, shared),
            (None, shared),
            (gpu_bytes, replace(shared, kv_bytes=300 * page_bytes)),
        ]
    )
    assert small == (gpu_bytes // 8 // page_bytes,)
    assert large == (256 * 8,)  # all that 256 answers can use
    assert asked == (300,)
    nothing_placed = fit(tiny, 4096, shared)[0]
    assert nothing_placed.placement is None
    assert nothing_placed.limits.num_pages == large
