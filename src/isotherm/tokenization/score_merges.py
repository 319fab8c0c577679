"""SentencePiece by score (GGUF tokenizer model "llama"): neighbours merge into the token with the best score."""

import heapq
import re

from isotherm.errors import ModelFileError
from isotherm.tokenization.vocabulary import TokenType, Vocabulary
from isotherm.types import TokenizerSpec

_SPACE = "▁"  # U+2581, which the vocabulary has in place of U+0020
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_MAX_CACHED_CHUNKS = 65_536
_MAX_CACHED_CHARS = 64


class ScoreMerges:
    """Ids of plain text by scored merges; raises ModelFileError where a byte has no token to fall back on."""

    def __init__(self, spec: TokenizerSpec, vocabulary: Vocabulary) -> None:
        self._spec = spec
        self._ids = vocabulary.ids
        self._costs = [-score for score in spec.scores] or [0.0] * len(spec.tokens)
        self._byte_ids = _byte_ids(spec, vocabulary)
        self._chunk_starts = _chunk_starts(spec.tokens)
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for chunk in self._chunk_starts.split(text.replace(" ", _SPACE)):
            ids += self._chunk_ids(chunk)
        return ids

    def piece(self, token: int) -> bytes:
        text = self._spec.tokens[token]
        kind = self._spec.token_types[token]
        if kind == TokenType.UNUSED:
            return b""
        if kind == TokenType.BYTE and (byte := _BYTE_TOKEN.fullmatch(text)):
            return bytes.fromhex(byte[1])
        return text.encode() if kind == TokenType.CONTROL else text.replace(_SPACE, " ").encode()

    def _chunk_ids(self, chunk: str) -> list[int]:
        known = self._cache.get(chunk)
        if known is not None:
            return known
        ids = self._merge(chunk)
        if len(chunk) <= _MAX_CACHED_CHARS:
            if len(self._cache) >= _MAX_CACHED_CHUNKS:
                self._cache.clear()
            self._cache[chunk] = ids
        return ids

    def _merge(self, text: str) -> list[int]:
        """Merges the best pair of neighbours, the leftmost of equals, until no pair is a token."""
        ids, costs, num_chars = self._ids, self._costs, len(text)
        # A symbol is text[start : ends[start]]; ends is 0 where no symbol starts any more.
        ends = list(range(1, num_chars + 1))
        previous = list(range(-1, num_chars))
        queue = []
        for start in range(num_chars - 1):
            token = ids.get(text[start : start + 2])
            if token is not None:
                queue.append((costs[token], start, start + 1, start + 2))
        heapq.heapify(queue)
        while queue:
            _, start, middle, end = heapq.heappop(queue)
            if ends[start] != middle or ends[middle] != end:
                continue  # one of the two has merged with another
            ends[start], ends[middle] = end, 0
            previous[end] = start
            before = previous[start]
            if before >= 0:
                token = ids.get(text[before:end])
                if token is not None:
                    heapq.heappush(queue, (costs[token], before, start, end))
            if end < num_chars:
                token = ids.get(text[start : ends[end]])
                if token is not None:
                    heapq.heappush(queue, (costs[token], start, end, ends[end]))
        return self._symbol_ids(text, ends)

    def _symbol_ids(self, text: str, ends: list[int]) -> list[int]:
        found: list[int] = []
        start = 0
        while start < len(text):
            symbol = text[start : ends[start]]
            token = self._ids.get(symbol)
            if token is not None:
                found.append(token)
            else:
                found += [self._byte_ids[byte] for byte in symbol.encode()]
            start = ends[start]
        return found


def _byte_ids(spec: TokenizerSpec, vocabulary: Vocabulary) -> list[int]:
    """The token of each byte: <0xAB>, else the byte as text, else the unknown token."""
    found = []
    for byte in range(0x100):
        token = vocabulary.ids.get(f"<0x{byte:02X}>")
        if token is None and byte < 0x80:
            token = vocabulary.ids.get(chr(byte))
        if token is None:
            token = spec.unknown_id
        if token is None:
            raise ModelFileError(f"tokenizer: there is no token for the byte 0x{byte:02X} and no unknown token")
        found.append(token)
    return found


def _chunk_starts(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Where text may be cut with the same ids: before a space that follows a character no token has before a space."""
    glued = {match[0] for match in re.finditer(f"[^{_SPACE}](?={_SPACE})", "\0".join(tokens))}
    return re.compile(f"(?<=[^{re.escape(''.join(sorted(glued)))}{_SPACE}])(?={_SPACE})")
