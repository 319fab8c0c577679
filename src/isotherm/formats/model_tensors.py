"""The tensors of a model under canonical names: every tensor of the file is checked and spoken for."""

from pathlib import Path

from isotherm.errors import ModelFileError, UnsupportedModel
from isotherm.formats import powerinfer
from isotherm.formats.experts import EXPERT_TENSORS, check_stack, expert_shapes
from isotherm.formats.families import FAMILIES, GLOBAL_TENSORS, QKV_BIASES, ROPE_FACTORS, SHARED_NORM_TENSORS, Family
from isotherm.formats.gguf import GgufFile, GgufTensor
from isotherm.formats.metadata import quoted
from isotherm.formats.tensor_source import InterleavedHeads, TensorSource
from isotherm.types import ModelConfig


def read_tensors(file: GgufFile, config: ModelConfig) -> dict[str, TensorSource]:
    """Canonical name -> source, in the order of the model; every tensor of the file is checked and spoken for.

    Raises ModelFileError for a missing tensor and one of the wrong shape, UnsupportedModel for one that has no place.
    """
    family = FAMILIES[config.family]
    shapes = _expected_shapes(config)
    global_tensors = {**GLOBAL_TENSORS, **family.global_tensors}
    names = {canonical: stored for canonical, stored in global_tensors.items() if canonical in shapes}
    layer_tensors = _layer_tensors(family, config)
    if file.is_powerinfer:
        layer_tensors = powerinfer.stored_names(layer_tensors)
    for layer in range(config.num_layers):
        names |= {f"layers.{layer}.{suffix}": f"blk.{layer}.{stored}" for suffix, stored in layer_tensors.items()}
    sources = {canonical: _source(file, config, canonical, stored, shapes) for canonical, stored in names.items()}
    known = {*names.values(), *([ROPE_FACTORS] if family.rope_factors else [])}
    if file.is_powerinfer:
        known |= powerinfer.check_predictors(file, config)
    for stored in file.tensors:
        if stored not in known:
            raise UnsupportedModel(
                f"{file.path}: tensor {quoted(stored)} has no place in a {config.family} model of {config.num_layers} "
                "layers; the file is damaged, or of a variant that is not supported"
            )
    return sources


def _source(
    file: GgufFile, config: ModelConfig, canonical: str, stored: str, shapes: dict[str, tuple[int, int]]
) -> TensorSource:
    """How the tensor `stored`, once it is checked, is read as `canonical`."""
    family, tensor, suffix = FAMILIES[config.family], find_tensor(file, stored), canonical.rpartition(".")[2]
    shape = shapes[suffix]
    if file.is_powerinfer and suffix == "down":
        check_shape(file.path, tensor, shape[::-1])
        by_neuron = powerinfer.down_by_neuron(file.path, tensor)
        return TensorSource(canonical, by_neuron.quant_type, shape, by_neuron)
    if family.fused_qkv and suffix in ("q", "k", "v"):
        check_shape(file.path, tensor, shapes["qkv"])
        q_rows, kv_rows = shapes["q"][0], shapes["k"][0]
        first_row = {"q": 0, "k": q_rows, "v": q_rows + kv_rows}[suffix]
        return TensorSource(canonical, tensor.quant_type, shape, tensor, _first_row=first_row)
    if config.experts and suffix in ("gate", "up", "down"):
        check_stack(file, tensor, config.experts, shape)
        return TensorSource(canonical, tensor.quant_type, shape, tensor)
    check_shape(file.path, tensor, shape)
    is_rotated = suffix in ("q", "k", "q_bias", "k_bias")
    if is_rotated and family.interleaved_rope and config.rope:
        order = InterleavedHeads(config.head_dim, config.rope.dims)
        return TensorSource(canonical, tensor.quant_type, shape, tensor, order)
    return TensorSource(canonical, tensor.quant_type, shape, tensor)


def _layer_tensors(family: Family, config: ModelConfig) -> dict[str, str]:
    """Stored by canonical names of one layer."""
    names = {**family.layer_tensors, **(QKV_BIASES if config.qkv_bias else {})}
    if config.shared_norm:
        names = {name: stored for name, stored in names.items() if not name.startswith("ffn_norm")}
        names |= SHARED_NORM_TENSORS
    if config.experts:
        names |= EXPERT_TENSORS
    return names


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
        "qkv": (q_rows + 2 * kv_rows, hidden),
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


def find_tensor(file: GgufFile, name: str) -> GgufTensor:
    if name not in file.tensors:
        raise ModelFileError(f"{file.path}: tensor {name} is missing; the file is damaged or not a whole model")
    return file.tensors[name]


def check_shape(path: Path, tensor: GgufTensor, shape: tuple[int, int]) -> None:
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
