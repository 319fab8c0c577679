"""The seam between engine and machines: what a backend reads, and what it compiles a Program to."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from isotherm.program.batch import Batch
from isotherm.program.ops import Value
from isotherm.program.recording import Recording
from isotherm.types import QuantType

T = TypeVar("T")


class WeightTensor(Protocol):
    """A stored tensor in canonical row order; a vector has one row."""

    @property
    def quant_type(self) -> QuantType: ...

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    def read(self, row_start: int = 0, row_end: int | None = None) -> NDArray[np.uint8]:
        """Stored bytes, uint8 [rows, row bytes]."""


@dataclass(frozen=True)
class Shortlist:
    """The largest logits of a row, of equal ones those of the lowest ids; and of the whole row what gives their
    probabilities.

    ids int32 and logits float32 [kept], by rising id. total: the sum of exp(logit - peak), as the sampler adds it up.
    is_sound: no logit is NaN or +inf, and one is finite; else there is nothing else here.
    """

    is_sound: bool
    peak: float
    total: float
    ids: NDArray[np.int32]
    logits: NDArray[np.float32]


class CompiledProgram(Protocol):
    """A Program on one machine, with its KV pages. Not thread safe: one batch at a time."""

    def forward(self, batch: Batch) -> None:
        """Computes the batch up to the rows that the head reads; appends keys and values to the batch's pages.

        An interrupt (Ctrl-C) stops it between ops and is raised; what it appended is then not to be used.
        """

    def logits(self, first: int, count: int, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Logits [count, vocab_size] of the last batch's logit rows from `first` on; in `out`, where that is given."""

    @property
    def most_kept(self) -> int:
        """Longest Shortlist that `shortlists` gives; 0: it gives none."""

    def shortlists(self, first: int, kept: Sequence[int]) -> list[Shortlist]:
        """Of the last batch's logit rows from `first` on the kept[i] largest logits of each, which may choose a token:
        the row itself need not leave a GPU.
        """

    def observe(
        self, batch: Batch, wanted: Collection[Value], look: Callable[[Value, NDArray[np.float32]], None]
    ) -> None:
        """`forward`, which shows the wanted Values [rows, width] in the order in which they are made.

        Behind SelectRows they are shown in blocks of logit rows. There are no logits of the batch after it.
        """

    @property
    def page_bytes(self) -> tuple[int, ...]:
        """Bytes of a KV page, by state group."""

    @property
    def page_layout(self) -> str:
        """Names how the bytes of a page lie: between backends that give the same, pages can be exchanged."""

    def read_page(self, group: int, page: int) -> NDArray[np.uint8]:
        """A copy of one KV page of a state group, uint8 [page bytes]: layer after layer, each as the backend has it.

        This and `write_page` may run beside a batch that does not write to the page.
        """

    def write_page(self, group: int, page: int, data: NDArray[np.uint8]) -> None:
        """Fills a page with what `read_page` gave, in any process that runs the same Program."""

    @property
    def busy_s(self) -> float:
        """Seconds spent computing since it was made."""

    def read_weights_s(self) -> float | None:
        """Seconds in which the threads read every weight of a token once and compute nothing; None: it cannot tell."""

    def record(self, run: Callable[[], T], num_batches: int) -> tuple[T, Recording]:
        """What `run` gives, and what each thread did in it: at most `num_batches` batches, the head once for each.

        Raises OptionError where the backend cannot tell.
        """
