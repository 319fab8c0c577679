"""What a Program is compiled for, and the memory that takes."""

from collections.abc import Callable
from dataclasses import dataclass

from isotherm.backends.cpu.buffers import plan_buffers
from isotherm.facts import MemoryForecast
from isotherm.program import ops
from isotherm.program.recorder import Program

_MOST_BUNDLE_ROWS = 6  # of any instruction set: an expert's last bundle of rows may be short


@dataclass(frozen=True)
class CpuLimits:
    """What a compiled Program is made for; work memory grows with it."""

    context_tokens: int  # highest position + 1
    num_pages: tuple[int, ...]  # KV pages by state group
    max_tokens: int = 512  # of a batch
    max_head_rows: int = 64  # logit rows that one call of `logits` may ask for


def kv_bytes(program: Program, limits: CpuLimits) -> int:
    """Bytes of all KV pages."""
    return sum(state.page_bytes * pages for state, pages in zip(program.states, limits.num_pages, strict=True))


def work_bytes(program: Program, limits: CpuLimits, num_threads: int) -> int:
    """Bytes of buffers, quantised rows, rope tables and every thread's scratch, once all of it is in use."""
    rows = max(limits.max_tokens, limits.max_head_rows)
    *widths, vocab_size = plan_buffers(program).widths
    reading = (ops.QuantLinear, ops.QuantGlu, ops.SparseUp, ops.SparseDown, ops.PredictedLinear)
    inputs = [rows * op.x.width for op in program.ops if isinstance(op, reading)]
    gathered = [0]  # inputs of experts that a batch has
    for op in program.ops:
        if isinstance(op, ops.ExpertGlu | ops.ExpertGate | ops.SparseExpertUp | ops.ExpertDown):
            gathered.append(rows * op.experts.num_used + _MOST_BUNDLE_ROWS * op.experts.num_experts)
            width = op.x.width // op.experts.num_used if isinstance(op, ops.ExpertDown) else op.x.width
            inputs.append(gathered[-1] * width)
    ropes = {op.rope for op in program.ops if isinstance(op, ops.RopeAttention) and op.rope}
    floats = rows * sum(widths) + limits.max_head_rows * vocab_size + limits.context_tokens * sum(r.dims for r in ropes)
    quantised = max(inputs) * 3  # a byte per code, and less than two for scales, sums and starts
    totals = num_threads * max(rows, *gathered) * 32 * 4
    return 4 * floats + quantised + totals


def fit_context(
    forecast: Callable[[int], MemoryForecast], least: int, most: int, budget_bytes: int
) -> tuple[int, MemoryForecast]:
    """The context `most`, halved until its forecast fits, but never below `least`, whose forecast may not fit."""
    context_tokens = most
    while (needed := forecast(context_tokens)).total_bytes > budget_bytes and context_tokens > least:
        context_tokens = max(least, context_tokens // 2)
    return context_tokens, needed
