"""How far the predictions of one model are from those of another: what quantization or an approximation costs."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isotherm.errors import OptionError
from isotherm.evaluation.windows import cut_windows, log_softmax, scored_rows
from isotherm.text import TextGenerator


@dataclass(frozen=True)
class Divergence:
    """Kullback-Leibler divergence of the model from the reference, KL(P_reference || P_model), in nats per token."""

    mean_kl: float
    median_kl: float
    p99_kl: float
    max_kl: float
    top1_agreement: float  # share of positions where both find the same token most likely
    num_tokens: int


def divergence(
    reference: TextGenerator, model: TextGenerator, text: str, *, window_tokens: int = 512, num_windows: int = 16
) -> Divergence:
    """Compares next-token distributions over the positions that `perplexity` scores.

    Raises OptionError where the two are one object (each holds its lock while it is read) or do not share a tokenizer,
    and for what `perplexity` refuses.
    """
    if reference is model:
        raise OptionError("reference and model are one object; load the model twice to compare it with itself")
    windows = cut_windows(reference, text, window_tokens, num_windows)
    if cut_windows(model, text, window_tokens, num_windows) != windows:
        raise OptionError("the two models split the text into different tokens; their predictions cannot be compared")
    kl: list[float] = []
    num_agreeing = 0
    for index, window in enumerate(windows):
        rows = zip(scored_rows(reference, window, index), scored_rows(model, window, index), strict=True)
        for true_logits, logits in rows:
            if true_logits.shape != logits.shape:
                raise OptionError(f"vocabularies of {len(true_logits)} and {len(logits)} tokens cannot be compared")
            kl.append(kl_divergence(log_softmax(true_logits), log_softmax(logits)))
            num_agreeing += int(true_logits.argmax() == logits.argmax())
    return Divergence(
        mean_kl=float(np.mean(kl)),
        median_kl=float(np.median(kl)),
        p99_kl=float(np.quantile(kl, 0.99)),
        max_kl=float(np.max(kl)),
        top1_agreement=num_agreeing / len(kl),
        num_tokens=len(kl),
    )


def kl_divergence(true_log_p: NDArray[np.float64], log_p: NDArray[np.float64]) -> float:
    """KL(true || other) in nats of two rows of log-probabilities."""
    return float(np.dot(np.exp(true_log_p), true_log_p - log_p))
