"""Small frozen values that every room may speak of."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path


class KvType(Enum):
    """How keys and values are kept: float16, or int8 with a float16 scale per 32 columns of a head."""

    F16 = "f16"
    Q8_0 = "q8_0"


class QuantType(Enum):
    """How a weight tensor is stored; the value is the name GGUF gives the type."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    Q4_0 = "Q4_0"
    Q4_1 = "Q4_1"
    Q5_0 = "Q5_0"
    Q5_1 = "Q5_1"
    Q8_0 = "Q8_0"
    Q4_K = "Q4_K"
    Q5_K = "Q5_K"
    Q6_K = "Q6_K"
    IQ4_NL = "IQ4_NL"
    IQ4_XS = "IQ4_XS"
    MXFP4 = "MXFP4"
    NVFP4 = "NVFP4"
    Q2_K = "Q2_K"
    Q3_K = "Q3_K"
    TQ1_0 = "TQ1_0"
    TQ2_0 = "TQ2_0"
    IQ1_S = "IQ1_S"
    IQ1_M = "IQ1_M"
    IQ2_XXS = "IQ2_XXS"
    IQ2_XS = "IQ2_XS"
    IQ2_S = "IQ2_S"
    IQ3_XXS = "IQ3_XXS"
    IQ3_S = "IQ3_S"

    @property
    def block_elements(self) -> int:
        """Consecutive elements of a row that share one block of bytes."""
        return _BLOCKS[self][0]

    @property
    def block_bytes(self) -> int:
        return _BLOCKS[self][1]

    @property
    def is_float(self) -> bool:
        return self in (QuantType.F32, QuantType.F16, QuantType.BF16)

    def row_bytes(self, num_columns: int) -> int:
        """Bytes of one row; `num_columns` is a multiple of `block_elements`."""
        assert num_columns % self.block_elements == 0
        return num_columns // self.block_elements * self.block_bytes


# elements, bytes of a block (GGUF specification, ggml block structures)
_BLOCKS: dict[QuantType, tuple[int, int]] = {
    QuantType.F32: (1, 4),
    QuantType.F16: (1, 2),
    QuantType.BF16: (1, 2),
    QuantType.Q4_0: (32, 18),
    QuantType.Q4_1: (32, 20),
    QuantType.Q5_0: (32, 22),
    QuantType.Q5_1: (32, 24),
    QuantType.Q8_0: (32, 34),
    QuantType.Q4_K: (256, 144),
    QuantType.Q5_K: (256, 176),
    QuantType.Q6_K: (256, 210),
    QuantType.IQ4_NL: (32, 18),
    QuantType.IQ4_XS: (256, 136),
    QuantType.MXFP4: (32, 17),
    QuantType.NVFP4: (64, 36),
    QuantType.Q2_K: (256, 84),
    QuantType.Q3_K: (256, 110),
    QuantType.TQ1_0: (256, 54),
    QuantType.TQ2_0: (256, 66),
    QuantType.IQ1_S: (256, 50),
    QuantType.IQ1_M: (256, 56),
    QuantType.IQ2_XXS: (256, 66),
    QuantType.IQ2_XS: (256, 74),
    QuantType.IQ2_S: (256, 82),
    QuantType.IQ3_XXS: (256, 98),
    QuantType.IQ3_S: (256, 110),
}


