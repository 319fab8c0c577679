"""A really trained OPT as GGUF: its tokens, its answers and its zeros are those that `transformers` found."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_module import benchmark

import isotherm

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
