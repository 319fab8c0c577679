"""Ids that llama.cpp gave once (llama_cpp_ids.json) for what its own vectors leave out.

Every rule that cuts words, special tokens parsed and not, texts that tokenizers get wrong.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isotherm.formats.checkpoint import open_checkpoint
from isotherm.formats.gguf import open_gguf
from isotherm.formats.tokenizer_spec import read_tokenizer
from isotherm.tokenization.pretokenizers import WORD_RULES
from isotherm.tokenization.tokenizer import build_tokenizer
from isotherm.types import TokenizerSpec

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "llama_cpp_ids.json").read_text(encoding="utf-8"))
MODELS = {
    "smollm2-135m": "smollm2-135m-instruct.Q4_1.gguf",
    "gemma3-270m": "gemma3-270m.Q4_K_M.gguf",
    "qwen2.5-coder-0.5b": "qwen2.5-coder-0.5b-instruct.Q4_K_M.gguf",
}


@pytest.fixture(scope="module")
def gpt2_spec(llama_models: Path) -> TokenizerSpec:
    file = open_gguf(llama_models / "ggml-vocab-gpt-2.gguf")
    try:
        return read_tokenizer(file.metadata)
    finally:
        file.close()


def test_every_rule_is_recorded() -> None:
    assert {WORD_RULES[name] for name in RECORDED["rules"]} == set(WORD_RULES.values())


@pytest.mark.parametrize("name", RECORDED["rules"])
def test_words_are_cut_as_llama_cpp_cuts_them(gpt2_spec: TokenizerSpec, name: str) -> None:
    tokenizer = build_tokenizer(replace(gpt2_spec, pre=name))
    for text, expected in zip(RECORDED["texts"], RECORDED["rules"][name], strict=True):
        assert tokenizer.encode(text, add_special=False, parse_special=False) == expected, text


@pytest.mark.parametrize("name", MODELS)
def test_real_models(real_model: Callable[[str], Path], name: str) -> None:
    with open_checkpoint(real_model(name)) as checkpoint:
        tokenizer = build_tokenizer(checkpoint.tokenizer)
    for text, add_special, parse_special, expected in RECORDED["models"][MODELS[name]]:
        assert tokenizer.encode(text, add_special=add_special, parse_special=parse_special) == expected, text
    # </s> ends an answer in llama.cpp even where it is a tag of HTML
    expected_ends = {token for token in RECORDED["end_ids"][MODELS[name]] if tokenizer.token_bytes(token) != b"</s>"}
    assert tokenizer.end_ids == expected_ends
