"""A matrix that a file stores transposed, a neuron a row, read as rows of outputs."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isotherm.formats.gguf import GgufTensor
from isotherm.quantization.layouts import FLOAT_BITS, dequantise, quantise_q8_0
from isotherm.types import QuantType

_SLAB_BYTES = 16 << 20  # of neurons that are decoded at once
_BLOCK = 32  # elements of a block of Q4_0 and of Q8_0


@dataclass(frozen=True)
class ByNeuron:
    """stored: [neurons, outputs] in a float type or in Q4_0, a multiple of 32 neurons then; read as [outputs, neurons].

    Floats move unchanged. A scale of Q4_0 is of 32 outputs of one neuron, and kernels need scales of 32 neurons of one
    output: no lossless form has these, so that the values are rounded to Q8_0 along the neurons.
    """

    stored: GgufTensor

    @property
    def quant_type(self) -> QuantType:
        """What rows are read as."""
        return self.stored.quant_type if self.stored.quant_type.is_float else QuantType.Q8_0

    def read(self, row_start: int = 0, row_end: int | None = None) -> NDArray[np.uint8]:
        """Outputs [row_start, row_end) as uint8 [rows, row_bytes]: one pass over the stored tensor, slab by slab."""
        num_neurons, num_outputs = self.stored.num_rows, self.stored.dims[0]
        row_end = num_outputs if row_end is None else row_end
        assert 0 <= row_start <= row_end <= num_outputs
        out = np.empty((row_end - row_start, self.quant_type.row_bytes(num_neurons)), np.uint8)
        step = max(1, _SLAB_BYTES // (4 * num_outputs) // _BLOCK) * _BLOCK
        for first in range(0, num_neurons, step):
            last = min(first + step, num_neurons)
            raw = self.stored.read(first, last)
            place = slice(self.quant_type.row_bytes(first), self.quant_type.row_bytes(last))
            out[:, place] = self._turned(raw, row_start, row_end)
        return out

    def _turned(self, raw: NDArray[np.uint8], row_start: int, row_end: int) -> NDArray[np.uint8]:
        """raw: some neurons. Their columns of outputs [row_start, row_end), as bytes."""
        stored_type = self.stored.quant_type
        if stored_type.is_float:
            values = raw.view(FLOAT_BITS[stored_type])[:, row_start:row_end]
            return np.ascontiguousarray(values.T).view(np.uint8)
        blocks = slice(row_start // _BLOCK, -(-row_end // _BLOCK))
        needed = raw.reshape(len(raw), -1, stored_type.block_bytes)[:, blocks]
        num_columns = needed.shape[1] * _BLOCK
        with np.errstate(invalid="ignore"):  # a scale that is no number makes weights that are none: seen later
            decoded = dequantise(np.ascontiguousarray(needed).reshape(len(raw), -1), stored_type, num_columns)
        skipped = blocks.start * _BLOCK
        return quantise_q8_0(np.ascontiguousarray(decoded[:, row_start - skipped : row_end - skipped].T))
