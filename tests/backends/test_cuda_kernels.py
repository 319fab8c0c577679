"""Every kernel by NVRTC, CUDA's true compiler, which needs no GPU: it compiles, and rounds as the contract has it."""

import re

import pytest
from benchmark_module import benchmark
from slow_cases import with_slow
from test_gpu_ops import TYPES

from isotherm.backends.gpu.sources import (
    Dot4,
    Source,
    Tiling,
    attention_source,
    choice_source,
    elementwise_source,
    matmul_source,
    probe_source,
)
from isotherm.program.ops import AttentionShape
from isotherm.types import KvType, QuantType

gpu_code = benchmark("gpu_code")
OLDEST, NEWEST = "75", "100"  # of what NVRTC 13 and home machines have
SHAPES = [AttentionShape(4, 2, 64, 0.125, None), AttentionShape(30, 1, 48, 0.1, 16)]
# What is rounded otherwise than IEEE 754 says, flushes subnormals, or may be contracted.
LOOSE = re.compile(r"\.approx|\.ftz|\.full|\bmad\.\S*f\d\d|\b(?:add|sub|mul)\.f\d\d")


def check_compiles(source: Source, architecture: str = NEWEST) -> None:
    if gpu_code.find_installed(gpu_code.NVRTC) is None:
        pytest.skip("no NVRTC: pip install nvidia-cuda-nvrtc brings it")
    code, _ = gpu_code.compile_source(source, f"sm_{architecture}", "CUBIN")
    assert code.startswith(b"\x7fELF")
    text, _ = gpu_code.compile_source(source, f"compute_{architecture}", "PTX")
    assert not LOOSE.findall(text.decode(errors="replace"))


@pytest.mark.parametrize("architecture", [OLDEST, NEWEST])
def test_kernels_without_weights(architecture: str) -> None:
    for source in (elementwise_source(), choice_source(), *map(probe_source, (Dot4.PLAIN, Dot4.PTX))):
        check_compiles(source, architecture)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kv_type", KvType)
def test_attention(shape: AttentionShape, kv_type: KvType) -> None:
    check_compiles(attention_source(shape, kv_type))


@pytest.mark.parametrize("quant_type", with_slow(TYPES, QuantType))
def test_weights_of_each_type(quant_type: QuantType) -> None:
    check_compiles(matmul_source(quant_type, quant_type, Tiling(dot4=Dot4.PTX)))


def test_panels_of_two_types() -> None:
    check_compiles(matmul_source(QuantType.Q4_K, QuantType.Q6_K, Tiling(16, 2, 8, 8, 4)), OLDEST)


def test_contraction_would_be_seen() -> None:
    text = 'extern "C" __global__ void f(float* x) { x[0] = x[1] * x[2] + x[3]; }'
    check_compiles(Source(text, "CL1.2"))

    class Loose(Source):
        def options(self, architecture: str) -> str:
            return f"--gpu-architecture={architecture}"

    with pytest.raises(AssertionError):
        check_compiles(Loose(text.replace("x[1] * x[2]", "x[1] / x[2]").replace("+ x[3]", "* x[4] - x[3]"), "CL1.2"))
