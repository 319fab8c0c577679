"""Predictors: training finds what can be learnt; a slow twin; their file, the command, and answers with them."""

import io
import json
import math
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_module import benchmark
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_tiny
from tolerances import PREDICTED_SHARE

import isotherm
from isotherm.backends.reference import contract
from isotherm.backends.reference.backend import ReferenceBackend
from isotherm.cli import main
from isotherm.errors import OptionError, StatsFileError, UnsupportedModel
from isotherm.formats.checkpoint import open_checkpoint
from isotherm.models import FAMILIES
from isotherm.program import ops
from isotherm.program.batch import Batch, Sequence
from isotherm.program.lowering import lower
from isotherm.quantization.layouts import decode, dequantise, quantise_q8_0
from isotherm.sparsity import predictor_training
from isotherm.sparsity.array_file import write_arrays
from isotherm.sparsity.predictor import Measured, PredictedLayer, PredictorSet, Weights, load_predictors
from isotherm.sparsity.predictor_samples import LayerSamples, collect, quantised
from isotherm.sparsity.predictor_training import (
    PredictorTrainer,
    Wanted,
    first_rank,
    measure,
    ranks_to,
    scores,
    threshold_for,
    train_layer,
)
from isotherm.sparsity.profile import ffn_layers
from isotherm.types import Activation, QuantType

WINDOW, NUM_WINDOWS = 64, 10
NUM_STEPS = 150  # fewer than are taken for real models, of a rank
TEXT = "the rain in spain stays mainly in the plain, and nobody minds the rain. " * 40
RECALL = 0.9


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Neurons fire by a power law, and by the token: a text of few letters is easily learnt."""
    synthetic = benchmark("synthetic")
    path: Path = tmp_path_factory.mktemp("predictor") / "planted.gguf"
    planted = synthetic.Planted("relu", 0.1)
    synthetic.write_synthetic(path, synthetic.SHAPES["tiny"], "Q4_0", planted=planted)
    return path


@pytest.fixture(scope="module")
def text_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(TEXT)
    return path


def command(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--ctx", str(WINDOW), "--chunks", str(NUM_WINDOWS), "--recall", str(RECALL)]
    return ["train-predictor", str(model), "--text", str(text), "-o", str(out), *sizes, *more]


@pytest.fixture(scope="module", autouse=True)
def _brief() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor_training, "_NUM_STEPS", NUM_STEPS)
        yield


@pytest.fixture(scope="module")
def trained(model_path: Path, text_path: Path) -> Path:
    """The file of a whole training."""
    out = text_path.parent / "trained"
    assert main(command(model_path, text_path, out)) == 0
    return out


def windows_of(model: Any) -> list[list[int]]:
    ids = model.tokenize(TEXT)
    return [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(NUM_WINDOWS)]


# --- training


def test_it_learns_which_neurons_fire(trained: Path, model_path: Path) -> None:
    """Recall and share are recomputed in the arithmetic of the contract, from what the reference backend shows."""
    predictors = load_predictors(trained)
    with isotherm.load(model_path, cache_bytes=0) as model:
        held_out = windows_of(model)[4::5]
    with open_checkpoint(model_path) as checkpoint:
        program = lower(FAMILIES[checkpoint.config.family](checkpoint.config))
        layers = ffn_layers(program)
        assert len(predictors.layers) == len(layers) == predictors.training.num_layers == 2
        shown: dict[Any, list[Any]] = {value: [] for layer in layers for value in (layer.x, layer.hidden)}
        for window in held_out:
            twin = ReferenceBackend(checkpoint.tensors).compile(program, num_pages=(1,))
            rows = np.arange(WINDOW, dtype=np.int32)
            batch = Batch(np.array(window, np.int32), (Sequence(WINDOW, 0, (np.zeros(1, np.int32),)),), rows)
            twin.observe(batch, shown.keys(), lambda value, found: shown[value].append(found))
        for layer, kept in zip(layers, predictors.layers, strict=True):
            assert kept.weights is not None
            assert layer.norm is not None
            weight = dequantise(checkpoint.tensors[layer.norm.weight].read(), QuantType.F32, 256)[0]
            x = contract.rms_norm(np.concatenate(shown[layer.x]), weight, layer.norm.eps)
            fires = np.concatenate(shown[layer.hidden]) != 0
            assert fires.shape == (128, 512)
            low = contract.quant_matmul(*contract.quantise(x), decode(kept.weights.first, QuantType.Q8_0, 256))
            low = contract.activate(low, Activation.RELU)
            second = decode(kept.weights.second, QuantType.Q8_0, kept.weights.rank)
            found = contract.quant_matmul(*contract.quantise(low), second)
            predicted = found >= np.float32(kept.weights.threshold)
            assert kept.measured.active == fires.mean()
            assert kept.measured.recall == pytest.approx(predicted[fires].mean(), abs=PREDICTED_SHARE)
            assert kept.measured.predicted == pytest.approx(predicted.mean(), abs=PREDICTED_SHARE)
            assert kept.measured.recall >= RECALL
            # a predictor that knows how often each neuron fires, and nothing of the token, needs three times as many
            by_rate = np.cumsum(np.sort(fires.sum(axis=0))[::-1]) / fires.sum()
            assert predicted.mean() < 0.4 * (by_rate < RECALL).mean()
            assert predicted.mean() < 1.5 * fires.mean()


def made_samples(num_tokens: int, ffn_size: int, truth_rank: int | None, active: float = 0.1) -> LayerSamples:
    """Firing that follows from a product of low rank, or from nothing."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((num_tokens, 64)).astype(np.float32)
    if truth_rank is None:
        value = rng.standard_normal((num_tokens, ffn_size))
    else:
        value = x @ rng.standard_normal((64, truth_rank)) @ rng.standard_normal((truth_rank, ffn_size))
    fires = value > np.quantile(value, 1 - active)
    return LayerSamples(*quantised(x), np.packbits(fires, axis=1), ffn_size)


