"""Qwen3 (Qwen Team 2025), dense and with experts: pre-norm blocks, a norm on each head of q and k before its rope."""

from isotherm.program.ops import AttentionShape, Value
from isotherm.program.recorder import Program, Recorder, StateKind, StateSpec
from isotherm.types import ModelConfig, Rope


def record(config: ModelConfig) -> Program:
    """Grouped-query attention; a gated FFN, or experts."""
    assert config.rope is not None
    heads = (config.num_kv_heads, config.head_dim)
    state = StateSpec(StateKind.KV, config.num_layers, *heads, window=None)
    scale = config.attention_scale or config.head_dim**-0.5
    shape = AttentionShape(config.num_heads, *heads, scale, window=None)
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    r = Recorder(config.family, (state,))

    def turned(x: Value, name: str, rope: Rope) -> Value:
        return r.rope(r.norm(x, name, config.norm_eps, config.head_dim), rope, config.head_dim)

    x = r.embed("embed", config.hidden_size)
    for i in range(config.num_layers):
        name = f"layers.{i}"

        h = r.norm(x, f"{name}.attn_norm", config.norm_eps)
        q, k, v = (
            r.linear(h, f"{name}.{part}", width) for part, width in (("q", q_width), ("k", kv_width), ("v", kv_width))
        )
        q, k = turned(q, f"{name}.q_norm", config.rope), turned(k, f"{name}.k_norm", config.rope)
        attended = r.attention(q, k, v, shape, state=0)
        x = r.add(x, r.linear(attended, f"{name}.o", config.hidden_size))

        h = r.norm(x, f"{name}.ffn_norm", config.norm_eps)
        if config.experts:
            y = r.moe(h, name, config.ffn_size, config.experts, config.activation)
        else:
            names = (f"{name}.gate", f"{name}.up", f"{name}.down")
            y = r.ffn(h, names, config.ffn_size, config.activation)
        x = r.add(x, y)
    x = r.norm(r.select_rows(x), "final_norm", config.norm_eps)
    return r.finish(r.linear(x, "embed" if config.tied_head else "head", config.vocab_size))
