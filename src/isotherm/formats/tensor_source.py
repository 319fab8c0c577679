"""A weight under its canonical name, read in canonical row order whatever the order in the file."""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from isotherm.types import QuantType


@dataclass(frozen=True)
class InterleavedHeads:
    """Heads stored with the two rows of a rotary pair side by side; canonical order keeps them in halves.

        stored     a0 b0 a1 b1 a2 b2 rest      pair i is rows 2i, 2i + 1
        canonical  a0 a1 a2 b0 b1 b2 rest      pair i is rows i, i + rope_dims / 2

    Converters to GGUF store the q and k of `llama` files so; rows of a head past `rope_dims` do not turn and stay.
    """

    head_dim: int
    rope_dims: int

    def stored_rows(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """Where canonical `rows` stand in the file."""
        half = self.rope_dims // 2
        row = rows % self.head_dim  # in its head
        turned = np.where(row < half, 2 * row, 2 * (row - half) + 1)
        return rows - row + np.where(row < self.rope_dims, turned, row)


class StoredRows(Protocol):
    """What a file has of a matrix: a `GgufTensor`, or one that is turned while it is read."""

    def read(self, row_start: int = 0, row_end: int | None = None) -> NDArray[np.uint8]:
        """Rows [row_start, row_end) as uint8 [rows, row_bytes]."""


@dataclass(frozen=True)
class TensorSource:
    """A weight [rows, columns] of the model; a vector of n elements is one row, [1, n]."""

    name: str  # canonical
    quant_type: QuantType
    shape: tuple[int, int]  # rows, columns
    _stored: StoredRows = field(repr=False)
    _order: InterleavedHeads | None = None
    _first_row: int = 0  # of a stored matrix that holds more than this one; in its order, where `_order` is None

    @property
    def row_bytes(self) -> int:
        return self.quant_type.row_bytes(self.shape[1])

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.row_bytes

    def read(self, row_start: int = 0, row_end: int | None = None) -> NDArray[np.uint8]:
        """Canonical rows [row_start, row_end) as uint8 [rows, row_bytes], the caller's to keep.

        Raises ModelFileChanged where the file changed after it was opened, ValueError after `Checkpoint.close`.
        """
        num_rows, columns = self.shape
        row_end = num_rows if row_end is None else row_end
        assert 0 <= row_start <= row_end <= num_rows
        if self._order is None or row_start == row_end:
            return self._stored.read(self._first_row + row_start, self._first_row + row_end)
        if num_rows == 1:  # a bias: its elements go as the rows of its matrix go
            elements = self._stored.read().reshape(columns, -1)
            return elements[self._order.stored_rows(np.arange(columns))].reshape(1, -1)
        stored = self._order.stored_rows(np.arange(row_start, row_end))
        first = int(stored.min())
        return self._stored.read(first, int(stored.max()) + 1)[stored - first]
