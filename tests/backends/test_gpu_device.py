"""What is kept of a device: compiled kernels, the tiling that was the quickest. Half a file is none."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from on_gpu import open_gpu

from isotherm.backends.cpu.isa import choose_isa
from isotherm.backends.gpu import sources, survey, trial, tuning
from isotherm.backends.gpu.device import KernelCache, OpenGpu
from isotherm.backends.gpu.sources import Dot4, Tiling, elementwise_source
from isotherm.errors import DeviceFailed


def test_a_kernel_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_gpu()
    cache = KernelCache(tmp_path)
    writes: list[str] = []
    write = KernelCache.write
    monkeypatch.setattr(KernelCache, "write", lambda self, key, data: (writes.append(key), write(self, key, data)))
    for _ in range(2):
        gpu = OpenGpu(0, cache)
        gpu.kernel(elementwise_source(), "select_rows", [gpu.allocate(64)] * 3 + [1, 1])
    assert len(writes) == 1
    assert [path.stem for path in tmp_path.iterdir()] == writes


@given(cut=st.integers(0, 99), flipped=st.integers(0, 799))
def test_what_is_damaged_is_not_believed(tmp_path_factory: pytest.TempPathFactory, cut: int, flipped: int) -> None:
    folder = tmp_path_factory.mktemp("kernels")
    cache, data = KernelCache(folder), bytes(range(68))
    cache.write("a", data)
    assert cache.read("a") == data
    path = folder / "a.kernel"
    whole = path.read_bytes()
    assert len(whole) == 100
    path.write_bytes(whole[:cut])
    assert cache.read("a") == b""
    path.write_bytes(bytes(b ^ (i == flipped // 8) << flipped % 8 for i, b in enumerate(whole)))
    assert cache.read("a") == b""
    assert cache.read("b") == b""


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = KernelCache(tmp_path / "file" / "kernels")
    cache.write("a", b"data")
    assert cache.read("a") == b""


def test_a_refused_binary_is_built_from_its_source(tmp_path: Path) -> None:
    gpu = open_gpu()
    cache = KernelCache(tmp_path)
    cache.write(gpu.key(elementwise_source()), b"what no driver takes")
    other = OpenGpu(0, cache)
    other.kernel(elementwise_source(), "select_rows", [other.allocate(64)] * 3 + [1, 1])


def test_the_quickest_tiling_is_found_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cache, said = open_gpu(), KernelCache(tmp_path), []
    assert tuning.tuned_tiling(gpu, cache, said.append) == Tiling()  # it is a CPU
    assert said == []
    timed: list[Tiling] = []

    def time_s(_: OpenGpu, tiling: Tiling, num_outputs: int, num_rows: int) -> float:
        timed.append(tiling)
        if num_rows == 1:
            wanted = (16, 2) if num_outputs > 5000 else (32, 2)
            return float((tiling.few_slices, tiling.few_depth) != wanted)
        return float((tiling.many_slices, tiling.many_tokens) != (4, 16))

    monkeypatch.setattr(tuning, "_time_s", time_s)
    monkeypatch.setattr(type(gpu.facts), "is_gpu", True)
    found = tuning.tuned_tiling(gpu, cache, said.append)
    assert found == Tiling(few_slices=16, few_depth=2, narrow_slices=32, many_slices=4, many_tokens=16)
    assert said == [f"tuning the kernels for gpu:0 ({gpu.facts.name}), once"]
    num_timed = len(timed)
    assert tuning.tuned_tiling(gpu, cache, said.append) == found
    assert len(timed) == num_timed
    (kept,) = tmp_path.iterdir()
    assert json.loads(kept.read_bytes()[32:])["many_tokens"] == 16


@pytest.mark.slow
def test_a_search_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = open_gpu()
    monkeypatch.setattr(tuning, "_FEW", ((8, 2), (16, 1)))
    monkeypatch.setattr(tuning, "_MANY", ((8, 8), (4, 4)))
    found = tuning.search(gpu, few_outputs=64, many_outputs=64)
    assert found.few_slices in (8, 16)
    assert (found.many_slices, found.many_tokens) in ((8, 8), (4, 4))


def test_four_bytes_are_multiplied_by_what_the_driver_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A means that does not compile, or gives other numbers, is passed over."""
    gpu = open_gpu()
    monkeypatch.setattr(type(gpu.facts), "has_dot_product", True)
    monkeypatch.setattr(type(gpu.facts), "vendor", "NVIDIA Corporation")
    tried: list[Dot4] = []
    dot4s = survey._dot4s

    def wrong(device: object, dot4: Dot4, a: NDArray[np.int8], b: NDArray[np.int8]) -> NDArray[np.int32]:
        tried.append(dot4)
        if dot4 is Dot4.PTX:
            raise DeviceFailed("no such instruction")
        return np.zeros(len(a), np.int32)

    monkeypatch.setattr(survey, "_dot4s", wrong)
    assert survey.find_dot4(gpu.device) is Dot4.PLAIN
    assert tried == [Dot4.KHRONOS, Dot4.PTX]
    monkeypatch.setattr(survey, "_dot4s", lambda device, _, a, b: dot4s(device, Dot4.PLAIN, a, b))
    assert survey.find_dot4(gpu.device) is Dot4.KHRONOS


def test_a_device_is_tried_once_before_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cache, said = open_gpu(), KernelCache(tmp_path), []
    assert trial.computes_alike(gpu, choose_isa())
    monkeypatch.setattr(type(gpu.facts), "is_gpu", True)
    for _ in range(2):
        trial.check_answers(gpu, cache, choose_isa(), said.append)
    assert said == [f"trying gpu:0 ({gpu.facts.name}) against the CPU, once"]


@pytest.mark.parametrize("wrong", ["fma(a, b, c)", "sqrt("], ids=["fused", "square root"])
def test_a_device_that_rounds_otherwise_is_refused(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are a rounding off."""
    gpu, text = open_gpu(), sources._text

    def changed(name: str) -> str:
        return text(name).replace("fma(a, b, c)", "((a) * (b) + (c))") if "fma" in wrong else twisted(text(name))

    def twisted(source: str) -> str:
        return source.replace("1.0f / sqrt(", "nextafter(1.0f, 2.0f) / sqrt(")

    for cached in (sources.matmul_source, sources.elementwise_source, sources.attention_source):
        cached.cache_clear()
    monkeypatch.setattr(sources, "_text", changed)
    monkeypatch.setattr(type(gpu.facts), "is_gpu", True)
    try:
        with pytest.raises(DeviceFailed, match="gives other numbers than the CPU"):
            trial.check_answers(gpu, KernelCache(tmp_path), choose_isa(), lambda _: None)
    finally:
        for cached in (sources.matmul_source, sources.elementwise_source, sources.attention_source):
            cached.cache_clear()
    assert not list(tmp_path.iterdir())