def attempts_of(samples: LayerSamples, wanted: Wanted, gate_bytes: int) -> tuple[PredictedLayer, list[Any]]:
    tried: list[Any] = []
    held_out = np.arange(len(samples)) % 5 == 4
    return train_layer(samples, held_out, gate_bytes, wanted, tried.append), tried


def test_the_rank_with_which_a_token_reads_least() -> None:
    samples = made_samples(2000, 256, 3)
    gate_bytes = 1 << 20
    layer, tried = attempts_of(samples, Wanted(0.9, 256), gate_bytes)
    assert layer.weights is not None
    assert layer.measured.predicted < 0.2
    best = min(tried, key=lambda attempt: attempt.read)
    assert (layer.weights, layer.measured) == (best.weights, best.measured)
    ranks = [attempt.weights.rank for attempt in tried]
    assert len(set(ranks)) == len(ranks) >= 2
    assert set(ranks) <= {64, 128, 256}
    for attempt in tried:
        assert attempt.measured.recall >= 0.9
        assert attempt.read == attempt.weights.num_bytes / gate_bytes + attempt.measured.rows_read


@pytest.mark.parametrize(("truth_rank", "gate_bytes"), [(None, 1 << 30), (3, 1000)], ids=["noise", "a tiny gate"])
def test_a_layer_that_is_better_off_without(truth_rank: int | None, gate_bytes: int) -> None:
    layer, _ = attempts_of(made_samples(500, 64, truth_rank), Wanted(0.95, 64), gate_bytes)
    assert layer.weights is None
    assert 0 < layer.measured.active < 0.2


def test_ranks_that_could_not_read_less_are_not_tried() -> None:
    samples = made_samples(500, 256, 3)
    num_columns = 256 + samples.ffn_size
    _, tried = attempts_of(samples, Wanted(0.9, 256), gate_bytes=64 * num_columns * 2)
    assert [attempt.weights.rank for attempt in tried] == [64], "twice that rank alone is as large as the gate"


