"""Real models through the public door: against llama.cpp's answers, and native against float32.

shared/golden/README.md tells how the answers were made; tests/tolerances.py how near ours must be, and why.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tolerances import (
    CONTINUATION_AGREEMENT,
    GOLDEN_PERPLEXITY_SHARE,
    GOLDEN_TOP_LOGPROB,
    KL_FROM_FLOAT32,
    TOP1_AGREEMENT,
)

import isotherm
from isotherm.evaluation.divergence import divergence
from isotherm.evaluation.perplexity import perplexity
from isotherm.text import TextGenerator

CONTEXT_TOKENS = 1024


@dataclass(frozen=True)
class RealModel:
    """A model, loaded, beside what llama.cpp said about it."""

    name: str
    path: Path
    model: TextGenerator
    rows: list[dict[str, Any]]  # of its golden file: see shared/golden/README.md


@pytest.fixture(
    scope="module",
    params=[
        "smollm2-135m",
        "gemma3-270m",
        "qwen2.5-coder-0.5b",
        pytest.param("qwen2.5-coder-1.5b", marks=pytest.mark.slow),
    ],
)
def real(
    request: pytest.FixtureRequest, real_model: Callable[[str], Path], shared_dir: Path
) -> Iterator[RealModel]:
    path = real_model(request.param)
    rows = json.loads((shared_dir / "golden" / f"{path.stem}.json").read_text())["rows"]
    with isotherm.load(path, cache_bytes=0, context_tokens=CONTEXT_TOKENS) as model:
        yield RealModel(request.param, path, model, rows)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max()
    values: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return values


def test_prompts_give_the_same_ids(real: RealModel) -> None:
    for row in real.rows:
        assert real.model.prompt_ids(row["prompt"], raw=True) == row["prompt_ids"], row["prompt"]


def test_first_token_is_as_likely(real: RealModel) -> None:
    for row in real.rows:
        ids = row["prompt_ids"]
        (logits,) = np.concatenate(list(real.model.logit_blocks(ids, [len(ids) - 1])))
        ours = log_softmax(logits)
        token, golden = row["first_top_logprobs"][0]
        print(f"{real.name}: {row['prompt'][:30]!r} {golden:.3f}, ours {ours[token]:.3f}")
        assert abs(ours[token] - golden) < GOLDEN_TOP_LOGPROB, row["prompt"]


def test_continuations_agree_for_a_while(real: RealModel) -> None:
    """A greedy continuation may fork where two tokens are almost tied; on average it does so late."""
    shares = []
    for row in real.rows:
        golden = row["continuation_ids"]
        ours = real.model.generate(row["prompt"], raw=True, max_tokens=len(golden)).token_ids
        fork = next((i for i, pair in enumerate(zip(ours, golden, strict=False)) if pair[0] != pair[1]), len(ours))
        shares.append(fork / len(golden))
    print(f"{real.name}: ids before the first fork {', '.join(f'{share:.0%}' for share in shares)}")
    assert np.mean(shares) >= CONTINUATION_AGREEMENT


def test_perplexity(real: RealModel, shared_dir: Path) -> None:
    golden = json.loads((shared_dir / "golden" / "ppl.json").read_text())["perplexity"][real.path.name]
    text = (shared_dir / "data" / "wiki.eval.txt").read_text()
    ours = perplexity(real.model, text, window_tokens=512, num_windows=16)
    assert ours.num_windows == 16
    print(f"{real.name}: perplexity {golden:.3f}, ours {ours.perplexity:.3f}")
    assert abs(ours.perplexity / golden - 1) < GOLDEN_PERPLEXITY_SHARE


@pytest.mark.slow
def test_native_is_near_float32(real: RealModel, shared_dir: Path) -> None:
    """What 8-bit activations and a float16 cache cost, over some 128 tokens."""
    text = (shared_dir / "data" / "wiki.eval.txt").read_text()
    with isotherm.load(real.path, backend="reference", context_tokens=CONTEXT_TOKENS) as truth:
        d = divergence(truth, real.model, text, window_tokens=256, num_windows=1)
    print(f"{real.name}: mean KL {d.mean_kl:.2e}, 99th percentile {d.p99_kl:.2e}, same top {d.top1_agreement:.1%}")
    assert d.num_tokens > 100
    assert d.mean_kl < KL_FROM_FLOAT32
    assert d.top1_agreement > TOP1_AGREEMENT
