"""Byte-level BPE (GGUF tokenizer model "gpt2"): text is cut into words, the UTF-8 bytes of a word are merged."""

import re
from typing import TYPE_CHECKING

from isotherm.errors import ModelFileError, OptionError, UnsupportedModel
from isotherm.tokenization.pretokenizers import WORD_RULES, WordRule
from isotherm.tokenization.vocabulary import TokenType, Vocabulary
from isotherm.types import TokenizerSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer as MergeEngine

# GPT-2 writes each byte as a printable character: itself where it is one, else the next free one from U+0100.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = tuple(byte for byte in range(0x100) if byte not in _PRINTABLE)
_CHAR_TO_BYTE = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}

# The pattern engine gives up (in a panic) on a run of 5 million characters of one kind.
_MAX_RUN_CHARS = 2_000_000


class ByteLevelBpe:
    """Ids of plain text by ranked merges; raises UnsupportedModel or ModelFileError where the spec has no such rule."""

    def __init__(self, spec: TokenizerSpec, vocabulary: Vocabulary) -> None:
        rule = WORD_RULES.get(spec.pre)
        if rule is None:
            raise UnsupportedModel(f"pre-tokenizer {spec.pre!r} is not known; known: {', '.join(sorted(WORD_RULES))}")
        self._spec = spec
        self._num_tokens = len(spec.tokens)
        # Bytes the vocabulary lacks get ids past its end, so that they separate their neighbours; encode drops them.
        missing = (char for char in _CHAR_TO_BYTE if char not in vocabulary.ids)
        self._has_all_bytes = True
        ids = dict(vocabulary.ids)
        for token, char in enumerate(missing, start=self._num_tokens):
            ids[char] = token
            self._has_all_bytes = False
        self._engine = _merge_engine(ids, spec.merges, rule)

    def encode(self, text: str) -> list[int]:
        """Raises OptionError for a run of two million characters without white space (or of nothing else)."""
        if len(text) > _MAX_RUN_CHARS and any(len(run[0]) > _MAX_RUN_CHARS for run in re.finditer(r"\s+|\S+", text)):
            raise OptionError(f"the text has a run of more than {_MAX_RUN_CHARS} characters without a break; split it")
        ids: list[int] = self._engine.encode(text, add_special_tokens=False).ids
        return ids if self._has_all_bytes else [token for token in ids if token < self._num_tokens]

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


def _merge_engine(ids: dict[str, int], merges: tuple[str, ...], rule: WordRule) -> "MergeEngine":
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    pairs = []
    for merge in dict.fromkeys(merges):  # the first of two equal merges counts
        middle = merge.find(" ", 1)
        if middle < 0:
            raise ModelFileError(f"tokenizer: the merge {merge!r} is not a pair; the file is damaged")
        pairs.append((merge[:middle], merge[middle + 1 :]))
    try:
        model = BPE(vocab=ids, merges=pairs, ignore_merges=rule.ignore_merges)
    except Exception as error:  # the library raises nothing narrower
        raise ModelFileError(
            f"tokenizer: the merges do not fit the vocabulary ({error}); the file is damaged"
        ) from error
    engine = Tokenizer(model)
    cuts = [Split(Regex(pattern), behavior="isolated") for pattern in rule.patterns]
    engine.pre_tokenizer = Sequence([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])
    return engine
