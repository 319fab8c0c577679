"""Neuron statistics against a slow twin, over a whole text, cut short, and damaged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_module import benchmark
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_tiny
from tolerances import ZERO_SHARE

import isotherm
from isotherm.backends.reference import contract, float32
from isotherm.backends.reference.backend import ReferenceBackend
from isotherm.cli import main
from isotherm.errors import OptionError, StatsFileError
from isotherm.formats.checkpoint import open_checkpoint
from isotherm.models import FAMILIES
from isotherm.program import ops
from isotherm.program.batch import Batch, Sequence
from isotherm.program.lowering import lower
from isotherm.quantization.layouts import dequantise
from isotherm.sparsity.neuron_stats import NUM_BINS, NeuronStats, bin_edges, histogram, load_stats
from isotherm.sparsity.plots import threshold_cost
from isotherm.sparsity.profile import Profiler, ffn_layers, profile
from isotherm.sparsity.summary import hot_share, summarise
from isotherm.types import Activation, QuantType

WINDOWS = [list(range(start, start + 40)) for start in (1, 100, 200)]
CASES = {
    "opt": ("opt", {}),
    "relu": ("llama", {"isotherm.activation": "relu"}),
    "drelu": ("llama", {"isotherm.activation": "drelu"}),
    "falcon": ("falcon", {"isotherm.activation": "relu"}),
    "silu": ("llama", {}),
    "gemma3": ("gemma3", {}),
}


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def write_case(name: str) -> Path:
        family, metadata = CASES[name]
        path = folder / f"{name}.gguf"
        return path if path.exists() else write_tiny(path, family, QuantType.Q8_0, metadata=metadata, ffn_size=480)

    return write_case


def profiled(path: Path) -> NeuronStats:
    with isotherm.load(path, cache_bytes=0) as model, open_checkpoint(path) as checkpoint:
        profiler = Profiler(model, checkpoint.tensors, checkpoint.identity)
        return profile(profiler, profiler.start(WINDOWS), WINDOWS, lambda _: None)


@pytest.mark.parametrize("name", CASES)
def test_counts_are_those_of_the_contract(name: str, write: Callable[[str], Path]) -> None:
    path = write(name)
    stats = profiled(path)
    with open_checkpoint(path) as checkpoint:
        program = lower(FAMILIES[checkpoint.config.family](checkpoint.config))
        layers = ffn_layers(program)
        shown: dict[Any, list[Any]] = {layer.hidden: [] for layer in layers}
        for window in WINDOWS:
            pages = (np.zeros(1, np.int32),) * len(program.states)
            rows = np.arange(len(window), dtype=np.int32)
            batch = Batch(np.array(window, np.int32), (Sequence(len(window), 0, pages),), rows)
            twin = ReferenceBackend(checkpoint.tensors).compile(program, num_pages=(1,) * len(program.states))
            twin.observe(batch, shown.keys(), lambda value, rows: shown[value].append(rows))
        for layer, found in zip(layers, stats.layers, strict=True):
            hidden = np.concatenate(shown[layer.hidden])
            assert hidden.shape == (120, 480)
            codes = contract.quantise(hidden)[0][:, :480]
            assert found.num_fired.tolist() == (hidden != 0).sum(axis=0).tolist()
            assert found.num_coded.tolist() == (codes != 0).sum(axis=0).tolist()
            np.testing.assert_allclose(found.magnitude, np.abs(hidden).sum(axis=0, dtype=np.float64), rtol=1e-12)
            fires = hidden != 0 if stats.profiled.activation.has_zeros else codes != 0
            assert np.unpackbits(found.fired, axis=1)[:, :480].tolist() == fires.astype(int).tolist()
            assert found.inputs[3].tolist() == histogram(hidden).tolist()
            assert found.inputs.sum(axis=1).tolist() == [120 * 256] * 1 + [120 * 256] * 2 + [120 * 480]
            tensor = checkpoint.tensors[layer.down]
            down = dequantise(tensor.read(), tensor.quant_type, 480)
            np.testing.assert_allclose(found.down_norm, np.linalg.norm(down.astype(np.float64), axis=0), rtol=1e-6)
    assert stats.profiled.num_tokens == 120
    assert (summarise(stats).active < 0.9) == stats.profiled.activation.has_zeros


def test_histograms_see_what_a_matmul_reads(write: Callable[[str], Path]) -> None:
    """The input of gate and up is that of the float32 norm of what the layer before gave."""
    path = write("relu")
    stats = profiled(path)
    with isotherm.load(path, cache_bytes=0) as model, open_checkpoint(path) as checkpoint:
        glus = [op for op in model.program.ops if isinstance(op, ops.SparseUp)]
        seen: dict[Any, Any] = {}
        total = np.zeros(NUM_BINS, np.int64)
        weight = checkpoint.tensors["layers.0.ffn_norm"].read().view(np.float32)[0]
        for window in WINDOWS:
            model.observe(window, {glus[0].x}, seen.__setitem__)
            total += histogram(float32.rms_norm(seen[glus[0].x], weight, checkpoint.config.norm_eps))
    assert stats.layers[0].inputs[2].tolist() == total.tolist()


def test_bins() -> None:
    edges = bin_edges()
    assert len(edges) == NUM_BINS
    assert (np.diff(edges) > 0).all()
    values = np.array([0.0, 2.0**-30, 1.0, -1.0, 1.5, 2.0, 1e30, 2.0**-20], np.float32)
    counts = histogram(values)
    assert counts.sum() == len(values)
    for value in values:
        assert counts[np.searchsorted(edges, abs(value), side="right") - 1] > 0


@given(st.lists(st.floats(min_value=0, max_value=1e6), min_size=1, max_size=200))
def test_the_hot_share_is_the_least_that_does_the_work(values: list[float]) -> None:
    array = np.array(values)
    count = round(hot_share(array) * len(array))
    falling = np.sort(array)[::-1]
    assert falling[:count].sum() >= 0.8 * array.sum() * (1 - 1e-12)
    if count > 1:
        assert falling[: count - 1].sum() < 0.8 * array.sum() * (1 + 1e-12)


# --- the file


def test_a_file_comes_back(write: Callable[[str], Path], tmp_path: Path) -> None:
    stats = profiled(write("opt"))
    stats.save(tmp_path / "stats")
    again = load_stats(tmp_path / "stats")
    assert again.profiled == stats.profiled
    assert again.profiled.activation is Activation.RELU
    for found, expected in zip(again.layers, stats.layers, strict=True):
        for name, values in vars(expected).items():
            assert np.array_equal(getattr(found, name), values), name
    assert [path.name for path in tmp_path.iterdir()] == ["stats"]


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 but torn"])
def test_no_file_of_ours(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "stats").write_bytes(content)
    with pytest.raises(StatsFileError):
        load_stats(tmp_path / "stats")
    with pytest.raises(StatsFileError, match="No such file"):
        load_stats(tmp_path / "nothing")


def test_damage_anywhere_is_seen(write: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "stats"
    profiled(write("opt")).save(path)
    sound = path.read_bytes()
    whole = load_stats(path)
    for at in range(0, len(sound), max(1, len(sound) // 150)):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 0x55]) + sound[at + 1 :])
        try:
            found = load_stats(path)
        except StatsFileError:
            continue
        for layer, expected in zip(found.layers, whole.layers, strict=True):  # bytes that say nothing: dates, padding
            assert all(np.array_equal(getattr(layer, name), values) for name, values in vars(expected).items())
    for damaged in (sound.replace(b"'fortran_order'", b"'fortran_order "), sound.replace(b"), }", b"),  ")):
        assert damaged != sound
        path.write_bytes(damaged)  # headers that are no Python
        with pytest.raises(StatsFileError):
            load_stats(path)
    for size in (1, 100, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:size])
        with pytest.raises(StatsFileError):
            load_stats(path)


# --- the command


def test_a_run_that_was_cut_short_goes_on(
    write: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, out = tmp_path / "text", tmp_path / "stats"
    text.write_text("the rain in spain " * 80)
    command = ["profile", str(write("opt")), "--text", str(text), "--ctx", "64", "--chunks", "5"]
    assert main([*command, "-o", str(tmp_path / "whole"), "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)

    kept = Profiler.add
    calls = []

    def cut_short(self: Profiler, stats: NeuronStats, window: Any) -> NeuronStats:
        calls.append(window)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return kept(self, stats, window)

    monkeypatch.setattr(Profiler, "add", cut_short)
    monkeypatch.setattr("isotherm.cli.profile._SAVE_S", 0.0)
    assert main([*command, "-o", str(out)]) == 130
    assert load_stats(out).profiled.num_windows == 3
    assert main([*command, "-o", str(out), "--json"]) == 0
    streams = capsys.readouterr()
    assert "going on after 3 of 5 windows" in streams.err
    assert json.loads(streams.out) == whole
    assert len(calls) == 6
    other = tmp_path / "other"
    other.write_text("another text altogether, " * 80)
    assert main([*command[:3], str(other), *command[4:], "-o", str(out)]) == 0
    streams = capsys.readouterr()
    assert "of another model or text, and is written anew" in streams.err
    assert "80 % of firings by" in streams.out


def test_what_cannot_be_written(
    write: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text("the rain in spain " * 80)
    command = ["profile", str(write("opt")), "--text", str(text), "--ctx", "64", "--chunks", "1"]
    assert main([*command, "-o", str(tmp_path / "nowhere" / "stats")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_trained_opt_has_the_zeros_that_transformers_saw(shared_dir: Path, tmp_path: Path) -> None:
    folder = shared_dir / "models" / "tiny-opt"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    golden = json.loads((shared_dir / "golden" / "tiny-opt.json").read_text())
    benchmark("convert_opt").convert(folder, tmp_path / "tiny-opt.gguf", "F16")
    out, text = tmp_path / "stats", shared_dir / "data" / "wiki.eval.txt"
    command = ["profile", str(tmp_path / "tiny-opt.gguf"), "--text", str(text), "--ctx", "256", "--chunks", "40"]
    assert main([*command, "-o", str(out)]) == 0
    active = [layer.active for layer in summarise(load_stats(out)).layers]
    expected = [1 - share for share in golden["zero_share_per_layer_on_wiki_eval"].values()]
    assert np.abs(np.array(active) - expected).max() < ZERO_SHARE


def test_pictures(write: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, folder = tmp_path / "text", tmp_path / "a" / "plots"
    text.write_text("the rain in spain " * 80)
    command = ["profile", str(write("opt")), "--text", str(text), "--ctx", "64", "--chunks", "2"]
    assert main([*command, "-o", str(tmp_path / "stats"), "--plot", str(folder), "--json"]) == 0
    pictures = sorted(path.name for path in folder.iterdir())
    assert pictures == ["frequency.png", "numbers.json", "power-law.png", "threshold.png"]
    for name in pictures[:1] + pictures[2:]:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    found = json.loads((folder / "numbers.json").read_text())
    table = json.loads(capsys.readouterr().out)
    assert found["summary"] == {name: table[name] for name in found["summary"]}
    for curve in (found["power_law"]["model"], *found["power_law"]["layers"]):
        assert curve[0] == 0
        assert curve[-1] == pytest.approx(1)
        assert curve == sorted(curve)
        assert (np.diff(curve, 2) < 1e-9).all()  # the hottest come first
    at = round(found["summary"]["hot_firings"] * (len(curve) - 1))
    assert found["power_law"]["model"][at] == pytest.approx(0.8, abs=0.02)
    (tmp_path / "file").write_text("")
    assert main([*command, "-o", str(tmp_path / "stats"), "--plot", str(tmp_path / "file")]) == 2
    assert "--plot names another folder" in capsys.readouterr().err


def test_what_a_threshold_costs() -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    below, lost = threshold_cost(histogram(values))
    for edge, share, cost in zip(bin_edges(), below, lost, strict=True):
        assert share == (np.abs(values) < edge).mean()
        assert cost == pytest.approx(np.square(values[np.abs(values) < edge]).sum() / np.square(values).sum(), abs=0.01)


def test_experts_are_refused(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "moe.gguf", "qwen3moe", QuantType.Q4_0)
    with (
        isotherm.load(path, cache_bytes=0) as model,
        open_checkpoint(path) as checkpoint,
        pytest.raises(OptionError, match="is a mixture of experts, whose neurons are not counted"),
    ):
        Profiler(model, checkpoint.tensors, checkpoint.identity)
