"""Cuts text at the special tokens it spells out, before the rest is tokenized."""

import re
from collections.abc import Iterable, Sequence

from isotherm.tokenization.vocabulary import Vocabulary

_STAND_IN = "\ud800"
_STAND_IN_PATTERN = re.compile(_STAND_IN)


class SpecialTokenSplitter:
    """Finds the special tokens of one set in texts."""

    def __init__(self, vocabulary: Vocabulary, *, parse_special: bool) -> None:
        tokens = vocabulary.literal_ids | (vocabulary.parsed_ids if parse_special else frozenset())
        named = [(token, vocabulary.texts[token]) for token in sorted(tokens)]
        # Not the leftmost token wins but the longest in bytes, then the one listed first (llama.cpp).
        named.sort(key=lambda item: -len(item[1].encode()))
        self._ids = {text: token for token, text in named}
        self._ranks = {text: rank for rank, text in enumerate(self._ids)}
        self._lengths = _lengths_by_first(self._ids)
        self._firsts = re.compile(f"[{re.escape(''.join(self._lengths))}]") if self._ids else None

    def split(self, text: str) -> list[str | int]:
        """Stretches of plain text, none empty, and the ids of special tokens, in order."""
        fragments: list[str | int] = [text] if text else []
        for special in self._present(text):
            fragments = [part for fragment in fragments for part in self._cut(fragment, special)]
        return fragments

    def _present(self, text: str) -> list[str]:
        """The special tokens that occur in `text`, in the order in which they may claim it."""
        if self._firsts is None:
            return []
        found = set()
        for match in self._firsts.finditer(text):
            start = match.start()
            for length in self._lengths[match[0]]:
                candidate = text[start : start + length]
                if candidate in self._ids:
                    found.add(candidate)
        return sorted(found, key=self._ranks.__getitem__)

    def _cut(self, fragment: str | int, special: str) -> Iterable[str | int]:
        if isinstance(fragment, int):
            yield fragment
            return
        first, *others = fragment.split(special)
        if first:
            yield first
        for other in others:
            yield self._ids[special]
            if other:
                yield other


def _lengths_by_first(texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    lengths: dict[str, set[int]] = {}
    for text in texts:
        lengths.setdefault(text[0], set()).add(len(text))
    return {first: tuple(sorted(found)) for first, found in lengths.items()}


def split_around(
    splitter: SpecialTokenSplitter, text: str, literal_spans: Sequence[tuple[int, int]]
) -> Iterable[str | int]:
    """As `splitter.split`, but nothing is found in the spans. Lone surrogates become U+FFFD."""
    if not literal_spans:
        return splitter.split(without_surrogates(text))
    # A lone surrogate stands for a span: no text that was freed of them has one, and no token.
    pieces, literals, position = [], [], 0
    for start, end in literal_spans:
        pieces += [without_surrogates(text[position:start]), _STAND_IN]
        literals.append(without_surrogates(text[start:end]))
        position = end
    pieces.append(without_surrogates(text[position:]))
    waiting = iter(literals)
    return [
        fragment if isinstance(fragment, int) else _STAND_IN_PATTERN.sub(lambda _: next(waiting), fragment)
        for fragment in splitter.split("".join(pieces))
    ]


def without_surrogates(text: str) -> str:
    """Pairs become the character they mean, lone ones U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
