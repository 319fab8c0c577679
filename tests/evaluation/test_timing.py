"""The benchmark's arithmetic on an invented model and machine, then a tiny real one."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tiny_models import write_tiny

import isotherm
from isotherm.engine.solo import DecodeTiming
from isotherm.errors import OptionError
from isotherm.evaluation import bench as bench_module
from isotherm.evaluation.bench import BenchOptions, bench
from isotherm.facts import DeviceFacts
from isotherm.text import TextGenerator
from isotherm.types import QuantType

DEVICE = DeviceFacts("invented", 2, 10**9, "avx2", read_bytes_per_s=40e9, int8_ops_per_s=1000e9)


class InventedModel:
    """Takes 9 s for the warm-up of each test, then 1, 2, 4 .. s for a prefill and 0.5, 1, 2 .. s to decode."""

    context_tokens = 512
    facts = SimpleNamespace(
        token_ops=10**9, token_bytes=10**8, num_threads=2, backend="cpu", isa="avx2", placement=None
    )

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self._prefill = iter([9.0, 1.0, 2.0, 4.0])
        self._decode = iter([9.0, 0.5, 1.0, 2.0])
        self._reads = iter([0.04, 0.05, 0.03] * 2 + [0.06, 0.02, 0.04] * 2)

    def prefill_s(self, num_tokens: int) -> float:
        self.calls.append(("prefill", num_tokens, 0))
        return next(self._prefill)

    def read_weights_s(self) -> float:
        return next(self._reads)

    def decode_s(self, num_tokens: int, *, depth: int) -> DecodeTiming:
        self.calls.append(("decode", num_tokens, depth))
        total_s = next(self._decode)
        return DecodeTiming(total_s, 0.9 * total_s)


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str | None]]:
    """What the probe was asked; the machine gets slower with each."""
    asked: list[tuple[int, str | None]] = []

    def measure(num_threads: int, isa: str | None) -> DeviceFacts:
        asked.append((num_threads, isa))
        return replace(DEVICE, read_bytes_per_s=DEVICE.read_bytes_per_s / len(asked))

    monkeypatch.setattr(bench_module, "measure", measure)
    return asked


def test_rates_shares_and_turns(probes: list[tuple[int, str | None]]) -> None:
    model, told = InventedModel(), list[str]()
    result = bench(cast(TextGenerator, model), BenchOptions(100, 10, 3, depth=7), told.append)
    prefill, decode = result.tests
    assert (prefill.test, prefill.samples, prefill.tokens_per_second) == ("pp100", (100.0, 50.0, 25.0), 50.0)
    assert prefill.stddev == pytest.approx(38.1881, rel=1e-5)  # of 100, 50, 25, by n - 1
    assert prefill.limit_share == pytest.approx(50 * 1e9 / 1000e9)
    assert prefill.python_share is None
    assert (decode.test, decode.samples) == ("tg10 @ d7", (20.0, 10.0, 5.0))
    assert decode.limit_share == pytest.approx(10 * 1e8 / 40e9)
    assert decode.python_share == pytest.approx(0.1)
    assert decode.weights_share == pytest.approx(0.02 * 10)
    assert result.weights_bytes_per_s == pytest.approx(1e8 / 0.02)  # the best time of all
    assert model.calls == [("prefill", 100, 0), ("decode", 10, 7)] * 4
    assert probes == [(2, "avx2")] * 4
    assert result.device == DEVICE  # the best of the probes
    assert told == ["warm-up", *(f"repetition {number} of 3" for number in (1, 2, 3))]


@pytest.mark.parametrize(("prompt", "decode", "names"), [(8, 0, ["pp8"]), (0, 4, ["tg4"])])
def test_zero_tokens_leave_a_test_out(
    probes: list[tuple[int, str | None]], prompt: int, decode: int, names: list[str]
) -> None:
    result = bench(cast(TextGenerator, InventedModel()), BenchOptions(prompt, decode, 1))
    assert [speed.test for speed in result.tests] == names
    assert result.tests[0].stddev == 0
    assert probes


@pytest.mark.parametrize(
    "options", [{"prompt_tokens": -1}, {"repetitions": 0}, {"depth": -5}, {"prompt_tokens": 0, "decode_tokens": 0}]
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        BenchOptions(**options)


def test_a_context_too_small_is_refused_before_anything_runs() -> None:
    model = InventedModel()
    with pytest.raises(OptionError, match="need a context of 601 tokens, the model was loaded with 512"):
        bench(cast(TextGenerator, model), BenchOptions(100, 100, depth=500))
    assert not model.calls


@pytest.fixture(params=["cpu", "reference"])
def tiny(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TextGenerator]:
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path))
    path = write_tiny(tmp_path / "tiny.gguf", "llama", QuantType.Q4_0)
    with isotherm.load(path, backend=request.param, threads=1) as model:
        yield model


def test_a_real_model(tiny: TextGenerator) -> None:
    options = BenchOptions(16, 4, 1, depth=8)
    result = bench(tiny, options)
    assert [speed.test for speed in result.tests] == ["pp16", "tg4 @ d8"]
    for speed in result.tests:
        assert speed.tokens_per_second > 0
        assert speed.limit_share > 0  # beyond 1 too: the model fits a cache
    python_share = result.tests[1].python_share
    assert python_share is not None
    assert 0 < python_share < 1
    if tiny.facts.backend == "reference":  # has no packed weights
        assert (result.weights_bytes_per_s, result.tests[1].weights_share) == (None, None)
    else:
        assert 1e7 < (result.weights_bytes_per_s or 0) < 1e14
    assert result.peak_rss_bytes is None or result.peak_rss_bytes > 10**7
    assert options.context_tokens == 16
