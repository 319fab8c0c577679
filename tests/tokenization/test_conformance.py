"""Token ids against llama.cpp's own vectors, and against the golden answers on real models."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from isotherm.formats.checkpoint import open_checkpoint
from isotherm.formats.gguf import open_gguf
from isotherm.formats.tokenizer_spec import read_tokenizer
from isotherm.tokenization.tokenizer import Tokenizer, build_tokenizer

_SEPARATOR = "\n__ggml_vocab_test__\n"

VOCABULARIES = (
    *("command-r", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "llama-spm", "mpt", "phi-3"),
    *("qwen2", "qwen35", "refact", "starcoder"),
)
OTHER_KINDS = ("bert-bge", "gemma-4")  # WordPiece, and a kind of its own: no model that runs here has them


def tokenizer_of(path: Path) -> Tokenizer:
    file = open_gguf(path)
    try:
        return build_tokenizer(read_tokenizer(file.metadata))
    finally:
        file.close()


def test_every_vector_file_is_covered_or_named(llama_models: Path) -> None:
    found = {path.name.removeprefix("ggml-vocab-").partition(".")[0] for path in llama_models.glob("*.inp")}
    assert found == {*VOCABULARIES, *OTHER_KINDS}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_are_those_of_llama_cpp(llama_models: Path, name: str) -> None:
    path = llama_models / f"ggml-vocab-{name}.gguf"
    tokenizer = tokenizer_of(path)
    texts = _texts(path)
    expected = [[int(number) for number in line.split()] for line in Path(f"{path}.out").read_text().splitlines()]
    assert len(texts) == len(expected) > 40
    got = [tokenizer.encode(text, add_special=False, parse_special=False) for text in texts]
    assert got == expected


@pytest.mark.parametrize("name", VOCABULARIES)
def test_text_comes_back(llama_models: Path, name: str) -> None:
    path = llama_models / f"ggml-vocab-{name}.gguf"
    tokenizer = tokenizer_of(path)
    for text in _texts(path):
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert tokenizer.decode(ids) == text


def _texts(path: Path) -> list[str]:
    with Path(f"{path}.inp").open(encoding="utf-8", newline="") as file:
        return file.read().removesuffix(_SEPARATOR).split(_SEPARATOR)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("smollm2-135m", "smollm2-135m-instruct.Q4_1"),
        ("gemma3-270m", "gemma3-270m.Q4_K_M"),
        ("qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b-instruct.Q4_K_M"),
    ],
)
def test_prompt_ids_of_real_models_are_golden(
    shared_dir: Path, real_model: Callable[[str], Path], name: str, file: str
) -> None:
    rows = json.loads((shared_dir / "golden" / f"{file}.json").read_text())["rows"]
    with open_checkpoint(real_model(name)) as checkpoint:
        tokenizer = build_tokenizer(checkpoint.tokenizer)
    assert len(rows) == 8
    for row in rows:
        assert tokenizer.encode(row["prompt"], add_special=True, parse_special=True) == row["prompt_ids"]
        assert tokenizer.decode(row["continuation_ids"], continues=True) == row["continuation"]
