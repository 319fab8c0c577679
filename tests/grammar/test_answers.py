"""Answers under a grammar, held against other validators; together, interrupted and preempted they stay the same."""

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import write_tiny

import isotherm
from isotherm import Grammar
from isotherm.engine.request import Generation
from isotherm.errors import GrammarError, OptionError
from isotherm.text import TextGenerator
from isotherm.types import QuantType

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["tea", "rain"]}, "maxItems": 2},
        "child": {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
SUM = r"""
root  ::= term ([-+*/] term)*   # a sum
term  ::= number | "(" ws root ws ")"
number ::= [0-9]{1,3} ("." [0-9])?
ws ::= " "?
"""
LIST = 'start: "[" item ("," item)* "]"\nitem: WORD | start\nWORD: /[a-z]{1,4}/\n'


def is_sum(text: str) -> bool:
    """Python's own parser; a leading zero is a number in the grammar, and none in Python."""
    assert re.fullmatch(r"[-+*/().0-9 ]+", text)
    compile(re.sub(r"\b0+(?=\d)", "", text), "sum", "eval")
    return True


def is_list(text: str) -> bool:
    json.loads(re.sub("[a-z]+", '"x"', text))
    return bool(re.fullmatch(r"[][,a-z]+", text)) and not re.search("[a-z]{5}", text)


def is_person(text: str) -> bool:
    jsonschema.validate(json.loads(text), PERSON)
    return True


CASES: dict[str, tuple[Grammar, Callable[[str], bool]]] = {
    "json_schema": (Grammar("json_schema", json.dumps(PERSON)), is_person),
    "json_object": (Grammar("json_object"), lambda text: isinstance(json.loads(text), dict)),
    "regex": (
        Grammar("regex", r"[a-f]{2,6}-[0-9]{1,9}(\.[0-9]{2})?"),
        lambda t: bool(re.fullmatch(r"[a-f]{2,6}-[0-9]{1,9}(\.[0-9]{2})?", t)),
    ),
    "lark": (Grammar("lark", LIST), is_list),
    "gbnf": (Grammar("gbnf", SUM), is_sum),
}


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextGenerator:
    path = write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", request.param, QuantType.Q4_0)
    return isotherm.load(path, cache_bytes=0, threads=2)


@pytest.fixture(scope="module")
def smollm(real_model: Callable[[str], Path]) -> TextGenerator:
    return isotherm.load(real_model("smollm2-135m"), context_tokens=1024)


@pytest.mark.parametrize("kind", CASES)
def test_answers_follow_their_grammar(model: TextGenerator, kind: str) -> None:
    grammar, is_valid = CASES[kind]
    num_ended = 0
    for seed in range(4):
        answer = model.generate("rain", raw=True, grammar=grammar, max_tokens=400, temperature=1.0, seed=seed)
        if answer.finish_reason == "stop":
            num_ended += 1
            assert is_valid(answer.text), answer.text
    assert num_ended, "a model of noise may go on for long, but not always"


@pytest.mark.parametrize("kind", CASES)
def test_answers_of_a_real_model(smollm: TextGenerator, kind: str) -> None:
    grammar, is_valid = CASES[kind]
    prompt = "Answer in short: a person of your choice, or the sum of 12 and 30."
    answers = [
        smollm.generate(prompt, grammar=grammar, max_tokens=120, temperature=0.7, seed=seed) for seed in range(3)
    ]
    ended = [answer.text for answer in answers if answer.finish_reason == "stop"]
    assert ended or kind == "json_object", "nothing bounds an object's size"
    assert all(map(is_valid, ended)), ended


scalars = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda a, b: {"type": "integer", "minimum": min(a, b), "maximum": max(a, b)}, *[st.integers(-99, 999)] * 2
    ),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 5)),
    st.builds(
        lambda v: {"enum": v}, st.lists(st.one_of(st.text(max_size=4), st.integers(-9, 9)), min_size=1, max_size=3)
    ),
    st.builds(lambda v: {"const": v}, st.one_of(st.text(max_size=4), st.booleans(), st.none())),
)
NAMES = ["a", "b c", 'd"e', "☃"]


def containers(children: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        st.builds(lambda items, n: {"type": "array", "items": items, "maxItems": n}, children, st.integers(0, 2)),
        st.builds(
            lambda properties, required: {
                "type": "object",
                "properties": properties,
                "required": sorted(required & properties.keys()),
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(NAMES), children, max_size=3),
            st.sets(st.sampled_from(NAMES)),
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(children, min_size=1, max_size=2)),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=st.recursive(scalars, containers, max_leaves=5), seed=st.integers(0, 2**32))
def test_answers_to_random_schemas_are_valid(model: TextGenerator, schema: dict[str, Any], seed: int) -> None:
    grammar = Grammar("json_schema", json.dumps(schema))
    answer = model.generate("the", raw=True, grammar=grammar, max_tokens=250, temperature=1.0, seed=seed)
    if answer.finish_reason == "stop":
        jsonschema.validate(json.loads(answer.text), schema)


