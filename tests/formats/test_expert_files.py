"""Files of mixtures of experts: what their keys and tensors say, and what must be refused."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_models import add_value, write_tiny

from isotherm.errors import ModelFileError, UnsupportedModel
from isotherm.formats.checkpoint import open_checkpoint
from isotherm.types import Experts, QuantType

SIZES = {"num_layers": 1, "hidden_size": 64, "ffn_size": 32, "head_dim": 16}
NUM_EXPERTS = 4


def write_mixtral(path: Path, **options: Any) -> Path:
    return write_tiny(path / "tiny.gguf", "llama", QuantType.F32, num_experts=NUM_EXPERTS, **SIZES, **options)


def rewrite(path: Path, changed: dict[str, np.ndarray | None]) -> Path:
    """The file with the tensors named in `changed` replaced or added, or left out where they are None."""
    base = gguf.GGUFReader(path)
    out = path.with_name("changed.gguf")
    writer = gguf.GGUFWriter(out, base.fields["general.architecture"].contents())
    for key, item in base.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            add_value(writer, key, item.contents())
    for name, data in ({tensor.name: tensor.data for tensor in base.tensors} | changed).items():
        if data is not None:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_mixtral(tmp_path: Path) -> None:
    path = write_mixtral(tmp_path)
    theirs = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config.experts == Experts(NUM_EXPERTS, 2)
        assert (checkpoint.config.family, checkpoint.config.ffn_size) == ("llama", 32)
        tensors = checkpoint.tensors
        assert tensors["layers.0.router"].shape == (NUM_EXPERTS, 64)
        assert tensors["layers.0.gate"].shape == tensors["layers.0.up"].shape == (NUM_EXPERTS * 32, 64)
        assert tensors["layers.0.down"].shape == (NUM_EXPERTS * 64, 32)
        for name in ("gate", "up", "down"):
            stored = theirs[f"blk.0.ffn_{name}_exps.weight"]
            assert stored.shape[0] == NUM_EXPERTS
            rows = tensors[f"layers.0.{name}"].read(stored.shape[1], 2 * stored.shape[1])  # of the second expert
            np.testing.assert_array_equal(rows.view("<f4"), stored[1])
        one_expert = 3 * 32 * 64
        assert checkpoint.num_parameters == sum(data.size for data in theirs.values())
        assert checkpoint.num_active_parameters == checkpoint.num_parameters - 2 * one_expert


def test_qwen3moe_has_a_size_of_its_experts_own(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "qwen3moe", QuantType.F32, num_experts_used=3, **SIZES)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config.experts == Experts(6, 3)
        assert checkpoint.config.ffn_size == 32  # qwen3moe.feed_forward_length is 6144


def test_dense_models_have_no_experts(tmp_path: Path) -> None:
    for family in ("llama", "qwen3"):
        metadata = {f"{family}.expert_count": 0, f"{family}.expert_used_count": 0}
        path = write_tiny(tmp_path / "tiny.gguf", family, QuantType.F32, metadata=metadata, **SIZES)
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.config.experts is None
            assert checkpoint.num_active_parameters == checkpoint.num_parameters


@pytest.mark.parametrize(
    ("metadata", "error", "says"),
    [
        ({"llama.expert_count": 0}, ModelFileError, r"ffn_gate.weight is missing"),
        ({"llama.expert_count": 1}, UnsupportedModel, "a mixture of one expert"),
        ({"llama.expert_count": 3}, ModelFileError, r"\[64, 32, 4\], expected \[64, 32, 3\]"),
        ({"llama.expert_count": 2**31}, ModelFileError, "from 0 to 1024"),
        ({"llama.expert_count": "4"}, ModelFileError, "expert_count is '4'"),
        ({"llama.expert_count": [4]}, ModelFileError, "expert_count is array"),
        ({"llama.expert_used_count": None}, ModelFileError, "expert_used_count is missing"),
        ({"llama.expert_used_count": 0}, ModelFileError, "expert_used_count is 0, expected an integer from 1 to 4"),
        ({"llama.expert_used_count": 5}, ModelFileError, "expert_used_count is 5, expected an integer from 1 to 4"),
        ({"llama.feed_forward_length": 64}, ModelFileError, r"expected \[64, 64, 4\]"),
        ({"llama.expert_feed_forward_length": 0}, ModelFileError, "expert_feed_forward_length is 0"),
        ({"llama.expert_feed_forward_length": 64}, ModelFileError, r"\[64, 32, 4\], expected \[64, 64, 4\]"),
        ({"llama.expert_shared_count": 1}, UnsupportedModel, "expert_shared_count is 1"),
        ({"llama.expert_gating_func": 2}, UnsupportedModel, "expert_gating_func is 2"),
        ({"llama.expert_weights_norm": False}, UnsupportedModel, "expert_weights_norm is False"),
        ({"llama.expert_weights_scale": 2.5}, UnsupportedModel, "expert_weights_scale is 2.5"),
        ({"llama.expert_group_count": 8}, UnsupportedModel, "expert_group_count is 8"),
        ({"llama.leading_dense_block_count": 1}, UnsupportedModel, "leading_dense_block_count is 1"),
    ],
)
def test_numbers_that_do_not_fit(tmp_path: Path, metadata: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        open_checkpoint(write_mixtral(tmp_path, metadata=metadata))


def test_a_family_of_experts_without_them(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "qwen3moe", QuantType.F32, metadata={"qwen3moe.expert_count": 0}, **SIZES)
    with pytest.raises(ModelFileError, match="expert_count is 0, expected an integer from 1"):
        open_checkpoint(path)


def test_a_family_that_has_none(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "qwen2", QuantType.F32, metadata={"qwen2.expert_count": 4}, **SIZES)
    with pytest.raises(UnsupportedModel, match="expert_count is 4; experts are not supported in qwen2"):
        open_checkpoint(path)


GATE, DOWN = "blk.0.ffn_gate_exps.weight", "blk.0.ffn_down_exps.weight"
ROUTER = "blk.0.ffn_gate_inp.weight"


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        (GATE, None, "ffn_gate_exps.weight is missing"),
        (ROUTER, None, "ffn_gate_inp.weight is missing"),
        (GATE, (NUM_EXPERTS * 32, 64), r"ffn_gate_exps.weight has the dimensions \[64, 128\], expected \[64, 32, 4\]"),
        (GATE, (32, NUM_EXPERTS, 64), r"\[64, 4, 32\], expected \[64, 32, 4\]"),
        (GATE, (NUM_EXPERTS, 64, 32), r"\[32, 64, 4\], expected \[64, 32, 4\]"),
        (GATE, (2, 2, 32, 64), r"\[64, 32, 2, 2\], expected \[64, 32, 4\]"),
        (GATE, (NUM_EXPERTS - 1, 32, 64), r"\[64, 32, 3\], expected \[64, 32, 4\]"),
        (DOWN, (NUM_EXPERTS, 32, 64), r"ffn_down_exps.weight has the dimensions \[64, 32, 4\], expected \[32, 64, 4\]"),
        (ROUTER, (NUM_EXPERTS, 1, 64), r"\[64, 1, 4\], expected \[64, 4\]"),
        ("blk.0.ffn_gate_shexp.weight", (32, 64), "'blk.0.ffn_gate_shexp.weight' has no place"),
        ("blk.0.ffn_gate.weight", (32, 64), "'blk.0.ffn_gate.weight' has no place"),
        ("blk.0.exp_probs_b.bias", (NUM_EXPERTS,), "'blk.0.exp_probs_b.bias' has no place"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, name: str, shape: tuple[int, ...] | None, says: str) -> None:
    changed = rewrite(write_mixtral(tmp_path), {name: None if shape is None else np.zeros(shape, np.float32)})
    with pytest.raises(ModelFileError, match=says):
        open_checkpoint(changed)


def test_experts_in_tensors_of_their_own_are_named(tmp_path: Path) -> None:
    ones = {f"blk.0.ffn_{part}.{i}.weight": np.zeros((32, 64), np.float32) for part in ("gate", "up") for i in range(4)}
    changed = rewrite(write_mixtral(tmp_path), {GATE: None, **ones})
    with pytest.raises(UnsupportedModel, match=r"each expert in a tensor of its own .* before April 2024"):
        open_checkpoint(changed)


@pytest.mark.parametrize("quant_type", [QuantType.F16, QuantType.BF16, QuantType.Q8_0])
def test_a_router_may_have_any_type(tmp_path: Path, quant_type: QuantType) -> None:
    with open_checkpoint(write_mixtral(tmp_path, types={"ffn_gate_inp": quant_type})) as checkpoint:
        assert checkpoint.tensors["layers.0.router"].quant_type is quant_type
