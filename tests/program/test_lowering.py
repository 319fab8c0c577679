"""Lowering keeps the function: invariants of what it writes, and float32 weights give nearly the same numbers."""

from dataclasses import fields, replace

import numpy as np
import pytest
from float_tensor import FloatTensor
from numpy.typing import NDArray
from test_snapshots import CONFIGS
from tolerances import FLOAT_WEIGHTS_SHARE

from isotherm.backends.reference.backend import ReferenceBackend
from isotherm.models import FAMILIES
from isotherm.program import flow, ops
from isotherm.program.batch import Batch, Sequence
from isotherm.program.lowering import lower
from isotherm.program.ops import AttentionShape, NormWeights, Op, Projection, Value
from isotherm.program.recorder import Program, Recorder, StateKind, StateSpec
from isotherm.types import Activation, Rope

F32 = NDArray[np.float32]
ROPE = Rope(10000.0, 16)
STATE = StateSpec(StateKind.KV, 1, 2, 16, window=None)
SHAPE = AttentionShape(4, 2, 16, 0.25, window=None)
LOWERED = (
    ops.Embed,
    ops.EmbedPositions,
    ops.QuantLinear,
    ops.QuantGlu,
    ops.Route,
    ops.ExpertGlu,
    ops.ExpertDown,
    ops.RopeAttention,
    ops.AddNorm,
    ops.Add,
    ops.SelectRows,
)


def shapes(program: Program) -> dict[str, tuple[int, int]]:
    """Every weight that a recorded Program names."""
    found: dict[str, tuple[int, int]] = {}
    for op in program.ops:
        match op:
            case ops.Embed():
                found[op.weight] = (50, op.out.width)
            case ops.Norm():
                found |= dict.fromkeys([op.norm.weight, *([op.norm.bias] if op.norm.bias else [])], (1, op.group))
            case ops.EmbedPositions():
                found[op.weight] = (50, op.out.width)
            case ops.Linear():
                found[op.weight] = (op.out.width, op.x.width)
                if op.bias:
                    found[op.bias] = (1, op.out.width)
            case ops.Ffn():
                found[op.up] = (op.ffn_size, op.x.width)
                found[op.down] = (op.out.width, op.ffn_size)
                if op.gate:
                    found[op.gate] = found[op.up]
                if op.up_bias and op.down_bias:
                    found |= {op.up_bias: (1, op.ffn_size), op.down_bias: (1, op.out.width)}
            case ops.Moe():
                num_experts = op.experts.num_experts
                found[op.router] = (num_experts, op.x.width)
                found[op.gate] = found[op.up] = (num_experts * op.ffn_size, op.x.width)
                found[op.down] = (num_experts * op.out.width, op.ffn_size)
    return found


def names(item: object) -> set[str]:
    """Every weight named anywhere in an op."""
    if isinstance(item, Projection):
        return {item.weight, *([item.bias] if item.bias else [])}
    if isinstance(item, NormWeights):
        return {item.weight, *([item.bias] if item.bias else [])}
    if isinstance(item, tuple):
        return {name for part in item for name in names(part)}
    if isinstance(item, str):
        return {item}
    if isinstance(item, Op):
        return {name for f in fields(item) for name in names(getattr(item, f.name))}
    return set()


def logits(program: Program, tensors: dict[str, FloatTensor]) -> F32:
    compiled = ReferenceBackend(tensors).compile(program, num_pages=(1,) * len(program.states))
    ids = np.random.default_rng(0).integers(0, 50, 20).astype(np.int32)
    tables = (np.zeros(1, np.int32),) * len(program.states)
    compiled.forward(Batch(ids, (Sequence(20, 0, tables),), np.arange(20, dtype=np.int32)))
    return compiled.logits(0, 20)


def check(program: Program) -> Program:
    """Lowers, and holds the result against what was recorded."""
    lowered = lower(program)
    assert all(isinstance(op, LOWERED) for op in lowered.ops)
    written: set[Value] = set()
    for op in lowered.ops:
        assert written.issuperset(flow.inputs(op)), f"{op} reads what is not there yet"
        assert written.isdisjoint(flow.outputs(op)), f"{op} writes a second time"
        written.update(flow.outputs(op))
    assert program.logits in written
    assert (lowered.states, lowered.family, lowered.logits) == (program.states, program.family, program.logits)
    assert names(lowered.ops) == names(program.ops) == set(shapes(program))
    slots = [(op.state, op.slot) for op in lowered.ops if isinstance(op, ops.RopeAttention)]
    assert slots == [(op.state, op.slot) for op in program.ops if isinstance(op, ops.Attention)]

    random = np.random.default_rng(1)
    tensors = {}
    for name, (rows, columns) in shapes(program).items():
        noise = random.standard_normal((rows, columns))
        tensors[name] = FloatTensor((1 + noise / 4 if rows == 1 else noise / columns**0.5).astype(np.float32))
    truth = logits(program, tensors)
    assert np.abs(truth).max() > 0.1
    assert np.abs(logits(lowered, tensors) - truth).max() < FLOAT_WEIGHTS_SHARE * np.abs(truth).max()
    return lowered


