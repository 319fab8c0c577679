"""Devices through the public door: named, filled, missing, failing. A process has one driver: others are children's."""

import subprocess
import weakref
from pathlib import Path

import pytest
from gpu_child import run_child
from gpu_drivers import build_driver, open_driver
from tiny_models import write_tiny

import isotherm
from isotherm.backends.cpu.backend import CompiledCpu
from isotherm.backends.gpu.device import KernelCache, OpenGpu
from isotherm.errors import InsufficientMemory, OptionError
from isotherm.types import LoadOptions, QuantType, SamplingParams

SIZES = {"num_layers": 3, "hidden_size": 64, "ffn_size": 96, "head_dim": 16, "tied_head": False}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama", QuantType.Q4_0, **SIZES)


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver of tests/native/fake_opencl.cpp."""
    return build_driver("fake_opencl", tmp_path_factory.mktemp("fake"))


def child(model: Path, device: str, driver: str | Path, trust: str = "trusted", **environment: str) -> str:
    """driver: a library of OpenCL, or "pocl"."""
    chosen = {} if driver == "pocl" else {"ISOTHERM_OPENCL": str(driver), "ISOTHERM_CUDA": ""}
    return run_child(model, device, str(driver), trust, chosen | environment)


@pytest.fixture
def pocl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path))
    if reason := open_driver():
        pytest.skip(reason)


def answer(model: Path, device: str, vram_bytes: int | None = None, **options: object) -> tuple[list[int], str]:
    """Ids of an answer, and where what was computed."""
    chosen = LoadOptions(context_tokens=256, device=device, vram_bytes=vram_bytes, **options)  # type: ignore[arg-type]
    with isotherm.load(model, options=chosen) as generator:
        placement = generator.facts.placement
        ids = list(generator.generate("the cat and the hat", max_tokens=24).token_ids)
        return ids, "cpu" if placement is None else placement.text(generator.facts.config.num_layers)


@pytest.mark.usefixtures("pocl")
def test_a_model_answers_alike_wherever_it_lies(tiny: Path) -> None:
    expected, where = answer(tiny, "cpu")
    assert where == "cpu"
    ids, where = answer(tiny, "gpu:0")
    assert where.endswith("the embedding, all 3 layers and the head")
    assert ids == expected
    places = set()
    for vram_bytes in range(700_000, 1_600_000, 100_000):
        ids, where = answer(tiny, "gpu:0", vram_bytes)
        assert ids == expected, where
        places.add(where.partition(": ")[2])
    assert {"the last 1 of 3 layers and the head", "the last 2 of 3 layers and the head"} <= places


@pytest.mark.usefixtures("pocl")
@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.9, "top_k": 20, "top_p": 0.8, "seed": 3}, {"temperature": 1.0, "seed": 4}],
    ids=str,
)
def test_tokens_are_chosen_alike(tiny: Path, sampling: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the largest logits, which alone leave the GPU, or by all; three answers in one batch."""
    found = []
    prompts = ("the cat", "and the hat in the house", "or")
    for device in ("cpu", "gpu:0"):
        with isotherm.load(tiny, device=device, context_tokens=256) as model:
            is_short = device != "cpu" and ("top_k" in sampling or not sampling)
            unused = "logits" if is_short else "shortlists"
            with monkeypatch.context() as patched:
                patched.setattr(CompiledCpu, unused, None)  # is not called
                params = SamplingParams(**sampling)  # type: ignore[arg-type]
                ids = [model.prompt_ids(prompt, raw=True) for prompt in prompts]
                streams = [model.start(prompt, max_tokens=12, sampling=params) for prompt in ids]
                while model.step():
                    pass
            pieces = [stream.poll() for stream in streams]
            assert all(pieces)
            found.append([piece.tokens for piece in pieces if piece])
            for stream in streams:
                stream.close()
    assert found[0] == found[1]


@pytest.mark.usefixtures("pocl")
def test_memory_that_holds_nothing(tiny: Path) -> None:
    with pytest.raises(InsufficientMemory, match=r"in 0\.1 MB: not even its head; give more with --vram"):
        answer(tiny, "gpu:0", 100_000)


@pytest.mark.usefixtures("pocl")
def test_auto_leaves_a_cpu_that_poses_as_a_device_alone(tiny: Path) -> None:
    assert answer(tiny, "auto")[1] == "cpu"


@pytest.mark.parametrize("name", ["gpus", "gpu:", "gpu:x", "gpu:-1", "cuda", ""])
def test_names_of_no_device(tiny: Path, name: str) -> None:
    with pytest.raises(OptionError, match="auto, cpu, gpu or gpu:N"):
        isotherm.load(tiny, options=LoadOptions(device=name))


def test_options_that_do_not_go_together(tiny: Path) -> None:
    with pytest.raises(OptionError, match="reference backend runs on the CPU"):
        isotherm.load(tiny, options=LoadOptions(device="gpu", backend="reference"))
    with pytest.raises(OptionError, match="vram_bytes is 0"):
        isotherm.load(tiny, options=LoadOptions(vram_bytes=0))


