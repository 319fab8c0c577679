"""Weights as the model file stores them, in float32: a vector, or a matrix by slabs of rows; and how large they are."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from isotherm.program.backend import WeightTensor
from isotherm.quantization.layouts import dequantise

F32 = NDArray[np.float32]

_SLAB_ROWS = 256


def float_vector(tensor: WeightTensor) -> F32:
    """[columns], of a tensor of one row."""
    row: F32 = dequantise(tensor.read(), tensor.quant_type, tensor.shape[1])[0]
    return row


def float_slabs(tensor: WeightTensor) -> Iterator[F32]:
    """All rows in order, [at most 256, columns] at a time."""
    rows, columns = tensor.shape
    for start in range(0, rows, _SLAB_ROWS):
        yield dequantise(tensor.read(start, min(rows, start + _SLAB_ROWS)), tensor.quant_type, columns)


def stored_bytes(tensor: WeightTensor) -> int:
    rows, columns = tensor.shape
    return rows * tensor.quant_type.row_bytes(columns)