@pytest.mark.parametrize("name", CONFIGS)
def test_families(name: str) -> None:
    config = replace(CONFIGS[name], vocab_size=60)
    check(FAMILIES[config.family](config))


def start(width: int = 64) -> tuple[Recorder, Value]:
    r = Recorder("sketch", ())
    return r, r.embed("embed", width)


def end(r: Recorder, x: Value) -> Program:
    return r.finish(r.linear(r.select_rows(x), "head", 30))


def test_linear_without_norm_and_with_a_residual() -> None:
    r, x = start()
    lowered = check(end(r, r.add(r.linear(x, "a", 64, "a_bias"), x)))
    assert [type(op) for op in lowered.ops] == [ops.Embed, ops.QuantLinear, ops.SelectRows, ops.QuantLinear]
    first = lowered.ops[1]
    assert isinstance(first, ops.QuantLinear)
    assert first.residual == x


def test_a_linear_that_is_read_twice_keeps_its_add() -> None:
    r, x = start()
    y = r.linear(x, "a", 64)
    lowered = check(end(r, r.add(r.add(x, y), y)))
    assert sum(isinstance(op, ops.Add) for op in lowered.ops) == 2


def test_linears_of_one_input_share_its_quantisation() -> None:
    r, x = start()
    h = r.norm(x, "norm", 1e-5)
    a, b, c = (r.linear(h, name, 64) for name in "abc")
    lowered = check(end(r, r.add(r.add(a, b), c)))
    (group,) = (op for op in lowered.ops if isinstance(op, ops.QuantLinear) and op.norm and len(op.projections) > 1)
    assert [projection.weight for projection in group.projections] == ["a", "b", "c"]


def test_norms_that_are_read_by_linear_and_ffn() -> None:
    """Blocks side by side: one norm feeds both, and each takes it along."""
    r, x = start()
    h = r.norm(x, "norm", 1e-5)
    a, b = r.linear(h, "a", 64), r.ffn(h, ("gate", "up", "down"), 96, Activation.SILU)
    lowered = check(end(r, r.add(r.add(x, a), b)))
    assert sum(getattr(op, "norm", None) is not None for op in lowered.ops) == 2


@pytest.mark.parametrize("norm_first", [True, False])
def test_norm_of_what_a_block_adds(norm_first: bool) -> None:
    r, x = start()
    y = r.norm(r.linear(x, "a", 64), "norm", 1e-5)
    lowered = check(end(r, r.add(y, x) if norm_first else r.add(x, y)))
    (add,) = (op for op in lowered.ops if isinstance(op, ops.AddNorm))
    assert add.a == x


def recorded_attention(*, norm_k: bool, extra_reader: bool = False) -> Program:
    r = Recorder("sketch", (STATE,))
    x = r.embed("embed", 64)
    q, k, v = r.linear(x, "q", 64), r.linear(x, "k", 32), r.linear(x, "v", 32)
    q = r.rope(r.norm(q, "q_norm", 1e-6, 16), ROPE, 16)
    k = r.rope(r.norm(k, "k_norm", 1e-6, 16) if norm_k else k, ROPE, 16)
    attended = r.attention(q, k, v, SHAPE, state=0)
    return end(r, r.add(attended, q) if extra_reader else attended)


@pytest.mark.parametrize("norm_k", [True, False])
def test_attention_with_a_norm_on_queries_and_maybe_keys(norm_k: bool) -> None:
    lowered = check(recorded_attention(norm_k=norm_k))
    (attention,) = (op for op in lowered.ops if isinstance(op, ops.RopeAttention))
    assert attention.q_norm == NormWeights("q_norm", 1e-6)
    assert attention.k_norm == (NormWeights("k_norm", 1e-6) if norm_k else None)


def test_what_no_pattern_covers_is_refused() -> None:
    """Nothing is dropped or guessed: a value that would have to exist and does not is an assertion."""
    with pytest.raises(AssertionError, match="not fused away"):
        lower(recorded_attention(norm_k=True, extra_reader=True))
    r, x = start()
    h = r.norm(x, "norm", 1e-5)
    with pytest.raises(AssertionError, match="not fused away"):
        lower(end(r, r.add(r.linear(h, "a", 64), h)))
    r, x = start()
    with pytest.raises(AssertionError):
        lower(end(r, r.add(x, r.norm(x, "norm", 1e-5, group=16))))


def test_a_state_with_a_slot_that_no_layer_took_is_refused() -> None:
    r = Recorder("sketch", (replace(STATE, num_layers=2),))
    x = r.embed("embed", 64)
    q = r.rope(r.linear(x, "q", 64), ROPE, 16)
    k = r.rope(r.linear(x, "k", 32), ROPE, 16)
    attended = r.attention(q, k, r.linear(x, "v", 32), SHAPE, state=0)
    with pytest.raises(AssertionError, match="slot"):
        end(r, attended)


def test_page_bytes() -> None:
    """Keys and values, 2 bytes each, of 64 positions."""
    assert StateSpec(StateKind.KV, 30, 3, 64, None).page_bytes == 30 * 2 * 3 * 64 * 64 * 2
