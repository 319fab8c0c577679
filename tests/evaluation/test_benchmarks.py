"""The scripts in benchmarks/: what they write opens everywhere, and peers that are not here are named."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

import isotherm
from isotherm.formats.checkpoint import open_checkpoint
from isotherm.program import ops

ROOT = Path(__file__).parents[2]
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


def run_script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{Path(isotherm.__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def write_synthetic(path: Path, type_name: str, shape: str = "tiny") -> Path:
    run = run_script("synthetic.py", path, "--shape", shape, "--type", type_name)
    assert run.returncode == 0, run.stderr
    return path


@pytest.mark.parametrize(
    ("shape", "type_name"), [*(("tiny", type_name) for type_name in TYPES), ("falcon-tiny", "Q4_0")]
)
def test_a_synthetic_model_has_sane_weights_and_opens(tmp_path: Path, shape: str, type_name: str) -> None:
    path = write_synthetic(tmp_path / "synthetic.gguf", type_name, shape)
    for tensor in gguf.GGUFReader(path).tensors:  # as the gguf package reads and decodes it
        if len(tensor.shape) == 1:
            assert (tensor.data == (0 if tensor.name.endswith("bias") else 1)).all()
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        deviation = 1 / math.sqrt(values.shape[1])
        assert 0.7 * deviation < values.std() < 1.2 * deviation, tensor.name
        assert abs(values.mean()) < 0.15 * deviation, tensor.name
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.quantization.startswith(type_name)
        assert checkpoint.config.vocab_size == 512
        assert checkpoint.config.family == ("falcon" if shape.startswith("falcon") else "llama")


@pytest.mark.parametrize("shape", ["tiny-mixtral", "tiny-qwen3moe"])
def test_synthetic_experts_are_all_used(tmp_path: Path, shape: str) -> None:
    path = write_synthetic(tmp_path / "synthetic.gguf", "Q4_K", shape)
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) > 1:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert 0.7 < values.std() * math.sqrt(values.shape[-1]) < 1.2, tensor.name
    with isotherm.load(path, threads=1, cache_bytes=0) as model:
        experts = model.facts.config.experts
        assert experts is not None
        assert experts.num_used < experts.num_experts
        routes = [op.out for op in model.program.ops if isinstance(op, ops.Route)]
        chosen: list[int] = []
        model.observe(list(range(200)), set(routes), lambda _, rows: chosen.extend(rows[:, : experts.num_used].flat))
        assert set(chosen) == set(range(experts.num_experts))


@pytest.mark.parametrize(
    ("shape", "activation"), [("tiny", "relu"), ("tiny", "drelu"), ("tiny-mixtral", "relu"), ("opt-tiny", "relu")]
)
@pytest.mark.parametrize("active", [0.05, 0.3])
def test_as_many_neurons_fire_as_were_planted(tmp_path: Path, shape: str, activation: str, active: float) -> None:
    path = tmp_path / "planted.gguf"
    run = run_script("synthetic.py", path, "--shape", shape, "--activation", activation, "--active", str(active))
    assert run.returncode == 0, run.stderr
    with isotherm.load(path, threads=1, cache_bytes=0, sparse=True) as model:
        downs = {op.x for op in model.program.ops if isinstance(op, ops.SparseDown | ops.ExpertDown)}
        shares: list[float] = []
        model.observe(list(range(300)), downs, lambda _, rows: shares.append(float(np.mean(rows != 0))))
        assert model.generate("a b c", raw=True, max_tokens=8).token_ids
    both = 2 if activation == "drelu" else 1  # of the gates that fire, as many of up do not
    assert active / both / 1.6 < np.mean(shares) < active / both * 1.6


def test_a_synthetic_model_runs_and_takes_any_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path))
    path = write_synthetic(tmp_path / "synthetic.gguf", "Q4_0")
    text = "any text, bytes too: \x00 🙂 日本"
    with isotherm.load(path, threads=1) as model:
        ids = model.tokenize(text)
        assert model.detokenize(ids) == text
        assert np.isfinite(model.logits(ids)).all()


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    first, second = (write_synthetic(tmp_path / name, "Q4_K") for name in ("a.gguf", "b.gguf"))
    assert first.read_bytes() == second.read_bytes()


def test_what_cannot_be_planted_is_refused(tmp_path: Path) -> None:
    run = run_script("synthetic.py", tmp_path / "x.gguf", "--shape", "falcon-tiny", "--activation", "relu")
    assert run.returncode == 2
    assert "--activation is for shapes of llamas" in run.stderr


def test_an_impossible_shape_is_refused(tmp_path: Path) -> None:
    run = run_script("synthetic.py", tmp_path / "x.gguf", "--shape", "tiny", "--type", "Q2_K")
    assert run.returncode == 2


def test_peers_that_are_not_here_are_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path))
    path = write_synthetic(tmp_path / "synthetic.gguf", "Q4_0")
    empty = tmp_path / "empty-python"  # an interpreter that sees no packages
    empty.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    empty.chmod(0o755)
    sizes = ("-p", "16", "-n", "4", "-r", "2", "-t", "1", "-d", "8")
    run = run_script(
        "peers.py", path, *sizes, "--llama-python", empty, "--openvino-python", empty, "--results", tmp_path / "results"
    )
    assert run.returncode == 0, run.stderr
    assert "left out: llama.cpp: not installed" in run.stdout
    assert "left out: openvino: not installed" in run.stdout
    (file,) = (tmp_path / "results").iterdir()
    assert file.name.endswith("-peers-synthetic.jsonl")
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(record["engine"], record["test"]) for record in records] == [
        ("isotherm", "pp16"),
        ("isotherm", "tg4 @ d8"),
    ]
    for record in records:
        assert len(record["samples"]) == 2
        assert record["tokens_per_second"] == pytest.approx(sum(record["samples"]) / 2)
        assert len(record["read_bytes_per_s"]) == len(record["int8_ops_per_s"]) == 3  # also at the warm-up
        assert set(record["left_out"]) == {"llama.cpp", "openvino"}
        assert record["machine"]["cpu_name"]
        assert record["commit"]
        assert str(Path.home()) not in json.dumps(record)


def test_every_weight_type_is_measured(tmp_path: Path) -> None:
    types = ("Q4_0", "IQ4_XS", "MXFP4", "NVFP4", "Q2_K", "IQ1_M", "F16")
    sizes = ("--megabytes", "1", "--rows", "7", "--matrix-rows", "40", "--columns", "256", "-r", "2", "-t", "1")
    run = run_script("weight_types.py", "--types", ",".join(types), *sizes, "--results", tmp_path)
    assert run.returncode == 0, run.stderr
    assert [line.split()[0] for line in run.stdout.splitlines()] == ["type", *types]
    (file,) = tmp_path.iterdir()
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [record["type"] for record in records] == list(types)
    for record in records:
        assert len(record["read_bytes_per_s"]) == len(record["ops_per_s"]) == 2
        assert min(record["read_bytes_per_s"] + record["ops_per_s"]) > 0
    assert [record["bits_per_weight"] for record in records] == [4.5, 4.375, 4.25, 4.5, 2.625, 4.625, 16]
