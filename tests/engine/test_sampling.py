"""The native sampler against a slow twin in NumPy, whose random numbers are NumPy's own Philox."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isotherm.engine.sampling import Sampler, check_sampling
from isotherm.errors import OptionError
from isotherm.types import SamplingParams

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
NO_HISTORY = np.zeros(0, dtype=np.int32)


def uniform(seed: int, sequence: int, position: int) -> float:
    # NumPy's generator adds one to its 256-bit counter before it draws.
    counter = ((sequence << 64) + position - 1) % 2**256
    word = int(np.random.Philox(key=seed, counter=counter).random_raw())
    return (word >> 11) * 2.0**-53


def adjusted(params: SamplingParams, logits: Floats, history: Ids) -> Floats:
    values = logits.copy()
    for token_id, bias in params.logit_bias:
        values[token_id] = np.float32(float(values[token_id]) + bias)
    seen = history if params.penalty_tokens < 0 else history[max(0, len(history) - params.penalty_tokens) :]
    for token_id, count in Counter(seen.tolist()).items():
        value = float(values[token_id])
        value = value / params.repeat_penalty if value > 0 else value * params.repeat_penalty
        values[token_id] = np.float32(value - params.frequency_penalty * count - params.presence_penalty)
    return values


def survivors(params: SamplingParams, values: Floats) -> npt.NDArray[np.intp]:
    order = np.lexsort((np.arange(len(values)), -values))
    order = order[values[order] > -np.inf]
    exact = values.astype(np.float64)
    best = exact[order[0]]
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.top_p < 1:
        reached = np.cumsum(np.exp(exact[order] - best))
        total = reached[-1]
        order = order[: int(np.searchsorted(reached, params.top_p * total)) + 1]
    if params.min_p > 0:
        order = order[exact[order] >= best + math.log(params.min_p)]
    return np.sort(order)


def twin(params: SamplingParams, logits: Floats, history: Ids, position: int, sequence: int) -> int:
    values = adjusted(params, logits, history)
    if params.temperature == 0:
        return int(np.argmax(values))
    assert params.seed is not None
    ids = survivors(params, values)
    exact = values[ids].astype(np.float64)
    reached = np.cumsum(np.exp((exact - exact.max()) / params.temperature))
    target = uniform(params.seed, sequence, position) * reached[-1]
    return int(ids[int(np.searchsorted(reached, target, side="right"))])


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    exact = logits.astype(np.float64) - float(logits.max())
    shifted: npt.NDArray[np.float64] = exact - np.log(np.exp(exact).sum())
    return shifted


def some_logits(rng: np.random.Generator, vocab_size: int, kind: str) -> Floats:
    if kind == "ties":
        return (rng.integers(-4, 5, vocab_size) * 0.5).astype(np.float32)
    logits = (rng.normal(size=vocab_size) * 3).astype(np.float32)
    if kind == "holes":
        logits[rng.random(vocab_size) < 0.3] = -np.inf
        logits[rng.integers(vocab_size)] = 1.0
    elif kind == "peak":
        logits[rng.integers(vocab_size)] = 60.0
    return logits


@st.composite
def params_of(draw: st.DrawFn, vocab_size: int) -> SamplingParams:
    def neutral_or(neutral: float, low: float, high: float) -> float:
        return draw(st.one_of(st.just(neutral), st.floats(low, high)))

    ids = draw(st.lists(st.integers(0, vocab_size - 1), max_size=4, unique=True))
    return SamplingParams(
        temperature=neutral_or(0.0, 0.05, 3.0),
        top_k=draw(st.one_of(st.just(0), st.integers(0, 400))),
        top_p=neutral_or(1.0, 0.01, 1.0),
        min_p=neutral_or(0.0, 0.001, 1.0),
        repeat_penalty=neutral_or(1.0, 0.5, 2.0),
        presence_penalty=neutral_or(0.0, -2.0, 2.0),
        frequency_penalty=neutral_or(0.0, -2.0, 2.0),
        penalty_tokens=draw(st.sampled_from([-1, 0, 1, 5, 64])),
        logit_bias=tuple((i, draw(st.one_of(st.just(-math.inf), st.floats(-5, 5)))) for i in ids),
        seed=draw(st.integers(0, 2**64 - 1)),
    )


@settings(max_examples=600, derandomize=True, deadline=None)
@given(data=st.data())
def test_chooses_the_token_of_the_slow_twin(data: st.DataObject) -> None:
    vocab_size = data.draw(st.integers(1, 300))
    params = data.draw(params_of(vocab_size))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    logits = some_logits(rng, vocab_size, data.draw(st.sampled_from(["normal", "ties", "holes", "peak"])))
    history = rng.integers(0, vocab_size, data.draw(st.integers(0, 100))).astype(np.int32)
    position, sequence = data.draw(st.integers(0, 2**40)), data.draw(st.integers(0, 2**40))
    sampler = Sampler(params, vocab_size)
    if np.all(adjusted(params, logits, history) == -np.inf):
        with pytest.raises(OptionError, match="bans every token"):
            sampler.sample(logits, history, position, sequence)
        return
    token = sampler.sample(logits, history, position, sequence)
    assert token.token_id == twin(params, logits, history, position, sequence)
    assert token.logprob == pytest.approx(log_softmax(logits)[token.token_id], abs=1e-6)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=5),
        SamplingParams(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05, seed=6),
        SamplingParams(temperature=1.5, top_p=0.99, repeat_penalty=1.1, penalty_tokens=-1, seed=7),
        SamplingParams(temperature=1.0, top_k=100_000, top_p=0.9999, seed=8),
    ],
)
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_a_large_vocabulary(params: SamplingParams, kind: str) -> None:
    vocab_size = 151_936
    rng = np.random.default_rng(3)
    logits = some_logits(rng, vocab_size, kind)
    history = rng.integers(0, vocab_size, 500).astype(np.int32)
    sampler = Sampler(params, vocab_size)
    for position in range(5):
        assert sampler.sample(logits, history, position, 0).token_id == twin(params, logits, history, position, 0)


def test_equal_logits_lay_the_random_number_bare() -> None:
    vocab_size = 100_000
    sampler = Sampler(SamplingParams(temperature=1.0, seed=2**64 - 1), vocab_size)
    logits = np.zeros(vocab_size, dtype=np.float32)
    for position, sequence in [(0, 0), (1, 0), (0, 1), (2**64 - 1, 2**64 - 1)]:
        expected = int(uniform(2**64 - 1, sequence, position) * vocab_size)
        assert sampler.sample(logits, NO_HISTORY, position, sequence).token_id == expected


def chi_square(counts: npt.NDArray[np.int64], expected: npt.NDArray[np.float64]) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_draws_follow_the_distribution() -> None:
    logits = np.array([0.0, 1.0, -1.0, 2.0, 0.5, -0.5], dtype=np.float32)
    sampler = Sampler(SamplingParams(temperature=0.7, seed=11), len(logits))
    num_draws = 12_000
    along = [sampler.sample(logits, NO_HISTORY, position, 0).token_id for position in range(num_draws)]
    across = [sampler.sample(logits, NO_HISTORY, 0, sequence).token_id for sequence in range(num_draws)]
    weights = np.exp(logits.astype(np.float64) / 0.7)
    shares = weights / weights.sum()
    for draws in (along, across):
        assert chi_square(np.bincount(draws, minlength=6), shares * num_draws) < 20.5  # 99.9 % of 5 degrees of freedom
    pairs = np.bincount([6 * a + b for a, b in zip(along[::2], along[1::2], strict=True)], minlength=36)
    assert chi_square(pairs, np.outer(shares, shares).ravel() * num_draws / 2) < 66.6  # of 35


def test_the_answer_depends_on_seed_sequence_and_position_alone() -> None:
    rng = np.random.default_rng(0)
    logits = some_logits(rng, 1000, "normal")
    params = SamplingParams(temperature=1.0, seed=42)
    keys = [(position, sequence) for position in range(20) for sequence in range(3)]
    sampler = Sampler(params, 1000)
    forward = [sampler.sample(logits, NO_HISTORY, *key).token_id for key in keys]
    alone = [Sampler(params, 1000).sample(logits, NO_HISTORY, *key).token_id for key in reversed(keys)]
    assert forward == alone[::-1]
    other_seed = Sampler(replace(params, seed=43), 1000)
    assert forward != [other_seed.sample(logits, NO_HISTORY, *key).token_id for key in keys]


@settings(max_examples=200, derandomize=True, deadline=None)
@given(data=st.data())
def test_what_is_not_allowed_is_banned_as_by_a_bias(data: st.DataObject) -> None:
    vocab_size = data.draw(st.integers(1, 300))
    params = replace(data.draw(params_of(vocab_size)), num_logprobs=5, logit_bias=())
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    logits = some_logits(rng, vocab_size, data.draw(st.sampled_from(["normal", "ties", "holes", "peak"])))
    history = rng.integers(0, vocab_size, 20).astype(np.int32)
    bits = rng.random(-(-vocab_size // 32) * 32) < data.draw(st.sampled_from([0.02, 0.5, 1.0]))
    allowed = np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)  # with bits beyond the vocabulary
    banned = tuple((token_id, -math.inf) for token_id in np.flatnonzero(~bits[:vocab_size]).tolist())
    sampler, twin = Sampler(params, vocab_size), Sampler(replace(params, logit_bias=banned), vocab_size)
    if np.all(logits[bits[:vocab_size]] == -np.inf):
        with pytest.raises(OptionError, match="logit_bias and the grammar together ban every token"):
            sampler.sample(logits, history, 3, 0, allowed)
        return
    assert sampler.sample(logits, history, 3, 0, allowed) == twin.sample(logits, history, 3, 0)


def test_a_missing_seed_is_drawn_once() -> None:
    params = SamplingParams(temperature=1.0)
    first, second = Sampler(params, 1000), Sampler(params, 1000)
    assert first.seed != second.seed
    again = Sampler(replace(params, seed=first.seed), 1000)
    logits = np.zeros(1000, dtype=np.float32)
    for position in range(10):
        assert first.sample(logits, NO_HISTORY, position, 0) == again.sample(logits, NO_HISTORY, position, 0)


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits = np.array([1.0, 3.0, 3.0, -np.inf, 0.0], dtype=np.float32)
    params = SamplingParams(logit_bias=((1, -math.inf), (4, 50.0)), num_logprobs=5)
    token = Sampler(params, 5).sample(logits, NO_HISTORY, 0, 0)
    expected = log_softmax(logits)
    assert token.token_id == 4
    assert token.logprob == pytest.approx(expected[4], abs=1e-6)
    assert [token_id for token_id, _ in token.top_logprobs] == [1, 2, 0, 4]  # equal values by id; what cannot be is out
    assert [value for _, value in token.top_logprobs] == pytest.approx(expected[[1, 2, 0, 4]], abs=1e-6)


@pytest.mark.parametrize("num_logprobs", [1, 7, 40, 2000])
def test_top_logprobs_are_the_largest(num_logprobs: int) -> None:
    logits = some_logits(np.random.default_rng(9), 1500, "ties")
    token = Sampler(SamplingParams(num_logprobs=num_logprobs), 1500).sample(logits, NO_HISTORY, 0, 0)
    order = np.lexsort((np.arange(1500), -logits))[:num_logprobs]
    assert [token_id for token_id, _ in token.top_logprobs] == order.tolist()


def test_the_bits_are_the_same_everywhere() -> None:
    logits = ((np.arange(1000) * 37) % 101 / np.float32(8)).astype(np.float32)
    token = Sampler(SamplingParams(temperature=0.9, top_p=0.9, seed=1), 1000).sample(logits, NO_HISTORY, 17, 2)
    assert (token.token_id, token.logprob.hex()) == (947, "-0x1.540f9eda34f4fp+2")


@pytest.mark.parametrize("value", [3.4e38, -3.4e38])
@pytest.mark.parametrize("temperature", [0.0, 1e-300, 100.0])
def test_extreme_finite_values_stay_finite(value: float, temperature: float) -> None:
    params = SamplingParams(
        temperature=temperature, repeat_penalty=0.01, frequency_penalty=-100.0, logit_bias=((0, 1e6),), seed=0
    )
    logits = np.array([value, value, 0.0], dtype=np.float32)
    token = Sampler(params, 3).sample(logits, np.array([0, 0, 1], dtype=np.int32), 0, 0)
    assert math.isfinite(token.logprob)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_logits_are_our_own_mistake(bad: float) -> None:
    sampler = Sampler(SamplingParams(), 100)
    logits = np.zeros(100, dtype=np.float32)
    logits[77] = bad
    with pytest.raises(AssertionError, match="logits must be finite"):
        sampler.sample(logits, NO_HISTORY, 0, 0)
    with pytest.raises(AssertionError, match="logits must be finite"):
        sampler.sample(np.full(100, -np.inf, dtype=np.float32), NO_HISTORY, 0, 0)
    logits[77] = 1.0
    assert sampler.sample(logits, NO_HISTORY, 0, 0).token_id == 77  # and the sampler goes on


def test_arrays_that_do_not_fit_are_refused() -> None:
    sampler = Sampler(SamplingParams(repeat_penalty=2.0), 10)
    logits = np.zeros(10, dtype=np.float32)
    with pytest.raises(ValueError, match="one row"):
        sampler.sample(logits[:9], NO_HISTORY, 0, 0)
    for num_words in (0, 2):
        with pytest.raises(ValueError, match="words of 32"):
            sampler.sample(logits, NO_HISTORY, 0, 0, np.zeros(num_words, dtype=np.uint32))
    for outside in (-1, 10):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            sampler.sample(logits, np.array([0, outside], dtype=np.int32), 0, 0)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(temperature=-0.1), "temperature is -0.1; it must be a number from 0 to 100"),
        (SamplingParams(temperature=math.nan), "temperature is nan"),
        (SamplingParams(temperature=True), "temperature is True"),
        (SamplingParams(top_p=0.0), "top_p is 0.0"),
        (SamplingParams(top_p=1.1), "top_p is 1.1"),
        (SamplingParams(min_p=-1.0), "min_p is -1.0"),
        (SamplingParams(repeat_penalty=0.0), "repeat_penalty is 0.0"),
        (SamplingParams(presence_penalty=math.inf), "presence_penalty is inf"),
        (SamplingParams(frequency_penalty=-101.0), "frequency_penalty is -101.0"),
        (SamplingParams(top_k=-1), "top_k is -1; it must be a whole number from 0"),
        (SamplingParams(top_k=2.5), "top_k is 2.5"),  # type: ignore[arg-type]
        (SamplingParams(penalty_tokens=-2), "penalty_tokens is -2"),
        (SamplingParams(num_logprobs=-1), "num_logprobs is -1"),
        (SamplingParams(seed=2**64), "seed is"),
        (SamplingParams(seed=-1), "seed is -1"),
        (SamplingParams(sequence=-1), "sequence is -1; it must be a whole number from 0"),
        (SamplingParams(sequence=2**64), "sequence is"),
        (SamplingParams(logit_bias=((10, 1.0),)), "a token id of logit_bias is 10; .* from 0 to 9"),
        (SamplingParams(logit_bias=((1, math.nan),)), "logit_bias of token 1 is nan"),
        (SamplingParams(logit_bias=((1, math.inf),)), "logit_bias of token 1 is inf"),
        (SamplingParams(logit_bias=((1, 1.0), (1, 2.0))), "token 1 twice"),
    ],
)
def test_a_value_out_of_range_is_named(params: SamplingParams, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        check_sampling(params, 10)
