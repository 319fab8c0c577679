"""CUDA devices through the public door, on a fake of the driver and of NVRTC that computes (native/fake_cuda.cpp)."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_child import run_child
from gpu_drivers import build_driver, fake_cuda
from slow_cases import with_slow
from tiny_models import write_tiny

from isotherm.types import QuantType

SIZES = {"num_layers": 3, "hidden_size": 64, "ffn_size": 96, "head_dim": 16, "tied_head": False}
# A model at several places, asked the same; then what the driver counted.
PLACES = """
import ctypes
import os
import sys
import isotherm
import isotherm.assemble
from isotherm.types import LoadOptions
isotherm.assemble.tuned_tiling = lambda gpu, *_: gpu.tiling
answers, places = set(), []
for device, vram_bytes in (("cpu", None), ("gpu", None), ("gpu", 1000000), ("gpu", 1100000)):
    options = LoadOptions(context_tokens=256, device=device, vram_bytes=vram_bytes, cache_bytes=0)
    with isotherm.load(sys.argv[1], options=options) as model:
        prompt = "the cat and the hat " * 20
        answers.add(tuple(model.generate(prompt, raw=True, max_tokens=24, temperature=0.0).token_ids))
        placed = model.facts.placement
        places.append("cpu" if placed is None else placed.text(3))
driver = ctypes.CDLL(os.environ["ISOTHERM_CUDA"])
driver.fake_allocated_bytes.restype = ctypes.c_uint64
print(len(answers), places, sep="\\n")
print(driver.fake_num_graph_launches() > 2 * 20, driver.fake_num_graphs(), driver.fake_allocated_bytes())
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama", QuantType.Q4_0, **SIZES)


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("the fake compiles kernels for x86-64 on Linux")
    return fake_cuda(tmp_path_factory.mktemp("fake"))


def child(model: Path, device: str, environment: dict[str, str], trust: str = "trusted") -> str:
    return run_child(model, device, "cuda", trust, environment)


