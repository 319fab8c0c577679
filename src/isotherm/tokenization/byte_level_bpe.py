"""Byte-level BPE (GGUF tokenizer model "gpt2"): text is cut into words, the UTF-8 bytes of a word are merged."""

import re
from typing import TYPE_CHECKING

from isotherm._native import MergeTable
from isotherm.errors import ModelFileError, OptionError, UnsupportedModel
from isotherm.tokenization.pretokenizers import WORD_RULES, WordRule
from isotherm.tokenization.vocabulary import TokenType, Vocabulary
from isotherm.types import TokenizerSpec

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

# GPT-2 writes each byte as a printable character: itself where it is one, else the next free one from U+0100.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = tuple(byte for byte in range(0x100) if byte not in _PRINTABLE)
_CHAR_TO_BYTE = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}
_BYTE_CHARS = sorted(_CHAR_TO_BYTE, key=_CHAR_TO_BYTE.__getitem__)

# The pattern engine gives up (in a panic) on a run of 5 million characters of one kind.
_MAX_RUN_CHARS = 2_000_000


class ByteLevelBpe:
    """Ids of plain text by ranked merges; raises UnsupportedModel or ModelFileError where the spec has no such rule."""

    def __init__(self, spec: TokenizerSpec, vocabulary: Vocabulary) -> None:
        rule = WORD_RULES.get(spec.pre)
        if rule is None:
            raise UnsupportedModel(f"pre-tokenizer {spec.pre!r} is not known; known: {', '.join(sorted(WORD_RULES))}")
        self._spec = spec
        try:
            self._merges = MergeTable(vocabulary.index, spec.merges, _BYTE_CHARS, rule.ignore_merges)
        except ValueError as error:
            raise ModelFileError(
                f"tokenizer: the merges do not fit the vocabulary ({error}); the file is damaged"
            ) from error
        self._words = _word_cutter(rule)

    def encode(self, text: str) -> list[int]:
        """Raises OptionError for a run of two million characters without white space (or of nothing else)."""
        if len(text) > _MAX_RUN_CHARS and any(len(run[0]) > _MAX_RUN_CHARS for run in re.finditer(r"\s+|\S+", text)):
            raise OptionError(f"the text has a run of more than {_MAX_RUN_CHARS} characters without a break; split it")
        return self._merges.encode([word for word, _ in self._words.pre_tokenize_str(text)])

    def piece(self, token: int) -> bytes:
        text = self._spec.tokens[token]
        kind = self._spec.token_types[token]
        if kind == TokenType.UNUSED:
            return b""
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN):
            return text.encode()
        try:
            return bytes(map(_CHAR_TO_BYTE.__getitem__, text))
        except KeyError:  # not in the byte alphabet: a token that was added as plain text
            return text.encode()


def _word_cutter(rule: WordRule) -> "PreTokenizer":
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Sequence, Split

    return Sequence([Split(Regex(pattern), behavior="isolated") for pattern in rule.patterns])
