"""Tokenizers over small vocabularies, against slow twins; detokenizing; files that lie."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_specs import spec_of

from isotherm.errors import ModelFileError, OptionError, UnsupportedModel
from isotherm.tokenization.tokenizer import Detokenizer, Tokenizer, build_tokenizer
from isotherm.types import TokenizerSpec

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BYTE_CHARS = [chr(b) for b in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]]
BYTE_CHARS += [chr(0x100 + i) for i in range(256 - len(BYTE_CHARS))]


def bpe_spec(merges: Sequence[str] = (), special: dict[str, int] | None = None, **fields: object) -> TokenizerSpec:
    tokens = dict.fromkeys([*BYTE_CHARS, *(merge.replace(" ", "") for merge in merges)], NORMAL) | (special or {})
    return spec_of("gpt2", tokens, merges=tuple(merges), **fields)


def spm_spec(pieces: dict[str, float], special: dict[str, int] | None = None, **fields: object) -> TokenizerSpec:
    tokens = {"<unk>": UNKNOWN} | {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    tokens |= dict.fromkeys(pieces, NORMAL) | (special or {})
    scores = tuple(pieces.get(token, 0.0) for token in tokens)
    return spec_of("llama", tokens, scores=scores, unknown_id=0, **fields)


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special=False, parse_special=False)


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    return [tokenizer.spec.tokens[token] for token in ids]


# -- SentencePiece by score --------------------------------------------------------------------------------------------


def merge_slowly(pieces: dict[str, float], text: str) -> list[str]:
    """Looks at every pair of neighbours again for every merge."""
    symbols = list(text)
    while True:
        known = [(-pieces[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in pieces]
        if not known:
            return symbols
        _, place = min(known)
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.text("ab▁", min_size=1, max_size=4), st.integers(-3, 3).map(float), max_size=25),
    st.text("ab ", max_size=30),
)
def test_scored_merges_are_those_of_the_slow_twin(pieces: dict[str, float], text: str) -> None:
    # also where pieces hold a ▁ inside, so that text may not be cut before every space
    tokenizer = build_tokenizer(spm_spec(pieces))
    expected: list[str] = []
    for symbol in merge_slowly(pieces, text.replace(" ", "▁")):
        expected += [symbol] if symbol in pieces else [f"<0x{byte:02X}>" for byte in symbol.encode()]
    assert pieces_of(tokenizer, plain(tokenizer, text)) == expected
    if "▁" in pieces:  # else a space is the three bytes of ▁
        assert tokenizer.decode(plain(tokenizer, text)) == text


def test_the_leftmost_of_equal_scores_merges_first() -> None:
    tokenizer = build_tokenizer(spm_spec({"a": 0, "aa": -1}))
    assert pieces_of(tokenizer, plain(tokenizer, "aaa")) == ["aa", "a"]


def test_space_prefix_at_the_start_and_after_special_tokens() -> None:
    pieces = {"▁": -1.0, "▁a": 0.0, "a": -2.0}
    tokenizer = build_tokenizer(spm_spec(pieces, {"<s>": CONTROL, "<x>": USER_DEFINED}, add_space_prefix=True))
    ids = tokenizer.encode("a<x>a a<s>a", add_special=False, parse_special=True)
    assert pieces_of(tokenizer, ids) == ["▁a", "<x>", "▁a", "▁a", "<s>", "▁a"]
    assert tokenizer.decode(ids) == "a<x>a aa"
    assert tokenizer.decode(ids, show_special=True) == "a<x>a a<s>a"
    assert tokenizer.decode(ids, continues=True) == " a<x>a aa"


@given(st.text(max_size=40))
def test_any_text_comes_back_from_scored_merges(text: str) -> None:
    # documented: U+2581 is a space, a lone surrogate U+FFFD
    expected = text.replace("▁", " ").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    for prefix in (False, True):
        tokenizer = build_tokenizer(spm_spec({"▁t": 0.0, "▁": 0.0}, add_space_prefix=prefix))
        assert tokenizer.decode(plain(tokenizer, text)) == expected


def test_a_long_word_takes_less_than_quadratic_time() -> None:
    tokenizer = build_tokenizer(spm_spec({"a" * n: float(n) for n in range(1, 9)}))
    assert len(plain(tokenizer, "a" * 100_000)) == 12_500


# -- byte-level BPE ----------------------------------------------------------------------------------------------------


def rank_slowly(merges: Sequence[str], word: str) -> list[str]:
    ranks = {tuple(merge.split(" ")): rank for rank, merge in reversed(list(enumerate(merges)))}
    symbols = list(word)
    while True:
        known = [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]
        if not known:
            return symbols
        _, place = min(known)
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]


letters = st.text("abc", min_size=1, max_size=2)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(letters, letters), max_size=12), st.text("abc", min_size=1, max_size=20))
def test_ranked_merges_are_those_of_the_slow_twin(pairs: list[tuple[str, str]], word: str) -> None:
    merges = [f"{left} {right}" for left, right in pairs]
    parts = dict.fromkeys((part for pair in pairs for part in pair), NORMAL)
    tokenizer = build_tokenizer(bpe_spec(merges, {part: NORMAL for part in parts if len(part) > 1}))
    assert pieces_of(tokenizer, plain(tokenizer, word)) == rank_slowly(merges, word)


@given(st.text(max_size=40))
def test_any_text_comes_back_from_bytes(text: str) -> None:
    tokenizer = build_tokenizer(bpe_spec(["t h", "Ġ th", "Ã ©"]))
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(plain(tokenizer, text)) == expected


def test_a_byte_without_a_token_still_separates() -> None:
    spec = bpe_spec(["! !"])
    tokens = tuple(token for token in spec.tokens if token != "Ą")  # byte 0x04
    tokenizer = build_tokenizer(replace(spec, tokens=tokens, token_types=(NORMAL,) * len(tokens)))
    assert pieces_of(tokenizer, plain(tokenizer, "!!\x04!\x04!")) == ["!!", "!", "!"]


def test_ignore_merges_takes_whole_words() -> None:
    spec = bpe_spec(["a b"], {"abc": NORMAL})
    assert pieces_of(build_tokenizer(spec), plain(build_tokenizer(spec), "abc")) == ["ab", "c"]
    whole = build_tokenizer(replace(spec, pre="llama-bpe"))
    assert pieces_of(whole, plain(whole, "abc")) == ["abc"]


def test_a_run_that_would_break_the_pattern_engine_is_refused() -> None:
    tokenizer = build_tokenizer(bpe_spec(["Ġ Ġ"]))
    with pytest.raises(OptionError, match="without a break"):
        plain(tokenizer, "x" + " " * 2_000_001)


# -- special tokens ----------------------------------------------------------------------------------------------------


def split_slowly(specials: Sequence[str], text: str) -> list[str]:
    """One special token after the other, the longest first, each from the left."""
    parts = [(text, False)]
    for special in sorted(specials, key=lambda s: -len(s.encode())):
        found = []
        for part, is_special in parts:
            while not is_special and special in part:
                before, _, part = part.partition(special)
                found += [(before, False), (special, True)]
            found.append((part, is_special))
        parts = found
    return [part for part, is_special in parts for part in ([part] if is_special else list(part))]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab<", min_size=2, max_size=5), max_size=6, unique=True), st.text("ab<", max_size=30))
def test_special_tokens_are_found_as_the_slow_twin_finds_them(specials: list[str], text: str) -> None:
    specials = sorted(specials, key=lambda s: -len(s))
    tokenizer = build_tokenizer(bpe_spec(special=dict.fromkeys(specials, USER_DEFINED)))
    assert pieces_of(tokenizer, plain(tokenizer, text)) == split_slowly(specials, text)


def test_control_tokens_only_where_they_are_parsed() -> None:
    special = {"<|im_start|>": CONTROL, "<tool>": USER_DEFINED, "</s>": NORMAL, "<unk>": UNKNOWN}
    tokenizer = build_tokenizer(bpe_spec(special=special))
    text = "".join(special)
    assert pieces_of(tokenizer, tokenizer.encode(text, add_special=False, parse_special=True)) == list(special)
    literal = pieces_of(tokenizer, plain(tokenizer, text))
    assert literal == [*"<|im_start|>", "<tool>", *"</s><unk>"]


def test_bos_and_eos_are_added_where_asked() -> None:
    special = {"<s>": CONTROL, "<e>": CONTROL}
    base = bpe_spec(special=special, bos_id=256, eos_id=257)
    for add_bos in (False, True):
        for add_eos in (False, True):
            tokenizer = build_tokenizer(replace(base, add_bos=add_bos, add_eos=add_eos))
            expected = ["<s>"] * add_bos + ["a"] + ["<e>"] * add_eos
            assert pieces_of(tokenizer, tokenizer.encode("a", add_special=True, parse_special=False)) == expected
            assert pieces_of(tokenizer, plain(tokenizer, "a")) == ["a"]


def test_end_ids() -> None:
    special = {
        "<|im_end|>": CONTROL,
        "<|endoftext|>": NORMAL,
        "</s>": USER_DEFINED,
        "<|fim_pad|>": CONTROL,
        "<x>": CONTROL,
    }
    tokenizer = build_tokenizer(bpe_spec(special=special, eos_id=65))
    assert set(pieces_of(tokenizer, sorted(tokenizer.end_ids))) == {"<|im_end|>", "<|endoftext|>", "<|fim_pad|>", "b"}
    closing = build_tokenizer(bpe_spec(special={"</s>": CONTROL}))
    assert pieces_of(closing, sorted(closing.end_ids)) == ["</s>"]


def test_in_the_harmony_format_an_end_of_message_ends_no_answer() -> None:
    special = dict.fromkeys(("<|end|>", "<|return|>", "<|call|>", "<|channel|>"), CONTROL)
    tokenizer = build_tokenizer(bpe_spec(special=special))
    assert set(pieces_of(tokenizer, sorted(tokenizer.end_ids))) == {"<|return|>", "<|call|>"}
    assert tokenizer.decode(plain(tokenizer, "<|channel|>a<|end|>")) == "<|channel|>a<|end|>"


# -- detokenizing ------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.lists(st.integers(0, 257), max_size=30))
def test_pieces_join_to_the_text_of_all_bytes(ids: list[int]) -> None:
    tokenizer = build_tokenizer(bpe_spec(special={"<c>": CONTROL, "<é>": USER_DEFINED}))
    detokenizer = Detokenizer(tokenizer)
    pieces = [*map(detokenizer.push, ids), detokenizer.finish()]
    expected = b"".join(tokenizer.token_bytes(token) for token in ids if token != 256)
    assert "".join(pieces) == expected.decode(errors="replace") == tokenizer.decode(ids)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10))
def test_no_half_character_is_ever_shown(text: str) -> None:
    tokenizer = build_tokenizer(bpe_spec())
    detokenizer = Detokenizer(tokenizer)
    shown = ""
    for token in plain(tokenizer, text):
        shown += detokenizer.push(token)
        assert text.startswith(shown)
    assert shown == text
    assert detokenizer.finish() == ""


def test_an_unfinished_character_becomes_one_replacement() -> None:
    detokenizer = Detokenizer(build_tokenizer(bpe_spec()))
    ids = [BYTE_CHARS.index(char) for char in ("ð", "Ł", "ĺ")]  # three of the four bytes of an emoji
    assert "".join(map(detokenizer.push, ids)) == ""
    assert detokenizer.finish() == "\ufffd"


def test_unused_tokens_and_strange_byte_tokens_do_not_break() -> None:
    tokenizer = build_tokenizer(spm_spec({}, {"<pad7>": UNUSED, "<0xZZ>": BYTE}))
    ids = [tokenizer.spec.tokens.index("<pad7>"), tokenizer.spec.tokens.index("<0xZZ>"), 1 + 0x41]
    assert tokenizer.decode(ids) == "<0xZZ>A"


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    tokenizer = build_tokenizer(bpe_spec())
    for token in (-1, 256):
        with pytest.raises(OptionError, match="256"):
            tokenizer.token_bytes(token)


# -- files that lie ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"model": "bert"}, UnsupportedModel, "gpt2, llama"),
        ({"pre": "martian"}, UnsupportedModel, "qwen2"),
        ({"tokens": ()}, ModelFileError, "empty"),
        ({"token_types": (1,)}, ModelFileError, "token types"),
        ({"token_types": (256,) * 256}, ModelFileError, "token type"),
        ({"scores": (1.0,)}, ModelFileError, "scores"),
        ({"scores": (float("nan"),) * 256}, ModelFileError, "not a number"),
        ({"tokens": ("a",) * 256}, ModelFileError, "twice"),
        ({"tokens": ("\ud800", *BYTE_CHARS[1:])}, ModelFileError, "UTF-8"),
        ({"bos_id": 256}, ModelFileError, "bos id is 256"),
        ({"eot_id": -1}, ModelFileError, "eot id is -1"),
        ({"add_bos": True}, ModelFileError, "bos token"),
        ({"add_eos": True}, ModelFileError, "eos token"),
        ({"merges": ("ab",)}, ModelFileError, "not a pair"),
        ({"merges": ("a b",)}, ModelFileError, "do not fit"),
    ],
)
def test_what_is_wrong_is_said(fields: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        build_tokenizer(replace(bpe_spec(), **fields))  # type: ignore[arg-type]


def test_scored_merges_need_a_token_for_each_byte() -> None:
    with pytest.raises(ModelFileError, match="byte 0x00"):
        build_tokenizer(spec_of("llama", {"a": NORMAL}))


def test_empty_tokens_match_nothing() -> None:
    tokenizer = build_tokenizer(bpe_spec(special={"": USER_DEFINED}))
    assert pieces_of(tokenizer, plain(tokenizer, "ab")) == ["a", "b"]
    assert tokenizer.token_bytes(256) == b""


def test_importing_is_cheap() -> None:
    script = (
        "import sys, isotherm.tokenization as t; print(sorted({'jinja2', 'tokenizers', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
