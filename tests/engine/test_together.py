"""Many requests in one batch: each answer is, bit for bit, the one that it gets alone."""

import random
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tiny_models import write_tiny

import isotherm
from isotherm.engine.request import Generation
from isotherm.engine.sampling import SampledToken
from isotherm.errors import OptionError
from isotherm.text import TextGenerator
from isotherm.types import QuantType

WORDS = ["the", "rain", "in", "spain", "falls", "on", "the", "sand", "and", "the", "sea"]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextGenerator:
    path = write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", request.param, QuantType.Q4_0)
    return isotherm.load(path, cache_bytes=0, threads=2)


@dataclass
class Client(threading.Thread):
    """Asks for one answer; may go away in the middle."""

    model: TextGenerator
    prompt: str
    seed: int
    leaves_after: int | None = None
    tokens: tuple[SampledToken, ...] = ()
    failed: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __hash__(self) -> int:
        return id(self)

    def run(self) -> None:
        try:
            options = {"raw": True, "max_tokens": 20, "temperature": 0.9, "seed": self.seed, "num_logprobs": 3}
            stream = self.model.stream(self.prompt, **options)
            for number, piece in enumerate(stream):
                if number == self.leaves_after:
                    stream.close()
                    return
                if piece.answer:
                    self.tokens = piece.answer.tokens
        except BaseException as error:
            self.failed.append(error)


def clients(model: TextGenerator, count: int) -> list[Client]:
    rng = random.Random(1)
    prompts = [" ".join(rng.choices(WORDS, k=rng.choice([1, 3, 20, 60]))) for _ in range(count)]
    return [Client(model, prompt, seed, 2 if seed % 5 == 4 else None) for seed, prompt in enumerate(prompts)]


def test_answers_together_are_answers_alone(model: TextGenerator) -> None:
    alone, together = clients(model, 15), clients(model, 15)
    for client in alone:
        client.run()
    for client in together:
        client.start()
    for client in together:
        client.join(60)
        assert not client.is_alive()
    assert not [error for client in [*alone, *together] for error in client.failed]
    assert [client.tokens for client in together] == [client.tokens for client in alone]
    assert any(client.tokens for client in together)


def test_one_request_that_fails_touches_no_other(model: TextGenerator) -> None:
    everything = tuple((token, -float("inf")) for token in range(model.facts.config.vocab_size))
    good = clients(model, 4)
    for client in good:
        client.start()
    with pytest.raises(OptionError, match="bans every token"):
        model.generate("the rain", raw=True, logit_bias=everything)
    for client in good:
        client.join(60)
        assert not client.failed
    alone = clients(model, 4)
    for client in alone:
        client.run()
    assert [client.tokens for client in good] == [client.tokens for client in alone]


@pytest.mark.parametrize("where", ["forward", "commit", "choose"])
def test_an_interrupted_step_is_computed_again(
    model: TextGenerator, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    options = {"raw": True, "max_tokens": 10, "seed": 1}
    expected = model.generate("the rain in spain", **options).token_ids
    engine = model._open_engine()
    owner = {"forward": engine._compiled, "commit": engine._scheduler, "choose": Generation}[where]
    original, calls = getattr(owner, where), []

    def interrupted(*arguments: object) -> object:
        calls.append(arguments)
        result = original(*arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, where, interrupted)
    one = model.stream("the rain in spain", **options)
    two = model.stream("on the sand", **options)
    next(one)
    with pytest.raises(KeyboardInterrupt):
        list(two)  # leaves; the other stays
    pieces = list(one)
    assert pieces[-1].answer is not None
    assert pieces[-1].answer.token_ids == expected


def test_where_pages_run_out_answers_are_the_same(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "llama", QuantType.Q4_0)
    with isotherm.load(path, cache_bytes=0, threads=2, context_tokens=192) as model:  # three pages for four answers
        bias = tuple((token, -float("inf")) for token in model._tokenizer.end_ids)
        options = {"raw": True, "max_tokens": 150, "temperature": 1.0, "logit_bias": bias}
        alone = [model.generate(word, seed=seed, **options).token_ids for seed, word in enumerate(WORDS[:4])]
        together: dict[int, tuple[int, ...]] = {}

        def ask(seed: int) -> None:
            together[seed] = model.generate(WORDS[seed], seed=seed, **options).token_ids

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert model._open_engine()._scheduler.num_preemptions > 0
    assert [together[seed] for seed in range(4)] == alone
    assert {len(ids) for ids in alone} == {150}


def test_a_prompt_that_starts_alike_is_not_computed_again(model: TextGenerator) -> None:
    text = "the rain in spain falls on the sand and " * 20
    first = model.generate(text + "the sea", raw=True, max_tokens=4)
    second = model.generate(text + "the land", raw=True, max_tokens=4)
    assert second.num_cached_tokens >= first.num_prompt_tokens - 64 - len("the sea")
