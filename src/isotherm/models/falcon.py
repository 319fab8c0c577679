"""Falcon (Almazrouei et al. 2023): attention and an FFN without a gate side by side, layer norms, no other biases.

The 7B has one norm a layer and one KV head; the 40B, the "new decoder architecture", a norm each and groups of heads.

GELU is the tanh form, as in every reader of GGUF (`ggml_gelu`); transformers' own is the exact one, by erf. The two
differ by 5e-4 at most. Where the file names ReLU, that.
"""

from isotherm.program.ops import AttentionShape, Value
from isotherm.program.recorder import Program, Recorder, StateKind, StateSpec
from isotherm.types import ModelConfig


def record(config: ModelConfig) -> Program:
    """Both halves of a block read the hidden state before it, and are added to it one after the other."""
    assert config.rope is not None
    state = StateSpec(StateKind.KV, config.num_layers, config.num_kv_heads, config.head_dim, window=None)
    scale = config.attention_scale or config.head_dim**-0.5
    shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim, scale, window=None)
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    r = Recorder(config.family, (state,))

    def norm(x: Value, name: str) -> Value:
        return r.norm(x, name, config.norm_eps, bias=f"{name}_bias")

    x = r.embed("embed", config.hidden_size)
    for i in range(config.num_layers):
        name = f"layers.{i}"
        before_attention = norm(x, f"{name}.attn_norm")
        before_ffn = before_attention if config.shared_norm else norm(x, f"{name}.ffn_norm")

        q, k, v = (
            r.linear(before_attention, f"{name}.{part}", width)
            for part, width in (("q", q_width), ("k", kv_width), ("v", kv_width))
        )
        q, k = r.rope(q, config.rope, config.head_dim), r.rope(k, config.rope, config.head_dim)
        attended = r.attention(q, k, v, shape, state=0)
        x = r.add(x, r.linear(attended, f"{name}.o", config.hidden_size))
        x = r.add(x, r.ffn_without_gate(before_ffn, name, config.ffn_size, config.activation, has_bias=False))
    x = norm(r.select_rows(x), "final_norm")
    return r.finish(r.linear(x, "embed" if config.tied_head else "head", config.vocab_size))
