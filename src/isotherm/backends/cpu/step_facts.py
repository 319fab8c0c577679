"""What the steps of a lowered Program are called and cost."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from isotherm.backends.cpu.packing import pair_name
from isotherm.program import ops
from isotherm.program.flow import layer_of
from isotherm.program.recorder import PAGE_TOKENS, Program
from isotherm.program.recording import StepFacts
from isotherm.quantization.packed_file import EntrySpec
from isotherm.types import Experts

_NORM_AND_QUANTISE = "norm, quantise"
_GATHER = "norm, quantise, gather"
_ROPE_AND_APPEND = "rope, append"
_SPARSE = (ops.SparseUp, ops.SparseDown, ops.PredictedLinear)
_EXPERTS = (ops.ExpertGlu, ops.ExpertGate, ops.SparseExpertUp, ops.ExpertDown)
_QUANTISING = (ops.QuantLinear, ops.QuantGlu, *_SPARSE, *_EXPERTS)
_MAX_MARKS = {ops.RopeAttention: 6, **dict.fromkeys(_QUANTISING, 4)}  # two for each part; split attention has three


def max_marks(program: Program) -> int:
    """Marks that a thread makes on one walk through all steps, at most; two more for each of forward and head."""
    return sum(_MAX_MARKS.get(type(op), 2) for op in program.ops) + 4


def describe_steps(program: Program, entry: Callable[[str], EntrySpec]) -> tuple[StepFacts, ...]:
    """One for each op; `entry` gives a packed weight by its name."""
    return tuple(_Description(program, entry).steps())


class _Description:
    def __init__(self, program: Program, entry: Callable[[str], EntrySpec]) -> None:
        self._program = program
        self._entry = entry
        self._layer: int | None = None  # of the op before: attention and a plain sum name no weight

    def steps(self) -> Iterator[StepFacts]:
        for op in self._program.ops:
            if names := weight_names(op):
                self._layer = layer_of(names[0])
            yield self._describe(op)

    def _describe(self, op: ops.Op) -> StepFacts:
        match op:
            case ops.Embed():
                entry = self._entry(op.weight)
                return StepFacts("embed", row_bytes=entry.num_bytes // entry.shape[0])
            case ops.EmbedPositions():
                entry = self._entry(op.weight)
                return StepFacts("embed positions", row_bytes=entry.num_bytes // entry.shape[0])
            case ops.QuantLinear():
                names = [projection.weight for projection in op.projections]
                return self._matmul("head" if self._layer is None else _joined(names), names)
            case ops.QuantGlu():
                return self._matmul("glu", [pair_name(op.gate, op.up)])
            case ops.PredictedLinear():
                return self._matmul(f"{_joined([op.weight])}, those predicted", [op.weight])
            case ops.SparseUp():
                return self._matmul("up, those that fire", [op.weight])
            case ops.SparseDown():
                return self._matmul("down, those that fire", [op.weight])
            case ops.TrimOp():
                return StepFacts("trim", self._layer)
            case ops.Route():
                return StepFacts("route", self._layer)
            case ops.ExpertGlu():
                return self._experts("glu of experts", pair_name(op.gate, op.up), op.experts)
            case ops.ExpertGate():
                return self._experts("gate of experts", op.weight, op.experts)
            case ops.SparseExpertUp():
                return self._experts("up of experts, those that fire", op.weight, op.experts)
            case ops.ExpertDown():
                kind = "down of experts, those that fire" if op.by_neuron else "down of experts"
                return self._experts(kind, op.weight, op.experts)
            case ops.RopeAttention():
                state = self._program.states[op.state]
                return StepFacts(
                    "attention",
                    self._layer,
                    _ROPE_AND_APPEND,
                    attention=op.shape,
                    position_bytes=state.page_bytes // (state.num_layers * PAGE_TOKENS),
                )
            case ops.AddNorm():
                return StepFacts("add, norm", self._layer)
            case ops.Add():
                return StepFacts("add", self._layer)
            case ops.SelectRows():
                return StepFacts("select rows")
            case _:
                raise AssertionError(f"{type(op).__name__} is not a lowered op")

    def _matmul(self, kind: str, names: list[str]) -> StepFacts:
        entries = [self._entry(name) for name in names]
        return StepFacts(
            kind,
            self._layer,
            _NORM_AND_QUANTISE,
            weight_bytes=sum(entry.num_bytes for entry in entries),
            row_ops=sum(2 * entry.shape[0] * entry.shape[1] * len(entry.types) for entry in entries),
            is_int8=not any(quant_type.is_float for entry in entries for quant_type in entry.types),
        )

    def _experts(self, kind: str, name: str, experts: Experts) -> StepFacts:
        facts = self._matmul(kind, [name])
        row_ops = facts.row_ops // experts.num_experts * experts.num_used
        return replace(facts, prepares=_GATHER, row_ops=row_ops, experts=experts)


def weight_names(op: ops.Op) -> tuple[str, ...]:
    """The matrices of a lowered op, or the norm of one that has no other weight; none of an embedding."""
    match op:
        case ops.QuantLinear():
            return tuple(projection.weight for projection in op.projections)
        case ops.QuantGlu() | ops.ExpertGlu():
            return op.gate, op.up
        case ops.SparseUp() | ops.SparseDown() | ops.PredictedLinear():
            return (op.weight,)
        case ops.ExpertGate() | ops.SparseExpertUp() | ops.ExpertDown():
            return (op.weight,)
        case ops.AddNorm():
            return (op.norm.weight,)
        case _:
            return ()


def _joined(names: list[str]) -> str:
    """q, k and v become qkv."""
    parts = [name.rpartition(".")[2] for name in names]
    return ("" if all(len(part) == 1 for part in parts) else "+").join(parts)
