"""Masks of every kind of grammar against brute force: a token may come if some word goes on so."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_models import write_tiny

from isotherm.errors import GrammarError
from isotherm.formats.checkpoint import open_checkpoint
from isotherm.grammar.compiler import GrammarCompiler, GrammarConstraint
from isotherm.tokenization.tokenizer import Tokenizer, build_tokenizer
from isotherm.types import Grammar, QuantType


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", request.param, QuantType.Q8_0)
    return build_tokenizer(open_checkpoint(path).tokenizer)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.num_tokens + 100)  # rows of logits may be longer than the list


def bits(mask: NDArray[np.uint32]) -> set[int]:
    return {token for token in range(32 * len(mask)) if int(mask[token // 32]) >> token % 32 & 1}


def after(constraint: GrammarConstraint, answer: list[int]) -> set[int] | None:
    constraint.prepare(np.array(answer, np.int32))
    mask = constraint.allowed()
    return None if mask is None else bits(mask)


def brute_force(tokenizer: Tokenizer, words: set[bytes], text: bytes) -> set[int] | None:
    plain = [t for t in range(tokenizer.num_tokens) if not tokenizer.is_special(t) and tokenizer.token_bytes(t)]
    ways = {t for t in plain if any(word.startswith(text + tokenizer.token_bytes(t)) for word in words)}
    if text in words:
        return ways | tokenizer.end_ids if ways else None
    return ways


def literal(word: str) -> str:
    return json.dumps(word, ensure_ascii=False)


def gbnf(words: list[str]) -> str:
    return "root ::= " + " | ".join(" ".join(rf"[\u{ord(char):04x}]" for char in word) for word in words)


@settings(max_examples=40, deadline=None)
@given(
    words=st.lists(st.text('then ain"{é\\]-^/☃', min_size=1, max_size=6), min_size=1, max_size=5, unique=True),
    data=st.data(),
)
@pytest.mark.parametrize("kind", ["regex", "lark", "gbnf", "gbnf literals", "json_schema"])
def test_masks_are_those_of_brute_force(
    tokenizer: Tokenizer, compiler: GrammarCompiler, kind: str, words: list[str], data: st.DataObject
) -> None:
    sources = {
        "regex": "|".join(map(re.escape, words)),
        "lark": "start: " + " | ".join(map(literal, words)),
        "gbnf": gbnf(words),
        "gbnf literals": "root ::= " + " | ".join(map(literal, words)),
        "json_schema": json.dumps({"enum": words}),
    }
    constraint = compiler.compile(Grammar(kind.removesuffix(" literals"), sources[kind]))
    spelled = {literal(word) if kind == "json_schema" else word for word in words}
    expected = {word.encode() for word in spelled}
    answer, text = list[int](), b""
    while (ways := brute_force(tokenizer, expected, text)) is not None:
        allowed = after(constraint, answer)
        next_bytes = {word[len(text) : len(text) + 1] for word in expected if word.startswith(text)}
        if len(next_bytes) == 1:  # what is certain comes in the tokens that the tokenizer gives for it
            assert allowed
            assert allowed <= ways
            ways = allowed
        else:
            assert allowed == ways
        token = data.draw(st.sampled_from(sorted(ways)))
        if token in tokenizer.end_ids:
            return
        answer.append(token)
        text += tokenizer.token_bytes(token)
    assert after(constraint, answer) is None


def test_a_step_that_is_computed_anew_changes_nothing(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    constraint = compiler.compile(Grammar("regex", "the rain|then"))
    answer = tokenizer.encode_continuation("the")
    first = after(constraint, answer)
    assert first == after(constraint, answer) == bits(constraint.compute(np.array(answer, np.int32)))  # type: ignore[arg-type]
    assert first != after(constraint, [*answer, next(iter(first or ()))])


def test_a_model_without_end_tokens_ends_with_the_grammar(tokenizer: Tokenizer) -> None:
    endless = Tokenizer(tokenizer.spec, tokenizer._vocabulary, tokenizer._model)
    endless.end_ids = frozenset()
    constraint = GrammarCompiler(endless, tokenizer.num_tokens).compile(Grammar("regex", "a+b"))
    answer = [token for token in range(tokenizer.num_tokens) if tokenizer.token_bytes(token) in (b"a", b"b")][:2]
    assert after(constraint, answer[:1])
    assert after(constraint, answer) is None


def test_a_grammar_that_names_an_end_token_may_not_end_there(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    end = min(tokenizer.end_ids)
    constraint = compiler.compile(Grammar("lark", f'start: "a" (<[{end}]> | "b") "c"'))
    allowed = after(constraint, tokenizer.encode_continuation("a"))
    assert allowed is not None
    assert not allowed & tokenizer.end_ids


def test_a_token_that_was_not_allowed_is_an_error(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    constraint = compiler.compile(Grammar("regex", "abc"))
    with pytest.raises(GrammarError, match="doesn't satisfy"):
        after(constraint, [next(t for t in range(tokenizer.num_tokens) if tokenizer.token_bytes(t) == b"x")])
