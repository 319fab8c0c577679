"""`isotherm tune` on a tiny model, and what `--quality` then does."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import write_tiny

import isotherm
from isotherm.cli import main
from isotherm.program.ops import Trim
from isotherm.quality import tuning
from isotherm.quality.choice import Choice, LayerTrims, load_choice
from isotherm.quality.search import Candidate
from isotherm.types import QuantType

TEXT = "There is a hand on the other door, and it is in there. " * 200


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path / "cache"))
    return str(write_tiny(tmp_path / "tiny.gguf", "llama", QuantType.Q8_0))


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def saves_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which share is faster depends on the machine; what follows from it does not."""
    monkeypatch.setattr(tuning, "gains", lambda *_: tuple(i / 20 for i in range(20)))

    def timed(candidates: list[Candidate], *_: object) -> list[Candidate]:
        return [_with_speed(candidate, 1 + candidate.share) for candidate in candidates]

    monkeypatch.setattr(tuning, "timed", timed)


def _with_speed(candidate: Candidate, speed: float) -> Candidate:
    return replace(candidate, measured=replace(candidate.measured, speed=speed))


def test_tune_then_run(tiny: str, text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune = ["tune", tiny, "--text", text_file, "--quality", "kl=0.02", "--chunks", "1"]
    assert main([*tune, "--rule", "cats", "--rule", "teal", "--json"]) == 0
    streams = capsys.readouterr()
    found = json.loads(streams.out)
    assert [candidate["rule"] for candidate in found["candidates"]] == ["cats", "teal"]
    assert all(candidate["kl"] <= 0.02 for candidate in found["candidates"])
    assert found["rule"] in ("cats", "teal")
    assert found["measured"]["speed"] > 1
    assert "layer 2 of 2: errors of all rules" in streams.err
    choice = load_choice(Path(found["file"]))
    assert (choice.budget, choice.rule) == ("kl=0.02", found["rule"])
    run = ["run", tiny, "the other", "--raw", "-n", "12"]
    assert main([*run, "--quality", "kl=0.02"]) == 0
    trimmed = capsys.readouterr().out
    assert main([*run, "--quality", found["file"]]) == 0
    assert capsys.readouterr().out == trimmed
    with isotherm.load(tiny, quality="kl=0.02") as model:
        assert model.program.is_trimmed
        assert model.generate("the other", raw=True, max_tokens=12).text.strip() == trimmed.strip()


def test_a_table_and_multiple_choice(
    tiny: str, text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text('{"context": "the door", "choices": [" is in", " on a hand"], "answer": 0}\n')
    tune = ["tune", tiny, "--text", text_file, "--quality", "ppl=+5%", "--chunks", "1", "--rule", "chess"]
    assert main([*tune, "--held-out", text_file, "--items", str(items)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == [
        "RULE",
        "NEURONS",
        "LEFT",
        "OUT",
        "WEIGHTS",
        "SKIPPED",
        "KL",
        "PERPLEXITY",
        "DECODE",
    ]
    assert "ppl=+5%: chess," in out
    assert "multiple choice:" in out


def test_nothing_is_faster(
    tiny: str, text_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuning, "gains", lambda *_: (0.0,) * 20)
    tune = ["tune", tiny, "--text", text_file, "--quality", "kl=0.02", "--chunks", "1", "--rule", "cats"]
    assert main(tune) == 0
    assert "nothing is faster than the exact model here" in capsys.readouterr().out
    with isotherm.load(tiny, quality="kl=0.02") as model:
        assert not model.program.is_trimmed


@pytest.mark.parametrize("family", ["llama", "qwen3moe"])
def test_experts_are_refused(
    family: str, text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path / "cache"))
    path = str(write_tiny(tmp_path / "moe.gguf", family, QuantType.Q4_0, num_experts=4))
    choice = tmp_path / "choice.npz"
    Choice("kl=0.1", "cats", (LayerTrims(gate=Trim(None, 0.5)),) * 2, None).save(choice)
    for arguments in (
        ("tune", path, "--text", text_file, "--quality", "kl=0.1"),
        ("run", path, "the other", "--quality", "kl=0.1"),
        ("run", path, "the other", "--quality", str(choice)),
    ):
        assert main(arguments) == 2
        streams = capsys.readouterr()
        assert f"quality {arguments[-1]}: experts are not tuned: lossy rules take models with one FFN" in streams.err
        assert "packing" not in streams.err, "it is said before anything is computed"


def test_rules_of_a_gate_where_there_is_none(
    tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path / "cache"))
    opt = str(write_tiny(tmp_path / "opt.gguf", "opt", QuantType.Q8_0))
    tune = ["tune", opt, "--text", text_file, "--quality", "kl=0.02", "--chunks", "1", "--rule", "cats"]
    assert main(tune) == 2
    assert "cats: the FFNs of this model have no gate; rules for it are teal, wina" in capsys.readouterr().err
    assert main([*tune, "--rule", "teal", "--json"]) == 0
    streams = capsys.readouterr()
    assert [candidate["rule"] for candidate in json.loads(streams.out)["candidates"]] == ["teal"]
    assert "left out, for the FFNs of this model have no gate: cats" in streams.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--quality names the budget to tune for"),
        (("--quality", "fast"), "it must be exact, kl=NATS"),
        (("--quality", "kl=0.1", "--rule", "magic"), "rule 'magic'; known: cats, chess"),
        (("--quality", "kl=0.1", "--items", "missing.jsonl"), "missing.jsonl"),
        (("--quality", "kl=0.1", "--held-out", "missing.txt"), "missing.txt cannot be read"),
    ],
)
def test_mistakes(
    tiny: str, text_file: str, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", tiny, "--text", text_file, *arguments]) == 2
    assert message in capsys.readouterr().err
