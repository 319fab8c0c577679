"""The op vocabulary: what recorders write, and what lowering turns it into.

A Program is a flat list of ops over Values. Every Value is float32 [tokens, width]; `tokens` is the batch's, save after
SelectRows, where it is the number of logit rows. Weights are named, never held. Recorders use the ops of the first
group and never fuse; lowering replaces them by those of the second group, which a quantising backend runs.
"""

from dataclasses import dataclass
from hashlib import sha256

from isotherm.types import Activation, Experts, Rope


@dataclass(frozen=True)
class Value:
    """One activation; `index` is its place in the order of recording."""

    index: int
    width: int

    def __str__(self) -> str:
        return f"%{self.index}"


@dataclass(frozen=True)
class NormWeights:
    """RMS norm: x / sqrt(mean(x * x) + eps) * weight (Zhang and Sennrich, 2019). With a bias layer norm, of d = x -
    mean(x): d / sqrt(mean(d * d) + eps) * weight + bias (Ba, Kiros and Hinton, 2016).
    """

    weight: str
    eps: float
    bias: str | None = None

    def __str__(self) -> str:
        if self.bias is not None:
            return f"layer({self.weight}, {self.bias}, eps={self.eps:.3g})"
        return f"rms({self.weight}, eps={self.eps:.3g})"


@dataclass(frozen=True)
class Trim:
    """A lossy rule: what is below a threshold counts as 0, in the sequences of a batch that are trimmed.

    thresholds: of magnitudes, float32 bytes by column (Lee et al. 2024; Liu et al. 2024). None: that of a token is the
    mean of its magnitudes + `deviations` * their standard deviation (You et al. 2025). What is not a number stays.
    """

    thresholds: bytes | None
    deviations: float = 0.0

    def __str__(self) -> str:
        if self.thresholds is None:
            return f"trim(mean + {self.deviations:.6g} deviations)"
        return f"trim({sha256(self.thresholds).hexdigest()[:16]})"


@dataclass(frozen=True)
class Predictor:
    """A lossy rule: neurons whose score is below the threshold count as 0, in the sequences that are trimmed.

    scores = relu(x @ first.T) @ second.T, x being the FFN's input (Liu et al. 2023; Song et al. 2024). The names of
    the weights, first [rank, width] and second [ffn_size, rank], tell their content. What is no number is not below.
    """

    first: str
    second: str
    rank: int
    threshold: float  # a float32


# --- recorded -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embed:
    """out = scale * rows of `weight` by token id."""

    out: Value
    weight: str
    scale: float


@dataclass(frozen=True)
class EmbedPositions:
    """out = x + rows of `weight` by position; position 0 has row `first_row`."""

    out: Value
    x: Value
    weight: str
    first_row: int


@dataclass(frozen=True)
class Norm:
    """Norm over each run of `group` columns: the whole width, or one head."""

    out: Value
    x: Value
    norm: NormWeights
    group: int


@dataclass(frozen=True)
class Linear:
    """out = x @ weight.T + bias."""

    out: Value
    x: Value
    weight: str
    bias: str | None


@dataclass(frozen=True)
class RopeOp:
    """Rotates the first `rope.dims` of each head by its token's position."""

    out: Value
    x: Value
    rope: Rope
    head_dim: int


@dataclass(frozen=True)
class AttentionShape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # on the scores
    window: int | None  # a query sees itself and the window - 1 positions before it; None: all


@dataclass(frozen=True)
class Attention:
    """Appends k and v to the cache, then softmax(q k scale) v, causal. `slot` is the layer's place in group `state`."""

    out: Value
    q: Value
    k: Value
    v: Value
    shape: AttentionShape
    state: int
    slot: int


@dataclass(frozen=True)
class Ffn:
    """out = hidden @ down.T + down_bias, hidden being activation(x @ gate.T) * (x @ up.T), or, where there is no gate,
    activation(x @ up.T + up_bias): the one seam for sparsity. A neuron is one hidden column.
    """

    out: Value
    x: Value
    gate: str | None
    up: str
    down: str
    ffn_size: int
    activation: Activation
    up_bias: str | None = None
    down_bias: str | None = None
    trim_gate: Trim | None = None  # of the activated gate
    trim_hidden: Trim | None = None
    predictor: Predictor | None = None  # of an activation that has zeros


@dataclass(frozen=True)
class Moe:
    """A mixture of experts (Jiang et al. 2024): of the logits x @ router.T the largest `experts.num_used` choose the
    experts of a token, of equal ones the first; out is the sum of what these say, weighted by the softmax of their
    logits alone. Expert e says (activation(x @ gate_e.T) * (x @ up_e.T)) @ down_e.T.

    Weights: router [num_experts, width]; gate and up [num_experts * ffn_size, width] and down [num_experts * width,
    ffn_size], expert after expert.
    """

    out: Value
    x: Value
    router: str
    gate: str
    up: str
    down: str
    ffn_size: int  # of one expert
    experts: Experts
    activation: Activation