def test_a_model_answers_alike_wherever_it_lies(tiny: Path, fake: dict[str, str]) -> None:
    """And what is decoded is launched as graphs; a closed model leaves nothing behind."""
    environment = {**os.environ, **fake, "ISOTHERM_CACHE": str(tiny.parent)}
    run = subprocess.run(
        [sys.executable, "-c", PLACES, str(tiny)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert run.returncode == 0, run.stderr
    num_answers, places, counts = run.stdout.splitlines()
    assert num_answers == "1"
    assert places.startswith("['cpu', 'gpu:0 (Fake CUDA): the embedding, all 3 layers and the head'")
    assert "of 3 layers and the head']" in places
    assert counts == "True 0 0"


@pytest.mark.slow
def test_its_word_is_tried_once(tiny: Path, fake: dict[str, str], tmp_path: Path) -> None:
    environment = fake | {"ISOTHERM_CACHE": str(tmp_path)}
    said = child(tiny, "auto", environment, trust="tried")
    assert "notice: trying gpu:0 (Fake CUDA) against the CPU, once" in said
    assert "notice: gpu:0 (Fake CUDA): the embedding, all 3 layers and the head" in said
    assert "answer:" in said
    again = child(tiny, "auto", environment, trust="tried")
    assert "trying" not in again
    assert again.splitlines()[-1] == said.splitlines()[-1]


def test_kernels_are_compiled_once(tiny: Path, fake: dict[str, str], tmp_path: Path) -> None:
    environment = fake | {"ISOTHERM_CACHE": str(tmp_path)}
    said = child(tiny, "gpu", environment)
    assert child(tiny, "gpu", environment | {"FAKE_FAIL": "nvrtcCompileProgram:6"}) == said
    kept = list(tmp_path.rglob("*.kernel"))
    assert kept
    for path in kept:
        path.write_bytes(path.read_bytes()[:-1])
    assert "DeviceFailed" in child(tiny, "gpu", environment | {"FAKE_FAIL": "nvrtcCompileProgram:6"})
    assert child(tiny, "gpu", environment) == said


FAILURES = [
    ("Init:999", "DeviceNotFound: no OpenCL on this machine: libOpenCL.so.1 cannot be opened; CUDA's driver does not"),
    ("MemAlloc:2:10", "InsufficientMemory: Fake CUDA: cuMemAlloc gave error 2 (CUDA_ERROR_FAKE); give it less with"),
    (
        "MemcpyDtoHAsync:700",
        "DeviceFailed: Fake CUDA: cuMemcpyDtoHAsync gave error 700 (CUDA_ERROR_FAKE); --device",
    ),
    ("LaunchKernel:719:60", "DeviceFailed: Fake CUDA: cuLaunchKernel gave error 719"),
    ("GraphLaunch:719:2", "DeviceFailed: Fake CUDA: cuGraphLaunch gave error 719"),
]
OTHERS = [
    ("DevicePrimaryCtxRetain:2", "InsufficientMemory: Fake CUDA: cuDevicePrimaryCtxRetain gave error 2"),
    ("CtxPushCurrent:201:9", "DeviceFailed: Fake CUDA: cuCtxPushCurrent gave error 201"),
    ("StreamCreate:999", "DeviceFailed: Fake CUDA: cuStreamCreate gave error 999"),
    ("MemAllocHost:2", "InsufficientMemory: Fake CUDA: cuMemAllocHost gave error 2"),
    ("MemcpyHtoDAsync:700:9", "DeviceFailed: Fake CUDA: cuMemcpyHtoDAsync gave error 700"),
    (
        "nvrtcCompileProgram:6",
        "DeviceFailed: Fake CUDA: kernels were not compiled: NVRTC gave error 6: line 1: no",
    ),
    ("ModuleLoadData:218", "DeviceFailed: Fake CUDA: cuModuleLoadData gave error 218"),
    ("ModuleGetFunction:500", "DeviceFailed: Fake CUDA: cuModuleGetFunction gave error 500"),
    ("LaunchKernel:719", "DeviceFailed: Fake CUDA: cuLaunchKernel gave error 719"),
    ("StreamBeginCapture:900", "DeviceFailed: Fake CUDA: cuStreamBeginCapture gave error 900"),
    ("StreamEndCapture:901", "DeviceFailed: Fake CUDA: cuStreamEndCapture gave error 901"),
    ("GraphInstantiateWithFlags:999", "DeviceFailed: Fake CUDA: cuGraphInstantiateWithFlags gave error 999"),
    ("StreamSynchronize:719:9", "DeviceFailed: Fake CUDA: cuStreamSynchronize gave error 719"),
    ("EventSynchronize:719:9", "DeviceFailed: Fake CUDA: cuEventSynchronize gave error 719"),
]


@pytest.mark.parametrize("case", with_slow(FAILURES, OTHERS), ids=str)
def test_a_driver_that_fails(tiny: Path, fake: dict[str, str], case: tuple[str, str], tmp_path: Path) -> None:
    """At any call: the error has a type, says which call it was, and the way out; nothing hangs or crashes."""
    failure, expected = case
    cache = tmp_path if "nvrtc" in failure else tiny.parent
    assert expected in child(tiny, "gpu", fake | {"FAKE_FAIL": failure, "ISOTHERM_CACHE": str(cache)})


@pytest.mark.parametrize("failure", ["Init:999", "MemAlloc:2:10"])
def test_auto_goes_on_without_a_gpu_that_fails(tiny: Path, fake: dict[str, str], failure: str) -> None:
    assert "answer:" in child(tiny, "auto", fake | {"FAKE_FAIL": failure})


def test_a_driver_without_its_compiler(tiny: Path, fake: dict[str, str]) -> None:
    environment = fake | {"ISOTHERM_NVRTC": ""}
    said = child(tiny, "gpu", environment)
    assert "DeviceNotFound" in said
    assert "Fake CUDA, which lacks NVRTC, CUDA's compiler (pip install isotherm[cuda])" in said
    assert "answer:" in child(tiny, "auto", environment)
    said = child(tiny, "gpu", fake | {"ISOTHERM_NVRTC": "/nowhere"})
    assert "ISOTHERM_NVRTC names /nowhere, which cannot be opened" in said
    said = child(tiny, "gpu", fake | {"FAKE_VERSION": "12080"})
    assert "Fake CUDA, which lacks a driver as new as its compiler, NVRTC 13.0" in said


def test_a_gpu_of_both_drivers_is_opencls(tiny: Path, fake: dict[str, str], tmp_path: Path) -> None:
    opencl = {"ISOTHERM_OPENCL": str(build_driver("fake_opencl", tmp_path)), "FAKE_NAME": "Fake CUDA"}
    assert "notice: gpu:0 (Fake CUDA): " in child(tiny, "gpu", fake | opencl)
    assert "notice: gpu:1 (Fake CUDA): " in child(tiny, "gpu:1", fake | opencl)
    assert "notice: gpu:1 (Fake CUDA): " in child(tiny, "gpu", fake | opencl | {"FAKE_LACKS": "1"})
