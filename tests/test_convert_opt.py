"""A really trained OPT as GGUF: its tokens, its answers and its zeros are those that `transformers` found."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_module import benchmark

import isotherm
from isotherm.program.ops import SparseDown

convert = benchmark("convert_opt").convert


@pytest.fixture(scope="module")
def folder(shared_dir: Path) -> Path:
    found = shared_dir / "models" / "tiny-opt"
    if not found.is_dir():
        pytest.skip(f"no {found}")
    return found


@pytest.fixture(scope="module")
def golden(shared_dir: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((shared_dir / "golden" / "tiny-opt.json").read_text())
    return read


@pytest.fixture(scope="module")
def path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("opt") / "tiny-opt.gguf"
    convert(folder, made, "F16")
    return made


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_greedy_answers(path: Path, golden: dict[str, Any], backend: str) -> None:
    with isotherm.load(path, backend=backend, cache_bytes=0) as model:
        for row in golden["rows"]:
            assert model.tokenize(row["prompt"]) == row["prompt_ids"]
            expected = row["continuation_ids"]
            answer = model.generate(row["prompt"], raw=True, max_tokens=len(expected))
            assert list(answer.token_ids) == expected


def test_neurons_that_fire_alone_give_the_bits_of_all(
    folder: Path, golden: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2000 tokens, of which 44 to 92 % of the neurons of a layer are zero."""
    monkeypatch.setattr("isotherm.backends.cpu.break_even._break_even", lambda *_: 1.0)  # whatever is faster here
    path = tmp_path / "tiny-opt.gguf"
    convert(folder, path, "Q8_0")
    with isotherm.load(path, cache_bytes=0) as sparse, isotherm.load(path, cache_bytes=0, sparse=False) as dense:
        assert any(isinstance(op, SparseDown) for op in sparse.program.ops)
        for row in golden["rows"]:
            answers = [model.generate(row["prompt"], raw=True, max_tokens=400) for model in (sparse, dense)]
            assert len(answers[0].tokens) == 400
            assert answers[0].tokens == answers[1].tokens  # log-probabilities too
