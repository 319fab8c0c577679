"""One table per model family: what GGUF calls its numbers and tensors, and in which row order it stores them.

Source: llama.cpp (llama-arch.cpp, llama-model.cpp and the converters). Norm weights of gemma3 already carry their + 1
in GGUF. Whatever would change the arithmetic and is not understood here is refused, never skipped.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from isotherm.errors import ModelFileError, UnsupportedModel
from isotherm.formats.experts import (
    EXPERT_TENSORS,
    NEUTRAL_EXPERT_KEYS,
    check_stack,
    expert_ffn_size,
    expert_shapes,
    read_experts,
)
from isotherm.formats.gguf import GgufFile, GgufTensor
from isotherm.formats.metadata import Metadata, quoted
from isotherm.formats.tensor_source import InterleavedHeads, TensorSource
from isotherm.types import Activation, Experts, ModelConfig, Rope

MAX_LAYERS = 1 << 10
MAX_HIDDEN_SIZE = 1 << 17
MAX_FFN_SIZE = 1 << 20
MAX_HEADS = 1 << 12
MAX_HEAD_DIM = 1 << 12
MAX_CONTEXT_TOKENS = 1 << 28
MAX_ATTENTION_SCALE = 1e3
MAX_ROPE_NUMBER = 1e12  # bases and factors

_EMBED = "token_embd.weight"
_HEAD = "output.weight"
_POSITIONS = "position_embd.weight"
_OPT_FIRST_ROWS = (0, 2)  # of position 0: checkpoints have two rows before it, which converters may drop
_ACTIVATION_KEY = "isotherm.activation"  # other writers of GGUF have no key for it
_ROPE_FACTORS = "rope_freqs.weight"
_GLOBAL_TENSORS = {"embed": _EMBED, "final_norm": "output_norm.weight", "head": _HEAD}
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
_BIAS_TENSORS = {"q_bias": "attn_q.bias", "k_bias": "attn_k.bias", "v_bias": "attn_v.bias"}
_HEAD_NORM_TENSORS = {"q_norm": "attn_q_norm.weight", "k_norm": "attn_k_norm.weight"}
_GEMMA_TENSORS = {
    **_HEAD_NORM_TENSORS,
    "post_attn_norm": "post_attention_norm.weight",
    "post_ffn_norm": "post_ffw_norm.weight",
}


_OPT_TENSORS = {
    **{name: stored for name, stored in _LAYER_TENSORS.items() if name != "gate"},
    **_BIAS_TENSORS,
    "attn_norm_bias": "attn_norm.bias",
    "o_bias": "attn_output.bias",
    "ffn_norm_bias": "ffn_norm.bias",
    "up_bias": "ffn_up.bias",
    "down_bias": "ffn_down.bias",
}
_OPT_GLOBAL_TENSORS = {"positions": _POSITIONS, "final_norm_bias": "output_norm.bias"}


@dataclass(frozen=True)
class Family:
    """How one architecture of GGUF maps to canonical names; `qkv_bias`, `has_experts` None: as the file has it."""

    layer_tensors: Mapping[str, str]
    global_tensors: Mapping[str, str] = field(default_factory=dict)  # beside those that all have
    eps_key: str = "layer_norm_rms_epsilon"
    has_rope: bool = True
    may_name_activation: bool = False
    qkv_bias: bool | None = False
    interleaved_rope: bool = False
    rope_factors: bool = False  # may bring rope_freqs.weight
    sliding_window: bool = False
    has_experts: bool | None = False


FAMILIES: dict[str, Family] = {
    "llama": Family(
        _LAYER_TENSORS,
        qkv_bias=None,
        interleaved_rope=True,
        rope_factors=True,
        may_name_activation=True,
        has_experts=None,
    ),
    "qwen2": Family(_LAYER_TENSORS, qkv_bias=True),
    "qwen3": Family(_LAYER_TENSORS | _HEAD_NORM_TENSORS),
    "qwen3moe": Family(_LAYER_TENSORS | _HEAD_NORM_TENSORS, has_experts=True),
    "gemma3": Family(_LAYER_TENSORS | _GEMMA_TENSORS, sliding_window=True),
    "opt": Family(_OPT_TENSORS, _OPT_GLOBAL_TENSORS, eps_key="layer_norm_epsilon", has_rope=False),
}

# Keys that change the arithmetic, by the values at which they do not.
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "final_logit_softcapping": (0,),
    "attn_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "use_parallel_residual": (False,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.temperature_length": (0,),
    "attention.shared_kv_layers": (0,),
    "rope.scaling.attn_factor": (0, 1),
}

_GEMMA3_GLOBAL_EVERY = 6
_GEMMA3_LOCAL_ROPE_BASE = 10000.0
_GEMMA3_27B_LAYERS = 62


def family_of(metadata: Metadata) -> str:
    """The architecture of the file, a key of FAMILIES; UnsupportedModel for any other."""
    kind = metadata.string("general.type", default="model")
    if kind != "model":
        raise UnsupportedModel(f"{metadata.path}: holds {quoted(kind)}, not a model that generates text")
    architecture = metadata.string("general.architecture")
    if architecture not in FAMILIES:
        raise UnsupportedModel(
            f"{metadata.path}: architecture {quoted(architecture)} is not supported; known: {', '.join(FAMILIES)}"
        )
    return architecture


def read_config(file: GgufFile) -> ModelConfig:
    """The numbers of the model, each within its cap; `read_tensors` compares them with the tensors."""
    metadata = file.metadata
    name = family_of(metadata)
    family = FAMILIES[name]
    hidden_size = metadata.integer(f"{name}.embedding_length", low=1, high=MAX_HIDDEN_SIZE)
    num_heads = metadata.uniform_integer(f"{name}.attention.head_count", low=1, high=MAX_HEADS)
    num_layers = metadata.integer(f"{name}.block_count", low=1, high=MAX_LAYERS)
    head_dim = _head_dim(metadata, name, hidden_size, num_heads)
    context_tokens = metadata.integer(f"{name}.context_length", low=1, high=MAX_CONTEXT_TOKENS)
    experts = read_experts(file, name, family.has_experts)
    _refuse_variants(metadata, name, _NEUTRAL | (NEUTRAL_EXPERT_KEYS if experts else {}))
    rope = _rope(file, name, head_dim) if family.has_rope else None
    window = metadata.integer(f"{name}.attention.sliding_window", low=0, high=MAX_CONTEXT_TOKENS, default=0)
    if window and not family.sliding_window and window < context_tokens:
        raise UnsupportedModel(f"{metadata.path}: sliding-window attention is not supported in {name}")
    is_windowed = family.sliding_window and window > 0
    return ModelConfig(
        family=name,
        name=_display_name(metadata),
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_size=_ffn_size(metadata, name, experts),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(metadata, name, num_heads),
        head_dim=head_dim,
        vocab_size=_tensor(file, _EMBED).num_rows,
        context_tokens=context_tokens,
        norm_eps=metadata.number(f"{name}.attention.{family.eps_key}", low=0.0, high=1.0),
        rope=rope,
        tied_head=_HEAD not in file.tensors,
        activation=_activation(metadata, name),
        qkv_bias=family.qkv_bias if family.qkv_bias is not None else f"blk.0.{_BIAS_TENSORS['q_bias']}" in file.tensors,
        attention_scale=_attention_scale(metadata, name, num_layers, hidden_size / num_heads),
        sliding_window=window if is_windowed else None,
        local_rope=_local_rope(metadata, name, rope.dims) if is_windowed and rope else None,
        global_every=_global_every(metadata, name) if is_windowed else None,
        first_position_row=0 if family.has_rope else _first_position_row(file, context_tokens),
        experts=experts,
    )


def read_tensors(file: GgufFile, config: ModelConfig) -> dict[str, TensorSource]:
    """Canonical name -> source, in the order of the model; every tensor of the file is checked and spoken for.

    Raises ModelFileError for a missing tensor and one of the wrong shape, UnsupportedModel for one that has no place.
    """
    family = FAMILIES[config.family]
    shapes = _expected_shapes(config)
    global_tensors = {**_GLOBAL_TENSORS, **family.global_tensors}
    names = {canonical: stored for canonical, stored in global_tensors.items() if canonical in shapes}
    layer_tensors = {**family.layer_tensors, **(_BIAS_TENSORS if config.qkv_bias else {})}
    if config.experts:
        layer_tensors |= EXPERT_TENSORS
    for layer in range(config.num_layers):
        names |= {f"layers.{layer}.{suffix}": f"blk.{layer}.{stored}" for suffix, stored in layer_tensors.items()}
    order = InterleavedHeads(config.head_dim, config.rope.dims) if family.interleaved_rope and config.rope else None
    sources = {}
    for canonical, stored in names.items():
        tensor = _tensor(file, stored)
        suffix = canonical.rpartition(".")[2]
        if config.experts and suffix in ("gate", "up", "down"):
            check_stack(file, tensor, config.experts, shapes[suffix])
        else:
            _check_shape(file.path, tensor, shapes[suffix])
        is_rotated = suffix in ("q", "k", "q_bias", "k_bias")
        sources[canonical] = TensorSource(
            canonical, tensor.quant_type, shapes[suffix], tensor, order if is_rotated else None
        )
    known = {*names.values(), *([_ROPE_FACTORS] if family.rope_factors else [])}
    for stored in file.tensors:
        if stored not in known:
            raise UnsupportedModel(
                f"{file.path}: tensor {quoted(stored)} has no place in a {config.family} model of {config.num_layers} "
                "layers; the file is damaged, or of a variant that is not supported"
            )
    return sources


def _expected_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns by the last part of a canonical name."""
    hidden, ffn, head_dim = config.hidden_size, config.ffn_size, config.head_dim
    q_rows, kv_rows = config.num_heads * head_dim, config.num_kv_heads * head_dim
    shapes = {
        "embed": (config.vocab_size, hidden),
        "final_norm": (1, hidden),
        "head": (config.vocab_size, hidden),
        "q": (q_rows, hidden),
        "k": (kv_rows, hidden),
        "v": (kv_rows, hidden),
        "q_bias": (1, q_rows),
        "k_bias": (1, kv_rows),
        "v_bias": (1, kv_rows),
        "o": (hidden, q_rows),
        "q_norm": (1, head_dim),
        "k_norm": (1, head_dim),
        "gate": (ffn, hidden),
        "up": (ffn, hidden),
        "down": (hidden, ffn),
        "up_bias": (1, ffn),
        "positions": (config.first_position_row + config.context_tokens, hidden),
    }
    shapes |= dict.fromkeys(("attn_norm", "post_attn_norm", "ffn_norm", "post_ffn_norm"), (1, hidden))
    shapes |= dict.fromkeys(("attn_norm_bias", "ffn_norm_bias", "final_norm_bias", "o_bias", "down_bias"), (1, hidden))
    if config.experts:
        shapes |= expert_shapes(config.experts, hidden, ffn)
    if config.tied_head:
        del shapes["head"]
    return shapes


