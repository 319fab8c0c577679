"""Whole tiny models: native = the contract on every instruction set, and both stay close to float32."""

from pathlib import Path

import numpy as np
import pytest
from sketch import ISAS, assert_equal
from tiny import make_tiny, run, text_ids
from tiny_models import FAMILIES, write_tiny
from tolerances import FLOAT_WEIGHTS_SHARE, QUANTISED_SHARE

import isotherm
from isotherm.backends.reference.backend import ReferenceBackend
from isotherm.formats.checkpoint import open_checkpoint
from isotherm.models import FAMILIES as FAMILIES_BY_NAME
from isotherm.program.batch import Batch, Sequence
from isotherm.program.lowering import lower
from isotherm.types import QuantType

SMALL = {"hidden_size": 64, "ffn_size": 128, "head_dim": 32}
CASES = [(family, quant_type) for family in FAMILIES for quant_type in QuantType]


@pytest.mark.parametrize(("family", "quant_type"), CASES, ids=lambda value: str(getattr(value, "value", value)))
def test_native_is_the_contract(tmp_path: Path, family: str, quant_type: QuantType) -> None:
    sizes = {} if quant_type.block_elements == 256 else SMALL
    model = make_tiny(tmp_path, family, quant_type, tied_head=quant_type is not QuantType.Q4_0, **sizes)
    pages = np.array([3, 1], np.int32)
    steps = (model.batch(text_ids(18), 0, pages), model.batch(text_ids(3, seed=1), 18, pages))
    reference = model.reference()
    expected = [run(reference, step) for step in steps]
    for isa in ISAS:
        native = model.native(isa)
        actual = [run(native, step) for step in steps]
        for i in (0, 1):
            assert_equal(actual[i], expected[i], f"{isa}, step {i}")
    truth = run(model.reference(lowered=False), steps[0])
    off = np.abs(expected[0] - truth).max(axis=1) / np.abs(truth).max()
    # what is rounded otherwise chooses, here and there, another expert
    share = np.median(off) if model.checkpoint.config.experts else off.max()
    assert share < (FLOAT_WEIGHTS_SHARE if quant_type.is_float else QUANTISED_SHARE)


@pytest.mark.parametrize("activation", ["", "relu"])
def test_one_norm_and_one_kv_head_side_by_side(tmp_path: Path, activation: str) -> None:
    """As in Falcon 7B; the family above is like the 40B."""
    sizes = {"num_heads": 5, "num_kv_heads": 1, "shared_norm": True, **SMALL}
    model = make_tiny(tmp_path, "falcon", QuantType.Q4_0, activation, **sizes)
    step = model.batch(text_ids(18))
    expected = run(model.reference(), step)
    for isa in ISAS:
        assert_equal(run(model.native(isa), step), expected, isa)


def test_a_file_of_many_types_through_the_front_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by the gguf package, loaded as a user does, packed twice: logits are those of the contract."""
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path / "cache"))
    types = {
        "attn_q": QuantType.Q2_K,
        "attn_k": QuantType.Q3_K,
        "attn_v": QuantType.IQ4_XS,
        "attn_output": QuantType.MXFP4,
        "ffn_gate": QuantType.IQ2_XXS,
        "ffn_up": QuantType.IQ3_S,
        "ffn_down": QuantType.IQ1_M,
        "output": QuantType.NVFP4,
    }
    path = write_tiny(tmp_path / "mixed.gguf", "llama", QuantType.TQ1_0, types=types, tied_head=False)
    ids = [int(i) for i in text_ids(30)]
    with open_checkpoint(path) as checkpoint:
        program = lower(FAMILIES_BY_NAME["llama"](checkpoint.config))
        assert {tensor.quant_type for tensor in checkpoint.tensors.values()} > set(types.values())
        reference = ReferenceBackend(checkpoint.tensors).compile(program, num_pages=(1,))
        rows = np.arange(len(ids), dtype=np.int32)
        expected = run(reference, Batch(np.array(ids, np.int32), (Sequence(len(ids), 0, (rows[:1],)),), rows))
    for _ in range(2):  # the second time from the packed file
        with isotherm.load(path, threads=2) as model:
            assert_equal(np.asarray(model.logits(ids)), expected, "logits")
            assert model.generate("the rain", max_tokens=5).text
