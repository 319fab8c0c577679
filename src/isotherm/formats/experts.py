"""What GGUF says of mixtures of experts: their numbers, and tensors that hold the matrices of all experts.

Source: llama.cpp (gguf-py constants, llama-model.cpp): `ffn_gate_exps` and its like have the dimensions [columns, rows,
experts]. The weights of the experts of a token are the softmax of their logits alone in `llama` and `qwen3moe`.
"""

from isotherm.errors import ModelFileError, UnsupportedModel
from isotherm.formats.gguf import GgufFile, GgufTensor
from isotherm.formats.metadata import Metadata
from isotherm.types import Experts

MAX_EXPERTS = 1 << 10
MAX_EXPERTS_USED = 64  # of a token; native/kernels/table.h has the same number

EXPERT_TENSORS = {
    "router": "ffn_gate_inp.weight",
    "gate": "ffn_gate_exps.weight",
    "up": "ffn_up_exps.weight",
    "down": "ffn_down_exps.weight",
}
# Keys that change what experts compute, by the values at which they do not: gating 1 is softmax.
NEUTRAL_EXPERT_KEYS: dict[str, tuple[float, ...]] = {
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_group_count": (0, 1),
    "expert_gating_func": (0, 1),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0, 1),
    "leading_dense_block_count": (0,),
    "interleave_moe_layer_step": (0, 1),
}
_ONE_EXPERT = "ffn_gate.0.weight"  # of files that keep each expert in tensors of its own


def read_experts(file: GgufFile, name: str, has_experts: bool | None) -> Experts | None:
    """The experts of a layer; None: it has one FFN. Raises ModelFileError, UnsupportedModel.

    has_experts: whether the family `name` has them; None: as the file says.
    """
    metadata, key = file.metadata, f"{name}.expert_count"
    num_experts = metadata.integer(key, low=int(has_experts is True), high=MAX_EXPERTS, default=0)
    if num_experts == 0:
        return None
    if has_experts is False:
        raise UnsupportedModel(f"{metadata.path}: {key} is {num_experts}; experts are not supported in {name}")
    if file.is_powerinfer:
        raise UnsupportedModel(
            f"{metadata.path}: {key} is {num_experts}; PowerInfer's files of experts are not supported"
        )
    if num_experts == 1:
        raise UnsupportedModel(f"{metadata.path}: a mixture of one expert is not supported")
    if f"blk.0.{_ONE_EXPERT}" in file.tensors:
        raise UnsupportedModel(
            f"{metadata.path}: keeps each expert in a tensor of its own ({_ONE_EXPERT}), as converters did before "
            "April 2024; take a newer file of the model"
        )
    most_used = min(num_experts, MAX_EXPERTS_USED)
    return Experts(num_experts, metadata.integer(f"{name}.expert_used_count", low=1, high=most_used))


def expert_ffn_size(metadata: Metadata, name: str, high: int) -> int | None:
    """The FFN size of one expert, where the file has a key for it."""
    key = f"{name}.expert_feed_forward_length"
    return metadata.uniform_integer(key, low=1, high=high) if metadata.has(key) else None


def expert_shapes(experts: Experts, hidden_size: int, ffn_size: int) -> dict[str, tuple[int, int]]:
    """Rows and columns by the last part of a canonical name: the matrices of all experts, one after the other."""
    up = (experts.num_experts * ffn_size, hidden_size)
    down = (experts.num_experts * hidden_size, ffn_size)
    return {"router": (experts.num_experts, hidden_size), "gate": up, "up": up, "down": down}


def check_stack(file: GgufFile, tensor: GgufTensor, experts: Experts, shape: tuple[int, int]) -> None:
    """`tensor` holds a matrix for each expert, `shape` being that of them all. Raises ModelFileError."""
    expected = (shape[1], shape[0] // experts.num_experts, experts.num_experts)
    if tensor.dims[:3] != expected or max(tensor.dims[3:], default=1) > 1:
        raise ModelFileError(
            f"{file.path}: tensor {tensor.name} has the dimensions {list(tensor.dims)}, expected {list(expected)} "
            "by the metadata; the file is damaged"
        )
