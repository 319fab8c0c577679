"""Multiple choice: the rule written out on invented models, slow twins on tiny ones, transformers, hostile files."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from float_tensor import FloatTensor
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracle.cases import ANSWERS, CASES, OracleCase, weights
from tiny_models import FAMILIES, write_tiny
from tolerances import ORACLE_LOGITS

import isotherm
from isotherm.backends.reference.backend import ReferenceBackend
from isotherm.engine.engine import Engine, EngineLimits
from isotherm.errors import ContextOverflow, ModelFileError, OptionError
from isotherm.evaluation import multiple_choice as module
from isotherm.evaluation.multiple_choice import Item, ItemResult, MultipleChoiceResult, multiple_choice, read_items
from isotherm.evaluation.windows import log_softmax
from isotherm.models import FAMILIES as RECORDERS
from isotherm.text import TextGenerator
from isotherm.types import QuantType

F32 = NDArray[np.float32]
Texts = Sequence[tuple[Sequence[int], Sequence[int]]]

VOCAB_SIZE = 256
BOS, EOS = 1, 2


class InventedModel:
    """A token is a letter, or one of `pairs` of letters; the logits after it are a row of a random table."""

    def __init__(
        self, *, pairs: Sequence[str] = (), bos: bool = False, eos: bool = False, context: int = 512, seed: int = 0
    ) -> None:
        self.context_tokens = context
        self.pairs = {pair: 200 + index for index, pair in enumerate(pairs)}
        self.table = np.random.default_rng(seed).normal(0, 3, (VOCAB_SIZE, VOCAB_SIZE)).astype(np.float32)
        self._bos, self._eos = [BOS] * bos, [EOS] * eos
        self.num_asked = 0

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        ids, at = [], 0
        while at < len(text):
            token = self.pairs.get(text[at : at + 2])
            ids.append(ord(text[at]) if token is None else token)
            at += 1 if token is None else 2
        return [*self._bos, *ids, *self._eos] if add_special else ids

    def logit_blocks_of_each(self, texts: Texts, *, block_rows: int) -> Iterator[tuple[int, F32]]:
        self.num_asked += 1
        for index, (ids, rows) in enumerate(texts):
            for start in range(0, len(rows), block_rows):
                yield index, np.stack([self.table[ids[row]] for row in rows[start : start + block_rows]])

    def log_p(self, before: int, token: int) -> float:
        p = np.exp(self.table[before].astype(np.float64))
        return math.log(p[token] / p.sum())

    def answer(self, *items: Item, **options: Any) -> MultipleChoiceResult:
        return multiple_choice(cast(TextGenerator, self), items, **options)


letters = st.text("abcdé ", min_size=1, max_size=12)
questions = st.lists(letters, min_size=2, max_size=5).flatmap(
    lambda choices: st.builds(Item, letters, st.just(tuple(choices)), st.integers(0, len(choices) - 1))
)


# --- the rule ---


@given(seed=st.integers(0, 99), bos=st.booleans(), items=st.lists(questions, min_size=1, max_size=8))
def test_the_rule_written_out(seed: int, bos: bool, items: list[Item]) -> None:
    model = InventedModel(seed=seed, bos=bos)
    found = model.answer(*items)
    num_right = {"per character": 0, "sum": 0}
    for item, result in zip(items, found.items, strict=True):
        sums = []
        for choice in item.choices:
            before = item.context[-1] + choice[:-1]  # a letter is a token: each predicts the next
            sums.append(sum(model.log_p(ord(a), ord(b)) for a, b in zip(before, choice, strict=True)))
        means = [total / len(choice) for total, choice in zip(sums, item.choices, strict=True)]
        assert result.log_likelihoods == pytest.approx(sums, rel=1e-9)
        assert result.per_character == pytest.approx(means, rel=1e-9)
        assert result.chosen == result.per_character.index(max(result.per_character))
        assert result.chosen_by_sum == result.log_likelihoods.index(max(result.log_likelihoods))
        num_right["per character"] += result.chosen == item.answer
        num_right["sum"] += result.chosen_by_sum == item.answer
    assert found.num_items == len(items)
    assert found.acc_norm == num_right["per character"] / len(items)
    assert found.acc == num_right["sum"] / len(items)


def test_both_accuracies_and_their_errors() -> None:
    model = InventedModel()
    model.table[:] = 0  # every token is as likely: per character all are equal, by sum the shortest wins
    items = [Item("x", ("aaa", "bb", "c"), answer) for answer in (0, 0, 2, 1)]
    found = model.answer(*items)
    assert [result.chosen for result in found.items] == [0] * 4
    assert [result.chosen_by_sum for result in found.items] == [2] * 4
    assert found.items[0].log_likelihoods == pytest.approx([-3 * math.log(256), -2 * math.log(256), -math.log(256)])
    assert (found.acc_norm, found.acc, found.num_items) == (0.5, 0.25, 4)
    for share, error in ((found.acc_norm, found.acc_norm_standard_error), (found.acc, found.acc_standard_error)):
        outcomes = [1.0] * int(4 * share) + [0.0] * int(4 - 4 * share)
        assert error == pytest.approx(np.std(outcomes, ddof=1) / math.sqrt(4))
    assert model.answer(items[0]).acc_norm_standard_error == 0


def test_a_token_that_spans_the_border_is_the_choices() -> None:
    model = InventedModel(pairs=("ab", "cd"))
    ab, cd = model.pairs.values()
    (found,) = model.answer(Item("xa", ("b", "bcd", "c"), 0)).items
    x, a, c = map(ord, "xac")
    assert found.log_likelihoods == pytest.approx(
        [model.log_p(x, ab), model.log_p(x, ab) + model.log_p(ab, cd), model.log_p(a, c)]
    )
    assert found.per_character == pytest.approx([found.log_likelihoods[i] / n for i, n in enumerate((1, 3, 1))])


def test_a_space_at_the_end_of_the_context_is_as_one_at_the_start_of_the_choice() -> None:
    model = InventedModel(pairs=(" b", " c"))
    (behind,) = model.answer(Item("x ", ("b", "cd"), 0)).items
    (before,) = model.answer(Item("x", (" b", " cd"), 0)).items
    assert behind.log_likelihoods == before.log_likelihoods


def test_bos_is_predicted_from_and_eos_is_never_scored() -> None:
    (with_both,) = InventedModel(bos=True, eos=True).answer(Item("", ("a", "bc"), 0)).items
    model = InventedModel(bos=True)
    expected = [model.log_p(BOS, ord("a")), model.log_p(BOS, ord("b")) + model.log_p(ord("b"), ord("c"))]
    assert with_both.log_likelihoods == pytest.approx(expected)
    assert with_both == model.answer(Item("", ("a", "bc"), 0)).items[0]


@pytest.mark.parametrize("context", ["", "a"])
def test_nothing_to_predict_from_is_told(context: str) -> None:
    with pytest.raises(OptionError, match=r"here: no token comes before choice 1, .* put some text into the context"):
        InventedModel(pairs=("ab",)).answer(Item(context or "b", ("x", "y"), 0), Item("a", ("x", "bx"), 0, "here"))


def test_a_choice_without_tokens_is_told() -> None:
    class Forgetful(InventedModel):
        def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
            return super().tokenize(text.replace("~", ""), add_special=add_special)

    with pytest.raises(OptionError, match="item 0: choice 1 adds no token"):
        Forgetful().answer(Item("x", ("a", "~"), 0))


def test_what_does_not_fit_is_told_before_anything_is_computed() -> None:
    model = InventedModel(context=9)
    fits = Item("x" * 5, ("12345", "a"), 0)  # nine positions: the tenth token is predicted, and nothing from it
    assert model.answer(fits).num_items == 1
    too_long = Item("x" * 5, ("a", "123456"), 0, "items.jsonl, line 7")
    model.num_asked = 0
    with pytest.raises(ContextOverflow, match=r"items.jsonl, line 7: context and choice 1 need 10 .* has 9;") as caught:
        model.answer(fits, too_long)
    assert (caught.value.num_tokens, caught.value.context_tokens, model.num_asked) == (10, 9, 0)
    assert model.answer(fits, too_long, num_items=1).num_items == 1


def test_logits_that_are_no_numbers_are_told() -> None:
    model = InventedModel()
    model.table[ord("a")] = np.nan
    with pytest.raises(ModelFileError, match=r"item 1, choice 2 has logits that are no finite numbers"):
        model.answer(Item("x", ("b", "c"), 0), Item("x", ("b", "c", "ad"), 0))


def test_progress_is_the_result_so_far() -> None:
    items = [Item("x", ("a", "b"), answer) for answer in (0, 1, 1)]
    told: list[tuple[MultipleChoiceResult, int]] = []
    model = InventedModel()
    result = model.answer(*items, on_item=lambda *news: told.append(news))
    assert [total for _, total in told] == [3, 3, 3]
    assert [so_far for so_far, _ in told] == [model.answer(*items, num_items=count) for count in (1, 2, 3)]
    assert told[-1][0] == result


def test_impossible_numbers_of_items_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no items"):
        InventedModel().answer()
    for wrong in (0, -3):
        with pytest.raises(OptionError, match=f"number of items is {wrong}"):
            InventedModel().answer(Item("x", ("a", "b"), 0), num_items=wrong)
        with pytest.raises(OptionError, match=f"number of items is {wrong}"):
            read_items(tmp_path / "unread", num_items=wrong)


# --- models that compute ---

WORDS = ("the", "rain", "in", "spain", "on", "other", "hand", "is", "there", "and", "a", "door", "sand")


def sentence(seed: int, num_words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, num_words))


ITEMS = [
    Item(sentence(1, 90), tuple(f" {sentence(seed, 12 + seed)}" for seed in range(2, 6)), 2),
    Item(sentence(6, 3), (" on the door", " on the door and", "s", " on"), 0),  # one goes on from another
    Item(sentence(7, 30), (f" {sentence(8, 70)}", "?!"), 1),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_bits_of_each_choice_computed_alone(tmp_path: Path, family: str) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", family, QuantType.Q4_0)
    with isotherm.load(path, threads=2, cache_bytes=0) as model:
        found = multiple_choice(model, ITEMS)
        for item, result in zip(ITEMS, found.items, strict=True):
            sums = []
            for choice in item.choices:
                ids = model.tokenize(item.context + choice, add_special=True)
                num_before = len(model.tokenize(item.context, add_special=True))  # no token spans these borders
                rows = model.logits(ids)[num_before - 1 : -1]
                log_p = [float(log_softmax(row)[token]) for row, token in zip(rows, ids[num_before:], strict=True)]
                sums.append(math.fsum(log_p))
            per_character = tuple(total / len(choice) for total, choice in zip(sums, item.choices, strict=True))
            chosen, chosen_by_sum = int(np.argmax(per_character)), int(np.argmax(sums))
            assert result == ItemResult(item.answer, chosen, chosen_by_sum, tuple(sums), per_character)
        model.generate("the rain", max_tokens=2, raw=True)  # the model is as it was
    with isotherm.load(path, threads=1, cache_bytes=0) as model:
        assert multiple_choice(model, ITEMS) == found


def test_a_context_is_computed_once(tmp_path: Path) -> None:
    asked: list[Texts] = []
    with isotherm.load(write_tiny(tmp_path / "tiny.gguf", "llama", QuantType.Q4_0), cache_bytes=0) as model:
        blocks = model.logit_blocks_of_each

        def recording(texts: Texts, **options: Any) -> Iterator[tuple[int, F32]]:
            asked.append(texts)
            return blocks(texts, **options)

        model.logit_blocks_of_each = recording  # type: ignore[method-assign]
        multiple_choice(model, ITEMS)
        contexts = [model.tokenize(item.context) for item in ITEMS]
    assert len(asked) == len(ITEMS)  # all choices of an item in one call, which computes what they share once
    for texts, item, context in zip(asked, ITEMS, contexts, strict=True):
        assert len(texts) == len(item.choices)
        assert all(list(ids[: len(context)]) == context and rows[0] == len(context) - 1 for ids, rows in texts)


def spelled(ids: Sequence[int]) -> str:
    return "".join(chr(ord("A") + token) for token in ids)


class Spelling:
    """In place of a tokenizer: a letter a token."""

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return [ord(letter) - ord("A") for letter in text]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_scores_are_those_of_transformers(case: OracleCase) -> None:
    """Of stretches of the text whose logits transformers gave (tests/oracle/make_answers.py)."""
    program = RECORDERS[case.config.family](case.config)
    tensors = {name: FloatTensor(np.atleast_2d(values)) for name, values in weights(case.config).items()}
    num_pages = (4,) * len(program.states)
    engine = Engine(
        ReferenceBackend(tensors).compile(program, num_pages=num_pages), program, EngineLimits(256, 256, num_pages)
    )
    model = TextGenerator(engine, cast(Any, Spelling()), None, cast(Any, SimpleNamespace(config=case.config)))
    ids = case.token_ids.tolist()
    cuts = [(12, (40, 13, 29)), (1, (48, 30)), (30, (31, 32, 33, 48))]
    items = [Item(spelled(ids[:start]), tuple(spelled(ids[start:end]) for end in ends), 0) for start, ends in cuts]
    found = multiple_choice(model, items)
    with np.load(ANSWERS) as answers:
        logits = answers[case.name].astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for (start, ends), result in zip(cuts, found.items, strict=True):
        for end, log_likelihood in zip(ends, result.log_likelihoods, strict=True):
            expected = sum(math.log(p[row, ids[row + 1]]) for row in range(start - 1, end - 1))
            assert abs(log_likelihood - expected) < 2 * ORACLE_LOGITS * (end - start)


# Right of the first 100 items, per character and by sum. Logits are the same bits everywhere; the last bits of NumPy's
# exp are not, but no two best scores of an item are nearer than 6e-4.
RECORDED = {"smollm2-135m": (40, 30)}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
def test_accuracy_of_a_real_model(real_model: Callable[[str], Path], shared_dir: Path, name: str) -> None:
    items = read_items(shared_dir / "data" / "hellaswag.jsonl", num_items=100)
    with isotherm.load(real_model(name), context_tokens=512) as model:
        found = multiple_choice(model, items)
    assert (found.acc_norm, found.acc) == tuple(count / 100 for count in RECORDED[name])


# --- files ---

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(items=st.lists(questions, min_size=1, max_size=6), wanted=st.none() | st.integers(1, 8), data=st.data())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, items: list[Item], wanted: int | None, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "items.jsonl"
    lines, numbers = [], []
    for item in items:
        lines += [data.draw(st.sampled_from(["", " \t\r"]))] * data.draw(st.integers(0, 2))
        value = {"context": item.context, "choices": item.choices, "answer": item.answer}
        value |= data.draw(st.dictionaries(st.text(max_size=3), json_values, max_size=2))
        lines.append(json.dumps(value, ensure_ascii=data.draw(st.booleans())))
        numbers.append(len(lines))
    text = data.draw(st.sampled_from(["\n", "\r\n"])).join(lines) + data.draw(st.sampled_from(["", "\n"]))
    path.write_bytes(text.encode())
    found = read_items(path, num_items=wanted)
    assert [(item.context, item.choices, item.answer) for item in found] == [
        (item.context, item.choices, item.answer) for item in items[:wanted]
    ]
    assert [item.where for item in found] == [f"{path}, line {number}" for number in numbers[:wanted]]


@settings(max_examples=300)
@given(
    line=st.binary(max_size=60)
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.fixed_dictionaries(
        {}, optional={"context": json_values, "choices": json_values | st.lists(json_values), "answer": json_values}
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_line_is_an_item_or_refused_by_its_number(tmp_path_factory: pytest.TempPathFactory, line: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(b'\n{"context": "a", "choices": ["b", "c"], "answer": 0}\n' + line)
    items, message = [], f"{path}, line "
    try:
        items = read_items(path)
    except OptionError as error:
        message = str(error)
    assert message.startswith(f"{path}, line ")
    assert all(len(item.choices) > item.answer >= 0 for item in items)


GOOD = '{"context": "a", "choices": ["b", "c"], "answer": 0}'
HOSTILE: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"context: a", r"is no JSON \(column 1: Expecting value\); an item is"),
    "cut short": (b'{"context": "a", "choi', r"is no JSON \(column 18: Unterminated string"),
    "two on a line": (f"{GOOD} {GOOD}".encode(), "is no JSON .*Extra data"),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD.encode(), "is no JSON .*BOM"),
    "Latin-1": ('{"context": "ä"}'.encode("latin-1"), r"is not UTF-8 text \(byte 13\); convert the file"),
    "no object": (b'["a", "b"]', "is a list of 2; an item is"),
    "a number": (b"17", "is 17;"),
    "missing": (b'{"context": "a"}', 'has no "choices" and no "answer"; an item is'),
    "NaN": (b'{"context": "a", "choices": ["b", "c"], "answer": NaN}', "NaN is no JSON"),
    "Infinity": (b'{"context": "a", "choices": ["b", "c"], "answer": 0, "x": [-Infinity]}', "-Infinity is no JSON"),
    "twice": (b'{"context": "a", "choices": ["b", "c"], "answer": 0, "answer": 1}', 'key "answer" stands there twice'),
    "twice inside": (b'{"x": {"y": 1, "y": 1}}', 'key "y" stands there twice'),
    "context": (b'{"context": null, "choices": ["b", "c"], "answer": 0}', "the context is null, not text"),
    "choices": (b'{"context": "a", "choices": "bc", "answer": 0}', 'the choices are "bc", not two or more'),
    "an object": (b'{"context": "a", "choices": {"b": 1, "c": 2}, "answer": 0}', "the choices are an object, not"),
    "one": (b'{"context": "a", "choices": ["b"], "answer": 0}', "the choices are a list of 1, not two or more"),
    "empty": (b'{"context": "a", "choices": ["b", ""], "answer": 0}', 'choice 1 is "", not a text that is not empty'),
    "no text": (b'{"context": "a", "choices": [["b"], "c"], "answer": 0}', "choice 0 is a list of 1, not a text"),
    "too high": (
        b'{"context": "a", "choices": ["b", "c"], "answer": 2}',
        "answer is 2, not a whole number from 0 to 1",
    ),
    "negative": (b'{"context": "a", "choices": ["b", "c"], "answer": -1}', "the answer is -1, not"),
    "a text": (b'{"context": "a", "choices": ["b", "c"], "answer": "0"}', 'the answer is "0", not'),
    "a fraction": (b'{"context": "a", "choices": ["b", "c"], "answer": 1.0}', r"the answer is 1\.0, not"),
    "true": (b'{"context": "a", "choices": ["b", "c"], "answer": true}', "the answer is true, not"),
    "huge": (b'{"context": "a", "choices": ["b", "c"], "answer": 1e999}', "the answer is Infinity, not"),
    "long": (b'{"context": "a", "choices": ["b", "c"], "answer": ' + b"7" * 4000 + b"}", "the answer is 7{40}…, not"),
    "too many digits": (b'{"answer": ' + b"7" * 5000 + b"}", "digits"),
    "surrogate": (b'{"context": "a", "choices": ["b", "c\\ud800"], "answer": 0}', "half of a surrogate pair"),
    "deep": (b"[" * 100_000, "is nested too deeply"),
    "a long line": (b" " * (1 << 20) + GOOD.encode(), "is longer than 1 MiB"),
    "zeros": (bytes(3 << 20), "is longer than 1 MiB"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_lines_are_refused_by_file_line_and_what_is_expected(tmp_path: Path, name: str) -> None:
    line, message = HOSTILE[name]
    path = tmp_path / "items.jsonl"
    path.write_bytes(f"{GOOD}\n\n".encode() + line)
    with pytest.raises(OptionError, match=message) as caught:
        read_items(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert len(str(caught.value)) < len(str(path)) + 300
    assert len(read_items(path, num_items=1)) == 1  # what comes after is not read


@pytest.mark.parametrize("depth", range(900, 1000, 7))
def test_no_depth_is_a_traceback(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(f'{{"context": {"[" * depth}{"]" * depth}, "choices": ["b", "c"], "answer": 0}}')
    with pytest.raises(OptionError, match=r"line 1: .*(the context is a list|nested too deeply)"):
        read_items(path)


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, many = tmp_path / "empty", tmp_path / "many"
    empty.write_text("\n \n")
    many.write_text(f"{GOOD}\n" * 9)
    with pytest.raises(OptionError, match="empty holds no items; an item is"):
        read_items(empty)
    with pytest.raises(OptionError, match="cannot be read: No such file"):
        read_items(tmp_path / "none")
    with pytest.raises(OptionError, match="cannot be read: Is a directory"):
        read_items(tmp_path)
    monkeypatch.setattr(module, "_MAX_FILE_BYTES", len(GOOD) * 7)
    with pytest.raises(OptionError, match="many, line 7: the file is longer than"):
        read_items(many)


def test_an_item_of_python_is_checked_too() -> None:
    with pytest.raises(OptionError, match="an item: the answer is 3, not a whole number from 0 to 1"):
        Item("a", ("b", "c"), 3)
    with pytest.raises(OptionError, match="the context is a bytes, not text"):
        Item(cast(str, b"a"), ("b", "c"), 0)
