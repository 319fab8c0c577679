"""How many columns share an activation scale: 256, or 32 for a model that 256 would cost too much."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isotherm.backends.cpu.backend import CpuBackend
from isotherm.backends.cpu.limits import CpuLimits
from isotherm.program.batch import Batch
from isotherm.program.batch import Sequence as BatchSequence
from isotherm.program.recorder import PAGE_TOKENS, Program
from isotherm.quantization.packed_file import PackedWeights

COARSE_COLUMNS, FINE_COLUMNS = 256, 32

# Mean KL that a coarse scale may cost. The quantisation that made the file costs ten times as much and more.
KL_BUDGET = 2e-3

# A sample of prose, names, numbers and code. At least 64 tokens in any vocabulary.
SAMPLE_TEXT = (
    "The river rises in the hills north of the town and reaches the sea after some forty miles. In 1847 a bridge was "
    "built by the engineer Thomas Harwood, who had studied in Edinburgh; it cost 12,500 pounds and still stands. "
    "Water boils at 100 degrees Celsius at sea level because its vapour pressure then equals that of the air.\n"
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)\n"
)
_SAMPLE_TOKENS = 128


@dataclass(frozen=True)
class PrecisionChoice:
    quant_columns: int
    coarse_kl: float  # mean KL of coarse scales from fine ones, over the sample


def choose_precision(
    program: Program, weights: PackedWeights, sample_ids: Sequence[int], *, isa: str, num_threads: int
) -> PrecisionChoice:
    """Runs the sample with both scales. Fine ones cost some 5-10 % of prefill, and nothing in decode."""
    ids = np.array(sample_ids[:_SAMPLE_TOKENS], np.int32)
    fine, coarse = (
        _log_probabilities(program, CpuBackend(weights, isa=isa, num_threads=num_threads, quant_columns=columns), ids)
        for columns in (FINE_COLUMNS, COARSE_COLUMNS)
    )
    kl = float(np.mean(np.sum(np.exp(fine) * (fine - coarse), axis=1)))
    return PrecisionChoice(COARSE_COLUMNS if kl <= KL_BUDGET else FINE_COLUMNS, kl)


def _log_probabilities(program: Program, backend: CpuBackend, ids: NDArray[np.int32]) -> NDArray[np.float64]:
    num_pages = -(-len(ids) // PAGE_TOKENS)
    pages = np.arange(num_pages, dtype=np.int32)
    limits = CpuLimits(
        len(ids), (num_pages,) * len(program.states), max_tokens=len(ids), max_head_rows=len(ids)
    )
    compiled = backend.compile(program, limits)
    sequence = BatchSequence(len(ids), 0, (pages,) * len(program.states))
    compiled.forward(Batch(ids, (sequence,), np.arange(len(ids), dtype=np.int32)))
    logits = compiled.logits(0, len(ids)).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    normalised: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return normalised
