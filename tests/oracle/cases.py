"""Small random models for which transformers has been asked: their configs here and there, and their weights.

Weights come from NumPy's legacy generator, whose streams are frozen (NEP 19), so that no weights need to be kept.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isotherm.types import Activation, Experts, ModelConfig, Rope

F32 = NDArray[np.float32]

ANSWERS = Path(__file__).parents[1] / "golden" / "transformers.npz"
NUM_TOKENS = 48
VOCAB_SIZE = 64


@dataclass(frozen=True)
class OracleCase:
    name: str
    config: ModelConfig
    hf_class: str  # of transformers
    hf_config: dict[str, Any]  # of its config class, beside what `config` says already
    adds_one: bool = False  # the norms there add 1 to their weight

    @property
    def token_ids(self) -> NDArray[np.int32]:
        return np.random.RandomState(7).randint(0, VOCAB_SIZE, NUM_TOKENS).astype(np.int32)


_LLAMA = ModelConfig(
    family="llama",
    name="tiny",
    num_layers=2,
    hidden_size=64,
    ffn_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=VOCAB_SIZE,
    context_tokens=256,
    norm_eps=2e-3,  # large enough to be missed
    rope=Rope(10000.0, 16),
    tied_head=False,
)
_GEMMA = replace(
    _LLAMA,
    family="gemma3",
    num_layers=4,
    num_kv_heads=1,
    head_dim=32,
    norm_eps=1e-3,
    rope=Rope(1_000_000.0, 32, position_scale=1 / 8),
    tied_head=True,
    attention_scale=24.0**-0.5,
    sliding_window=9,
    local_rope=Rope(10000.0, 32),
    global_every=2,
)
_FALCON = replace(_LLAMA, family="falcon", activation=Activation.GELU_TANH)


def llama3_factors(dims: int, base: float, factor: float, original_tokens: int) -> tuple[float, ...]:
    """What Llama 3.1 divides each frequency by (Llama 3.1 model card; low and high factors 1 and 4).

    Waves shorter than a quarter of the original context stay, those longer than all of it are stretched by `factor`,
    those between are blended.
    """
    wavelengths = 2 * np.pi * base ** (2 * np.arange(dims // 2) / dims)
    blend = np.clip((original_tokens / wavelengths - 1) / (4 - 1), 0, 1)
    return tuple((1 / ((1 - blend) / factor + blend)).tolist())


CASES = (
    OracleCase(
        "llama", _LLAMA, "LlamaForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    ),
    OracleCase(
        "llama-linear-rope",
        replace(_LLAMA, rope=Rope(10000.0, 16, position_scale=1 / 4), num_kv_heads=1),
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    OracleCase(
        "llama3-rope",
        replace(
            _LLAMA,
            rope=Rope(5000.0, 32, factors=llama3_factors(32, 5000.0, 8.0, 32)),
            head_dim=32,
            tied_head=True,
        ),
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    OracleCase(
        "qwen2",
        replace(_LLAMA, family="qwen2", norm_eps=5e-3, rope=Rope(1_000_000.0, 16), tied_head=True, qkv_bias=True),
        "Qwen2ForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}, "use_sliding_window": False},
    ),
    OracleCase(
        "gemma3",
        _GEMMA,
        "Gemma3ForCausalLM",
        {
            "sliding_window": 9,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        adds_one=True,
    ),
    OracleCase(
        "mixtral",
        replace(_LLAMA, experts=Experts(5, 2)),
        "MixtralForCausalLM",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
    ),
    OracleCase(
        "qwen3",
        replace(_LLAMA, family="qwen3", rope=Rope(1_000_000.0, 32), head_dim=32, tied_head=True),
        "Qwen3ForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}, "use_sliding_window": False},
    ),
    OracleCase(
        "qwen3moe",
        replace(_LLAMA, family="qwen3moe", ffn_size=48, rope=Rope(1_000_000.0, 16), experts=Experts(12, 4)),
        "Qwen3MoeForCausalLM",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "use_sliding_window": False,
            "num_experts": 12,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
    ),
    OracleCase(
        "relu-llama",
        replace(_LLAMA, activation=Activation.RELU),
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "hidden_act": "relu"},
    ),
    OracleCase(
        "opt",
        replace(
            _LLAMA,
            family="opt",
            num_kv_heads=4,
            norm_eps=1e-5,
            rope=None,
            tied_head=True,
            activation=Activation.RELU,
            first_position_row=2,
        ),
        "OPTForCausalLM",
        {},
    ),
    OracleCase(
        "falcon",
        _FALCON,
        "FalconForCausalLM",
        {"new_decoder_architecture": True, "activation": "gelu_pytorch_tanh"},
    ),
    OracleCase(
        "falcon-7b",
        replace(_FALCON, num_kv_heads=1, shared_norm=True, tied_head=True),
        "FalconForCausalLM",
        {"multi_query": True, "activation": "gelu_pytorch_tanh"},
    ),
    OracleCase(
        "falcon-11b",  # the new architecture with one norm
        replace(_FALCON, shared_norm=True),
        "FalconForCausalLM",
        {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "activation": "gelu_pytorch_tanh"},
    ),
    OracleCase(
        "relu-falcon",
        replace(_FALCON, activation=Activation.RELU),
        "FalconForCausalLM",
        {"new_decoder_architecture": True, "activation": "relu"},
    ),
)


def weights(config: ModelConfig) -> dict[str, F32]:
    """Canonical name -> float32 [rows, columns], or [n] of a vector."""
    random = np.random.RandomState(11)
    hidden, ffn = config.hidden_size, config.ffn_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed": (config.vocab_size, hidden), "final_norm": (hidden,)}
    if not config.tied_head:
        shapes["head"] = (config.vocab_size, hidden)
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "q": (q_rows, hidden),
        "k": (kv_rows, hidden),
        "v": (kv_rows, hidden),
        "o": (hidden, q_rows),
        "ffn_norm": (hidden,),
        "gate": (ffn, hidden),
        "up": (ffn, hidden),
        "down": (hidden, ffn),
    }
    if config.qkv_bias:
        layer |= {"q_bias": (q_rows,), "k_bias": (kv_rows,), "v_bias": (kv_rows,)}
    if config.family == "opt":
        del layer["gate"]
        layer |= {f"{name}_bias": shape[:1] for name, shape in layer.items()}
        shapes |= {
            "positions": (config.first_position_row + config.context_tokens, hidden),
            "final_norm_bias": (hidden,),
        }
    if config.family == "falcon":
        del layer["gate"]
        if config.shared_norm:
            del layer["ffn_norm"]
        layer |= {f"{name}_bias": (hidden,) for name in layer if name.endswith("norm")}
        shapes["final_norm_bias"] = (hidden,)
    if config.family in ("gemma3", "qwen3", "qwen3moe"):
        layer |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    if config.experts:
        num_experts = config.experts.num_experts
        layer |= {name: (num_experts * layer[name][0], layer[name][1]) for name in ("gate", "up", "down")}
        layer["router"] = (num_experts, hidden)
    if config.family == "gemma3":
        layer |= {"post_attn_norm": (hidden,), "post_ffn_norm": (hidden,)}
    for i in range(config.num_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return {name: _random(random, name, shape) for name, shape in shapes.items()}


def _random(random: np.random.RandomState, name: str, shape: tuple[int, ...]) -> F32:
    noise = random.standard_normal(shape)
    if len(shape) == 2:
        noise = noise * (2.0 / shape[1]) ** 0.5
    elif not name.endswith("bias"):
        noise = 1 + 0.3 * noise
    values: F32 = noise.astype(np.float32)
    return values
