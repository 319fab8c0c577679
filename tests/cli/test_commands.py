"""The commands that touch files: pull, list, show, rm, tokenize, cache, config; with real tiny models."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_model import loads_strictly
from tiny_models import write_tiny

from isotherm.cli import main
from isotherm.types import QuantType

Capture = pytest.CaptureFixture[str]

REPO = "someone/Tiny-GGUF"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def fetched(home: Path) -> Path:
    """A model in the Hugging Face cache, in the layout that `huggingface_hub` documents."""
    folder = home / "huggingface" / "hub" / "models--someone--Tiny-GGUF"
    snapshot = folder / "snapshots" / COMMIT
    for path in (snapshot, folder / "blobs", folder / "refs"):
        path.mkdir(parents=True)
    blob = write_tiny(folder / "blobs" / "abc", "llama", QuantType.Q8_0, metadata={"tokenizer.chat_template": TEMPLATE})
    (snapshot / "Tiny.Q8_0.gguf").symlink_to(blob)
    (folder / "refs" / "main").write_text(COMMIT)
    return snapshot / "Tiny.Q8_0.gguf"


def test_list_shows_what_is_here(fetched: Path, capsys: Capture) -> None:
    assert main(["list"]) == 0
    captured = capsys.readouterr()
    header, row = captured.out.splitlines()
    assert header.split() == ["NAME", "SIZE", "SOURCE", "PATH"]
    assert row.split() == [f"{REPO}:Q8_0", f"{fetched.stat().st_size / 1e6:.1f}", "MB", "hub", str(fetched)]
    assert "smollm2" in captured.err
    assert main(["ls", "--json"]) == 0
    captured = capsys.readouterr()
    assert loads_strictly(captured.out) == [
        {"name": f"{REPO}:Q8_0", "size_bytes": fetched.stat().st_size, "source": "hub", "path": str(fetched)}
    ]
    assert captured.err == ""


def test_list_of_nothing(capsys: Capture) -> None:
    assert main(["list"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "isotherm pull" in captured.err
    assert main(["list", "--json"]) == 0
    assert loads_strictly(capsys.readouterr().out) == []


def test_pull_prints_where_the_model_is(fetched: Path, capsys: Capture) -> None:
    assert main(["pull", f"{REPO}:Q8_0", "--offline"]) == 0
    assert capsys.readouterr().out == f"{fetched}\n"
    assert main(["pull", f"{REPO}:Q8_0", "--offline", "--json"]) == 0
    assert loads_strictly(capsys.readouterr().out) == {"name": f"{REPO}:Q8_0", "path": str(fetched)}


def test_pull_offline_says_what_is_missing(capsys: Capture) -> None:
    assert main(["pull", "smollm2", "--offline"]) == 1
    assert capsys.readouterr() == (
        "",
        "error: smollm2 is not on this disk, and offline mode forbids to fetch it\n",
    )


def test_show_tells_what_the_file_is(fetched: Path, capsys: Capture) -> None:
    assert main(["show", REPO, "--json"]) == 0
    facts = loads_strictly(capsys.readouterr().out)
    assert facts["path"] == str(fetched)
    assert (facts["family"], facts["quantization"], facts["num_layers"]) == ("llama", "Q8_0", 2)
    assert (facts["context_tokens"], facts["vocab_size"], facts["licence"]) == (512, 330, "cc0-1.0")
    assert facts["has_chat_template"] is True
    assert facts["metadata"]["general.name"] == "Tiny llama"
    assert main(["show", REPO]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(facts) - {"metadata"} == set(shown) - {"FACT"}
    assert (shown["name"], shown["num_parameters"]) == ("Tiny llama", f"{facts['num_parameters'] / 1e6:.1f} million")


def test_show_template(fetched: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["show", REPO, "--template"]) == 0
    assert capsys.readouterr().out == TEMPLATE + "\n"
    plain = write_tiny(tmp_path / "plain.gguf", "llama", QuantType.Q8_0)
    assert main(["show", str(plain), "--template"]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_show_fetches_nothing(capsys: Capture) -> None:
    assert main(["show", "smollm2"]) == 1
    assert capsys.readouterr().err == ("error: smollm2 is not on this disk; `isotherm pull smollm2` fetches it\n")


def test_names_in_a_file_cannot_speak_to_the_terminal(tmp_path: Path, capsys: Capture) -> None:
    name = "evil\x1b]0;title\x07\nname"
    path = write_tiny(tmp_path / "x.gguf", "llama", QuantType.Q8_0, metadata={"general.name": name})
    assert main(["show", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_damaged_model_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    path = write_tiny(tmp_path / "x.gguf", "llama", QuantType.Q8_0)
    path.write_bytes(path.read_bytes()[:5000])
    assert main(["show", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {path}")
    assert captured.err.count("\n") == 1


def test_rm_deletes_model_and_packed_form(fetched: Path, home: Path, tmp_path: Path, capsys: Capture) -> None:
    other = write_tiny(tmp_path / "other.gguf", "llama", QuantType.Q8_0, seed=1)
    for model in (REPO, str(other)):
        assert main(["run", model, "Hi", "-n", "1", "--raw"]) == 0
    assert len(list((home / "isotherm" / "packed").glob("*.p32"))) == 2
    capsys.readouterr()
    assert main(["rm", f"{REPO}:Q8_0"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"deleted {REPO}:Q8_0, ")
    assert not fetched.exists()
    assert [path.name[:6] for path in (home / "isotherm" / "packed").glob("*.p32")] == ["other-"]


def test_rm_leaves_files_outside_the_caches(tmp_path: Path, capsys: Capture) -> None:
    path = write_tiny(tmp_path / "mine.gguf", "llama", QuantType.Q8_0)
    assert main(["rm", str(path)]) == 2
    assert "delete it yourself" in capsys.readouterr().err
    assert path.exists()


def test_rm_of_something_unknown(capsys: Capture) -> None:
    assert main(["rm", "smolm2"]) == 1
    assert "smollm2" in capsys.readouterr().err


def test_tokenize(fetched: Path, pipe_in: Callable[[bytes], None], capsys: Capture) -> None:
    assert main(["tokenize", REPO, "in the é", "--json"]) == 0
    tokens = loads_strictly(capsys.readouterr().out)
    assert [token["piece"] for token in tokens] == ["in", " the", " ", "\ufffd", "\ufffd"]
    pipe_in("in the é".encode())
    assert main(["tokenize", REPO]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(maxsplit=1)[1] for row in rows] == ["PIECE", "'in'", "' the'", "' '", r"b'\xc3'", r"b'\xa9'"]
    assert [int(row.split()[0]) for row in rows[1:]] == [token["id"] for token in tokens]
    assert main(["tokenize", REPO, "in the é", "--count"]) == 0
    assert capsys.readouterr().out == "5\n"
    assert main(["tokenize", REPO, "<|im_end|>", "--count", "--json"]) == 0
    assert loads_strictly(capsys.readouterr().out) == {"num_tokens": 1}


def test_tokenize_special_adds_bos(tmp_path: Path, capsys: Capture) -> None:
    path = write_tiny(tmp_path / "x.gguf", "gemma3", QuantType.Q8_0)
    counts = []
    for flags in ([], ["--special"]):
        assert main(["tokenize", str(path), "in", "--count", *flags]) == 0
        counts.append(int(capsys.readouterr().out))
    assert counts[1] == counts[0] + 1


def test_cache_list_and_clear(tmp_path: Path, home: Path, capsys: Capture) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "llama", QuantType.Q8_0)
    assert main(["run", str(path), "Hi", "-n", "1"]) == 0
    (home / "isotherm" / "packed" / "old.p32").write_bytes(b"of another version")
    capsys.readouterr()
    assert main(["cache", "list", "--json"]) == 0
    listed = {Path(entry["path"]).name[:4]: entry for entry in loads_strictly(capsys.readouterr().out)}
    assert {name: entry["is_valid"] for name, entry in listed.items()} == {"tiny": True, "old.": False}
    assert all(entry["size_bytes"] == Path(entry["path"]).stat().st_size for entry in listed.values())
    assert main(["cache", "list"]) == 0
    captured = capsys.readouterr()
    assert [row.split()[-1] for row in captured.out.splitlines()] == ["STATE", "ok", "stale"]
    assert captured.err.startswith("2 packed models, ")
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out == ""
    assert list((home / "isotherm" / "packed").iterdir()) == []
    assert main(["cache", "clear"]) == 0


def test_cache_gib_0_keeps_nothing(tmp_path: Path, home: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "llama", QuantType.Q8_0)
    assert main(["run", str(path), "Hi", "-n", "1", "--cache-gib", "0"]) == 0
    assert not (home / "isotherm").exists()


def test_config_shows_values_and_origins(
    monkeypatch: pytest.MonkeyPatch, write_config: Callable[[str], Path], home: Path, capsys: Capture
) -> None:
    file = write_config("temperature = 0.5\nseed = 1\n")
    monkeypatch.setenv("ISOTHERM_SEED", "2")
    monkeypatch.setenv("ISOTHERM_ISA", "scalar")
    assert main(["config", "--json", "--threads", "3", "--offline"]) == 0
    rows = {row.pop("name"): row for row in loads_strictly(capsys.readouterr().out)}
    assert rows["threads"] == {"value": 3, "origin": "flag", "source": "--threads"}
    assert rows["offline"] == {"value": True, "origin": "flag", "source": "--offline"}
    assert rows["seed"] == {"value": 2, "origin": "env", "source": "ISOTHERM_SEED"}
    assert rows["temperature"] == {"value": 0.5, "origin": "file", "source": str(file)}
    assert rows["top_k"] == {"value": 0, "origin": "default", "source": ""}
    assert rows["isa"] == {"value": "scalar", "origin": "env", "source": "ISOTHERM_ISA"}
    assert rows["cache"] == {"value": str(home / "isotherm"), "origin": "env", "source": "HF_HOME"}
    assert rows["config_file"]["value"] == str(file)
    assert main(["config"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["NAME", *rows]
    assert next(line.split() for line in table if line.startswith("ctx")) == ["ctx", "none", "default"]


def test_config_tells_misspelt_variables(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("ISOTHERM_TREADS", "2")
    assert main(["config", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)
    assert captured.err == "ISOTHERM_TREADS is no setting; did you mean ISOTHERM_THREADS?\n"


@pytest.mark.parametrize("command", [["config"], ["run", "m", "Hi"], ["chat", "m"], ["pull", "m"]])
def test_broken_config_stops_every_command_that_reads_it(
    command: list[str], write_config: Callable[[str], Path], capsys: Capture
) -> None:
    path = write_config("threads = 'four'\n")
    assert main(command) == 2
    assert capsys.readouterr().err == (f"error: {path}: threads is 'four'; it must be a whole number from 1 to 1024\n")
