"""Perplexity and divergence: closed forms on invented models, a slow twin on tiny ones, golden numbers on real ones."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_models import FAMILIES, write_tiny

import isotherm
from isotherm.errors import ModelFileError, OptionError
from isotherm.evaluation.divergence import divergence, kl_divergence
from isotherm.evaluation.perplexity import PerplexityResult, perplexity
from isotherm.evaluation.windows import cut_windows, log_softmax
from isotherm.text import TextGenerator
from isotherm.types import QuantType

F32 = NDArray[np.float32]
TEXT = "The other hand is on the door and there is nothing in it. " * 12

# window 512, first 16 windows: the file in the shared folder says the same
GOLDEN_TOLERANCE = 0.01


class InventedModel:
    """Token ids are the code points of the text; the logits after a token are a function of its id."""

    def __init__(
        self, logits_after: Callable[[int], F32], *, bos: int | None = None, eos: int | None = None, context: int = 512
    ) -> None:
        self.context_tokens = context
        self.asked: list[tuple[list[int], range, int]] = []
        self._logits_after = logits_after
        self._bos, self._eos = ([] if token is None else [token] for token in (bos, eos))

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        ids = [ord(letter) for letter in text]
        return [*self._bos, *ids, *self._eos] if add_special else ids

    def logit_blocks(self, ids: Sequence[int], rows: range, *, block_rows: int) -> Iterator[F32]:
        self.asked.append((list(ids), rows, block_rows))
        for start in range(0, len(rows), block_rows):
            yield np.stack([self._logits_after(ids[row]) for row in rows[start : start + block_rows]])


def invented(logits_after: Callable[[int], F32], **options: Any) -> TextGenerator:
    return cast(TextGenerator, InventedModel(logits_after, **options))


def uniform(_token: int) -> F32:
    return np.zeros(256, np.float32)


def random_table(seed: int) -> Callable[[int], F32]:
    table = np.random.default_rng(seed).normal(0, 3, (256, 256)).astype(np.float32)
    return lambda token: table[token]


def test_uniform_logits_give_the_size_of_the_vocabulary() -> None:
    result = perplexity(invented(uniform), "a" * 100, window_tokens=20, num_windows=3)
    assert result == PerplexityResult(pytest.approx(256.0), 0.0, num_tokens=27, num_windows=3, window_tokens=20)  # type: ignore[arg-type]


def test_a_certain_prediction_has_perplexity_one() -> None:
    def next_letter(token: int) -> F32:
        logits = np.full(256, -200, np.float32)
        logits[ord("b") if token == ord("a") else ord("a")] = 200
        return logits

    assert perplexity(invented(next_letter), "ab" * 60, window_tokens=40).perplexity == 1.0


def test_logits_beyond_the_range_of_exp_are_no_trouble() -> None:
    logits = np.array([3e38, -3e38, 0], np.float32)
    assert log_softmax(logits)[0] == 0
    assert np.allclose(np.exp(log_softmax(np.full(4, 1e30, np.float32))), 0.25)


@given(seed=st.integers(0, 99), window=st.integers(4, 40), wanted=st.integers(1, 6), bos=st.sampled_from([None, 2]))
def test_perplexity_agrees_with_the_rule_written_out(seed: int, window: int, wanted: int, bos: int | None) -> None:
    text = "".join(chr(code) for code in np.random.default_rng(seed).integers(97, 123, 150))
    table = random_table(seed)
    result = perplexity(invented(table, bos=bos), text, window_tokens=window, num_windows=wanted)

    # llama.cpp, tools/perplexity: windows side by side, BOS over the first token, rows n/2 .. n-2 predict the next one
    ids = ([] if bos is None else [bos]) + [ord(letter) for letter in text]
    losses = []
    for start in range(0, min(wanted, len(ids) // window) * window, window):
        part = ids[start : start + window]
        for row in range(window // 2, window - 1):
            seen = bos if row == 0 and bos is not None else part[row]
            p = np.exp(table(seen).astype(np.float64))
            losses.append(-math.log(p[part[row + 1]] / p.sum()))
    assert result.num_tokens == len(losses)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-9)
    error = np.std(losses, ddof=1) / math.sqrt(len(losses)) if len(losses) > 1 else 0
    assert result.standard_error == pytest.approx(result.perplexity * error, rel=1e-6, abs=1e-9)


def test_bos_stands_at_the_start_of_every_window_where_the_model_asks_for_it() -> None:
    with_bos = cut_windows(invented(uniform, bos=2), "abcdefghijkl", 5, 9)
    assert [window.token_ids for window in with_bos] == [(2, 97, 98, 99, 100), (2, *range(102, 106))]
    assert [window.targets for window in with_bos] == [(99, 100), (104, 105)]
    without = cut_windows(invented(uniform, eos=3), "abcdefghijkl", 5, 9)  # EOS alone is no BOS
    assert [window.token_ids for window in without] == [tuple(range(97, 102)), tuple(range(102, 107))]


def test_only_the_scored_rows_are_asked_for_and_few_at_once() -> None:
    model = InventedModel(uniform)
    perplexity(cast(TextGenerator, model), "a" * 600, window_tokens=512)
    assert [(rows, block_rows) for _, rows, block_rows in model.asked] == [(range(256, 511), 64)]


def test_progress_is_told_after_each_window() -> None:
    told: list[tuple[PerplexityResult, int]] = []
    result = perplexity(
        invented(random_table(1)), "abc" * 20, window_tokens=20, on_window=lambda *news: told.append(news)
    )
    assert [(so_far.num_windows, total) for so_far, total in told] == [(1, 3), (2, 3), (3, 3)]
    assert told[-1][0] == result


@pytest.mark.parametrize(
    ("text", "window", "count", "message"),
    [
        ("short", 20, 1, "fewer than one window"),
        ("a" * 900, 600, 1, "does not fit the context of 512"),
        ("a" * 900, 3, 1, "it takes at least one, of 4 or more"),
        ("a" * 900, 20, 0, "it takes at least one"),
    ],
)
def test_impossible_windows_are_refused(text: str, window: int, count: int, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        perplexity(invented(uniform), text, window_tokens=window, num_windows=count)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_told(bad: float) -> None:
    def broken(_token: int) -> F32:
        return np.array([0, bad] * 128, np.float32)

    with pytest.raises(ModelFileError, match="window 0 has logits that are no finite numbers"):
        perplexity(invented(broken), "a" * 40, window_tokens=20)


def test_divergence_in_closed_form() -> None:
    # P = (3/4, 1/4, ~0 ..) and Q = (1/4, 3/4, ~0 ..): KL = 3/4 ln 3 + 1/4 ln 1/3
    def two(p: float) -> Callable[[int], F32]:
        logits = np.full(256, -100, np.float32)
        logits[:2] = math.log(p), math.log(1 - p)
        return lambda _token: logits

    result = divergence(invented(two(0.75)), invented(two(0.25)), "a" * 60, window_tokens=20)
    expected = 0.5 * math.log(3)
    assert (result.mean_kl, result.median_kl, result.p99_kl, result.max_kl) == pytest.approx((expected,) * 4)
    assert (result.top1_agreement, result.num_tokens) == (0, 27)
    same = divergence(invented(two(0.75)), invented(two(0.75)), "a" * 60, window_tokens=20)
    assert same.mean_kl == pytest.approx(0, abs=1e-15)
    assert same.top1_agreement == 1


@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=20), st.integers(0, 9))
def test_kl_is_never_negative_and_zero_for_equals(logits: list[float], seed: int) -> None:
    first = np.array(logits, np.float32)
    second = first + np.random.default_rng(seed).normal(0, 2, len(first)).astype(np.float32)
    assert kl_divergence(log_softmax(first), log_softmax(second)) >= -1e-12
    assert kl_divergence(log_softmax(first), log_softmax(first)) == 0


def test_divergence_refuses_what_cannot_be_compared() -> None:
    model = invented(uniform)
    with pytest.raises(OptionError, match="one object"):
        divergence(model, model, "a" * 40, window_tokens=20)
    with pytest.raises(OptionError, match="different tokens"):
        divergence(model, invented(uniform, bos=2), "a" * 40, window_tokens=20)
    with pytest.raises(OptionError, match="vocabularies of 256 and 255"):
        divergence(model, invented(lambda _token: np.zeros(255, np.float32)), "a" * 40, window_tokens=20)


@pytest.mark.parametrize("family", FAMILIES)
def test_native_predicts_what_the_reference_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path))
    # all experts: what is rounded otherwise would choose, here and there, another
    path = write_tiny(tmp_path / "tiny.gguf", family, QuantType.Q4_0, num_experts_used=6)
    with isotherm.load(path, threads=1) as native, isotherm.load(path, backend="reference") as reference:
        found = divergence(reference, native, TEXT, window_tokens=64, num_windows=2)
        native_result = perplexity(native, TEXT, window_tokens=64, num_windows=2)
        true_result = perplexity(reference, TEXT, window_tokens=64, num_windows=2)
        # the reference's own logits of a whole window, scored with float64 at once
        ids = reference.tokenize(TEXT, add_special=True)[:64]
        logits = reference.logits(ids).astype(np.float64)
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    first_window = [-math.log(probabilities[row, ids[row + 1]]) for row in range(32, 63)]
    with isotherm.load(path, backend="reference") as reference:
        alone = perplexity(reference, TEXT, window_tokens=64, num_windows=1)
    assert alone.perplexity == pytest.approx(math.exp(np.mean(first_window)), rel=1e-6)
    assert found.mean_kl < 1e-3
    assert found.top1_agreement > 0.9
    assert native_result.perplexity == pytest.approx(true_result.perplexity, rel=0.01)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("smollm2-135m", "smollm2-135m-instruct.Q4_1.gguf"),
        pytest.param("gemma3-270m", "gemma3-270m.Q4_K_M.gguf", marks=pytest.mark.slow),
        pytest.param("qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b-instruct.Q4_K_M.gguf", marks=pytest.mark.slow),
    ],
)
def test_perplexity_of_real_models_is_that_of_llama_cpp(
    real_model: Callable[[str], Path], shared_dir: Path, name: str, file: str
) -> None:
    golden = json.loads((shared_dir / "golden" / "ppl.json").read_text(encoding="utf-8"))["perplexity"][file]
    text = (shared_dir / "data" / "wiki.eval.txt").read_text(encoding="utf-8")
    with isotherm.load(real_model(name), context_tokens=512) as model:
        found = perplexity(model, text)
    assert found.num_tokens == 16 * 255
    assert found.perplexity == pytest.approx(golden, rel=GOLDEN_TOLERANCE)
