"""What one step computes: plain data across the binding."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isotherm.program.recorder import PAGE_TOKENS

FREED_PAGE = -1  # stands in a page table where a window has passed


@dataclass(frozen=True)
class Sequence:
    """One sequence's share of a batch: its next `num_new` tokens, after `num_cached` that its pages hold.

    page_tables: for each state group, int32 page ids by page index (position // PAGE_TOKENS); they cover
    num_cached + num_new positions. FREED_PAGE where no token of this batch looks. is_trimmed: whether the Trims of the
    Program hold for it.
    """

    num_new: int
    num_cached: int
    page_tables: tuple[NDArray[np.int32], ...]
    is_trimmed: bool = True

    def __post_init__(self) -> None:
        num_pages = -(-(self.num_cached + self.num_new) // PAGE_TOKENS)
        assert self.num_new > 0
        assert all(len(table) >= num_pages for table in self.page_tables)


@dataclass(frozen=True)
class Batch:
    """token_ids int32 [tokens], sequence after sequence; logit_rows int32 [rows], rising: who needs the head."""

    token_ids: NDArray[np.int32]
    sequences: tuple[Sequence, ...]
    logit_rows: NDArray[np.int32]

    def __post_init__(self) -> None:
        assert len(self.token_ids) == sum(sequence.num_new for sequence in self.sequences)
        assert all(0 <= row < len(self.token_ids) for row in self.logit_rows)

    def positions(self) -> NDArray[np.int32]:
        """Absolute position of each token, int32 [tokens]."""
        spans = [np.arange(s.num_cached, s.num_cached + s.num_new, dtype=np.int32) for s in self.sequences]
        return np.concatenate(spans)

    def trimmed_rows(self) -> NDArray[np.bool_]:
        """Whether each token's sequence is trimmed, bool [tokens]."""
        return np.concatenate([np.full(s.num_new, s.is_trimmed) for s in self.sequences])
