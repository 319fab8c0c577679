"""Gemma 3 (Gemma Team 2025), text only: local and global layers, QK norm, norms on both sides of a block, GeGLU."""

from isotherm.program.ops import AttentionShape
from isotherm.program.recorder import Program, Recorder, StateKind, StateSpec
from isotherm.types import Activation, ModelConfig

GLOBAL, LOCAL = 0, 1  # state groups


def record(config: ModelConfig) -> Program:
    """Every `global_every`-th layer sees all positions, the others a window, each kind with its own rope base."""
    assert config.global_every is not None
    assert config.rope is not None
    assert config.local_rope is not None
    kinds = [GLOBAL if (i + 1) % config.global_every == 0 else LOCAL for i in range(config.num_layers)]
    heads = (config.num_kv_heads, config.head_dim)
    states = (
        StateSpec(StateKind.KV, kinds.count(GLOBAL), *heads, window=None),
        StateSpec(StateKind.KV_WINDOW, kinds.count(LOCAL), *heads, window=config.sliding_window),
    )
    scale = config.attention_scale or config.head_dim**-0.5
    shapes = [AttentionShape(config.num_heads, *heads, scale, state.window) for state in states]
    ropes = (config.rope, config.local_rope)
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    eps = config.norm_eps
    r = Recorder(config.family, states)
    x = r.embed("embed", config.hidden_size, scale=config.hidden_size**0.5)
    for i, kind in enumerate(kinds):
        name = f"layers.{i}"

        h = r.norm(x, f"{name}.attn_norm", eps)
        q, k, v = (
            r.linear(h, f"{name}.{part}", width) for part, width in (("q", q_width), ("k", kv_width), ("v", kv_width))
        )
        q = r.rope(r.norm(q, f"{name}.q_norm", eps, config.head_dim), ropes[kind], config.head_dim)
        k = r.rope(r.norm(k, f"{name}.k_norm", eps, config.head_dim), ropes[kind], config.head_dim)
        o = r.linear(r.attention(q, k, v, shapes[kind], kind), f"{name}.o", config.hidden_size)
        x = r.add(x, r.norm(o, f"{name}.post_attn_norm", eps))

        h = r.norm(x, f"{name}.ffn_norm", eps)
        names = (f"{name}.gate", f"{name}.up", f"{name}.down")
        y = r.ffn(h, names, config.ffn_size, Activation.GELU_TANH)
        x = r.add(x, r.norm(y, f"{name}.post_ffn_norm", eps))
    x = r.norm(r.select_rows(x), "final_norm", eps)
    return r.finish(r.linear(x, "embed" if config.tied_head else "head", config.vocab_size))
