"""Rewrites a recorded Program into the fused ops that a quantising backend runs.

Five patterns, each tried on the op at hand with the ops that use its result:

    Norm -> Linear.. | Ffn | Moe      the norm moves into the op that quantises
    Linear, Linear.. of one input     one QuantLinear: the input is quantised once (Q, K and V)
    Linear -> Add                     QuantLinear with a residual
    Norm -> Add                       AddNorm
    [[Norm] -> RopeOp] -> Attention   RopeAttention

Last, SelectRows moves up to the last attention: what follows it is computed for the rows that are asked for only.

An intermediate value that anything else reads stops its pattern; what no pattern covers is an AssertionError.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

from isotherm.program import flow, ops
from isotherm.program.ops import NormWeights, Op, Projection, Value
from isotherm.program.recorder import Program
from isotherm.types import Activation, Rope


def lower(program: Program, is_sparse: Callable[[ops.Ffn | ops.Moe], bool] = lambda _: False) -> Program:
    """The same function of tokens, in ops of the second group of `ops.py`.

    is_sparse: whether an FFN, or the experts in its place, are to be computed by neurons where few of them fire: only
    where something makes zeros, an activation or a Trim.
    """
    return replace(program, ops=tuple(_select_early(_Lowering(program, is_sparse).run())))


def _select_early(lowered: list[Op]) -> list[Op]:
    """After the last attention rows depend on themselves alone, so that selecting them there changes nothing."""
    select = next(i for i, op in enumerate(lowered) if isinstance(op, ops.SelectRows))
    attentions = [i for i, op in enumerate(lowered[:select]) if isinstance(op, ops.RopeAttention)]
    if not attentions:
        return lowered
    first = attentions[-1] + 1
    kept, tail = lowered[:first], lowered[first:select] + lowered[select + 1 :]
    made = {value for op in kept for value in flow.outputs(op)}
    needed = dict.fromkeys(value for op in lowered[first:] for value in flow.inputs(op) if value in made)
    unused = 1 + max(value.index for op in lowered for value in flow.outputs(op))
    selected = {value: Value(unused + i, value.width) for i, value in enumerate(needed)}
    selects: list[Op] = [ops.SelectRows(out, value) for value, out in selected.items()]
    late = lowered[select]
    assert isinstance(late, ops.SelectRows)
    return (
        kept + selects + [flow.replace_inputs(op, selected | {late.out: selected.get(late.x, late.x)}) for op in tail]
    )


class _Lowering:
    def __init__(self, program: Program, is_sparse: Callable[[ops.Ffn | ops.Moe], bool]) -> None:
        self._program = program
        self._is_sparse = is_sparse
        self._num_values = 1 + max(value.index for op in program.ops for value in flow.outputs(op))
        self._maker: dict[Value, Op] = {value: op for op in program.ops for value in flow.outputs(op)}
        self._readers: dict[Value, list[Op]] = defaultdict(list)
        for op in program.ops:
            for value in flow.inputs(op):
                self._readers[value].append(op)
        self._done: set[Value] = set()  # written by a fused op that was emitted before
        self._out: list[Op] = []

    def run(self) -> list[Op]:
        for op in self._program.ops:
            if self._done.issuperset(flow.outputs(op)):
                continue
            match op:
                case ops.Embed() | ops.EmbedPositions() | ops.SelectRows():
                    self._out.append(op)
                case ops.Linear():
                    self._linear(op)
                case ops.Ffn():
                    self._ffn(op)
                case ops.Moe():
                    self._moe(op)
                case ops.Attention():
                    self._attention(op)
                case ops.Norm():
                    self._norm(op)
                case ops.RopeOp():
                    self._absorbed(op.out, (ops.Attention,))
                case ops.Add():
                    self._out.append(op)
                case _:
                    raise AssertionError(f"lowering meets {op}")
        return self._out

    def _absorbed(self, value: Value, kinds: tuple[type, ...]) -> None:
        readers = self._readers[value]
        assert readers, f"nothing reads {value}"
        assert all(isinstance(reader, kinds) for reader in readers), f"{value} is not fused away"

    def _norm(self, op: ops.Norm) -> None:
        add = self._only_reader(op.out, ops.Add)
        if add is None:
            return self._absorbed(op.out, (ops.Linear, ops.Ffn, ops.Moe, ops.RopeOp))
        assert op.group == op.x.width
        assert op.norm.bias is None
        self._out.append(ops.AddNorm(add.out, add.a if add.b == op.out else add.b, op.x, op.norm))
        self._done.add(add.out)
        return None

    def _only_reader(self, value: Value, kind: type[ops.Add]) -> ops.Add | None:
        readers = self._readers[value]
        return readers[0] if len(readers) == 1 and isinstance(readers[0], kind) else None

    def _input_of(self, x: Value) -> tuple[Value, NormWeights | None]:
        """What a quantising op reads for `x`: the value before its norm, and that norm."""
        maker = self._maker[x]
        if isinstance(maker, ops.Norm) and maker.group == x.width:
            return maker.x, maker.norm
        return x, None

    def _linear(self, op: ops.Linear) -> None:
        siblings = [reader for reader in self._readers[op.x] if isinstance(reader, ops.Linear)]
        x, norm = self._input_of(op.x)
        add = self._only_reader(op.out, ops.Add) if len(siblings) == 1 else None
        if add is not None:
            residual = add.a if add.b == op.out else add.b
            self._out.append(ops.QuantLinear(x, norm, (Projection(add.out, op.weight, op.bias),), residual))
            self._done.add(add.out)
            return
        projections = tuple(Projection(linear.out, linear.weight, linear.bias) for linear in siblings)
        self._out.append(ops.QuantLinear(x, norm, projections, None))
        self._done.update(linear.out for linear in siblings)

    def _ffn(self, op: ops.Ffn) -> None:
        x, norm = self._input_of(op.x)
        is_sparse = self._is_sparse(op)
        hidden = self._hidden(op, x, norm, is_sparse=is_sparse)
        if op.trim_hidden is not None:
            hidden = self._trimmed(hidden, None, op.trim_hidden)
        out, residual = self._with_residual(op.out)
        if is_sparse:
            self._out.append(ops.SparseDown(out, hidden, op.down, op.down_bias, residual))
        else:
            self._out.append(ops.QuantLinear(hidden, None, (Projection(out, op.down, op.down_bias),), residual))

    def _hidden(self, op: ops.Ffn, x: Value, norm: NormWeights | None, *, is_sparse: bool) -> Value:
        has_zeros = op.activation.has_zeros or op.trim_gate is not None
        assert has_zeros or op.trim_hidden is not None or not is_sparse
        if op.predictor is not None:
            return self._predicted_hidden(op, op.predictor, x, norm, is_sparse=is_sparse)
        hidden = self._new_value(op.ffn_size)
        if op.gate is None:
            assert op.trim_gate is None, "without a gate hidden values are trimmed"
            up = (Projection(hidden, op.up, op.up_bias),)
            self._out.append(ops.QuantLinear(x, norm, up, None, op.activation))
        elif op.trim_gate is not None or (is_sparse and has_zeros):
            gated = self._new_value(op.ffn_size)
            self._out.append(ops.QuantLinear(x, norm, (Projection(gated, op.gate, None),), None))
            if op.trim_gate is not None:
                gated = self._trimmed(gated, op.activation, op.trim_gate)
            self._out.append(ops.SparseUp(hidden, gated, x, norm, op.up, op.activation, by_rows=is_sparse))
        else:
            self._out.append(ops.QuantGlu(hidden, x, norm, op.gate, op.up, op.activation))
        return hidden

    def _predicted_hidden(
        self, op: ops.Ffn, predictor: ops.Predictor, x: Value, norm: NormWeights | None, *, is_sparse: bool
    ) -> Value:
        """The predictor's own activation is a ReLU, whatever the FFN's is."""
        assert op.activation.has_zeros, "what makes no zeros has none to predict"
        low, scores = self._new_value(predictor.rank), self._new_value(op.ffn_size)
        first, second = Projection(low, predictor.first, None), Projection(scores, predictor.second, None)
        self._out.append(ops.QuantLinear(x, norm, (first,), None, Activation.RELU))
        self._out.append(ops.QuantLinear(low, None, (second,), None))
        out, threshold = self._new_value(op.ffn_size), predictor.threshold
        weight, bias, activation = (op.up, op.up_bias, op.activation) if op.gate is None else (op.gate, None, None)
        predicted = ops.PredictedLinear(out, scores, x, norm, weight, bias, threshold, activation, by_rows=is_sparse)
        self._out.append(predicted)
        if op.gate is None:
            assert op.trim_gate is None, "without a gate hidden values are trimmed"
            return out
        gated = out if op.trim_gate is None else self._trimmed(out, op.activation, op.trim_gate)
        hidden = self._new_value(op.ffn_size)
        self._out.append(ops.SparseUp(hidden, gated, x, norm, op.up, op.activation, by_rows=is_sparse))
        return hidden

    def _trimmed(self, x: Value, activation: Activation | None, trim: ops.Trim) -> Value:
        out = self._new_value(x.width)
        self._out.append(ops.TrimOp(out, x, activation, trim))
        return out

    def _moe(self, op: ops.Moe) -> None:
        x, norm = self._input_of(op.x)
        logits = self._new_value(op.experts.num_experts)
        routes = self._new_value(2 * op.experts.num_used)
        hidden = self._new_value(op.experts.num_used * op.ffn_size)
        self._out.append(ops.QuantLinear(x, norm, (Projection(logits, op.router, None),), None))
        self._out.append(ops.Route(routes, logits, op.experts))
        is_sparse = self._is_sparse(op)
        if is_sparse:
            gated = self._new_value(hidden.width)
            self._out.append(ops.ExpertGate(gated, x, norm, routes, op.gate, op.experts))
            self._out.append(ops.SparseExpertUp(hidden, gated, x, norm, routes, op.up, op.experts, op.activation))
        else:
            self._out.append(ops.ExpertGlu(hidden, x, norm, routes, op.gate, op.up, op.experts, op.activation))
        out, residual = self._with_residual(op.out)
        self._out.append(ops.ExpertDown(out, hidden, routes, op.down, op.experts, residual, by_neuron=is_sparse))

    def _with_residual(self, value: Value) -> tuple[Value, Value | None]:
        """What a block writes in place of `value`, and what it adds: those of the Add that alone reads it."""
        add = self._only_reader(value, ops.Add)
        if add is None:
            return value, None
        self._done.add(add.out)
        return add.out, add.a if add.b == value else add.b

    def _new_value(self, width: int) -> Value:
        self._num_values += 1
        return Value(self._num_values - 1, width)

    def _attention(self, op: ops.Attention) -> None:
        q, rope, q_norm = self._before_attention(op.q)
        k, k_rope, k_norm = self._before_attention(op.k)
        assert rope == k_rope
        fused = ops.RopeAttention(op.out, q, k, op.v, q_norm, k_norm, rope, op.shape, op.state, op.slot)
        self._out.append(fused)

    def _before_attention(self, value: Value) -> tuple[Value, Rope | None, NormWeights | None]:
        rotated = self._maker[value]
        if not isinstance(rotated, ops.RopeOp):
            return value, None, None
        normed = self._maker[rotated.x]
        if isinstance(normed, ops.Norm):
            assert normed.group == rotated.head_dim
            return normed.x, rotated.rope, normed.norm
        return rotated.x, rotated.rope, None
