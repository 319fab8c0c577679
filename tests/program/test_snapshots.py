"""Each family's Program as text, recorded and lowered: a change of a model is a diff that a reviewer reads.

pytest tests/program --update-snapshots
"""

from dataclasses import replace
from pathlib import Path

import pytest

from isotherm.models import FAMILIES
from isotherm.program.lowering import lower
from isotherm.types import Activation, Experts, ModelConfig, Rope

SNAPSHOTS = Path(__file__).parent / "snapshots"

_LLAMA = ModelConfig(
    family="llama",
    name="snapshot",
    num_layers=1,
    hidden_size=96,
    ffn_size=256,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=1000,
    context_tokens=2048,
    norm_eps=1e-5,
    rope=Rope(10000.0, 16),
    tied_head=False,
)
CONFIGS = {
    "llama": _LLAMA,
    "llama3": replace(
        _LLAMA, num_layers=2, rope=Rope(500000.0, 4, position_scale=0.5, factors=(1.0, 8.0)), tied_head=True
    ),
    "qwen2": replace(_LLAMA, family="qwen2", qkv_bias=True, tied_head=True),
    "mixtral": replace(_LLAMA, num_layers=2, experts=Experts(8, 2)),
    "qwen3": replace(_LLAMA, family="qwen3", head_dim=32, tied_head=True),
    "qwen3moe": replace(_LLAMA, family="qwen3moe", num_layers=2, head_dim=32, ffn_size=64, experts=Experts(16, 4)),
    "gemma3": replace(
        _LLAMA,
        family="gemma3",
        num_layers=3,
        head_dim=32,
        tied_head=True,
        attention_scale=0.25,
        rope=Rope(1_000_000.0, 32, position_scale=0.125),
        sliding_window=512,
        local_rope=Rope(10000.0, 32),
        global_every=3,
    ),
    "relu-llama": replace(_LLAMA, activation=Activation.RELU),
    "opt": replace(
        _LLAMA,
        family="opt",
        num_layers=2,
        num_kv_heads=6,
        rope=None,
        tied_head=True,
        activation=Activation.RELU,
        first_position_row=2,
    ),
    "bamboo": replace(_LLAMA, family="bamboo", activation=Activation.DRELU),
    "falcon": replace(_LLAMA, family="falcon", num_layers=2, activation=Activation.GELU_TANH),
    "falcon-7b": replace(
        _LLAMA, family="falcon", num_kv_heads=1, tied_head=True, activation=Activation.RELU, shared_norm=True
    ),
}


def test_every_family_has_a_snapshot() -> None:
    assert {config.family for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("form", ["recorded", "lowered"])
@pytest.mark.parametrize("name", CONFIGS)
def test_snapshot(name: str, form: str, request: pytest.FixtureRequest) -> None:
    config = CONFIGS[name]
    program = FAMILIES[config.family](config)
    dump = (program if form == "recorded" else lower(program)).dump()
    path = SNAPSHOTS / f"{name}.{form}.txt"
    if request.config.getoption("--update-snapshots", default=False):
        SNAPSHOTS.mkdir(exist_ok=True)
        path.write_text(dump)
    assert path.is_file(), f"{path.name} is missing: pytest tests/program --update-snapshots"
    assert dump == path.read_text(), "pytest tests/program --update-snapshots, and read the diff"
