"""What a model's token list says: ids by text, what each token is for, which ones end an answer."""

import math
import re
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

from isotherm._native import TokenIndex
from isotherm.errors import ModelFileError
from isotherm.types import TokenizerSpec


class TokenType(IntEnum):
    """GGUF `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Files often give these no type and no id. llama.cpp goes by their text, so ids agree only if we do too.
_END_MARKERS = (
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>"),
    *(
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<turn|>",
        "<end_of_utterance>",
        "<eos>",
        "<|tool_response>",
    ),
    *("<EOT>", "_<EOT>", "[EOT]", "[EOS]", "[e~[", "<｜end▁of▁sentence｜>"),
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|file_sep|>"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
)
_FILL_MARKERS = (
    *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>"),
    *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>"),
    *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>"),
    *("<|prefix|>", "<|suffix|>", "<|middle|>"),
)
# Of the harmony format: text for the parser of answers, whatever type the file gives them.
_HARMONY_MARKERS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
# The end of a sequence in some files, the end of struck text (HTML) in others.
_STRIKE_END = "</s>"


@dataclass(frozen=True)
class Vocabulary:
    """Token texts and ids by purpose.

    hidden_ids: render as nothing. parsed_ids: found in a text only where special tokens are parsed.
    literal_ids: found in any text. end_ids: end an answer.
    """

    texts: tuple[str, ...]  # none empty
    index: TokenIndex
    hidden_ids: frozenset[int]
    parsed_ids: frozenset[int]
    literal_ids: frozenset[int]
    end_ids: frozenset[int]

    @cached_property
    def ids(self) -> dict[str, int]:
        return {text: token for token, text in enumerate(self.texts)}


def read_vocabulary(spec: TokenizerSpec) -> Vocabulary:
    """Checks `spec` and sorts its tokens by purpose. Raises ModelFileError where the lists contradict each other."""
    _check_lists(spec)
    _check_special_ids(spec)
    texts = spec.tokens
    if not all(texts):  # An empty token must match nothing; llama.cpp gives it this name.
        texts = tuple(text or f"[EMPTY_{token}]" for token, text in enumerate(texts))
    index = _index(texts)
    kinds = _type_bytes(spec)

    def by_type(*types: TokenType) -> set[int]:
        return {match.start() for match in re.finditer(b"[%b]" % bytes(types), kinds)}

    def by_text(*names: str) -> set[int]:
        return {token for name in names if (token := index.find(name)) is not None}

    shown = by_text(*_HARMONY_MARKERS)
    if _ends_messages_only(index):
        shown |= by_text("<|end|>")
    control = by_type(TokenType.CONTROL, TokenType.UNKNOWN)
    hidden = (control | by_text(*_END_MARKERS, *_FILL_MARKERS)) - shown
    strike_end = by_text(_STRIKE_END)
    ends = {spec.eos_id, spec.eot_id} | by_text(*_END_MARKERS) | (strike_end & control)
    return Vocabulary(
        texts=texts,
        index=index,
        hidden_ids=frozenset(hidden),
        parsed_ids=frozenset(hidden | strike_end),
        literal_ids=frozenset((by_type(TokenType.USER_DEFINED) | shown) - hidden - strike_end),
        end_ids=frozenset(token for token in ends - shown if token is not None),
    )


def _index(texts: tuple[str, ...]) -> TokenIndex:
    try:
        index = TokenIndex(texts)
    except UnicodeEncodeError as error:
        raise ModelFileError(f"tokenizer: a token is not valid UTF-8 ({error.reason}); the file is damaged") from error
    if index.num_repeats:
        raise ModelFileError(f"tokenizer: {index.num_repeats} tokens occur twice; convert the model anew")
    return index


def _type_bytes(spec: TokenizerSpec) -> bytes:
    """A byte for each token: a pattern finds the few special ones much faster than a loop would."""
    try:
        return bytes(spec.token_types)
    except ValueError as error:
        raise ModelFileError("tokenizer: a token type is not one of GGUF; the file is damaged") from error


def _ends_messages_only(index: TokenIndex) -> bool:
    """Whether an answer of this model has several messages, each with its <|end|> (harmony, Solar)."""

    def has_any(*texts: str) -> bool:
        return any(index.find(text) is not None for text in texts)

    return has_any("<|call|>", "<|calls|>") and has_any("<|return|>", "<|flush|>")


def _check_lists(spec: TokenizerSpec) -> None:
    num_tokens = len(spec.tokens)
    if num_tokens == 0:
        raise ModelFileError(
            "tokenizer: the vocabulary is empty; the file holds weights only, give one with a tokenizer"
        )
    for name, values in (("token types", spec.token_types), ("scores", spec.scores)):
        if len(values) != num_tokens and not (name == "scores" and not values):
            raise ModelFileError(f"tokenizer: {len(values)} {name} for {num_tokens} tokens; the file is damaged")
    if any(map(math.isnan, spec.scores)):
        raise ModelFileError("tokenizer: a score is not a number; the file is damaged")


def _check_special_ids(spec: TokenizerSpec) -> None:
    num_tokens = len(spec.tokens)
    named = (("bos", spec.bos_id), ("eos", spec.eos_id), ("eot", spec.eot_id), ("unknown", spec.unknown_id))
    for name, token in named:
        if token is not None and not 0 <= token < num_tokens:
            raise ModelFileError(f"tokenizer: the {name} id is {token}, but there are {num_tokens} tokens")
    for name, wanted, token in (("bos", spec.add_bos, spec.bos_id), ("eos", spec.add_eos, spec.eos_id)):
        if wanted and token is None:
            raise ModelFileError(f"tokenizer: the file asks for a {name} token with each text, but names none")
