"""Multiple choice as a language model answers it, HellaSwag say: the choice that it finds likeliest after the context.

A file of items is JSON Lines in UTF-8, an object a line: {"context": text, "choices": [text, text, ...], "answer":
index of the right choice, from 0}. Other keys and empty lines are left alone.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from isotherm.engine.solo import num_common
from isotherm.errors import ContextOverflow, OptionError
from isotherm.evaluation.windows import BLOCK_ROWS, Window, check_finite, leading_special, log_softmax
from isotherm.text import TextGenerator

_KEYS = ("context", "choices", "answer")
_EXPECTED = 'an item is {"context": text, "choices": [text, text, ...], "answer": index of the right one, from 0}'
_MAX_LINE_BYTES = 1 << 20
_MAX_FILE_BYTES = 256 << 20
_MAX_SHOWN = 40  # characters of a value in a message


@dataclass(frozen=True)
class Item:
    """One question: which of `choices` goes on from `context`, the one at `answer`. Raises OptionError.

    Choices are put behind the context as they are, so that a space between the two stands in one of them.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    where: str = ""  # what messages call it: "FILE, line N"; by default its index

    def __post_init__(self) -> None:
        if wrong := _what_is_wrong(self.context, self.choices, self.answer):
            raise OptionError(f"{self.where or 'an item'}: {wrong}; {_EXPECTED}")


@dataclass(frozen=True)
class ItemResult:
    """How a model answers one item; of equal scores the first is chosen.

    log_likelihoods: by choice, the natural logarithm of its probability after the context, added up over its tokens.
    per_character: the same divided by the characters (code points) of the choice.
    """

    answer: int  # the right one
    chosen: int  # the highest per character
    chosen_by_sum: int
    log_likelihoods: tuple[float, ...]
    per_character: tuple[float, ...]


@dataclass(frozen=True)
class MultipleChoiceResult:
    """Shares of the items that were answered right, named as in lm-evaluation-harness; acc_norm is the usual one."""

    acc_norm: float  # by log-likelihood per character
    acc_norm_standard_error: float  # items taken as independent; 0 for one
    acc: float  # by plain log-likelihood
    acc_standard_error: float
    num_items: int
    items: tuple[ItemResult, ...]


def read_items(path: Path, *, num_items: int | None = None) -> list[Item]:
    """The first `num_items` items of a file, or all; what comes after them is not read.

    Raises OptionError, with file and line, for what is no file of items.
    """
    _check_num_items(num_items)
    try:
        with path.open("rb") as file:
            items = _read(file, path, num_items)
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}") from error
    if not items:
        raise OptionError(f"{path} holds no items; {_EXPECTED}, a line each")
    return items


def multiple_choice(
    model: TextGenerator,
    items: Sequence[Item],
    *,
    num_items: int | None = None,
    on_item: Callable[[MultipleChoiceResult, int], None] | None = None,
) -> MultipleChoiceResult:
    """Has a model answer the first `num_items` items, or all.

    Context and choice are tokenized together, as one text, with BOS where the model asks for it; control tokens that
    they spell out are those tokens. The context is tokenized alone too. What both have in common from the start on is
    what the choice is predicted from; all tokens behind it are the choice's, and their log-probabilities make its
    score. Mostly these are the tokens behind the context. Where a token spans the border, the whole of it counts as
    the choice's, and so does what the tokenizer splits differently before it. (lm-evaluation-harness leaves off as many
    tokens as the context has alone, which is the same unless a token spans the border; a space at the end of the
    context, which it moves to the choice, comes there by this rule as well.)

    What the choices of an item have in common is computed once; by the arithmetic contract, which all backends but the
    float32 reference keep, the scores are those of choices computed each alone, bit for bit. Log-probabilities are
    computed in float64, and their sum is rounded once.

    `on_item` gets the result so far and the number of items there will be, after each item. Raises OptionError (no
    items, an item with nothing to predict from), ContextOverflow (a context and choice that do not fit) before the
    first item is computed, and ModelFileError (NaN in the weights).
    """
    _check_num_items(num_items)
    asked = [replace(item, where=item.where or f"item {index}") for index, item in enumerate(items[:num_items])]
    if not asked:
        raise OptionError("there are no items to answer; pass some")
    bos = leading_special(model)
    for item in asked:  # cut twice, which costs little, so that no hour of work ends at an item that does not fit
        _windows(model, item, bos)
    results: list[ItemResult] = []
    num_right = num_right_by_sum = 0
    for item in asked:
        results.append(_answer(model, item, bos))
        num_right += results[-1].chosen == item.answer
        num_right_by_sum += results[-1].chosen_by_sum == item.answer
        if on_item:
            on_item(_result(results, num_right, num_right_by_sum), len(asked))
    return _result(results, num_right, num_right_by_sum)


def _answer(model: TextGenerator, item: Item, bos: list[int]) -> ItemResult:
    windows = _windows(model, item, bos)
    log_p: list[list[float]] = [[] for _ in windows]
    texts = [(window.token_ids, window.rows) for window in windows]
    for choice, block in model.logit_blocks_of_each(texts, block_rows=BLOCK_ROWS):
        check_finite(block, f"{item.where}, choice {choice}")
        for logits in block:
            target = windows[choice].targets[len(log_p[choice])]
            log_p[choice].append(float(log_softmax(logits)[target]))
    sums = tuple(map(math.fsum, log_p))
    per_character = tuple(total / len(choice) for total, choice in zip(sums, item.choices, strict=True))
    return ItemResult(item.answer, _first_highest(per_character), _first_highest(sums), sums, per_character)


