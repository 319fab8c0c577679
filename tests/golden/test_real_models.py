"""Real models through the public door: against llama.cpp's answers, and native against float32.

shared/golden/README.md tells how the answers were made; tests/tolerances.py how near ours must be, and why.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tolerances import (
    CONTINUATION_AGREEMENT,
    FORK_GAP,
    GOLDEN_PERPLEXITY_SHARE,
    GOLDEN_TOP_LOGPROB,
    KL_FROM_FLOAT32,
    TOP1_AGREEMENT,
    TOP_LOGPROB_FROM_FLOAT32,
)

import isotherm
from isotherm.evaluation.divergence import divergence
from isotherm.evaluation.perplexity import perplexity
from isotherm.text import TextGenerator

CONTEXT_TOKENS = 1024
SMALL, OTHERS, LARGE = "smollm2-135m", ("gemma3-270m", "qwen2.5-coder-0.5b"), "qwen2.5-coder-1.5b"
SLOW_LARGE = pytest.param(LARGE, marks=pytest.mark.slow)
ALL_QUICK = [SMALL, *OTHERS, SLOW_LARGE]
SMALL_QUICK = [SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS), SLOW_LARGE]


@dataclass(frozen=True)
class Row:
    """One prompt of a golden file."""

    prompt: str
    prompt_ids: list[int]
    continuation_ids: list[int]  # greedy
    top_id: int
    top_logprob: float

    @property
    def top_position(self) -> int:
        """Where in the continuation the likeliest token was recorded: at the end of the first whole character.

        llama.cpp gives no probabilities for a token that ends inside a character, but those of the next one.
        """
        return self.continuation_ids.index(self.top_id)


@dataclass(frozen=True)
class RealModel:
    """A model, loaded, beside what llama.cpp said about it."""

    name: str
    path: Path
    model: TextGenerator
    rows: list[Row]

    def print(self, text: str) -> None:
        print(f"{self.name}: {text}")


@pytest.fixture(scope="module")
def real(request: pytest.FixtureRequest, real_model: Callable[[str], Path], shared_dir: Path) -> Iterator[RealModel]:
    path = real_model(request.param)
    rows = [
        Row(row["prompt"], row["prompt_ids"], row["continuation_ids"], *row["first_top_logprobs"][0])
        for row in json.loads((shared_dir / "golden" / f"{path.stem}.json").read_text())["rows"]
    ]
    assert len(rows) == 8
    with isotherm.load(path, cache_bytes=0, context_tokens=CONTEXT_TOKENS) as model:
        yield RealModel(request.param, path, model, rows)


def continuation_logprobs(model: TextGenerator, row: Row) -> NDArray[np.float64]:
    """Log-probabilities [continuation ids, vocab_size], each after the golden ids before it."""
    first, count = len(row.prompt_ids) - 1, len(row.continuation_ids)
    blocks = model.logit_blocks(row.prompt_ids + row.continuation_ids, range(first, first + count))
    logits = np.concatenate(list(blocks)).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    values: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return values


@pytest.mark.parametrize("real", ALL_QUICK, indirect=True)
def test_prompts_give_the_same_ids(real: RealModel) -> None:
    for row in real.rows:
        assert real.model.prompt_ids(row.prompt, raw=True) == row.prompt_ids, row.prompt


@pytest.mark.parametrize("real", ALL_QUICK, indirect=True)
def test_first_token_is_as_likely(real: RealModel) -> None:
    """As near to llama.cpp as its own notes ask; a row that is not has to be near to float32, the truth above both."""
    far = []
    for row in real.rows:
        ours = continuation_logprobs(real.model, row)[row.top_position, row.top_id]
        real.print(f"{row.prompt[:30]!r} {row.top_logprob:.3f}, ours {ours:.3f}")
        if abs(ours - row.top_logprob) >= GOLDEN_TOP_LOGPROB:
            far.append((row, ours))
    assert len(far) <= 2
    if far:
        with isotherm.load(real.path, backend="reference", context_tokens=CONTEXT_TOKENS) as truth:
            for row, ours in far:
                exact = continuation_logprobs(truth, row)[row.top_position, row.top_id]
                real.print(f"{row.prompt[:30]!r} float32 {exact:.3f}")
                assert abs(ours - exact) < TOP_LOGPROB_FROM_FLOAT32, row.prompt


@pytest.mark.parametrize("real", ALL_QUICK, indirect=True)
def test_continuations_agree_for_a_while(real: RealModel) -> None:
    """A greedy continuation may fork, but late on average, and only where the two tokens are nearly as likely."""
    shares = []
    for row in real.rows:
        logprobs = continuation_logprobs(real.model, row)
        forks = np.flatnonzero(logprobs.argmax(axis=1) != row.continuation_ids)
        first = int(forks[0]) if len(forks) else len(row.continuation_ids)
        shares.append(first / len(row.continuation_ids))
        for fork in forks:
            gap = logprobs[fork].max() - logprobs[fork, row.continuation_ids[fork]]
            assert gap < FORK_GAP, f"{row.prompt!r} after {fork} tokens"
    real.print(f"ids before the first fork {', '.join(f'{share:.0%}' for share in shares)}, mean {np.mean(shares):.0%}")
    assert np.mean(shares) >= CONTINUATION_AGREEMENT


@pytest.mark.parametrize("real", ALL_QUICK, indirect=True)
def test_decode_is_prefill(real: RealModel) -> None:
    """What is generated token by token is what one prefill of the whole finds likeliest."""
    row = real.rows[1]
    ids = list(real.model.generate(row.prompt, raw=True, max_tokens=12).token_ids)
    logits = real.model.logits(row.prompt_ids + ids)[len(row.prompt_ids) - 1 : -1]
    assert logits.argmax(axis=1).tolist() == ids


@pytest.mark.parametrize("real", SMALL_QUICK, indirect=True)
def test_perplexity(real: RealModel, shared_dir: Path) -> None:
    golden = json.loads((shared_dir / "golden" / "ppl.json").read_text())["perplexity"][real.path.name]
    text = (shared_dir / "data" / "wiki.eval.txt").read_text()
    ours = perplexity(real.model, text, window_tokens=512, num_windows=16)
    assert ours.num_windows == 16
    real.print(f"perplexity {golden:.3f}, ours {ours.perplexity:.3f}")
    assert abs(ours.perplexity / golden - 1) < GOLDEN_PERPLEXITY_SHARE


@pytest.mark.parametrize("real", SMALL_QUICK[:-1], indirect=True)
def test_native_is_near_float32(real: RealModel, shared_dir: Path) -> None:
    """What 8-bit activations and a float16 cache cost, over some 128 tokens."""
    text = (shared_dir / "data" / "wiki.eval.txt").read_text()
    with isotherm.load(real.path, backend="reference", context_tokens=CONTEXT_TOKENS) as truth:
        d = divergence(truth, real.model, text, window_tokens=256, num_windows=1)
    real.print(f"mean KL {d.mean_kl:.2e}, 99th percentile {d.p99_kl:.2e}, same top {d.top1_agreement:.1%}")
    assert d.num_tokens > 100
    assert d.mean_kl < KL_FROM_FLOAT32[real.name]
    assert d.top1_agreement > TOP1_AGREEMENT
