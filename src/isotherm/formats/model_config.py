"""The numbers of a model, from the metadata of its GGUF file.

What would change the arithmetic and is not understood here is refused, never skipped.
"""

import math
from collections.abc import Mapping

import numpy as np

from isotherm.errors import ModelFileError, UnsupportedModel
from isotherm.formats import powerinfer
from isotherm.formats.experts import NEUTRAL_EXPERT_KEYS, expert_ffn_size, read_experts
from isotherm.formats.families import EMBED, FAMILIES, HEAD, POSITIONS, QKV_BIASES, ROPE_FACTORS, SECOND_NORM
from isotherm.formats.gguf import GgufFile
from isotherm.formats.metadata import Metadata, quoted
from isotherm.formats.model_tensors import check_shape, find_tensor
from isotherm.types import Activation, Experts, ModelConfig, Rope

MAX_LAYERS = 1 << 10
MAX_HIDDEN_SIZE = 1 << 17
MAX_FFN_SIZE = 1 << 20
MAX_HEADS = 1 << 12
MAX_HEAD_DIM = 1 << 12
MAX_CONTEXT_TOKENS = 1 << 28
MAX_ATTENTION_SCALE = 1e3
MAX_ROPE_NUMBER = 1e12  # bases and factors

_OPT_FIRST_ROWS = (0, 2)  # of position 0: checkpoints have two rows before it, which converters may drop
_ACTIVATION_KEY = "isotherm.activation"  # other writers of GGUF have no key for it
_QKV_LAYOUT = "jploski"  # how llama.cpp calls the order of rows in a fused matrix

# Keys that change the arithmetic, by the values at which they do not.
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "final_logit_softcapping": (0,),
    "attn_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
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
    if file.is_powerinfer:
        powerinfer.check_family(metadata, name)
    hidden_size = metadata.integer(f"{name}.embedding_length", low=1, high=MAX_HIDDEN_SIZE)
    num_heads = metadata.uniform_integer(f"{name}.attention.head_count", low=1, high=MAX_HEADS)
    num_layers = metadata.integer(f"{name}.block_count", low=1, high=MAX_LAYERS)
    head_dim = _head_dim(metadata, name, hidden_size, num_heads)
    context_tokens, first_position_row = _context(file, name)
    experts = read_experts(file, name, family.has_experts)
    _refuse_variants(metadata, name, NEUTRAL_EXPERT_KEYS if experts else {})
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
        vocab_size=find_tensor(file, EMBED).num_rows,
        context_tokens=context_tokens,
        norm_eps=_norm_eps(file, name),
        rope=rope,
        tied_head=HEAD not in file.tensors,
        activation=powerinfer.ACTIVATIONS[name] if file.is_powerinfer else _activation(metadata, name),
        qkv_bias=family.qkv_bias if family.qkv_bias is not None else f"blk.0.{QKV_BIASES['q_bias']}" in file.tensors,
        attention_scale=_attention_scale(metadata, name, num_layers, hidden_size / num_heads),
        sliding_window=window if is_windowed else None,
        local_rope=_local_rope(metadata, name, rope.dims) if is_windowed and rope else None,
        global_every=_global_every(metadata, name) if is_windowed else None,
        first_position_row=first_position_row,
        experts=experts,
        shared_norm=family.parallel_residual and f"blk.0.{SECOND_NORM}" not in file.tensors,
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


def _ffn_size(metadata: Metadata, name: str, experts: Experts | None) -> int:
    own = expert_ffn_size(metadata, name, MAX_FFN_SIZE) if experts else None
    return own or metadata.uniform_integer(f"{name}.feed_forward_length", low=1, high=MAX_FFN_SIZE)