def _windows(model: TextGenerator, item: Item, bos: list[int]) -> list[Window]:
    """What is computed and predicted of each choice. Raises OptionError and ContextOverflow."""
    context_ids = bos + model.tokenize(item.context)
    return [_window(model, item, index, context_ids, bos) for index in range(len(item.choices))]


def _window(model: TextGenerator, item: Item, index: int, context_ids: list[int], bos: list[int]) -> Window:
    ids = bos + model.tokenize(item.context + item.choices[index])
    first = num_common(context_ids, ids)
    if first == len(ids):
        raise OptionError(f"{item.where}: choice {index} adds no token to the context; write it out, or drop the item")
    if first == 0:
        raise OptionError(
            f"{item.where}: no token comes before choice {index}, and this model starts with no BOS token, so that "
            "there is nothing to predict it from; put some text into the context"
        )
    num_tokens = len(ids) - 1  # the last one is predicted, and nothing from it
    if num_tokens > model.context_tokens:
        raise ContextOverflow(
            f"{item.where}: context and choice {index} need {num_tokens} positions, the context of the model has "
            f"{model.context_tokens}; shorten the item, or load the model with more, if it has more (--ctx)",
            num_tokens=num_tokens,
            context_tokens=model.context_tokens,
        )
    return Window(tuple(ids[:-1]), range(first - 1, len(ids) - 1), tuple(ids[first:]))


def _first_highest(scores: Sequence[float]) -> int:
    return scores.index(max(scores))


def _result(results: list[ItemResult], num_right: int, num_right_by_sum: int) -> MultipleChoiceResult:
    acc_norm, acc = num_right / len(results), num_right_by_sum / len(results)
    return MultipleChoiceResult(
        acc_norm=acc_norm,
        acc_norm_standard_error=_standard_error(acc_norm, len(results)),
        acc=acc,
        acc_standard_error=_standard_error(acc, len(results)),
        num_items=len(results),
        items=tuple(results),
    )


def _standard_error(share: float, num_items: int) -> float:
    """Of the mean of `num_items` zeros and ones, by their sample variance."""
    return math.sqrt(share * (1 - share) / max(1, num_items - 1))


def _check_num_items(num_items: int | None) -> None:
    if num_items is not None and num_items < 1:
        raise OptionError(f"the number of items is {num_items}; it must be at least 1")


# --- the file ---


def _read(file: BinaryIO, path: Path, num_items: int | None) -> list[Item]:
    items: list[Item] = []
    num_bytes = 0
    for number in count(1):
        if len(items) == num_items or not (line := file.readline(_MAX_LINE_BYTES + 1)):
            break
        where = f"{path}, line {number}"
        num_bytes += len(line)
        if len(line) > _MAX_LINE_BYTES:
            raise OptionError(f"{where}: is longer than {_MAX_LINE_BYTES >> 20} MiB; {_EXPECTED}, a line each")
        if num_bytes > _MAX_FILE_BYTES:
            raise OptionError(f"{where}: the file is longer than {_MAX_FILE_BYTES >> 20} MiB; split it")
        if line.strip():
            items.append(_parse(line, where))
    return items


def _parse(line: bytes, where: str) -> Item:
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise OptionError(f"{where}: is not UTF-8 text (byte {error.start}); convert the file") from error
    except json.JSONDecodeError as error:
        raise OptionError(f"{where}: is no JSON (column {error.colno}: {error.msg}); {_EXPECTED}") from error
    except RecursionError as error:
        raise OptionError(f"{where}: is nested too deeply; {_EXPECTED}") from error
    except ValueError as error:
        raise OptionError(f"{where}: {error}; {_EXPECTED}") from error
    if not isinstance(value, dict):
        raise OptionError(f"{where}: is {_shown(value)}; {_EXPECTED}")
    if missing := [key for key in _KEYS if key not in value]:
        raise OptionError(f"{where}: has no {' and no '.join(map(_shown, missing))}; {_EXPECTED}")
    choices = value["choices"]
    return Item(value["context"], tuple(choices) if isinstance(choices, list) else choices, value["answer"], where)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json keeps the last of equal keys, and nobody would know which one was meant."""
    value: dict[str, Any] = {}
    for key, part in pairs:
        if key in value:
            raise ValueError(f"the key {_shown(key)} stands there twice")
        value[key] = part
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _what_is_wrong(context: Any, choices: Any, answer: Any) -> str | None:
    """Any: it comes from a file."""
    if not isinstance(context, str):
        return f"the context is {_shown(context)}, not text"
    if not isinstance(choices, tuple) or len(choices) < 2:
        return f"the choices are {_shown(choices)}, not two or more"
    for index, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice:
            return f"choice {index} is {_shown(choice)}, not a text that is not empty"
    if not _is_unicode(context) or not all(map(_is_unicode, choices)):
        return "its text has half of a surrogate pair (\\ud800 to \\udfff), which is no character"
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        return f"the answer is {_shown(answer)}, not a whole number from 0 to {len(choices) - 1}"
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if not isinstance(value, str | int | float | None):
        return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
