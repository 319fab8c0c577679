"""The native merges and token index against slow twins in Python and the BPE of the `tokenizers` library."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.models import BPE

from isotherm._native import MergeTable, TokenIndex

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_CHARS = [chr(byte) if byte in PRINTABLE else chr(0x100 + OTHERS.index(byte)) for byte in range(256)]
LETTERS = "ab é"  # of one byte, of one that is spelled otherwise, of two
LONG_BYTES = 32  # words up to here are merged in another way than longer ones


@dataclass(frozen=True)
class Rules:
    tokens: tuple[str, ...]
    merges: tuple[str, ...]
    takes_words: bool

    def table(self) -> MergeTable:
        return MergeTable(TokenIndex(self.tokens), self.merges, BYTE_CHARS, self.takes_words)


def spelled(word: str) -> str:
    return "".join(BYTE_CHARS[byte] for byte in word.encode())


def merge_slowly(rules: Rules, word: str) -> list[int]:
    """Looks at every pair of neighbours again for every merge."""
    if rules.takes_words and spelled(word) in rules.tokens:
        return [rules.tokens.index(spelled(word))]
    ranks = {tuple(merge.split(" ")): rank for rank, merge in reversed(list(enumerate(rules.merges)))}
    symbols = list(spelled(word))
    while known := [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]:
        place = min(known)[1]
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
    return [rules.tokens.index(symbol) for symbol in symbols if symbol in rules.tokens]


def merge_with_library(rules: Rules, words: Sequence[str]) -> list[int]:
    # it knows no bytes without a token and keeps the last of two equal merges
    texts = [*rules.tokens, *(char for char in BYTE_CHARS if char not in rules.tokens)]
    pairs = [(left, right) for left, right in map(str.split, dict.fromkeys(rules.merges))]
    model = BPE(vocab={text: token for token, text in enumerate(texts)}, merges=pairs, ignore_merges=rules.takes_words)
    ids = [token.id for word in words for token in model.tokenize(spelled(word))]
    return [token for token in ids if token < len(rules.tokens)]


@st.composite
def random_rules(draw: st.DrawFn, letters: str) -> Rules:
    """Merges of merges in any order, some twice; a vocabulary in any order, some bytes missing."""
    pieces = sorted({char for letter in letters for char in spelled(letter)})
    missing = draw(st.sets(st.sampled_from(pieces), max_size=1))
    merges = []
    for left, right in draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=30)):
        pair = pieces[left % len(pieces)], pieces[right % len(pieces)]
        if len("".join(pair)) <= 8:
            merges.append(" ".join(pair))
            pieces.append("".join(pair))
    tokens = draw(st.permutations(sorted({*pieces, "abba"} - missing)))
    return Rules(tuple(tokens), tuple(draw(st.permutations(merges))), draw(st.booleans()))


@settings(max_examples=300, deadline=None)
@given(random_rules(LETTERS), st.lists(st.text(LETTERS + "x", min_size=1, max_size=12), max_size=6))
def test_short_words_are_merged_as_by_the_slow_twin_and_by_the_library(rules: Rules, words: list[str]) -> None:
    ids = rules.table().encode(words)
    assert ids == [token for word in words for token in merge_slowly(rules, word)]
    assert ids == merge_with_library(rules, words)


@settings(max_examples=300, deadline=None)
@given(random_rules("abc"), st.randoms(use_true_random=False), st.integers(LONG_BYTES + 1, 300))
def test_long_words_are_merged_as_by_the_slow_twin_and_by_the_library(
    rules: Rules, random: Random, num_chars: int
) -> None:
    word = "".join(random.choices("abc", k=num_chars))
    ids = rules.table().encode([word])
    assert ids == merge_slowly(rules, word) == merge_with_library(rules, [word])


@pytest.mark.parametrize("num_bytes", range(LONG_BYTES - 2, LONG_BYTES + 3))
def test_words_about_as_long_as_a_short_one_may_be(num_bytes: int) -> None:
    rules = Rules(("b", "aaaa", "a", "aa", "aaa"), ("a a", "aa aa", "aa a"), takes_words=False)
    for word in ("a" * num_bytes, "a" * (num_bytes - 1) + "b", "b" + "a" * (num_bytes - 1)):
        assert rules.table().encode([word]) == merge_slowly(rules, word)


def test_the_first_of_equal_merges_counts() -> None:
    tokens = (*"abc", "ab", "bc")
    for merges in (("a b", "b c", "a b"), ("a b", "b c")):
        assert Rules(tokens, merges, takes_words=False).table().encode(["abc"]) == [3, 2]


def test_a_word_of_two_million_characters() -> None:
    doubles = ["a" * (1 << power) for power in range(11)]
    rules = Rules((*doubles, "b"), tuple(f"{half} {half}" for half in doubles[:-1]), takes_words=True)
    assert rules.table().encode(["a" * 2_000_000]) == [10] * 1953 + [7]
    pairs = Rules((*"ab", "ab", "abab"), ("a b", "ab ab"), takes_words=False)
    assert pairs.table().encode(["ab" * 1_000_000]) == [3] * 500_000


def test_one_table_serves_many_threads() -> None:
    table = Rules((*"ab", "ab", "aba"), ("a b", "ab a"), takes_words=False).table()
    words = [["ab" * n, "a" * n, "aab" * n] for n in range(1, 200)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(table.encode, words)) == [table.encode(some) for some in words]


def test_the_table_outlives_what_it_was_made_of() -> None:
    table = Rules((*"ab", "ab"), ("a b",), takes_words=True).table()
    assert table.encode(["ab", "ba"]) == [2, 1, 0]
    assert table.encode([]) == table.encode([""]) == []


@pytest.mark.parametrize(
    ("merges", "match"),
    [
        (("a b", "ab"), "merge 1, 'ab', is not a pair"),
        (("",), "merge 0, '', is not a pair"),
        ((" ",), "merge 0, ' ', is not a pair"),
        ((" b",), "is not a pair"),
        (("a ",), "is not a pair"),
        (("a b ",), "is not a pair"),
        (("a b c",), "is not a pair"),
        (("a b", "a yy"), "merge 1, 'a yy', has a piece that is no token"),
        (("a y",), "makes what is no token"),
        (("a \x1b[2J",), r"'a \\x1b\[2J', has a piece"),
        (("b a",), "merge 0, 'b a', makes what is no token"),
        (("a \ud800",), "surrogates not allowed"),
    ],
)
def test_a_merge_that_cannot_be_is_named(merges: tuple[str, ...], match: str) -> None:
    tokens = TokenIndex((*(char for char in BYTE_CHARS if char != "y"), "ab", "y y"))
    with pytest.raises(ValueError, match=match):
        MergeTable(tokens, merges, BYTE_CHARS, False)


def test_a_long_merge_is_cut_in_the_error() -> None:
    with pytest.raises(ValueError, match="has a piece") as caught:
        MergeTable(TokenIndex(BYTE_CHARS), ("é" * 10_000 + " b",), BYTE_CHARS, False)
    assert len(str(caught.value)) < 200


def test_a_missing_byte_may_be_a_piece() -> None:
    rules = Rules(("a", "ay"), ("a y",), takes_words=False)
    assert rules.table().encode(["ayya"]) == [1, 0] == merge_with_library(rules, ["ayya"])


def test_what_is_no_text_is_refused() -> None:
    table = Rules(("a",), (), takes_words=False).table()
    with pytest.raises(TypeError):
        table.encode([b"a"])  # type: ignore[list-item]
    with pytest.raises(UnicodeEncodeError):
        table.encode(["a", "\ud800"])
    with pytest.raises(UnicodeEncodeError):
        TokenIndex(["\udfff"])
    with pytest.raises(ValueError, match="256 bytes"):
        MergeTable(TokenIndex("a"), (), BYTE_CHARS[1:], False)


@given(st.lists(st.text(max_size=20) | st.sampled_from(["", "\0", "a\0", "a", "aaaaaaaa", "aaaaaaaaa"])), st.text())
def test_the_index_is_that_of_a_dict(texts: list[str], other: str) -> None:
    texts = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
    other = other.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    index = TokenIndex(texts)
    first_ids = {text: token for token, text in reversed(list(enumerate(texts)))}
    assert {text: index.find(text) for text in texts} == first_ids
    assert index.num_repeats == len(texts) - len(first_ids)
    assert index.find(other) == first_ids.get(other)
    assert index.find(other + "\0") == first_ids.get(other + "\0")
