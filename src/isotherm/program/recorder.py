"""Program and the recorder that a model family writes it with."""

from dataclasses import dataclass, replace
from enum import Enum

from isotherm.program import ops
from isotherm.program.ops import AttentionShape, Ffn, NormWeights, Op, Value
from isotherm.program.text_form import show
from isotherm.types import Activation, Experts, KvType, Rope

PAGE_TOKENS = 64  # positions of one KV page


class StateKind(Enum):
    KV = "kv"
    KV_WINDOW = "kv_window"  # pages that no later token can see are freed


@dataclass(frozen=True)
class StateSpec:
    """What one group of layers keeps between steps: keys and values, one page table per sequence."""

    kind: StateKind
    num_layers: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    kv_type: KvType = KvType.F16

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers of the group, keys and values."""
        row_bytes = 2 * self.head_dim if self.kv_type is KvType.F16 else self.head_dim + 2 * -(-self.head_dim // 32)
        return self.num_layers * self.num_kv_heads * PAGE_TOKENS * 2 * row_bytes


@dataclass(frozen=True)
class Program:
    """A model, recorded. `logits` is the last value, [logit rows, vocab_size]."""

    family: str
    ops: tuple[Op, ...]
    states: tuple[StateSpec, ...]
    logits: Value

    @property
    def ffns(self) -> tuple[Ffn, ...]:
        """Of a recorded Program, layer by layer."""
        return tuple(op for op in self.ops if isinstance(op, Ffn))

    @property
    def is_trimmed(self) -> bool:
        """Whether a lossy rule holds, for sequences that are trimmed. Of a lowered Program."""
        return any(isinstance(op, ops.TrimOp | ops.PredictedLinear) for op in self.ops)

    def keeping(self, kv_type: KvType) -> "Program":
        """The same Program with keys and values kept as `kv_type`."""
        return replace(self, states=tuple(replace(state, kv_type=kv_type) for state in self.states))

    def dump(self) -> str:
        """The Program as text, an op a line: what a reviewer sees the diff of."""
        lines = [f"program {self.family}"]
        for index, state in enumerate(self.states):
            window = f", window={state.window}" if state.window else ""
            lines.append(
                f"  state {index}: {state.kind.value}, {state.num_layers} layers, "
                f"{state.num_kv_heads} x {state.head_dim}{window}"
            )
        for op in self.ops:
            written = "" if isinstance(op, ops.QuantLinear) else f"{op.out}: {op.out.width} = "
            lines.append(f"  {written}{show(op)}")
        return "\n".join([*lines, f"  return {self.logits}", ""])


class Recorder:
    """Writes a Program op by op; every method returns the Value that its op makes."""

    def __init__(self, family: str, states: tuple[StateSpec, ...]) -> None:
        self._family = family
        self._states = states
        self._slots = [0] * len(states)
        self._ops: list[Op] = []
        self._num_values = 0

    def _value(self, width: int) -> Value:
        self._num_values += 1
        return Value(self._num_values - 1, width)

    def embed(self, weight: str, width: int, scale: float = 1.0) -> Value:
        out = self._value(width)
        self._ops.append(ops.Embed(out, weight, scale))
        return out

    def embed_positions(self, x: Value, weight: str, first_row: int) -> Value:
        out = self._value(x.width)
        self._ops.append(ops.EmbedPositions(out, x, weight, first_row))
        return out

    def norm(self, x: Value, weight: str, eps: float, group: int | None = None, bias: str | None = None) -> Value:
        """A layer norm where there is a bias."""
        out = self._value(x.width)
        self._ops.append(ops.Norm(out, x, NormWeights(weight, eps, bias), group or x.width))
        return out

    def linear(self, x: Value, weight: str, width: int, bias: str | None = None) -> Value:
        out = self._value(width)
        self._ops.append(ops.Linear(out, x, weight, bias))
        return out

    def rope(self, x: Value, rope: Rope, head_dim: int) -> Value:
        out = self._value(x.width)
        self._ops.append(ops.RopeOp(out, x, rope, head_dim))
        return out

    def attention(self, q: Value, k: Value, v: Value, shape: AttentionShape, state: int) -> Value:
        """Takes the next free slot of `state`, so that call order is layer order."""
        out = self._value(q.width)
        self._ops.append(ops.Attention(out, q, k, v, shape, state, self._slots[state]))
        self._slots[state] += 1
        return out

    def ffn(self, x: Value, names: tuple[str, str, str], ffn_size: int, activation: Activation) -> Value:
        """`names` are the weights gate, up and down."""
        out = self._value(x.width)
        self._ops.append(ops.Ffn(out, x, *names, ffn_size, activation))
        return out

    def ffn_without_gate(self, x: Value, name: str, ffn_size: int, activation: Activation, *, has_bias: bool) -> Value:
        """`name` is the layer's; has_bias: whether its up and down have one each."""
        out = self._value(x.width)
        up, down = f"{name}.up", f"{name}.down"
        biases = (f"{up}_bias", f"{down}_bias") if has_bias else (None, None)
        self._ops.append(ops.Ffn(out, x, None, up, down, ffn_size, activation, *biases))
        return out

    def moe(self, x: Value, name: str, ffn_size: int, experts: Experts, activation: Activation) -> Value:
        """`name` is the layer's, whose experts have each an FFN of `ffn_size`."""
        out = self._value(x.width)
        router, gate, up, down = (f"{name}.{part}" for part in ("router", "gate", "up", "down"))
        self._ops.append(ops.Moe(out, x, router, gate, up, down, ffn_size, experts, activation))
        return out

    def add(self, a: Value, b: Value) -> Value:
        out = self._value(a.width)
        self._ops.append(ops.Add(out, a, b))
        return out

    def select_rows(self, x: Value) -> Value:
        out = self._value(x.width)
        self._ops.append(ops.SelectRows(out, x))
        return out

    def finish(self, logits: Value) -> Program:
        assert self._slots == [state.num_layers for state in self._states], "a state has a slot that no layer took"
        return Program(self._family, tuple(self._ops), self._states, logits)
