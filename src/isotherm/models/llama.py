"""Llama and what is built like it (Touvron et al. 2023).

Qwen2 adds biases to QKV; ReluLLaMA and Bamboo (Song et al. 2024) have other activations; Mixtral has experts.
"""

from isotherm.program.ops import AttentionShape
from isotherm.program.recorder import Program, Recorder, StateKind, StateSpec
from isotherm.types import ModelConfig


def record(config: ModelConfig) -> Program:
    """Pre-norm blocks of rotary grouped-query attention and a gated FFN."""
    assert config.rope is not None
    state = StateSpec(StateKind.KV, config.num_layers, config.num_kv_heads, config.head_dim, window=None)
    scale = config.attention_scale or config.head_dim**-0.5
    shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim, scale, window=None)
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    r = Recorder(config.family, (state,))
    x = r.embed("embed", config.hidden_size)
    for i in range(config.num_layers):
        name = f"layers.{i}"

        h = r.norm(x, f"{name}.attn_norm", config.norm_eps)
        q, k, v = (
            r.linear(h, f"{name}.{part}", width, f"{name}.{part}_bias" if config.qkv_bias else None)
            for part, width in (("q", q_width), ("k", kv_width), ("v", kv_width))
        )
        q, k = r.rope(q, config.rope, config.head_dim), r.rope(k, config.rope, config.head_dim)
        attended = r.attention(q, k, v, shape, state=0)
        x = r.add(x, r.linear(attended, f"{name}.o", config.hidden_size))

        h = r.norm(x, f"{name}.ffn_norm", config.norm_eps)
        names = (f"{name}.gate", f"{name}.up", f"{name}.down")
        if config.experts:
            y = r.moe(h, name, config.ffn_size, config.experts, config.activation)
        else:
            y = r.ffn(h, names, config.ffn_size, config.activation)
        x = r.add(x, y)
    x = r.norm(r.select_rows(x), "final_norm", config.norm_eps)
    return r.finish(r.linear(x, "embed" if config.tied_head else "head", config.vocab_size))
