"""Whole tiny models: native = the contract on every instruction set, and both stay close to float32."""

from pathlib import Path

import numpy as np
import pytest
from sketch import ISAS, assert_equal
from tiny import make_tiny, run, text_ids
from tiny_models import FAMILIES
from tolerances import FLOAT_WEIGHTS_SHARE, QUANTISED_SHARE

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
    share = np.abs(expected[0] - truth).max() / np.abs(truth).max()
    assert share < (FLOAT_WEIGHTS_SHARE if quant_type.is_float else QUANTISED_SHARE)
