"""One table per model family: what GGUF calls its numbers and tensors, and in which row order it stores them.

Source: llama.cpp (llama-arch.cpp, llama-model.cpp and the converters). Norm weights of gemma3 already carry their + 1
in GGUF. `model_config` reads the numbers by these tables, `model_tensors` the tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from isotherm.types import Activation

EMBED = "token_embd.weight"
HEAD = "output.weight"
POSITIONS = "position_embd.weight"
ROPE_FACTORS = "rope_freqs.weight"
SECOND_NORM = "attn_norm_2.weight"

GLOBAL_TENSORS = {"embed": EMBED, "final_norm": "output_norm.weight", "head": HEAD}
_LAYER_TENSORS = {
    "attn_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "ffn_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
}
QKV_BIASES = {"q_bias": "attn_q.bias", "k_bias": "attn_k.bias", "v_bias": "attn_v.bias"}
_HEAD_NORM_TENSORS = {"q_norm": "attn_q_norm.weight", "k_norm": "attn_k_norm.weight"}
_GEMMA_TENSORS = {
    **_HEAD_NORM_TENSORS,
    "post_attn_norm": "post_attention_norm.weight",
    "post_ffn_norm": "post_ffw_norm.weight",
}
_UNGATED_TENSORS = {name: stored for name, stored in _LAYER_TENSORS.items() if name != "gate"}
_OPT_TENSORS = {
    **_UNGATED_TENSORS,
    **QKV_BIASES,
    "attn_norm_bias": "attn_norm.bias",
    "o_bias": "attn_output.bias",
    "ffn_norm_bias": "ffn_norm.bias",
    "up_bias": "ffn_up.bias",
    "down_bias": "ffn_down.bias",
}
# Of two norms, GGUF calls that of the FFN attn_norm; where there is one it has this name, and both read it.
_FALCON_TENSORS = {
    **_UNGATED_TENSORS,
    **dict.fromkeys("qkv", "attn_qkv.weight"),
    "attn_norm": SECOND_NORM,
    "attn_norm_bias": "attn_norm_2.bias",
    "ffn_norm": "attn_norm.weight",
    "ffn_norm_bias": "attn_norm.bias",
}
SHARED_NORM_TENSORS = {"attn_norm": "attn_norm.weight", "attn_norm_bias": "attn_norm.bias"}
_FINAL_NORM_BIAS = {"final_norm_bias": "output_norm.bias"}


@dataclass(frozen=True)
class Family:
    """How one architecture of GGUF maps to canonical names; `qkv_bias`, `has_experts` None: as the file has it."""

    layer_tensors: Mapping[str, str]
    global_tensors: Mapping[str, str] = field(default_factory=dict)  # beside those that all have
    eps_key: str = "layer_norm_rms_epsilon"
    has_rope: bool = True
    activation: Activation = Activation.SILU  # where the file names none
    named_activations: tuple[Activation, ...] = ()  # that the file may name
    qkv_bias: bool | None = False
    interleaved_rope: bool = False
    rope_factors: bool = False  # may bring rope_freqs.weight
    sliding_window: bool = False
    fused_qkv: bool = False  # rows of q, then of k, then of v, in one matrix
    parallel_residual: bool = False  # attention and FFN side by side; they may share a norm
    has_experts: bool | None = False


FAMILIES: dict[str, Family] = {
    "llama": Family(
        _LAYER_TENSORS,
        qkv_bias=None,
        interleaved_rope=True,
        rope_factors=True,
        named_activations=tuple(Activation),
        has_experts=None,
    ),
    "bamboo": Family(_LAYER_TENSORS, interleaved_rope=True, activation=Activation.DRELU),
    "qwen2": Family(_LAYER_TENSORS, qkv_bias=True),
    "qwen3": Family(_LAYER_TENSORS | _HEAD_NORM_TENSORS),
    "qwen3moe": Family(_LAYER_TENSORS | _HEAD_NORM_TENSORS, has_experts=True),
    "gemma3": Family(_LAYER_TENSORS | _GEMMA_TENSORS, sliding_window=True),
    "opt": Family(
        _OPT_TENSORS, {"positions": POSITIONS, **_FINAL_NORM_BIAS}, eps_key="layer_norm_epsilon", has_rope=False
    ),
    "falcon": Family(
        _FALCON_TENSORS,
        _FINAL_NORM_BIAS,
        eps_key="layer_norm_epsilon",
        activation=Activation.GELU_TANH,
        named_activations=(Activation.GELU_TANH, Activation.RELU),
        fused_qkv=True,
        parallel_residual=True,
    ),
}
