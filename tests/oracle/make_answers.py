"""Asks transformers for the logits of every case; needs the `oracle` extra.

python tests/oracle/make_answers.py            writes tests/golden/transformers.npz
python tests/oracle/make_answers.py --check    compares with it, and fails where they differ
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from oracle.cases import ANSWERS, CASES, F32, OracleCase, weights
from tolerances import ORACLE_AGAIN

from isotherm.types import ModelConfig

_LAYER_NAMES = {
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_EXPERT_NAMES = {"router": "mlp.gate.weight", "gate+up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"}
_GEMMA_LAYER_NAMES = _LAYER_NAMES | {
    "post_attn_norm": "post_attention_layernorm.weight",
    "ffn_norm": "pre_feedforward_layernorm.weight",
    "post_ffn_norm": "post_feedforward_layernorm.weight",
}
_OPT_NAMES = {
    "embed": "embed_tokens.weight",
    "positions": "embed_positions.weight",
    "final_norm": "final_layer_norm.weight",
    "attn_norm": "self_attn_layer_norm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.out_proj.weight",
    "ffn_norm": "final_layer_norm.weight",
    "up": "fc1.weight",
    "down": "fc2.weight",
}
_FALCON_NAMES = {
    "attn_norm": "ln_attn",
    "ffn_norm": "ln_mlp",
    "qkv": "self_attention.query_key_value",
    "o": "self_attention.dense",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
_GLOBAL_NAMES = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}


def answer(case: OracleCase) -> F32:
    """Logits [tokens, vocab_size]."""
    model_class = getattr(transformers, case.hf_class)
    c = case.config
    shared = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "max_position_embeddings": c.context_tokens,
        "tie_word_embeddings": c.tied_head,
        "attn_implementation": "eager",
    }
    if c.family == "opt":
        shared |= {"ffn_dim": c.ffn_size, "word_embed_proj_dim": c.hidden_size}
    elif c.family == "falcon":
        shared |= {"ffn_hidden_size": c.ffn_size, "num_kv_heads": c.num_kv_heads, "layer_norm_epsilon": c.norm_eps}
    else:
        shared |= {
            "intermediate_size": c.ffn_size,
            "num_key_value_heads": c.num_kv_heads,
            "head_dim": c.head_dim,
            "rms_norm_eps": c.norm_eps,
        }
    config = model_class.config_class(**shared, **case.hf_config)
    model = model_class(config).to(torch.float32).eval()
    ours = _with_stacks(c, weights(c))
    if c.family == "falcon":
        ours = _fuse_qkv(c, ours)
    state = {_hf_name(case, name): torch.from_numpy(_hf_values(case, name, w)) for name, w in ours.items()}
    left = model.load_state_dict(state, strict=False)
    assert not left.unexpected_keys, left.unexpected_keys
    assert left.missing_keys == (["lm_head.weight"] if c.tied_head else []), left.missing_keys
    model.tie_weights()
    with torch.no_grad():
        logits = model(torch.from_numpy(case.token_ids.astype(np.int64))[None], use_cache=False).logits
    values: F32 = logits[0].numpy()
    return values


def _with_stacks(config: ModelConfig, ours: dict[str, F32]) -> dict[str, F32]:
    """Matrices of experts as transformers has them: [experts, rows, columns], gate above up."""
    if not config.experts:
        return ours
    out = dict(ours)
    for i in range(config.num_layers):
        name = f"layers.{i}"
        gate, up, down = (
            out.pop(f"{name}.{part}").reshape(config.experts.num_experts, -1, columns)
            for part, columns in (
                ("gate", config.hidden_size),
                ("up", config.hidden_size),
                ("down", config.ffn_size),
            )
        )
        out |= {f"{name}.gate+up": np.concatenate([gate, up], axis=1), f"{name}.down": down}
    return out


def _fuse_qkv(config: ModelConfig, ours: dict[str, F32]) -> dict[str, F32]:
    """Of each layer one matrix: for each KV head the rows of its query heads, of its key, of its value."""
    fused = {name: values for name, values in ours.items() if name.rpartition(".")[2] not in ("q", "k", "v")}
    for i in range(config.num_layers):
        shape = (config.num_kv_heads, -1, config.hidden_size)
        parts = [ours[f"layers.{i}.{part}"].reshape(shape) for part in "qkv"]
        fused[f"layers.{i}.qkv"] = np.concatenate(parts, axis=1).reshape(-1, config.hidden_size)
    return fused


def _hf_name(case: OracleCase, name: str) -> str:
    if case.config.family == "falcon" and name != "head":
        place, _, part = name.rpartition(".")
        suffix = ".bias" if part.endswith("_bias") else ".weight"
        part = part.removesuffix("_bias")
        if not place:
            return f"transformer.{'word_embeddings' if part == 'embed' else 'ln_f'}{suffix}"
        stored = "input_layernorm" if part == "attn_norm" and case.config.shared_norm else _FALCON_NAMES[part]
        return f"transformer.{place.replace('layers', 'h')}.{stored}{suffix}"
    if case.config.family == "opt":
        place, _, part = name.rpartition(".")
        stored = _OPT_NAMES[part.removesuffix("_bias")]
        stored = stored.replace(".weight", ".bias") if part.endswith("_bias") else stored
        return f"model.decoder.{place}.{stored}" if place else f"model.decoder.{stored}"
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    _, layer, part = name.split(".")
    names = _GEMMA_LAYER_NAMES if case.config.family == "gemma3" else _LAYER_NAMES
    if case.config.experts:
        names = names | _EXPERT_NAMES
    return f"model.layers.{layer}.{names[part]}"


def _hf_values(case: OracleCase, name: str, values: F32) -> F32:
    return values - np.float32(1) if case.adds_one and name.endswith("norm") else values


def main() -> None:
    answers = {case.name: answer(case) for case in CASES}
    if "--check" not in sys.argv[1:]:
        np.savez(ANSWERS, **answers)  # type: ignore[arg-type]
        print(f"transformers {transformers.__version__}, torch {torch.__version__}: wrote {len(answers)} answers")
        return
    with np.load(ANSWERS) as stored:
        assert set(stored) == set(answers), f"{ANSWERS.name} has {set(stored)}, the cases are {set(answers)}"
        worst = {name: float(np.abs(stored[name] - logits).max()) for name, logits in answers.items()}
    print("largest difference:", ", ".join(f"{name} {value:.2g}" for name, value in worst.items()))
    sys.exit(max(worst.values()) > ORACLE_AGAIN)


if __name__ == "__main__":
    main()
