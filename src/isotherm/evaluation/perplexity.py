"""How well a model predicts a text."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from isotherm.evaluation.windows import cut_windows, log_softmax, scored_rows
from isotherm.text import TextGenerator


@dataclass(frozen=True)
class PerplexityResult:
    """perplexity = exp(mean negative log-likelihood of a token)."""

    perplexity: float
    standard_error: float  # of the perplexity, tokens taken as independent
    num_tokens: int  # scored
    num_windows: int  # may be fewer than asked for, in a short text
    window_tokens: int


def perplexity(
    model: TextGenerator,
    text: str,
    *,
    window_tokens: int = 512,
    num_windows: int = 16,
    on_window: Callable[[PerplexityResult, int], None] | None = None,
) -> PerplexityResult:
    """Perplexity of the second halves of the first windows of `text`, comparable with llama.cpp's at equal windows.

    `on_window` gets the result so far and the number of windows there will be, after each window. Raises OptionError
    (the text is shorter than a window, the window longer than the context) and ModelFileError (NaN in the weights).
    """
    windows = cut_windows(model, text, window_tokens, num_windows)
    losses: list[float] = []
    for index, window in enumerate(windows):
        for logits, target in zip(scored_rows(model, window, index), window.targets, strict=True):
            losses.append(-float(log_softmax(logits)[target]))
        if on_window:
            on_window(_result(losses, index + 1, window_tokens), len(windows))
    return _result(losses, len(windows), window_tokens)


def _result(losses: list[float], num_windows: int, window_tokens: int) -> PerplexityResult:
    mean = math.fsum(losses) / len(losses)
    variance = math.fsum((loss - mean) ** 2 for loss in losses) / max(1, len(losses) - 1)
    estimate = math.exp(mean)
    return PerplexityResult(
        perplexity=estimate,
        standard_error=estimate * math.sqrt(variance / len(losses)),
        num_tokens=len(losses),
        num_windows=num_windows,
        window_tokens=window_tokens,
    )
