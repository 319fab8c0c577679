"""Windows of a text to score, cut the way llama.cpp's perplexity tool cuts them, so that numbers compare."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isotherm.errors import ModelFileError, OptionError
from isotherm.text import TextGenerator

_MIN_WINDOW_TOKENS = 4  # so that the second half holds something to predict
BLOCK_ROWS = 64  # logit rows in memory at once


@dataclass(frozen=True)
class Window:
    """`token_ids` are the model's input. The logits after the tokens at `rows` predict `targets`."""

    token_ids: tuple[int, ...]
    rows: range
    targets: tuple[int, ...]


def cut_windows(model: TextGenerator, text: str, window_tokens: int, num_windows: int) -> list[Window]:
    """The first `num_windows` windows of `text`, fewer where it is shorter; the second half of each is scored.

    The text is tokenized once, with BOS where the model asks for it; there BOS also replaces the first token of every
    window. Raises OptionError: a window longer than the context, a text shorter than a window.
    """
    if window_tokens < _MIN_WINDOW_TOKENS or num_windows < 1:
        raise OptionError(
            f"{num_windows} windows of {window_tokens} tokens: it takes at least one, of {_MIN_WINDOW_TOKENS} or more"
        )
    if window_tokens > model.context_tokens:
        raise OptionError(
            f"a window of {window_tokens} tokens does not fit the context of {model.context_tokens}; "
            "take a shorter window or load the model with more context_tokens"
        )
    token_ids = model.tokenize(text, add_special=True)
    if len(token_ids) < window_tokens:
        raise OptionError(
            f"the text has {len(token_ids)} tokens, fewer than one window of {window_tokens}; "
            "take a longer text or a shorter window"
        )
    bos = leading_special(model)
    starts = range(0, len(token_ids) - window_tokens + 1, window_tokens)[:num_windows]
    return [_window(token_ids[start : start + window_tokens], bos) for start in starts]


def scored_rows(model: TextGenerator, window: Window, index: int) -> Iterator[NDArray[np.float32]]:
    """Logits [vocab_size] of each scored row in turn. Raises ModelFileError where one is not a finite number."""
    for block in model.logit_blocks(window.token_ids, window.rows, block_rows=BLOCK_ROWS):
        check_finite(block, f"window {index}")
        yield from block


def check_finite(logits: NDArray[np.float32], what: str) -> None:
    """Raises ModelFileError where one is not a finite number; `what` has them."""
    if not np.isfinite(logits).all():
        raise ModelFileError(
            f"{what} has logits that are no finite numbers: the weights hold NaN or infinity; "
            "fetch the model again or take another quantization"
        )


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural logarithms of the probabilities of one row [vocab_size], in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def _window(token_ids: list[int], bos: list[int]) -> Window:
    first = len(token_ids) // 2
    rows = range(first, len(token_ids) - 1)
    return Window((*bos, *token_ids[len(bos) :]), rows, tuple(token_ids[first + 1 :]))


def leading_special(model: TextGenerator) -> list[int]:
    """BOS in a list, or an empty one; found by comparison, for a model may add EOS alone."""
    plain, special = model.tokenize("a"), model.tokenize("a", add_special=True)
    return special[:1] if special[1 : 1 + len(plain)] == plain else []
