"""What a backend tells of a run, where it is asked: its steps with their costs, and when each thread was at which."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from isotherm.program.ops import AttentionShape
from isotherm.types import Experts

MARK = np.dtype([("ns", np.int64), ("step", np.int32), ("phase", np.int32)])


class Phase(IntEnum):
    """Numbers as in native/runtime/step_log.h."""

    START = 0
    PREPARE = 1
    WORK = 2
    WAIT = 3


@dataclass(frozen=True)
class Walk:
    """One pass through some steps: a batch up to where rows are selected, or from there on some of its rows."""

    num_rows: int
    sequences: tuple[tuple[int, int], ...]  # num_new, num_cached; none where rows were selected


@dataclass(frozen=True)
class StepFacts:
    """One step of a compiled program, and what it costs.

    weight_bytes are read once by a walk, row_bytes by each row, position_bytes (keys and values) for each position that
    attention sees; a multiply-add is two operations. Where there are experts, weight_bytes are those of all of them,
    and a walk reads as many as its rows may choose.
    """

    kind: str
    layer: int | None = None
    prepares: str = ""  # what its phase of preparation does
    weight_bytes: int = 0
    row_bytes: int = 0
    row_ops: int = 0
    is_int8: bool = False  # whether its operations are on 8-bit integers
    attention: AttentionShape | None = None
    position_bytes: int = 0
    experts: Experts | None = None

    @property
    def name(self) -> str:
        return self.kind if self.layer is None else f"layer {self.layer} {self.kind}"

    def num_bytes(self, walk: Walk) -> int:
        """Weights, and the keys and values that any of the walk's tokens sees, each read once."""
        num_seen = 0
        if self.attention is not None:
            window = self.attention.window
            num_seen = sum(
                new + (cached if window is None else min(cached, window - 1)) for new, cached in walk.sequences
            )
        weight_bytes = self.weight_bytes
        if self.experts is not None:
            num_read = min(self.experts.num_experts, self.experts.num_used * walk.num_rows)
            weight_bytes = weight_bytes // self.experts.num_experts * num_read
        return weight_bytes + self.row_bytes * walk.num_rows + self.position_bytes * num_seen

    def num_ops(self, walk: Walk) -> int:
        """Matrix products; of attention the scores and their sums, over what each token sees."""
        attention_ops = 0
        if self.attention is not None:
            shape = self.attention
            pairs = sum(_num_pairs(num_new, num_cached, shape.window) for num_new, num_cached in walk.sequences)
            attention_ops = 4 * shape.num_heads * shape.head_dim * pairs
        return self.row_ops * walk.num_rows + attention_ops


@dataclass(frozen=True)
class Recording:
    """marks: MARK [marks] by thread, the calling one first: since its mark before, a thread was in `phase` of `step`.

    Each walk begins with a START on every thread; on the first thread its last mark is the walk's end.
    """

    steps: tuple[StepFacts, ...]
    walks: tuple[Walk, ...]
    marks: tuple[NDArray[np.void], ...]


def _num_pairs(num_new: int, num_cached: int, window: int | None) -> int:
    """How many (token, position it sees) there are."""
    seen = np.arange(num_cached + 1, num_cached + num_new + 1, dtype=np.int64)
    return int((seen if window is None else np.minimum(seen, window)).sum())