def test_a_layer_that_never_fires() -> None:
    samples = replace(made_samples(500, 64, 3), fired=np.zeros((500, 8), np.uint8))
    assert attempts_of(samples, Wanted(0.95, 64), 1 << 30) == (PredictedLayer(None, Measured(0, 0, 0, 0)), [])


def test_training_twice_gives_the_same() -> None:
    samples = made_samples(400, 64, 3)
    first, second = (attempts_of(samples, Wanted(0.9, 64), 1 << 30)[0].weights for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.digest == second.digest
    assert first.threshold == second.threshold


@given(st.floats(0.01, 1.0), st.integers(0, 5))
def test_the_threshold_is_the_highest_with_that_recall(recall: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = made_samples(40, 64, 3)
    first, second = (
        quantise_q8_0(rng.standard_normal((32, 64), np.float32)),
        quantise_q8_0(rng.standard_normal((64, 32), np.float32)),
    )
    threshold = threshold_for(recall, first, second, samples)
    found, fires = scores(first, second, samples, slice(0, 40)), samples.fires(slice(0, 40))
    fired = found[fires]
    assert (fired >= np.float32(threshold)).mean() >= recall
    assert (fired > np.float32(threshold)).sum() < math.ceil(recall * fired.size)
    measured = measure(Weights(first, second, threshold), samples)
    predicted = found >= np.float32(threshold)
    by_token = predicted.mean(axis=1)
    assert measured.recall == predicted[fires].mean()
    assert measured.predicted == predicted.mean()
    assert measured.rows_read == pytest.approx(np.where(by_token <= 0.5, by_token, 1).mean(), abs=1e-12)


def test_ranks() -> None:
    assert ranks_to(64) == [64]
    assert ranks_to(256) == [64, 128, 256]
    assert ranks_to(320) == [64, 128, 256, 320]
    few, many = made_samples(500, 256, 3, active=0.02), made_samples(500, 256, 3, active=0.5)
    assert first_rank([8, 16, 32], few) < first_rank([8, 16, 32], many)


def test_samples_are_what_the_model_reads(model_path: Path) -> None:
    with isotherm.load(model_path, cache_bytes=0) as model, open_checkpoint(model_path) as checkpoint:
        windows = windows_of(model)[:2]
        both, alone = (
            collect(model, checkpoint.tensors, layers, windows)
            for layers in (ffn_layers(model.program), ffn_layers(model.program)[1:])
        )
        seen: dict[Any, list[Any]] = {}
        layer = ffn_layers(model.program)[1]
        for window in windows:
            model.observe(window, {layer.hidden}, lambda value, rows: seen.setdefault(value, []).append(rows))
    for name in ("codes", "scales", "fired"):
        assert np.array_equal(getattr(both[1], name), getattr(alone[0], name))
    assert np.array_equal(both[1].fires(slice(None)), np.concatenate(seen[layer.hidden]) != 0)
    assert both[1].num_fired.tolist() == both[1].fires(slice(None)).sum(axis=0).tolist()


def test_few_layers_at_a_time_give_the_same(
    trained: Path, model_path: Path, text_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor_training, "_SAMPLE_BYTES", 1)
    assert main(command(model_path, text_path, tmp_path / "again")) == 0
    assert same(load_predictors(tmp_path / "again"), load_predictors(trained))


# --- answers with it


def digest_of(model: Any, *, exact: bool = False) -> list[Any]:
    answer = model.generate("the rain in spain", raw=True, max_tokens=24, exact=exact)
    return [(token.token_id, token.logprob) for token in answer.tokens]


def test_answers_are_the_same_however_they_are_computed(model_path: Path, trained: Path) -> None:
    load = partial(isotherm.load, model_path, cache_bytes=0)
    with (
        load() as plain,
        load(predictor=trained) as one,
        load(predictor=str(trained), sparse=False, threads=1) as other,
    ):
        assert one.program.is_trimmed
        assert digest_of(one) == digest_of(other)
        assert digest_of(one, exact=True) == digest_of(plain)
        assert digest_of(one) != digest_of(plain)
        assert one.facts.token_bytes > plain.facts.token_bytes
        predicted_bytes = sum(layer.weights.num_bytes for layer in load_predictors(trained).layers if layer.weights)
        assert one.facts.token_bytes - plain.facts.token_bytes == pytest.approx(predicted_bytes, rel=0.2)
        assert one.facts.token_ops > plain.facts.token_ops
        assert one.facts.file_bytes == plain.facts.file_bytes
        # what fires is what fired without it, less what was not predicted, in the first layer
        first = ffn_layers(plain.program)[0].hidden
        hidden = next(op.out for op in one.program.ops if isinstance(op, ops.SparseUp))
        seen: list[Any] = []
        ids = windows_of(plain)[0]
        for model, value in ((plain, first), (one, hidden)):
            model.observe(ids, {value}, lambda _, rows: seen.append(rows))
        fires, left = seen[0] != 0, seen[1] != 0
        assert not (left & ~fires).any()
        assert 0.8 < left.sum() / fires.sum() < 1
        assert np.array_equal(seen[0][left], seen[1][left])


def test_the_reference_backend_takes_it(model_path: Path, trained: Path) -> None:
    load = partial(isotherm.load, model_path, backend="reference")
    with load(predictor=trained) as reference, load() as plain:
        ids = windows_of(plain)[0][:24]
        found, without = reference.logits(ids), plain.logits(ids)
        exact = np.concatenate(list(reference.logit_blocks(ids, range(len(ids)), exact=True)))
        assert np.array_equal(exact, without)
        assert 0 < np.abs(found - without).mean() < 0.1 * np.abs(without).mean()


def test_packed_weights_are_those_of_the_file_that_is_asked_for(
    model_path: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A predictor with other weights never meets those that were packed of another."""
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path / "cache"))
    predictors = load_predictors(trained)
    turned = [
        PredictedLayer(replace(layer.weights, second=layer.weights.second[::-1].copy()), layer.measured)
        for layer in predictors.layers
        if layer.weights
    ]
    other = tmp_path / "other"
    replace(predictors, layers=tuple(turned)).save(other)
    expected = []
    for path in (trained, other, None):
        with isotherm.load(model_path, cache_bytes=0, predictor=path) as model:
            expected.append(digest_of(model))
    assert expected[0] != expected[1] != expected[2]
    for path, wanted in zip((trained, other, None, trained), (*expected, expected[0]), strict=True):
        for _ in range(2):
            with isotherm.load(model_path, predictor=path) as model:
                assert digest_of(model) == wanted


def test_statistics_are_of_the_exact_model(model_path: Path, trained: Path) -> None:
    model = isotherm.load(model_path, cache_bytes=0, predictor=trained)
    with model, pytest.raises(OptionError, match="asked of the exact model"):
        ffn_layers(model.program)


# --- the file


def same(found: PredictorSet, expected: PredictorSet) -> bool:
    def content(layer: PredictedLayer) -> Any:
        weights = layer.weights
        return layer.measured, weights and (weights.first.tobytes(), weights.second.tobytes(), weights.threshold)

    return found.training == expected.training and list(map(content, found.layers)) == list(
        map(content, expected.layers)
    )


def test_a_file_comes_back(trained: Path, tmp_path: Path) -> None:
    predictors = load_predictors(trained)
    left_out = replace(predictors, layers=(PredictedLayer(None, Measured(0.5, 0.9, 0.8, 1.0)), predictors.layers[1]))
    left_out.save(tmp_path / "copy")
    assert same(load_predictors(tmp_path / "copy"), left_out)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_layer_without_is_exact(model_path: Path, trained: Path, tmp_path: Path) -> None:
    predictors = load_predictors(trained)
    none = PredictedLayer(None, Measured(0.5, 0.9, 0.8, 1.0))
    replace(predictors, layers=(none, none)).save(tmp_path / "none")
    replace(predictors, layers=(none, predictors.layers[1])).save(tmp_path / "one")
    with (
        isotherm.load(model_path, cache_bytes=0) as plain,
        isotherm.load(model_path, cache_bytes=0, predictor=tmp_path / "none") as without,
        isotherm.load(model_path, cache_bytes=0, predictor=tmp_path / "one") as one,
    ):
        assert without.program == plain.program
        assert sum(isinstance(op, ops.PredictedLinear) for op in one.program.ops) == 1
        assert digest_of(without) == digest_of(plain)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 but torn"])
def test_no_file_of_ours(content: bytes, model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "predictor").write_bytes(content)
    with pytest.raises(StatsFileError, match="train-predictor"):
        isotherm.load(model_path, cache_bytes=0, predictor=tmp_path / "predictor")
    with pytest.raises(StatsFileError, match="No such file"):
        isotherm.load(model_path, cache_bytes=0, predictor=tmp_path / "nothing")


def test_damage_anywhere_is_seen(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "predictor"
    sound, whole = trained.read_bytes(), load_predictors(trained)
    for at in range(0, len(sound), max(1, len(sound) // 150)):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 0x55]) + sound[at + 1 :])
        try:
            found = load_predictors(path)
        except StatsFileError:
            continue
        assert same(found, whole)  # bytes that say nothing: dates, padding
    for size in (1, 100, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:size])
        with pytest.raises(StatsFileError):
            load_predictors(path)


def rewritten(source: Path, path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Path:
    """A sound archive whose content was changed: change(meta, arrays)."""
    with np.load(source) as archive:
        meta = json.loads(bytes(archive["meta"]))
        arrays = {name: archive[name] for name in archive.files if name != "meta"}
    kind = (meta.pop("format"), meta.pop("version"))
    change(meta, arrays)
    write_arrays(path, kind, meta, arrays)
    return path


def not_a_number(_: Any, arrays: dict[str, Any]) -> None:
    arrays["0.first"] = arrays["0.first"].copy()
    arrays["0.first"][0, :2] = (0x00, 0x7E)


CHANGES: dict[str, Callable[[Any, Any], object]] = {
    "rank": lambda _, arrays: arrays.update({"0.first": arrays["0.first"][:-1]}),
    "half a block": lambda _, arrays: arrays.update({"0.first": arrays["0.first"][:, :-1].copy()}),
    "another hidden size": lambda _, arrays: arrays.update({"0.first": arrays["0.first"][:, :-34].copy()}),
    "another ffn size": lambda _, arrays: arrays.update({"0.second": arrays["0.second"][:-1]}),
    "no rows": lambda _, arrays: arrays.update({"0.second": arrays["0.second"][:0]}),
    "type": lambda _, arrays: arrays.update({"0.second": arrays["0.second"].astype(np.float32)}),
    "scale": not_a_number,
    "missing": lambda _, arrays: arrays.pop("1.second"),
    "threshold": lambda meta, _: meta["layers"][0].update(threshold=float("nan")),
    "infinite threshold": lambda meta, _: meta["layers"][0].update(threshold=1e300),
    "text": lambda meta, _: meta["layers"][0].update(threshold="high"),
    "share": lambda meta, _: meta["layers"][1].update(recall=2),
    "field": lambda meta, _: meta["layers"][1].update(speed=2),
    "identity": lambda meta, _: meta["training"].update(identity=None),
    "layers": lambda meta, _: meta["training"].update(num_layers=1),
    "more layers": lambda meta, _: meta["training"].update(num_layers=3),
    "no list": lambda meta, _: meta.update(layers=5),
    "another model": lambda meta, _: meta["training"].update(identity="0123"),
    "unfinished": lambda meta, _: meta["layers"].pop(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_hostile_content(name: str, trained: Path, model_path: Path, tmp_path: Path) -> None:
    path = rewritten(trained, tmp_path / "predictor", CHANGES[name])
    with pytest.raises(StatsFileError, match="train-predictor"):
        isotherm.load(model_path, cache_bytes=0, predictor=path)


def test_what_unpacks_to_any_size_is_refused(trained: Path, model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "predictor"
    with zipfile.ZipFile(trained) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    with pytest.raises(StatsFileError, match="compressed"):
        isotherm.load(model_path, cache_bytes=0, predictor=path)


def test_a_predictor_of_a_model_without_zeros(trained: Path, tmp_path: Path) -> None:
    silu = write_tiny(tmp_path / "silu.gguf", "llama", QuantType.Q4_0)
    with open_checkpoint(silu) as checkpoint:
        identity = checkpoint.identity
    path = rewritten(trained, tmp_path / "predictor", lambda meta, _: meta["training"].update(identity=identity))
    with pytest.raises(StatsFileError, match="does not fit"):
        isotherm.load(silu, cache_bytes=0, predictor=path)


# --- the command


def test_the_table(
    model_path: Path, text_path: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is whole is read, and nothing is trained again."""
    out = tmp_path / "whole"
    out.write_bytes(trained.read_bytes())
    assert main(command(model_path, text_path, out, "--json")) == 0
    streams = capsys.readouterr()
    assert "going on after 2 of 2 layers" in streams.err
    assert "rank" not in streams.err
    table = json.loads(streams.out)
    assert (table["recall"], table["max_rank"], len(table["layers"])) == (RECALL, 128, 2)
    predictors = load_predictors(out)
    for row, layer in zip(table["layers"], predictors.layers, strict=True):
        assert layer.weights is not None
        assert row["rank"] == layer.weights.rank
        assert row["predicted"] == layer.measured.predicted
        gate_bytes = 512 * 256 * 18 / 32
        assert row["of_gate"] == pytest.approx(layer.weights.rank * (256 + 512) * 34 / 32 / gate_bytes)
        assert row["of_ffn"] == pytest.approx(row["of_gate"] / 3)
        assert row["gate_read"] == row["of_gate"] + row["rows_read"]
    assert main(command(model_path, text_path, out)) == 0
    assert "predictor of gate" in capsys.readouterr().out


def test_a_training_that_was_cut_short_goes_on(
    model_path: Path, text_path: Path, trained: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "predictor"
    kept, calls = predictor_training.train_layer, []

    def cut_short(*arguments: Any) -> PredictedLayer:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return kept(*arguments)

    monkeypatch.setattr(predictor_training, "train_layer", cut_short)
    assert main(command(model_path, text_path, out)) == 130
    assert len(load_predictors(out).layers) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["predictor"]
    with pytest.raises(StatsFileError, match="1 of 2 layers"):
        isotherm.load(model_path, cache_bytes=0, predictor=out)
    assert main(command(model_path, text_path, out)) == 0
    assert "going on after 1 of 2 layers" in capsys.readouterr().err
    assert len(calls) == 3
    assert same(load_predictors(out), load_predictors(trained))
    monkeypatch.setattr(predictor_training, "train_layer", lambda *_: PredictedLayer(None, Measured(0.5, 0.9, 0.9, 1)))
    assert main(command(model_path, text_path, out, "--max-rank", "64")) == 0
    streams = capsys.readouterr()
    assert "is of another model, text or aim, and is written anew" in streams.err
    assert "left out" in streams.out
    out.write_bytes(b"torn")
    assert main(command(model_path, text_path, out)) == 0
    assert "starting anew" in capsys.readouterr().err


REFUSALS = {
    ("--recall", "0"): "must lie above 0",
    ("--recall", "nan"): "must lie above 0",
    ("--max-rank", "63"): "must be from 64",
    ("--chunks", "1"): "it takes two",
}


@pytest.mark.parametrize("flags", REFUSALS)
def test_what_is_refused(
    flags: tuple[str, str], model_path: Path, text_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model_path, text_path, tmp_path / "predictor", *flags)) == 2
    assert REFUSALS[flags] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written(
    model_path: Path, text_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told before anything is trained."""
    assert main(command(model_path, text_path, tmp_path / "nowhere" / "predictor")) == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error
    assert "rank" not in error


@pytest.mark.parametrize(
    ("quant_type", "metadata", "error", "message"),
    [
        (QuantType.Q4_0, {}, OptionError, "is ever exactly 0"),
        (QuantType.F16, {"isotherm.activation": "relu"}, UnsupportedModel, "spares nothing"),
    ],
)
def test_models_that_have_nothing_to_predict(
    quant_type: QuantType, metadata: dict[str, str], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "llama", quant_type, metadata=metadata)
    model, checkpoint = isotherm.load(path, cache_bytes=0), open_checkpoint(path)
    with model, checkpoint, pytest.raises(error, match=message):
        PredictorTrainer(model, checkpoint.tensors, checkpoint.identity, [[1, 2]] * 5)


@pytest.mark.parametrize("words", [("run", "--raw", "-n", "4"), ("perplexity", "--ctx", "64", "--chunks", "1")])
def test_commands_take_it(
    words: tuple[str, ...],
    model_path: Path,
    text_path: Path,
    trained: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    name, *flags = words
    what = ["the rain in spain"] if name == "run" else ["--file", str(text_path)]
    assert main([name, str(model_path), *what, *flags, "--cache-gib", "0", "--predictor", str(trained)]) == 0
    with_it = capsys.readouterr().out
    assert main([name, str(model_path), *what, *flags, "--cache-gib", "0"]) == 0
    assert with_it != capsys.readouterr().out or name == "run"
    assert main([name, str(model_path), *what, *flags, "--predictor", str(text_path)]) == 1
    assert "holds no predictors" in capsys.readouterr().err


def test_the_benchmark_tells_of_it(
    model_path: Path, text_path: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        sparse = benchmark("sparse")
    finally:
        del sys.path[0]
    flags = ["-r", "1", "-n", "4", "-t", "1", "--results", str(tmp_path)]
    sparse.main([str(model_path), *flags, "--predictor", str(trained), "--text", str(text_path)])
    (file,) = tmp_path.iterdir()
    record = json.loads(file.read_text())
    assert set(record["medians"]) == {"sparse", "dense", "predicted"}
    found = record["predictor"]
    assert len(found["layers"]) == len(found["ranks"]) == 2
    assert found["recall"] > 0.85
    assert found["predicted"] < 0.3
    assert f"{found['recall']:.1%} of firings" in capsys.readouterr().out


def test_a_trained_opt(shared_dir: Path, tmp_path: Path) -> None:
    """One layer of it, which has no gate: up is what a predictor spares."""
    folder, text = shared_dir / "models" / "tiny-opt", shared_dir / "data" / "wiki.calib.txt"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    path = tmp_path / "tiny-opt.gguf"
    benchmark("convert_opt").convert(folder, path, "Q8_0")
    with isotherm.load(path, cache_bytes=0, context_tokens=256) as model, open_checkpoint(path) as checkpoint:
        ids = model.tokenize(text.read_text()[:40000])
        windows = [ids[start : start + 256] for start in range(0, 20 * 256, 256)]
        trainer = PredictorTrainer(model, checkpoint.tensors, checkpoint.identity, windows)
        layer = trainer.layers[3]
        assert trainer.gate_bytes(layer) == 1024 * 256 * 34 / 32
        (samples,) = collect(model, checkpoint.tensors, [layer], windows)
    trained, _ = attempts_of(samples, Wanted(0.9, 64), trainer.gate_bytes(layer))
    assert trained.weights is not None
    assert trained.measured.recall >= 0.9
    assert trained.measured.predicted < 2 * trained.measured.active < 0.3