def _refuse_variants(metadata: Metadata, name: str, expert_keys: Mapping[str, tuple[float, ...]]) -> None:
    family = FAMILIES[name]
    neutral_values = {**_NEUTRAL, **expert_keys, "use_parallel_residual": (family.parallel_residual,)}
    for suffix, neutral in neutral_values.items():
        value = metadata.values.get(f"{name}.{suffix}", neutral[0])
        if not isinstance(value, bool | int | float) or value not in neutral:
            raise UnsupportedModel(f"{metadata.path}: {name}.{suffix} is {quoted(value)}, which is not supported")
    layout = metadata.values.get(f"{name}.tensor_data_layout", _QKV_LAYOUT)
    if family.fused_qkv and layout != _QKV_LAYOUT:
        raise UnsupportedModel(
            f"{metadata.path}: {name}.tensor_data_layout is {quoted(layout)}; known is {_QKV_LAYOUT}: rows of q, k, v"
        )


def _attention_scale(metadata: Metadata, name: str, num_layers: int, hidden_per_head: float) -> float | None:
    scale = metadata.number(f"{name}.attention.scale", low=0.0, high=MAX_ATTENTION_SCALE, default=0.0)
    if scale == 0.0 and name == "gemma3" and num_layers == _GEMMA3_27B_LAYERS:
        return 1.0 / math.sqrt(hidden_per_head)  # llama.cpp knows the 27B by its layers too; its files do not say it
    return scale or None


def _activation(metadata: Metadata, name: str) -> Activation:
    family = FAMILIES[name]
    if not metadata.has(_ACTIVATION_KEY):
        return family.activation
    value = metadata.string(_ACTIVATION_KEY)
    known = [activation.value for activation in family.named_activations]
    if value not in known:
        raise UnsupportedModel(
            f"{metadata.path}: {_ACTIVATION_KEY} is {quoted(value)}, which is not supported in {name}; it may have "
            f"{'one of ' + ', '.join(known) if known else 'its own alone'}"
        )
    return Activation(value)


def _norm_eps(file: GgufFile, name: str) -> float:
    key = f"{name}.attention.{FAMILIES[name].eps_key}"
    default = powerinfer.DEFAULT_EPS.get(name) if file.is_powerinfer else None
    return file.metadata.number(key, low=0.0, high=1.0, default=default)


def _context(file: GgufFile, name: str) -> tuple[int, int]:
    """Tokens of the longest sequence, and the row of position 0 where positions are learned."""
    context_tokens = file.metadata.integer(f"{name}.context_length", low=1, high=MAX_CONTEXT_TOKENS)
    if FAMILIES[name].has_rope:
        return context_tokens, 0
    num_rows = find_tensor(file, POSITIONS).num_rows
    if file.is_powerinfer and num_rows == context_tokens > max(_OPT_FIRST_ROWS):
        context_tokens -= max(_OPT_FIRST_ROWS)  # that dialect counts all rows of a table that it copies whole
    first_row = num_rows - context_tokens
    if first_row not in _OPT_FIRST_ROWS:
        raise ModelFileError(
            f"{file.path}: tensor {POSITIONS} has {first_row + context_tokens} rows for a context of "
            f"{context_tokens}; the file is damaged"
        )
    return context_tokens, first_row


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
        factors=_rope_factors(file, dims) if FAMILIES[name].rope_factors and ROPE_FACTORS in file.tensors else None,
    )


def _rope_dims(metadata: Metadata, name: str, head_dim: int) -> int:
    key = f"{name}.rope.dimension_count"
    dims = metadata.integer(key, low=2, high=MAX_HEAD_DIM, default=head_dim)
    if dims > head_dim or dims % 2:
        raise ModelFileError(f"{metadata.path}: key {key} is {dims}, expected an even number up to {head_dim}")
    return dims


def _rope_factors(file: GgufFile, dims: int) -> tuple[float, ...]:
    tensor = file.tensors[ROPE_FACTORS]
    check_shape(file.path, tensor, (1, dims // 2))
    if tensor.quant_type.value != "F32":
        raise UnsupportedModel(f"{file.path}: tensor {ROPE_FACTORS} is {tensor.quant_type.value}, expected F32")
    factors = tensor.read().view("<f4")[0]
    if not (np.isfinite(factors) & (factors > 0) & (factors <= MAX_ROPE_NUMBER)).all():
        raise ModelFileError(f"{file.path}: tensor {ROPE_FACTORS} holds numbers that are not positive and finite")
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
