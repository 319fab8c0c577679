"""A weight that a test makes up."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isotherm.types import QuantType


@dataclass(frozen=True)
class FloatTensor:
    """A WeightTensor of float32 values [rows, columns]."""

    values: NDArray[np.float32]
    quant_type: QuantType = QuantType.F32

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def read(self, row_start: int = 0, row_end: int | None = None) -> NDArray[np.uint8]:
        return self.values[row_start:row_end].view(np.uint8)
