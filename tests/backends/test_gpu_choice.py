"""A token chosen by a GPU's shortlist is the one that the sampler chooses by the whole row, its log-probability too."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import open_gpu
from sketch import F32

from isotherm.backends.gpu.device import OpenGpu
from isotherm.backends.gpu.sources import ROW_LANES, choice_source
from isotherm.backends.gpu.storage import MOST_KEPT, SHORTLIST_WORDS, read_shortlist
from isotherm.engine.sampling import Sampler
from isotherm.program.backend import Shortlist
from isotherm.types import SamplingParams

VOCAB = 2500  # past one stretch of the kernel, and no multiple of its lanes


def rows() -> F32:
    """Logits as they come, with ties, with zeros of both signs, with few finite ones, and rows that are unsound."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((10, VOCAB)).astype(np.float32) * 3
    logits[1] = np.round(logits[1])
    logits[2] = 0.0
    logits[2, ::3] = -0.0
    logits[3, 5:] = -np.inf
    logits[4] *= 30  # most weights are zero
    logits[5] = np.abs(logits[5]) * 1e-38
    logits[6, VOCAB - 1] = 50
    logits[7] = -np.inf
    logits[8, 17] = np.nan
    logits[9, 3] = np.inf
    return logits


@cache
def device() -> OpenGpu:
    gpu = open_gpu()
    if not gpu.has_double:
        pytest.skip("the device has no double precision")
    return gpu


def shortlists(logits: F32, kept: list[int]) -> list[Shortlist]:
    gpu, (num_rows, width) = device(), logits.shape
    head = np.array([num_rows, *range(num_rows), *kept], np.int32)
    words = np.zeros((num_rows, SHORTLIST_WORDS), np.uint32)
    buffers = [gpu.upload(part.nbytes, [part.reshape(-1).view(np.uint8)]) for part in (logits, head, words)]
    kernel = gpu.kernel(choice_source(), "shortlist", [*buffers, width, MOST_KEPT])
    gpu.device.launch(kernel, (1, num_rows, 1), ROW_LANES)
    gpu.device.read(buffers[2], 0, words.reshape(-1).view(np.uint8))
    for buffer in buffers:
        gpu.device.release(buffer)
    return [read_shortlist(row) for row in words]


def assert_chosen_alike(params: SamplingParams, logits: F32) -> None:
    sampler, other = Sampler(params, logits.shape[1]), Sampler(params, logits.shape[1])
    assert 0 < sampler.num_needed <= MOST_KEPT
    history = np.zeros(1, np.int32)
    for i, row in enumerate(shortlists(logits, [sampler.num_needed] * len(logits))):
        for position in range(3):
            try:
                wanted = sampler.sample(logits[i], history, position, 5)
            except AssertionError:
                assert not row.is_sound
                with pytest.raises(AssertionError, match="finite"):
                    other.sample_short(row, position, 5)
                continue
            assert row.is_sound
            assert other.sample_short(row, position, 5) == wanted, f"row {i}, position {position}, {params}"


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1.0, top_k=1, seed=1),
        SamplingParams(temperature=0.7, top_k=40, top_p=0.9, seed=2),
        SamplingParams(temperature=2.0, top_k=MOST_KEPT, min_p=0.05, seed=3),
        SamplingParams(temperature=100.0, top_k=7, top_p=0.5, seed=4),
    ],
    ids=str,
)
def test_chosen_as_by_the_whole_row(params: SamplingParams) -> None:
    assert_chosen_alike(params, rows())


@settings(max_examples=30, deadline=None)
@given(
    kept=st.integers(1, MOST_KEPT),
    width=st.integers(MOST_KEPT + 1, 3000),
    num_values=st.integers(1, 400),
    seed=st.integers(0, 2**32),
    top_p=st.sampled_from((1.0, 0.95, 0.3)),
)
def test_any_rows_with_many_ties(kept: int, width: int, num_values: int, seed: int, top_p: float) -> None:
    rng = np.random.default_rng(seed)
    values = np.append(rng.standard_normal(num_values).astype(np.float32) * 10, [-np.inf, 0.0])
    logits = rng.choice(values, (2, width)).astype(np.float32)
    logits[:, 0] = 1.0
    assert_chosen_alike(SamplingParams(temperature=0.8, top_k=kept, top_p=top_p, seed=seed), logits)


def test_a_shortlist_is_the_largest_by_rising_id() -> None:
    logits = rows()[:2]
    for row, values in zip(shortlists(logits, [100, 100]), logits, strict=True):
        order = np.lexsort((np.arange(VOCAB), -values))[:100]
        np.testing.assert_array_equal(row.ids, np.sort(order))
        np.testing.assert_array_equal(row.logits, values[row.ids])
        assert row.peak == values.max()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(num_logprobs=1),
        SamplingParams(repeat_penalty=1.1),
        SamplingParams(presence_penalty=0.5),
        SamplingParams(logit_bias=((3, 1.0),)),
        SamplingParams(temperature=1.0, top_k=VOCAB),
    ],
    ids=str,
)
def test_what_needs_the_whole_row_says_so(params: SamplingParams) -> None:
    assert Sampler(params, VOCAB).num_needed == 0
