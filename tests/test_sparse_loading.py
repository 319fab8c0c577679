"""Which FFNs a loaded model computes by neuron: where it is wanted, has zeros, and fits the memory."""

from pathlib import Path

import pytest
from tiny_models import write_tiny

import isotherm
from isotherm.program import ops
from isotherm.text import TextGenerator
from isotherm.types import QuantType


class Heard:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        raise AssertionError("nothing is fetched")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("opt") / "opt.gguf", "opt", QuantType.Q4_0)


def is_by_neuron(model: TextGenerator) -> bool:
    return any(isinstance(op, ops.SparseDown) for op in model.program.ops)


def test_it_can_be_switched_off(path: Path) -> None:
    with isotherm.load(path, cache_bytes=0) as sparse, isotherm.load(path, cache_bytes=0, sparse=False) as dense:
        assert is_by_neuron(sparse)
        assert not is_by_neuron(dense)
        assert sparse.facts.token_bytes == dense.facts.token_bytes
        assert sparse.facts.memory.weights_bytes > dense.facts.memory.weights_bytes
        answers = [model.generate("the rain in spain", raw=True, max_tokens=64) for model in (sparse, dense)]
        assert answers[0].token_ids == answers[1].token_ids
        assert [token.logprob for token in answers[0].tokens] == [token.logprob for token in answers[1].tokens]


def test_weights_by_neuron_give_way_to_the_context(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with isotherm.load(path, cache_bytes=0) as sparse, isotherm.load(path, cache_bytes=0, sparse=False) as dense:
        between = (sparse.facts.memory.total_bytes + dense.facts.memory.total_bytes) // 2
        context_tokens = dense.context_tokens
    monkeypatch.setattr("isotherm.fitting.available_memory_bytes", lambda: between)
    monkeypatch.setattr("isotherm.fitting._MEMORY_SHARE", 1)
    heard = Heard()
    with isotherm.load(path, reporter=heard, cache_bytes=0) as model:
        assert not is_by_neuron(model)
        assert model.context_tokens == context_tokens
    assert [text for text in heard.notices if text.startswith("all neurons are computed")] == heard.notices


def test_activations_without_zeros_are_dense(tmp_path: Path) -> None:
    with isotherm.load(write_tiny(tmp_path / "silu.gguf", "llama", QuantType.Q4_0), cache_bytes=0) as model:
        assert not is_by_neuron(model)
