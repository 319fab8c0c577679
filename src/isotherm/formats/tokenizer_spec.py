"""`tokenizer.*` metadata of a GGUF file -> TokenizerSpec, with the defaults of llama.cpp where a key is absent."""

import numpy as np

from isotherm import _native
from isotherm.errors import ModelFileError, UnsupportedModel
from isotherm.formats.metadata import Metadata, quoted
from isotherm.types import TokenizerSpec

_BPE, _SENTENCEPIECE = "gpt2", "llama"

_NORMAL_TYPE, _BYTE_TYPE = 1, 6  # first and last of the token types of GGUF

# pre-tokenizers that put a BOS before the text unless the file says otherwise (llama.cpp, llama-vocab.cpp)
_PRE_WITH_BOS = {
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "tekken",
    "chameleon",
}

# Texts that end a turn, for the many files without tokenizer.ggml.eot_token_id; the first one present counts.
_END_OF_TURN_TEXTS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "_<EOT>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
)


def read_tokenizer(metadata: Metadata, default_pre: str = "default") -> TokenizerSpec:
    """default_pre: the pre-tokenizer of a file that names none.

    Raises ModelFileError (missing or contradictory keys), UnsupportedModel (another kind of tokenizer).
    """
    model = metadata.string("tokenizer.ggml.model")
    if model not in (_BPE, _SENTENCEPIECE):
        raise UnsupportedModel(
            f"{metadata.path}: tokenizer {quoted(model)} is not supported; "
            f"supported are {_BPE} (byte-level BPE) and {_SENTENCEPIECE} (SentencePiece by score)"
        )
    is_bpe = model == _BPE
    pre = metadata.string("tokenizer.ggml.pre", default=default_pre)
    tokens = _read_tokens(metadata)
    num_tokens = len(tokens)
    texts = frozenset(tokens)
    _check_unique(metadata, tokens, texts)
    end_of_turn = next((tokens.index(text) for text in _END_OF_TURN_TEXTS if text in texts), None)
    has_template = metadata.has("tokenizer.chat_template")
    # For BPE llama.cpp falls back on id 11, which means something in Falcon only; no id is the better answer.
    default_bos, default_eos, default_unknown = (None, None, None) if is_bpe else (1, 2, 0)
    return TokenizerSpec(
        model=model,
        pre=pre,
        tokens=tokens,
        token_types=_read_token_types(metadata, num_tokens),
        scores=() if is_bpe else _read_scores(metadata, num_tokens),
        merges=_read_merges(metadata) if is_bpe else (),
        bos_id=_read_id(metadata, "bos", num_tokens, default_bos),
        eos_id=_read_id(metadata, "eos", num_tokens, default_eos),
        eot_id=_read_id(metadata, "eot", num_tokens, end_of_turn),
        unknown_id=_read_id(metadata, "unknown", num_tokens, default_unknown),
        add_bos=metadata.boolean("tokenizer.ggml.add_bos_token", default=not is_bpe or pre in _PRE_WITH_BOS),
        add_eos=metadata.boolean("tokenizer.ggml.add_eos_token", default=False),
        add_space_prefix=metadata.boolean("tokenizer.ggml.add_space_prefix", default=not is_bpe),
        chat_template=metadata.string("tokenizer.chat_template") if has_template else None,
    )


def _read_tokens(metadata: Metadata) -> tuple[str, ...]:
    key = "tokenizer.ggml.tokens"
    tokens = metadata.strings(key)
    if not tokens:
        raise ModelFileError(f"{metadata.path}: key {key} is empty, expected a vocabulary")
    return tokens


def _check_unique(metadata: Metadata, tokens: tuple[str, ...], texts: frozenset[str]) -> None:
    """Real files have empty texts more than once, but no other."""
    if len(texts) == len(tokens) or len(texts) + tokens.count("") - 1 == len(tokens):
        return
    first_ids: dict[str, int] = {}
    for token, text in enumerate(tokens):
        first = first_ids.setdefault(text, token)
        if text and first != token:
            raise ModelFileError(
                f"{metadata.path}: key tokenizer.ggml.tokens has {quoted(text)} twice, as ids {first} and {token}"
            )


def _read_token_types(metadata: Metadata, num_tokens: int) -> tuple[int, ...]:
    key = "tokenizer.ggml.token_type"
    if not metadata.has(key):
        return (_NORMAL_TYPE,) * num_tokens
    types = metadata.integers(key)
    _check_length(metadata, key, len(types), num_tokens)
    if types.min() < _NORMAL_TYPE or types.max() > _BYTE_TYPE:
        wrong = int(np.flatnonzero((types < _NORMAL_TYPE) | (types > _BYTE_TYPE))[0])
        raise ModelFileError(f"{metadata.path}: key {key} gives token {wrong} the type {types[wrong]}, expected 1 to 6")
    return tuple(types.tolist())


def _read_scores(metadata: Metadata, num_tokens: int) -> tuple[float, ...]:
    key = "tokenizer.ggml.scores"
    scores = metadata.floats(key)
    _check_length(metadata, key, len(scores), num_tokens)
    return tuple(scores.tolist())


def _read_merges(metadata: Metadata) -> tuple[str, ...]:
    key = "tokenizer.ggml.merges"
    merges = metadata.strings(key)
    wrong = _native.find_unpaired(merges)
    if wrong is not None:
        raise ModelFileError(f"{metadata.path}: key {key} has {quoted(merges[wrong])} at {wrong}, expected two pieces")
    return merges


def _read_id(metadata: Metadata, name: str, num_tokens: int, default: int | None) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if not metadata.has(key):
        return default if default is None or default < num_tokens else None
    return metadata.integer(key, low=0, high=num_tokens - 1)


def _check_length(metadata: Metadata, key: str, length: int, num_tokens: int) -> None:
    if length != num_tokens:
        raise ModelFileError(f"{metadata.path}: key {key} has {length} values, expected {num_tokens}, one per token")