def test_a_machine_without_a_driver(tiny: Path) -> None:
    assert "answer:" in child(tiny, "auto", "/nowhere/libOpenCL.so")
    said = child(tiny, "gpu", "/nowhere/libOpenCL.so")
    assert "DeviceNotFound: ISOTHERM_OPENCL names /nowhere/libOpenCL.so, which cannot be opened" in said
    assert "--device cpu needs none" in said


def test_the_cpu_alone_touches_no_driver(tiny: Path, fake: Path) -> None:
    assert "answer:" in child(tiny, "cpu", fake, FAKE_ABORT="1")


def test_a_library_that_is_no_driver(tiny: Path, tmp_path: Path) -> None:
    library = tmp_path / "libempty.so"
    subprocess.run(["g++", "-shared", "-x", "c++", "/dev/null", "-o", library], check=True, timeout=120)
    assert "DeviceNotFound: the OpenCL library lacks clGetPlatformIDs" in child(tiny, "gpu:0", library)


def test_devices_that_cannot_be_used(tiny: Path, fake: Path) -> None:
    assert "DeviceNotFound: there is no gpu:7; gpu:0 is Fake GPU" in child(tiny, "gpu:7", fake)
    for device in ("gpu", "gpu:0"):
        said = child(tiny, device, fake, FAKE_LACKS="1")
        assert "DeviceNotFound" in said
        assert "lacks fused multiply-add" in said
    assert "answer:" in child(tiny, "auto", fake, FAKE_LACKS="1")


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        ("CreateContext:-5", "DeviceFailed: Fake GPU: clCreateContext gave error -5; --device cpu"),
        ("CreateBuffer:-4:20", "InsufficientMemory: Fake GPU: clCreateBuffer gave error -4; give it less with --vram"),
        ("EnqueueWriteBuffer:-4:3", "InsufficientMemory: Fake GPU: clEnqueueWriteBuffer gave error -4"),
        ("BuildProgram:-11", "DeviceFailed: Fake GPU: kernels were not compiled: line 1: no such thing"),
        ("CreateKernel:-46", "DeviceFailed: Fake GPU: clCreateKernel gave error -46"),
        ("EnqueueNDRangeKernel:-9999:10", "DeviceFailed: Fake GPU: clEnqueueNDRangeKernel gave error -9999"),
        ("EnqueueReadBuffer:-36", "DeviceFailed: Fake GPU: clEnqueueReadBuffer gave error -36"),
        ("Finish:-36", "DeviceFailed: Fake GPU: clFinish gave error -36"),
        ("Flush:-36:2", "DeviceFailed: Fake GPU: clFlush gave error -36"),
    ],
)
def test_a_driver_that_fails(tiny: Path, fake: Path, failure: str, expected: str) -> None:
    """At any call: the error has a type, says which call it was, and the way out; nothing hangs or crashes."""
    assert expected in child(tiny, "gpu", fake, FAKE_FAIL=failure)


@pytest.mark.parametrize("failure", ["CreateContext:-5", "BuildProgram:-11", "CreateBuffer:-4:20"])
def test_auto_goes_on_without_a_gpu_that_fails(tiny: Path, fake: Path, failure: str) -> None:
    said = child(tiny, "auto", fake, FAKE_FAIL=failure)
    assert "notice: the CPU computes all: Fake GPU: " in said
    assert "answer:" in said


def test_a_device_that_computes_wrong_answers_nobody(tiny: Path, fake: Path, tmp_path: Path) -> None:
    said = child(tiny, "gpu", fake, trust="tuned", ISOTHERM_CACHE=str(tmp_path))
    assert "notice: trying gpu:0 (Fake GPU) against the CPU, once" in said
    assert "DeviceFailed: gpu:0 (Fake GPU) gives other numbers than the CPU" in said
    said = child(tiny, "auto", fake, trust="tuned", ISOTHERM_CACHE=str(tmp_path))
    assert "notice: the CPU computes all: gpu:0 (Fake GPU) gives other numbers" in said
    assert "answer:" in said


def test_auto_takes_a_gpu_with_memory_of_its_own(tiny: Path, fake: Path) -> None:
    assert "notice: gpu:0 (Fake GPU): the embedding, all 3 layers and the head" in child(tiny, "auto", fake)


def test_two_devices_give_one_answer(tiny: Path) -> None:
    if reason := open_driver():
        pytest.skip(reason)
    environment = {"POCL_DEVICES": "pthread basic"}
    said = [child(tiny, device, "pocl", **environment) for device in ("cpu", "gpu:0", "gpu:1")]
    answers = [line for text in said for line in text.splitlines() if line.startswith("answer:")]
    assert len(answers) == 3
    assert len(set(answers)) == 1
    assert "notice: gpu:1 (" in said[2]


@pytest.mark.usefixtures("pocl")
def test_a_closed_model_gives_its_device_back(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[weakref.ref[OpenGpu]] = []
    make = OpenGpu.__init__

    def remember(self: OpenGpu, index: int, cache: KernelCache | None) -> None:
        devices.append(weakref.ref(self))
        make(self, index, cache)

    monkeypatch.setattr(OpenGpu, "__init__", remember)
    for _ in range(3):
        answer(tiny, "gpu:0")
    assert len(devices) == 3
    assert [device() for device in devices] == [None] * 3
