"""One file per family: config in, Program out."""

from collections.abc import Callable

from isotherm.models import falcon, gemma3, llama, opt, qwen3
from isotherm.program.recorder import Program
from isotherm.types import ModelConfig

FAMILIES: dict[str, Callable[[ModelConfig], Program]] = {
    "llama": llama.record,
    "bamboo": llama.record,
    "qwen2": llama.record,  # its biases on QKV are the config's
    "qwen3": qwen3.record,
    "qwen3moe": qwen3.record,
    "gemma3": gemma3.record,
    "opt": opt.record,
    "falcon": falcon.record,
}
