"""OPT (Zhang et al. 2022): layer norms, biases everywhere, learned positions, an FFN of ReLU without a gate."""

from isotherm.program.ops import AttentionShape, Value
from isotherm.program.recorder import Program, Recorder, StateKind, StateSpec
from isotherm.types import Activation, ModelConfig


def record(config: ModelConfig) -> Program:
    """Norms stand before a block, as in all sizes but the one of 350M parameters."""
    state = StateSpec(StateKind.KV, config.num_layers, config.num_kv_heads, config.head_dim, window=None)
    shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim**-0.5, window=None)
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    r = Recorder(config.family, (state,))

    def norm(x: Value, name: str) -> Value:
        return r.norm(x, name, config.norm_eps, bias=f"{name}_bias")

    x = r.embed_positions(r.embed("embed", config.hidden_size), "positions", config.first_position_row)
    for i in range(config.num_layers):
        name = f"layers.{i}"

        h = norm(x, f"{name}.attn_norm")
        q, k, v = (
            r.linear(h, f"{name}.{part}", width, f"{name}.{part}_bias")
            for part, width in (("q", q_width), ("k", kv_width), ("v", kv_width))
        )
        attended = r.attention(q, k, v, shape, state=0)
        x = r.add(x, r.linear(attended, f"{name}.o", config.hidden_size, f"{name}.o_bias"))

        h = norm(x, f"{name}.ffn_norm")
        x = r.add(x, r.ffn_without_gate(h, name, config.ffn_size, Activation.RELU, has_bias=True))
    x = norm(r.select_rows(x), "final_norm")
    return r.finish(r.linear(x, "embed" if config.tied_head else "head", config.vocab_size))
