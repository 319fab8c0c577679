"""What is chosen for a model, the file of it, and what it makes of a Program."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_tiny

import isotherm
from isotherm.errors import OptionError, StatsFileError
from isotherm.formats.checkpoint import open_checkpoint
from isotherm.load_options import Budget, parse_budget
from isotherm.models import FAMILIES
from isotherm.program.ops import Trim
from isotherm.program.recorder import Program
from isotherm.quality.choice import Choice, LayerTrims, Measured, choice_path, load_choice, trimmed_program
from isotherm.types import QuantType

MEASURED = Measured(0.009, 0.001, 20.1, 20.0, 0.1, 1.05, 0.38, 0.39)
trims = st.one_of(
    st.none(),
    st.builds(Trim, st.none(), st.floats(-3, 3, width=32)),
    st.builds(
        lambda values: Trim(np.array(values, np.float32).tobytes()), st.lists(st.floats(0, 9, width=32), max_size=5)
    ),
)
layers = st.lists(st.builds(LayerTrims, trims, trims), max_size=4).map(tuple)


@given(layers=layers, measured=st.sampled_from([None, MEASURED]))
@settings(max_examples=50)
def test_a_file_gives_back_what_was_kept(
    layers: tuple[LayerTrims, ...], measured: Measured | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("choice") / "sub" / "a.npz"
    choice = Choice("kl=0.01", "cats", layers, measured)
    choice.save(path)
    assert load_choice(path) == choice


@given(position=st.integers(0, 10**6), byte=st.integers(0, 255))
@settings(max_examples=200)
def test_damage_is_told_or_harmless(position: int, byte: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("choice") / "a.npz"
    Choice("kl=0.01", "cats", (LayerTrims(gate=Trim(np.ones(8, np.float32).tobytes())),), MEASURED).save(path)
    data = bytearray(path.read_bytes())
    data[position % len(data)] = byte
    path.write_bytes(data)
    with suppress(StatsFileError):
        assert isinstance(load_choice(path), Choice)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("exact", None),
        ("somewhere/choice.npz", None),
        ("kl=0.01", Budget("kl", 0.01)),
        ("kl=1e-3", Budget("kl", 0.001)),
        ("ppl=+1%", Budget("ppl", 0.01)),
        ("ppl=2.5%", Budget("ppl", 0.025)),
    ],
)
def test_budgets(text: str, budget: Budget | None) -> None:
    assert parse_budget(text) == budget
    if budget is not None:
        assert parse_budget(str(budget)) == budget


@pytest.mark.parametrize(
    "text", ["", "best", "kl", "kl=", "kl=-1", "kl=0", "kl=nan", "kl=2", "ppl=1", "ppl=+e%", "kl=1..2"]
)
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"kl=0\.01, or ppl=\+PERCENT%"):
        parse_budget(text)


def recorded(path: Path) -> tuple[Program, str]:
    with open_checkpoint(path) as checkpoint:
        return FAMILIES[checkpoint.config.family](checkpoint.config), checkpoint.identity


def test_a_choice_of_another_model_is_refused(tmp_path: Path) -> None:
    program, _ = recorded(write_tiny(tmp_path / "a.gguf", "llama", QuantType.Q8_0))
    ungated, _ = recorded(write_tiny(tmp_path / "b.gguf", "opt", QuantType.Q8_0))
    gate = LayerTrims(gate=Trim(np.ones(512, np.float32).tobytes()))
    assert trimmed_program(program, [gate, LayerTrims()]).ffns[0].trim_gate == gate.gate
    narrow = LayerTrims(gate=Trim(np.ones(511, np.float32).tobytes()))
    for other, wrong in ((program, [gate]), (program, [gate, narrow]), (ungated, [gate, gate])):
        with pytest.raises(OptionError, match="of another model; run `isotherm tune` again"):
            trimmed_program(other, wrong)


def test_quality_of_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trimmed by default, exact where it is asked for, side by side, and neither takes the other's keys and values."""
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path))
    path = write_tiny(tmp_path / "a.gguf", "llama", QuantType.Q4_0)
    _, identity = recorded(path)
    layers = (LayerTrims(gate=Trim(None, 0.3)),) * 2
    Choice("kl=0.5", "topk", layers, None).save(choice_path(tmp_path, identity, "kl=0.5"))
    prompt, limits = "the rain in spain and the other " * 12, {"raw": True, "max_tokens": 24}
    with isotherm.load(path) as model:
        exact = model.generate(prompt, **limits)
    kv_dir = tmp_path / "kv"
    with isotherm.load(path, quality="kl=0.5", kv_dir=kv_dir) as model:
        trimmed = model.generate(prompt, **limits)
        assert trimmed.tokens != exact.tokens
        assert model.generate(prompt, exact=True, **limits).tokens == exact.tokens
        again = [model.generate(prompt, exact=is_exact, **limits) for is_exact in (True, False)]
        assert [answer.tokens for answer in again] == [exact.tokens, trimmed.tokens]
        assert all(answer.num_cached_tokens > 64 for answer in again)
        assert (model.logits([1, 2, 3]) != next(model.logit_blocks([1, 2, 3], range(3), exact=True))).any()
    for sparse in (True, False):
        with isotherm.load(path, quality="kl=0.5", kv_dir=kv_dir, sparse=sparse) as model:
            found = [model.generate(prompt, exact=is_exact, **limits) for is_exact in (True, False)]
            assert [answer.tokens for answer in found] == [exact.tokens, trimmed.tokens]
            # another way to compute the same is another Program, whose pages are kept apart
            assert all(answer.num_cached_tokens > 0 for answer in found) == sparse
    with isotherm.load(path, kv_dir=kv_dir) as model:
        assert model.generate(prompt, **limits).tokens == exact.tokens


def test_where_nothing_was_faster_it_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path))
    path = write_tiny(tmp_path / "a.gguf", "llama", QuantType.Q4_0)
    file = tmp_path / "choice.npz"
    Choice("kl=0.01", None, (), None).save(file)
    with isotherm.load(path) as exact, isotherm.load(path, quality=str(file)) as model:
        assert model.program == exact.program


def test_without_a_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path))
    path = write_tiny(tmp_path / "a.gguf", "llama", QuantType.Q4_0)
    with pytest.raises(OptionError, match=r"no rule was chosen .*; `isotherm tune MODEL --quality kl=0\.01"):
        isotherm.load(path, quality="kl=0.01")
    with pytest.raises(StatsFileError, match="cannot be read"):
        isotherm.load(path, quality=str(tmp_path / "missing.npz"))
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    with pytest.raises(StatsFileError, match="tune again"):
        isotherm.load(path, quality=str(tmp_path / "bad.npz"))
    choice = Choice("kl=0.01", "cats", (LayerTrims(),), None)
    choice.save(tmp_path / "other.npz")
    with pytest.raises(OptionError, match="of another model"):
        isotherm.load(path, quality=str(tmp_path / "other.npz"))
    assert replace(choice, rule=None) != choice