def ask(model: TextGenerator, number: int) -> tuple[int, ...]:
    """The first is constrained and greedy; others are free, or follow grammars of their own."""
    grammar = [CASES["json_schema"][0], None, CASES["gbnf"][0], None][number]
    options = {"temperature": 0.0 if number == 0 else 0.9, "seed": number, "max_tokens": 60, "raw": True}
    return model.generate(["the rain", "on the", "sand in", "and"][number], grammar=grammar, **options).token_ids


def test_answers_together_are_answers_alone(model: TextGenerator) -> None:
    alone = [ask(model, number) for number in range(4)]
    together: dict[int, tuple[int, ...]] = {}
    threads = [threading.Thread(target=lambda n=n: together.update({n: ask(model, n)})) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [together[number] for number in range(4)] == alone


@pytest.mark.parametrize("where", ["forward", "commit", "choose", "prepare"])
def test_an_interrupted_step_is_computed_again(
    model: TextGenerator, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    options = {"raw": True, "max_tokens": 30, "grammar": CASES["json_schema"][0]}
    expected = model.generate("the rain in spain", **options).token_ids
    engine = model._open_engine()
    owners: dict[str, Any] = {"forward": engine._compiled, "commit": engine._scheduler}
    owner = owners.get(where, Generation)
    original, calls = getattr(owner, where), []

    def interrupted(*arguments: object) -> object:
        calls.append(arguments)
        result = original(*arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, where, interrupted)
    one = model.stream("the rain in spain", **options)
    two = model.stream("on the sand", **options)
    tokens = [token.token_id for token in next(one).tokens]
    with pytest.raises(KeyboardInterrupt):
        list(two)  # leaves; the other stays
    pieces = list(one)
    assert pieces[-1].answer is not None
    assert pieces[-1].answer.token_ids == expected
    assert tokens == list(expected[: len(tokens)])


def test_a_preempted_answer_goes_on_under_its_grammar(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "llama", QuantType.Q4_0)
    grammar = Grammar("regex", "([a-z]{3} ){150}")
    with isotherm.load(path, cache_bytes=0, threads=2, context_tokens=192) as model:  # three pages for four answers
        options = {"raw": True, "max_tokens": 150, "temperature": 1.0, "grammar": grammar}
        alone = [model.generate("rain", seed=seed, **options) for seed in range(4)]
        together: dict[int, str] = {}

        def ask(seed: int) -> None:
            together[seed] = model.generate("rain", seed=seed, **options).text

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert model.load().num_preemptions > 0
    assert [together[seed] for seed in range(4)] == [answer.text for answer in alone]
    assert all(re.fullmatch("([a-z]{3} )*[a-z]{0,3}", answer.text) for answer in alone)


def test_how_it_ends(model: TextGenerator) -> None:
    whole = model.generate("rain", raw=True, grammar=Grammar("regex", "then the sand"))
    assert (whole.text, whole.finish_reason) == ("then the sand", "stop")
    exact = model.generate("rain", raw=True, grammar=Grammar("regex", "then the sand"), max_tokens=whole.num_tokens)
    assert (exact.text, exact.finish_reason) == ("then the sand", "stop")
    cut = model.generate("rain", raw=True, grammar=Grammar("regex", "then the sand"), max_tokens=whole.num_tokens - 1)
    assert cut.finish_reason == "length"
    open_end = model.generate("rain", raw=True, grammar=Grammar("regex", "the( the)*"), max_tokens=1)
    assert open_end.finish_reason == "length"
    stopped = model.generate("rain", raw=True, grammar=Grammar("regex", "then the sand"), stop=["the s"])
    assert (stopped.text, stopped.stop_string) == ("then ", "the s")


def test_a_started_answer_follows_its_grammar(model: TextGenerator) -> None:
    with model.start(model.prompt_ids("rain", raw=True), grammar=Grammar("regex", "the sea")) as stream:
        text = ""
        while not stream.is_done:
            if piece := stream.poll():
                text += piece.text
            elif not stream.is_done:
                model.step()
    assert text == "the sea"


def test_what_a_bias_and_the_grammar_leave_nothing_of(model: TextGenerator) -> None:
    bias = tuple((token, -float("inf")) for token in range(200) if token not in model._tokenizer.end_ids)
    with pytest.raises(OptionError, match="logit_bias and the grammar together ban every token"):
        model.generate("rain", raw=True, grammar=Grammar("regex", "0+"), logit_bias=bias)


def test_log_probabilities_are_those_of_the_model(model: TextGenerator) -> None:
    free = model.generate("rain", raw=True, max_tokens=1, num_logprobs=3).tokens[0]
    bound = model.generate("rain", raw=True, max_tokens=1, num_logprobs=3, grammar=Grammar("regex", "[0-9]")).tokens[0]
    assert bound.top_logprobs == free.top_logprobs


def test_a_grammar_that_gets_stuck_touches_no_other(model: TextGenerator) -> None:
    expected = model.generate("the rain", raw=True, max_tokens=10).tokens
    other = model.stream("the rain", raw=True, max_tokens=10)
    next(other)
    end = min(model._tokenizer.end_ids)
    with pytest.raises(GrammarError, match="no token of this model can go on"):
        model.generate("rain", raw=True, grammar=Grammar("lark", f'start: "a" <[{end}]>'))
    pieces = list(other)
    assert pieces[-1].answer is not None
    assert pieces[-1].answer.tokens == expected
