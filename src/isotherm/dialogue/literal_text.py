"""Keeps what a user spells from becoming control tokens, through a chat template that does not know of it."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isotherm.errors import MessageError
from isotherm.tokenization.tokenizer import Tokenizer

# A lone surrogate stands for a control token's text: encodable text has none, so it can be no one else's.
_FIRST, _LAST = 0xD800, 0xDFFF
_STAND_INS = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")


@dataclass(frozen=True)
class Prompt:
    """literal_spans: stretches (start, end; rising) that spell control tokens and are plain text: Tokenizer.encode."""

    text: str
    literal_spans: tuple[tuple[int, int], ...] = ()


def render_literally(render: Callable[[Any], str], given: Any, tokenizer: Tokenizer) -> Prompt:
    """`render(given)`, with the places where it quotes control tokens that texts of `given` spell.

    They are found by rendering once more with stand-ins, only where there are such texts; the text itself is that of
    the plain rendering. Raises MessageError where the two differ, as for a template that looks for such a token.
    """
    stand_ins: dict[int, str] = {}
    masked = _mapped(given, lambda text: _masked(text, tokenizer, stand_ins))
    if not stand_ins:
        return Prompt(render(given))
    if len(stand_ins) > _LAST - _FIRST + 1:
        raise MessageError("messages", f"spell {len(stand_ins)} different control tokens of this model")
    spelled = {stand_in: _spelled(tokenizer, token) for token, stand_in in stand_ins.items()}
    text = _mapped(given, lambda text: _STAND_INS.sub(lambda m: spelled[m[0]], _masked(text, tokenizer, stand_ins)))
    prompt = _restored(render(masked), spelled)
    if prompt.text != render(text):
        tokens = ", ".join(sorted(spelled.values()))
        raise MessageError("messages", f"spell control tokens ({tokens}) that this chat template cannot quote")
    return prompt


def _masked(text: str, tokenizer: Tokenizer, stand_ins: dict[int, str]) -> str:
    return "".join(
        fragment if isinstance(fragment, str) else stand_ins.setdefault(fragment, chr(_FIRST + len(stand_ins)))
        for fragment in tokenizer.cut_at_control(text)
    )


def _spelled(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.token_bytes(token).decode()


def _restored(masked: str, spelled: Mapping[str, str]) -> Prompt:
    pieces, spans, position, num_chars = [], [], 0, 0
    for match in _STAND_INS.finditer(masked):
        before, literal = masked[position : match.start()], spelled.get(match[0], "")
        num_chars += len(before)
        spans.append((num_chars, num_chars + len(literal)))
        num_chars += len(literal)
        pieces += [before, literal]
        position = match.end()
    return Prompt("".join([*pieces, masked[position:]]), tuple(spans))


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The same value with every text in it changed, keys of objects too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_mapped(item, change) for item in value]
    return value
