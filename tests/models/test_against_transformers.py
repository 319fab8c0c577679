"""Every family's Program, in float32 and native, against what transformers said (tests/oracle/make_answers.py)."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from float_tensor import FloatTensor
from oracle.cases import ANSWERS, CASES, F32, OracleCase, weights
from tolerances import FLOAT_WEIGHTS_SHARE, ORACLE_LOGITS

from isotherm import _native
from isotherm.backends.cpu.backend import CpuBackend
from isotherm.backends.cpu.limits import CpuLimits
from isotherm.backends.cpu.packing import pack_program
from isotherm.backends.reference.backend import ReferenceBackend
from isotherm.models import FAMILIES
from isotherm.program.batch import Batch, Sequence
from isotherm.program.lowering import lower
from isotherm.quantization.packed_file import PackedMemory
from isotherm.types import Activation, Experts, ModelConfig, Rope

SCRIPT = Path(__file__).parents[1] / "oracle" / "make_answers.py"


def tensors(config: ModelConfig) -> dict[str, FloatTensor]:
    return {name: FloatTensor(np.atleast_2d(values)) for name, values in weights(config).items()}


def expected(case: OracleCase) -> F32:
    with np.load(ANSWERS) as answers:
        values: F32 = answers[case.name]
    return values


def reference(case: OracleCase, config: ModelConfig) -> F32:
    program = FAMILIES[config.family](config)
    compiled = ReferenceBackend(tensors(case.config)).compile(program, num_pages=(1,) * len(program.states))
    batch = whole(case, len(program.states))
    compiled.forward(batch)
    return compiled.logits(0, len(batch.token_ids))


def whole(case: OracleCase, num_states: int) -> Batch:
    ids = case.token_ids
    table = np.zeros(1, np.int32)
    return Batch(ids, (Sequence(len(ids), 0, (table,) * num_states),), np.arange(len(ids), dtype=np.int32))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32_is_transformers(case: OracleCase) -> None:
    assert np.abs(reference(case, case.config) - expected(case)).max() < ORACLE_LOGITS


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_native_is_transformers(case: OracleCase, isa: str) -> None:
    """Weights stored as float32 are not quantised, so that the native backend comes close too."""
    lowered = lower(FAMILIES[case.config.family](case.config))
    memory = PackedMemory()
    pack_program(lowered, tensors(case.config), memory)
    limits = CpuLimits(64, (1,) * len(lowered.states), max_tokens=64)
    compiled = CpuBackend(memory, isa=isa, num_threads=2).compile(lowered, limits)
    batch = whole(case, len(lowered.states))
    compiled.forward(batch)
    truth = expected(case)
    share = np.abs(compiled.logits(0, len(batch.token_ids)) - truth).max() / np.abs(truth).max()
    assert share < FLOAT_WEIGHTS_SHARE


MISTAKES: dict[str, tuple[str, dict[str, Any]]] = {
    "rope base": ("llama", {"rope": Rope(20000.0, 16)}),
    "no position scale": ("llama-linear-rope", {"rope": Rope(10000.0, 16)}),
    "no Llama 3 factors": ("llama3-rope", {"rope": Rope(5000.0, 32)}),
    "no bias": ("qwen2", {"qkv_bias": False}),
    "window too wide by one": ("gemma3", {"sliding_window": 10}),
    "window too narrow by one": ("gemma3", {"sliding_window": 8}),
    "local rope of the global layers": ("gemma3", {"local_rope": Rope(1_000_000.0, 32, position_scale=1 / 8)}),
    "scale of the head": ("gemma3", {"attention_scale": None}),
    "other layers global": ("gemma3", {"global_every": 4}),
    "experts used": ("mixtral", {"experts": Experts(5, 3)}),
    "no norms of q and k": ("qwen3", {"family": "llama"}),
    "one expert less": ("qwen3moe", {"experts": Experts(12, 3)}),
    "eps": ("llama", {"norm_eps": 1e-2}),
    "norm of attention for the FFN too": ("falcon", {"shared_norm": True}),
    "SiLU for GELU": ("falcon", {"activation": Activation.SILU}),
    "GELU for ReLU": ("relu-falcon", {"activation": Activation.GELU_TANH}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake: str) -> None:
    """What the answers are there to catch lies well outside their tolerance."""
    name, wrong = MISTAKES[mistake]
    case = next(case for case in CASES if case.name == name)
    assert np.abs(reference(case, replace(case.config, **wrong)) - expected(case)).max() > 10 * ORACLE_LOGITS


@pytest.mark.oracle
def test_transformers_still_says_so() -> None:
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        pytest.skip('needs the extra: pip install "isotherm[oracle]"')
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, SCRIPT, "--check"], capture_output=True, text=True, timeout=600, env=environment, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    print(run.stdout)
