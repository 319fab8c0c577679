"""Cosines and sines of rotary embedding, made in one place so that every backend rotates by the same bits."""

import numpy as np
from numpy.typing import NDArray

from isotherm.types import Rope


def rope_table(rope: Rope, start: int, end: int) -> NDArray[np.float32]:
    """float32 [end - start, dims]: for each position dims / 2 cosines, then dims / 2 sines, rounded from float64."""
    pairs = np.arange(rope.dims // 2, dtype=np.float64)
    frequencies = rope.base ** (-2.0 * pairs / rope.dims) * rope.position_scale
    if rope.factors is not None:
        frequencies = frequencies / np.asarray(rope.factors, dtype=np.float64)
    angles = np.arange(start, end, dtype=np.float64)[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