@dataclass(frozen=True)
class Add:
    out: Value
    a: Value
    b: Value


@dataclass(frozen=True)
class SelectRows:
    """Keeps the rows that the batch wants logits for."""

    out: Value
    x: Value


# --- lowered --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """One matmul of a group: out = q(x) @ weight.T + bias in the arithmetic of the contract."""

    out: Value
    weight: str
    bias: str | None


@dataclass(frozen=True)
class QuantLinear:
    """Quantises norm(x) once and runs every projection over it; one with a residual has one projection.

    activation: of what a projection gives, its bias included; never with a residual.
    """

    x: Value
    norm: NormWeights | None
    projections: tuple[Projection, ...]
    residual: Value | None
    activation: Activation | None = None


@dataclass(frozen=True)
class QuantGlu:
    """out = activation(q(norm(x)) @ gate.T) * (q(norm(x)) @ up.T), gate and up packed as one stream."""

    out: Value
    x: Value
    norm: NormWeights | None
    gate: str
    up: str
    activation: Activation


@dataclass(frozen=True)
class SparseUp:
    """out = activation(gated) * (q(norm(x)) @ weight.T), of which rows are needed where activation(gated) is not 0.

    by_rows: whether those may be computed alone; else all are.
    """

    out: Value
    gated: Value
    x: Value
    norm: NormWeights | None
    weight: str
    activation: Activation
    by_rows: bool = True


@dataclass(frozen=True)
class PredictedLinear:
    """out = activation(q(norm(x)) @ weight.T + bias), but 0 where it is trimmed and the score is below the threshold.
    by_rows: as of SparseUp."""

    out: Value
    scores: Value
    x: Value
    norm: NormWeights | None
    weight: str
    bias: str | None
    threshold: float
    activation: Activation | None
    by_rows: bool = True


@dataclass(frozen=True)
class TrimOp:
    """out = x where the magnitude of activation(x) reaches the threshold, else 0."""

    out: Value
    x: Value
    activation: Activation | None
    trim: Trim


@dataclass(frozen=True)
class SparseDown:
    """out = q(x) @ weight.T + bias + residual, of which columns are needed only where the code of x is not 0."""

    out: Value
    x: Value
    weight: str
    bias: str | None
    residual: Value | None


@dataclass(frozen=True)
class Route:
    """out = the experts of each row of `logits` in rising rank, as numbers, then their weights: see Moe."""

    out: Value  # [tokens, 2 * num_used]
    logits: Value  # [tokens, num_experts]
    experts: Experts


@dataclass(frozen=True)
class ExpertGlu:
    """As QuantGlu, of each row's experts side by side in the order of their rank."""

    out: Value  # [tokens, num_used * ffn_size]
    x: Value
    norm: NormWeights | None
    routes: Value
    gate: str
    up: str
    experts: Experts
    activation: Activation


@dataclass(frozen=True)
class ExpertGate:
    """out = q(norm(x)) @ weight_e.T of each row's experts, side by side in the order of their rank."""

    out: Value  # [tokens, num_used * ffn_size]
    x: Value
    norm: NormWeights | None
    routes: Value
    weight: str
    experts: Experts


@dataclass(frozen=True)
class SparseExpertUp:
    """As SparseUp, of each row's experts: of all rows of an expert together the neurons that fire."""

    out: Value
    gated: Value  # [tokens, num_used * ffn_size]
    x: Value
    norm: NormWeights | None
    routes: Value
    weight: str
    experts: Experts
    activation: Activation


@dataclass(frozen=True)
class ExpertDown:
    """out = sum over ranks of weight * (q(x of the rank) @ weight_e.T) + residual.

    by_neuron: whether those neurons whose code is not 0 may be computed alone.
    """

    out: Value
    x: Value  # [tokens, num_used * ffn_size]
    routes: Value
    weight: str
    experts: Experts
    residual: Value | None
    by_neuron: bool = False


@dataclass(frozen=True)
class RopeAttention:
    """Norms and rotates q and k, where the family does so, appends k and v, attends: everything between QKV and O."""

    out: Value
    q: Value
    k: Value
    v: Value
    q_norm: NormWeights | None
    k_norm: NormWeights | None
    rope: Rope | None
    shape: AttentionShape
    state: int
    slot: int


@dataclass(frozen=True)
class AddNorm:
    """out = a + norm(b): the residual of a family that norms what a block adds."""

    out: Value
    a: Value
    b: Value
    norm: NormWeights


RecordedOp = Embed | EmbedPositions | Norm | Linear | RopeOp | Attention | Ffn | Moe | Add | SelectRows
SparseOp = SparseUp | SparseDown | TrimOp | PredictedLinear
ExpertOp = Route | ExpertGlu | ExpertGate | SparseExpertUp | ExpertDown
FusedOp = QuantLinear | QuantGlu | SparseOp | ExpertOp | RopeAttention | AddNorm
LoweredOp = FusedOp | Embed | EmbedPositions | SelectRows | Add
Op = RecordedOp | FusedOp
