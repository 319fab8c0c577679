"""The engine against the plainest loop there is: the whole prefix recomputed for every token."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_tiny

import isotherm
from isotherm.engine.solo import SoloSequence
from isotherm.errors import ContextOverflow, OptionError
from isotherm.text import TextGenerator
from isotherm.types import QuantType

PROMPT = list(range(5, 45))


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextGenerator:
    path = write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", request.param, QuantType.Q4_1)
    return isotherm.load(path, cache_bytes=0, threads=2)


def greedy(model: TextGenerator, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(np.argmax(model.logits(ids)[-1])))
    return ids


def test_decode_is_the_whole_prefix_recomputed(model: TextGenerator) -> None:
    text = "the rain in spain on the sand"
    ids = model.prompt_ids(text, raw=True)
    expected = greedy(model, ids, 24)[len(ids) :]
    answer = model.generate(text, raw=True, max_tokens=24)
    stopped = min((i for i, token in enumerate(expected) if token in model._tokenizer.end_ids), default=24)
    assert list(answer.token_ids) == expected[:stopped]


def test_a_cache_hit_changes_nothing(model: TextGenerator) -> None:
    first = model.generate("the rain in spain", raw=True, max_tokens=16)
    again = model.generate("the rain in spain", raw=True, max_tokens=16)
    other = model.generate("on the sand", raw=True, max_tokens=4)
    once_more = model.generate("the rain in spain", raw=True, max_tokens=16)
    assert again.num_cached_tokens > 0
    assert first.token_ids == again.token_ids == once_more.token_ids
    assert other.num_tokens > 0


def test_seeds_repeat_and_differ(model: TextGenerator) -> None:
    options = {"raw": True, "max_tokens": 12, "temperature": 1.5}
    one, same, other = (model.generate("the rain", seed=seed, **options).token_ids for seed in (7, 7, 8))
    assert one == same
    assert one != other


def test_a_prompt_that_does_not_fit_says_by_how_much(model: TextGenerator) -> None:
    with pytest.raises(ContextOverflow, match="too many") as caught:
        model.generate("the rain in spain " * 400, raw=True)
    assert caught.value.context_tokens == model.context_tokens
    assert caught.value.num_tokens > model.context_tokens


def test_an_answer_ends_with_the_context(model: TextGenerator) -> None:
    bias = tuple((token, -float("inf")) for token in model._tokenizer.end_ids)
    answer = model.generate("the rain", raw=True, logit_bias=bias)
    assert answer.finish_reason == "length"
    assert answer.num_prompt_tokens + answer.num_tokens == model.context_tokens


def test_logit_blocks_are_the_rows_of_logits(model: TextGenerator) -> None:
    every = model.logits(PROMPT)
    rows = [0, 7, 8, 30, 39]
    blocks = list(model.logit_blocks(PROMPT, rows, block_rows=2))
    assert [len(block) for block in blocks] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(blocks), every[rows])


START = [int(token) for token in np.random.default_rng(3).integers(5, 300, 150)]
SEVERAL = [
    ([*START, *range(20, 60)], range(149, 189)),
    ([*START, *range(20, 40), *range(90, 110)], range(149, 190)),
    ([*START, 7], [149, 150]),
    (START, [10, 140]),  # a row that the text before has computed, without its logits
    (START[:-1], []),
    ([*START, *START, *START, 9], range(400, 451)),
    ([*START[:100], 8, 9], [101]),
]


def test_logits_of_several_texts_are_those_of_each(model: TextGenerator) -> None:
    found: list[list[np.ndarray]] = [[] for _ in SEVERAL]
    for index, block in model.logit_blocks_of_each(SEVERAL, block_rows=16):
        assert len(block) <= 16
        found[index].append(block.copy())
    for (ids, rows), blocks in zip(SEVERAL, found, strict=True):
        expected = model.logits(ids)[list(rows)]
        np.testing.assert_array_equal(np.concatenate([*blocks, expected[:0]]), expected)


def test_what_texts_have_in_common_is_computed_once(model: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    forward = SoloSequence._forward

    def counting(solo: SoloSequence, ids: list[int], logit_rows: Any) -> None:
        computed.append(len(ids))
        forward(solo, ids, logit_rows)

    monkeypatch.setattr(SoloSequence, "_forward", counting)
    for _ in model.logit_blocks_of_each(SEVERAL[:4]):
        pass
    has_window = any(state.window for state in model.program.states)
    assert computed == [190, 41, 2, 150 if has_window else 140]  # a window has passed what position 10 sees


def test_going_back_over_batches_gives_the_same_bits(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "gemma3", QuantType.Q8_0, context_tokens=2048)
    long = [*START, *(int(token) for token in np.random.default_rng(4).integers(5, 300, 900))]
    texts = [(long, [1040]), ([*START, 5, 6], range(149, 152)), ([*long[:700], 7], [700])]
    with isotherm.load(path, cache_bytes=0) as model:
        found = [block.copy() for _, block in model.logit_blocks_of_each(texts)]
        for (ids, rows), logits in zip(texts, found, strict=True):
            np.testing.assert_array_equal(logits, model.logits(ids)[list(rows)])


def test_a_text_among_several_that_does_not_fit_is_refused_before_any_is_computed(model: TextGenerator) -> None:
    with pytest.raises(ContextOverflow):
        next(model.logit_blocks_of_each([(START, [0]), ([5] * 9999, [0])]))


def test_wrong_token_ids_are_refused(model: TextGenerator) -> None:
    with pytest.raises(OptionError, match=r"0\.\."):
        model.logits([1, 10**6])
    with pytest.raises(OptionError, match="no tokens"):
        model.logits([])