class Activation(Enum):
    """Of an FFN's hidden values; of a gated one it is of the gate, and DRELU of both (Song et al. 2024)."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"
    RELU_SQUARED = "relu_squared"
    DRELU = "drelu"

    @property
    def has_zeros(self) -> bool:
        """Whether it makes true zeros, so that neurons fire or do not."""
        return self in (Activation.RELU, Activation.RELU_SQUARED, Activation.DRELU)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding over the first `dims` of a head, halves rotated against each other.

    Angle of pair i at position p: p * position_scale * base ** (-2 i / dims) / factors[i].
    """

    base: float
    dims: int
    position_scale: float = 1.0
    factors: tuple[float, ...] | None = None  # [dims / 2]; Llama 3 stretches the slow pairs only


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: how many FFNs a layer has, and how many of them compute a token."""

    num_experts: int
    num_used: int  # up to num_experts


@dataclass(frozen=True)
class ModelConfig:
    """What a family's recorder needs to know of a model, whatever file it came from."""

    family: str
    name: str
    num_layers: int
    hidden_size: int
    ffn_size: int  # of one expert, where there are experts
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_tokens: int
    norm_eps: float
    rope: Rope | None  # None: learned positions
    tied_head: bool
    activation: Activation = Activation.SILU
    qkv_bias: bool = False
    attention_scale: float | None = None  # on the scores; None: head_dim ** -0.5
    # Layers with a sliding window use `local_rope`; each `global_every`-th layer attends to everything.
    sliding_window: int | None = None
    local_rope: Rope | None = None
    global_every: int | None = None
    first_position_row: int = 0  # of the table of learned positions: the row of position 0
    experts: Experts | None = None  # None: an FFN that computes every token
    shared_norm: bool = False  # of attention and FFN side by side: both read one norm


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer as the model file describes it."""

    model: str  # "gpt2": byte-level BPE; "llama": SentencePiece by score
    pre: str  # name of the pre-tokenizer rule, "default" where the file is silent
    tokens: tuple[str, ...]
    token_types: tuple[int, ...]  # GGUF: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte
    scores: tuple[float, ...]  # empty for BPE
    merges: tuple[str, ...]  # "left right" in order of rank; empty for SentencePiece
    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    unknown_id: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. temperature 0 is greedy; a neutral value switches its rule off.

    Order: logit_bias, penalties, top_k, top_p, min_p, temperature, draw. `seed` None draws a fresh seed.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_tokens: int = 64  # how many of the last tokens the penalties see; -1 all
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    sequence: int = 0  # which of several answers with one seed: each draws other random numbers
    num_logprobs: int = 0


@dataclass(frozen=True)
class Grammar:
    """What an answer has to follow, as a whole. kind: "json_schema", "json_object", "regex", "lark" or "gbnf".

    source is in the kind's own language, "" for json_object.
    """

    kind: str
    source: str = ""


@dataclass(frozen=True)
class LoadOptions:
    """How `isotherm.load` opens a model."""

    context_tokens: int | None = None  # longest sequence; None: the model's own, cut to what memory holds
    threads: int | None = None  # None: the physical cores that this process may use
    backend: str = "cpu"  # or "reference": float32 in NumPy, slow and the truth
    cache_bytes: int = 64 << 30  # disk that packed models may take, the least recently used go first; 0: none
    offline: bool = False  # nothing is fetched
    kv: str = KvType.F16.value  # keys and values; "q8_0" takes half the memory
    parallel: int = 4  # answers that are computed together
    kv_bytes: int | None = None  # memory of KV pages, at least of one full context; None: what kv_share says
    kv_share: float = 0.0  # of free memory, the GPU's where one helps, for KV pages; at least one full context
    kv_dir: str | Path | None = None  # folder where KV pages are kept for later processes; None: nowhere
    sparse: bool = True  # compute only the neurons that fire, where that is quicker; answers are the same
    quality: str = (
        "exact"  # or a budget, as "kl=0.01" or "ppl=+1%": the lossy rule that `isotherm tune` chose within it
    )
    predictor: str | Path | None = None  # file of `isotherm train-predictor`: neurons it takes not to fire count as 0
    device: str = (
        "auto"  # "cpu", "gpu" or "gpu:1": which GPU helps; "auto": one with memory of its own, if there is one
    )
    vram_bytes: int | None = None  # memory of the GPU that may be used; None: nine tenths of it
    kv_disk_bytes: int = 16 << 30  # disk that all of `kv_dir` may take, the least recently used pages go first