def _tensor(file: GgufFile, name: str) -> GgufTensor:
    if name not in file.tensors:
        raise ModelFileError(f"{file.path}: tensor {name} is missing; the file is damaged or not a whole model")
    return file.tensors[name]


def _check_shape(path: Path, tensor: GgufTensor, shape: tuple[int, int]) -> None:
    rows, columns = shape
    # (n), (n, 1) and (n, 1, 1) are one shape; (n, a, b) is never a matrix of a * b rows
    if tensor.dims[0] != columns or tensor.num_rows != rows or max(tensor.dims[2:], default=1) > 1:
        raise ModelFileError(
            f"{path}: tensor {tensor.name} has the dimensions {list(tensor.dims)}, expected {[columns, rows]} "
            "by the metadata; the file is damaged"
        )
    if rows == 1 and not tensor.quant_type.is_float:
        raise UnsupportedModel(
            f"{path}: vector {tensor.name} is stored as {tensor.quant_type.value}, expected F32, F16 or BF16"
        )


def _head_dim(metadata: Metadata, name: str, hidden_size: int, num_heads: int) -> int:
    key, value_key = f"{name}.attention.key_length", f"{name}.attention.value_length"
    if not metadata.has(key) and hidden_size % num_heads:
        raise ModelFileError(
            f"{metadata.path}: {num_heads} heads do not divide a hidden size of {hidden_size}, and {key} is missing"
        )
    head_dim = metadata.integer(key, low=1, high=MAX_HEAD_DIM, default=hidden_size // num_heads)
    value_dim = metadata.integer(value_key, low=1, high=MAX_HEAD_DIM, default=hidden_size // num_heads)
    if value_dim != head_dim:
        raise UnsupportedModel(f"{metadata.path}: values of {value_dim} and keys of {head_dim} per head must be equal")
    return head_dim


def _num_kv_heads(metadata: Metadata, name: str, num_heads: int) -> int:
    key = f"{name}.attention.head_count_kv"
    num_kv_heads = metadata.uniform_integer(key, low=1, high=MAX_HEADS, default=num_heads)
    if num_heads % num_kv_heads:
        raise ModelFileError(f"{metadata.path}: key {key} is {num_kv_heads}, which does not divide {num_heads} heads")
    return num_kv_heads


def _refuse_variants(metadata: Metadata, name: str, neutral_keys: Mapping[str, tuple[float, ...]]) -> None:
    for suffix, neutral in neutral_keys.items():
        value = metadata.values.get(f"{name}.{suffix}", neutral[0])
        if not isinstance(value, bool | int | float) or value not in neutral:
            raise UnsupportedModel(f"{metadata.path}: {name}.{suffix} is {quoted(value)}, which is not supported")


def _ffn_size(metadata: Metadata, name: str, experts: Experts | None) -> int:
    own = expert_ffn_size(metadata, name, MAX_FFN_SIZE) if experts else None
    return own or metadata.uniform_integer(f"{name}.feed_forward_length", low=1, high=MAX_FFN_SIZE)


def _attention_scale(metadata: Metadata, name: str, num_layers: int, hidden_per_head: float) -> float | None:
    scale = metadata.number(f"{name}.attention.scale", low=0.0, high=MAX_ATTENTION_SCALE, default=0.0)
    if scale == 0.0 and name == "gemma3" and num_layers == _GEMMA3_27B_LAYERS:
        return 1.0 / math.sqrt(hidden_per_head)  # llama.cpp knows the 27B by its layers too; its files do not say it
    return scale or None


def _activation(metadata: Metadata, name: str) -> Activation:
    value = metadata.string(_ACTIVATION_KEY, default=Activation.SILU.value)
    known = [activation.value for activation in Activation]
    if value not in known or (metadata.has(_ACTIVATION_KEY) and not FAMILIES[name].may_name_activation):
        raise UnsupportedModel(
            f"{metadata.path}: {_ACTIVATION_KEY} is {quoted(value)}, which is not supported in {name}; llama may have "
            f"one of {', '.join(known)}"
        )
    return Activation(value)


def _first_position_row(file: GgufFile, context_tokens: int) -> int:
    first_row = _tensor(file, _POSITIONS).num_rows - context_tokens
    if first_row not in _OPT_FIRST_ROWS:
        raise ModelFileError(
            f"{file.path}: tensor {_POSITIONS} has {first_row + context_tokens} rows for a context of "
            f"{context_tokens}; the file is damaged"
        )
    return first_row


def _rope(file: GgufFile, name: str, head_dim: int) -> Rope:
    metadata = file.metadata
    dims = _rope_dims(metadata, name, head_dim)
    scaling = metadata.string(f"{name}.rope.scaling.type", default="linear")
    if scaling not in ("none", "linear"):
        raise UnsupportedModel(
            f"{metadata.path}: rope scaling {quoted(scaling)} is not supported; supported are none, linear and "
            "the frequency factors of Llama 3"
        )
    # scale_linear is the older name of scaling.factor; 0 means no scaling
    factor = metadata.number(f"{name}.rope.scale_linear", low=0.0, high=MAX_ROPE_NUMBER, default=0.0)
    factor = metadata.number(f"{name}.rope.scaling.factor", low=0.0, high=MAX_ROPE_NUMBER, default=factor)
    return Rope(
        base=metadata.number(f"{name}.rope.freq_base", low=1.0, high=MAX_ROPE_NUMBER, default=10000.0),
        dims=dims,
        position_scale=1.0 / factor if factor and scaling == "linear" else 1.0,
        factors=_rope_factors(file, dims) if FAMILIES[name].rope_factors and _ROPE_FACTORS in file.tensors else None,
    )


def _rope_dims(metadata: Metadata, name: str, head_dim: int) -> int:
    key = f"{name}.rope.dimension_count"
    dims = metadata.integer(key, low=2, high=MAX_HEAD_DIM, default=head_dim)
    if dims > head_dim or dims % 2:
        raise ModelFileError(f"{metadata.path}: key {key} is {dims}, expected an even number up to {head_dim}")
    return dims


def _rope_factors(file: GgufFile, dims: int) -> tuple[float, ...]:
    tensor = file.tensors[_ROPE_FACTORS]
    _check_shape(file.path, tensor, (1, dims // 2))
    if tensor.quant_type.value != "F32":
        raise UnsupportedModel(f"{file.path}: tensor {_ROPE_FACTORS} is {tensor.quant_type.value}, expected F32")
    factors = tensor.read().view("<f4")[0]
    if not (np.isfinite(factors) & (factors > 0) & (factors <= MAX_ROPE_NUMBER)).all():
        raise ModelFileError(f"{file.path}: tensor {_ROPE_FACTORS} holds numbers that are not positive and finite")
    return tuple(factors.tolist())


def _local_rope(metadata: Metadata, name: str, dims: int) -> Rope:
    """Linear scaling stretches the global layers alone."""
    key = f"{name}.rope.freq_base_swa"
    base = metadata.number(key, low=1.0, high=MAX_ROPE_NUMBER, default=_GEMMA3_LOCAL_ROPE_BASE)
    return Rope(base=base, dims=dims)


def _global_every(metadata: Metadata, name: str) -> int:
    key = f"{name}.attention.sliding_window_pattern"
    return metadata.integer(key, low=1, high=MAX_LAYERS, default=_GEMMA3_GLOBAL_EVERY)


def _display_name(metadata: Metadata) -> str:
    """general.name, or the name of the file; nothing in it can move a cursor."""
    name = metadata.string("general.name", default="") or metadata.path.stem
    return "".join(character if character.isprintable() else "?" for character in name[:200])
