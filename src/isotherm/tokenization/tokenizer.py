"""Text to token ids and back, with the ids llama.cpp gives."""

import codecs
from collections.abc import Sequence
from typing import Protocol

from isotherm.errors import OptionError, UnsupportedModel
from isotherm.tokenization.byte_level_bpe import ByteLevelBpe
from isotherm.tokenization.score_merges import ScoreMerges
from isotherm.tokenization.special_tokens import SpecialTokenSplitter, split_around, without_surrogates
from isotherm.tokenization.vocabulary import Vocabulary, read_vocabulary
from isotherm.types import TokenizerSpec


class PlainTextModel(Protocol):
    """Tokenizes text that holds no special token."""

    def encode(self, text: str) -> list[int]: ...

    def piece(self, token: int) -> bytes:
        """The bytes `token` stands for, special tokens as spelled."""
        ...


_MODELS: dict[str, type[ByteLevelBpe] | type[ScoreMerges]] = {"gpt2": ByteLevelBpe, "llama": ScoreMerges}


def build_tokenizer(spec: TokenizerSpec) -> "Tokenizer":
    """Raises UnsupportedModel for an unknown model or pre-tokenizer, ModelFileError where its lists disagree."""
    model = _MODELS.get(spec.model)
    if model is None:
        raise UnsupportedModel(f"tokenizer model {spec.model!r} is not supported; supported: {', '.join(_MODELS)}")
    vocabulary = read_vocabulary(spec)
    return Tokenizer(spec, vocabulary, model(spec, vocabulary))


class Tokenizer:
    """One model's tokenizer; any thread may use it.

    end_ids: the tokens that end an answer. They are those of llama.cpp, except that </s> counts only where the file
    calls it a control token: in other files it is a tag of HTML.
    """

    def __init__(self, spec: TokenizerSpec, vocabulary: Vocabulary, model: PlainTextModel) -> None:
        self.spec = spec
        self.num_tokens = len(spec.tokens)
        self.bos_id = spec.bos_id
        self.eos_id = spec.eos_id
        self.end_ids = vocabulary.end_ids
        self.prefixes_space = spec.model == "llama" and spec.add_space_prefix
        self._vocabulary = vocabulary
        self._model = model
        self._literal_splitter = SpecialTokenSplitter(vocabulary, parse_special=False)
        self._special_splitter = SpecialTokenSplitter(vocabulary, parse_special=True)

    def encode(
        self,
        text: str,
        *,
        add_special: bool,
        parse_special: bool,
        literal_spans: Sequence[tuple[int, int]] = (),
    ) -> list[int]:
        """Token ids of `text`.

        add_special: adds the bos and eos tokens the model asks for. parse_special: control tokens that `text` spells
        out become those tokens; text of a user must not have that power. literal_spans: stretches of `text` (start,
        end; rising) that have no special token in them, whatever they spell. Lone surrogates count as U+FFFD.
        """
        splitter = self._special_splitter if parse_special else self._literal_splitter
        ids = [self.spec.bos_id] if add_special and self.spec.add_bos and self.spec.bos_id is not None else []
        follows_special = True
        for fragment in split_around(splitter, text, literal_spans):
            if isinstance(fragment, int):
                ids.append(fragment)
                follows_special = True
            else:
                ids += self._model.encode(f" {fragment}" if self.prefixes_space and follows_special else fragment)
                follows_special = False
        if add_special and self.spec.add_eos and self.spec.eos_id is not None:
            ids.append(self.spec.eos_id)
        return ids

    def cut_at_control(self, text: str) -> list[str | int]:
        """`text` in order, cut where parse_special finds a control token, which stands as its id."""
        fragments: list[str | int] = []
        for fragment in self._special_splitter.split(without_surrogates(text)):
            if isinstance(fragment, int) and fragment not in self._vocabulary.parsed_ids:
                fragment = self._vocabulary.texts[fragment]
            if isinstance(fragment, str) and fragments and isinstance(fragments[-1], str):
                fragments[-1] += fragment
            else:
                fragments.append(fragment)
        return fragments

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of `text` that goes on after other text: no space is put before it, and no token is special."""
        return self._model.encode(without_surrogates(text))

    def decode(self, ids: Sequence[int], *, show_special: bool = False, continues: bool = False) -> str:
        """The text of `ids`, all at once; the options are those of Detokenizer."""
        detokenizer = Detokenizer(self, show_special=show_special, continues=continues)
        return "".join(map(detokenizer.push, ids)) + detokenizer.finish()

    def token_bytes(self, token: int) -> bytes:
        """The bytes `token` adds to a text, a special token as it is spelled. Raises OptionError for no such token."""
        if not 0 <= token < self.num_tokens:
            raise OptionError(f"token id {token} is not one of the {self.num_tokens} of this model")
        return self._model.piece(token)

    def is_hidden(self, token: int) -> bool:
        """Whether `token` renders as nothing unless special tokens are shown."""
        return token in self._vocabulary.hidden_ids

    def is_special(self, token: int) -> bool:
        """Whether `token` stands apart from the text around it."""
        return token in self._vocabulary.parsed_ids or token in self._vocabulary.literal_ids

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is spelled `text`; None where there is none."""
        token = self._vocabulary.index.find(text)
        return token if token is not None and self.is_special(token) else None


class Detokenizer:
    """Text from ids as they come, whole characters only; bytes that are no UTF-8 become U+FFFD.

    Undoes encode: where it puts a space before a stretch of text (SentencePiece), that space is dropped again.
    show_special: control tokens appear as spelled; shown: only these do. continues: the ids go on after some text, so
    that a space before the first of them is meant.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        show_special: bool = False,
        shown: frozenset[int] = frozenset(),
        continues: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._show_special = show_special
        self._shown = shown
        self._drops_space = tokenizer.prefixes_space and not continues
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes."""
        piece = self._tokenizer.token_bytes(token)
        if self._tokenizer.is_special(token):
            self._drops_space = self._tokenizer.prefixes_space
            if self._tokenizer.is_hidden(token) and not self._show_special and token not in self._shown:
                return ""
        elif self._drops_space:
            piece = piece.removeprefix(b" ")
            self._drops_space = False
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What is left of a character that never came to its end."""
        return self._decoder.decode(b"", final=True)
