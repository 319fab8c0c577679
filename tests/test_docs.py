"""The documents hold: Python examples run, shell lines parse, links lead somewhere, tables list what there is."""

import ast
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import typer
from server.serving import Serving
from tiny_models import FAMILIES, write_tiny

import isotherm
from isotherm import errors
from isotherm.cli.app import build_app
from isotherm.cli.settings import SETTINGS
from isotherm.formats.aliases import ALIASES
from isotherm.formats.fetching import size_text
from isotherm.formats.hub_cache import parse_hub_name
from isotherm.types import QuantType, SamplingParams

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
# Where examples find the server.
SERVER = "http://localhost:8080"
# What an example may take for granted: a text to score.
TEXT = "The other hand is on the door and there is nothing in it. " * 60


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its first line of content."""

    language: str
    content: str
    line: int


def fenced_blocks(page: Path) -> list[Block]:
    blocks, opened = [], None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if opened is None and line.startswith("```"):
            opened = Block(line.removeprefix("```").strip(), "", number + 1)
        elif opened is not None and line == "```":
            blocks.append(opened)
            opened = None
        elif opened is not None:
            opened = Block(opened.language, f"{opened.content}{line}\n", opened.line)
    assert opened is None, f"{page.name}: the block at line {opened and opened.line} has no end"
    return blocks


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))


def command_lines(page: Path) -> Iterator[tuple[int, str]]:
    """Shell lines with their numbers: those after `$ ` where a block shows output too."""
    for block in fenced_blocks(page):
        if block.language in ("", "sh", "bash", "shell", "console"):
            shows_output = block.content.startswith("$ ")
            for number, line in enumerate(block.content.splitlines(), start=block.line):
                if "isotherm " in line and (line.startswith("$ ") or not shows_output):
                    yield number, line.removeprefix("$ ")


def isotherm_calls(line: str) -> Iterator[list[str]]:
    """Arguments of each call of isotherm in a shell line, redirections and variables left out."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = iter(lexer)
    call: list[str] | None = None
    for word in words:
        if set(word) <= set("&|;"):
            if call is not None:
                yield call
            call = None
        elif set(word) <= set("<>"):
            next(words)
        elif call is not None:
            call.append(word)
        elif word == "isotherm":
            call = []
    if call is not None:
        yield call


def parse_call(arguments: list[str]) -> None:
    """Raises what the command line would say of these arguments; runs nothing."""
    command, rest = find_command(arguments)
    if hasattr(command, "commands"):  # `isotherm --version`
        return
    values = command.make_context(command.name, list(rest)).params
    for name, value in values.items():
        if name in SETTINGS and isinstance(value, str):
            SETTINGS[name].parse(value, name)


def find_command(arguments: list[str]) -> tuple[Any, list[str]]:
    """The command that the first words name, and the other words. Flags of `isotherm` itself are looked up."""
    command: Any = typer.main.get_command(build_app())
    for index, word in enumerate(arguments):
        if not hasattr(command, "commands"):
            return command, arguments[index:]
        if word.startswith("-"):
            assert word in flags_of(command), f"isotherm has no {word}"
            continue
        assert word in command.commands, f"there is no command {word!r}"
        command = command.commands[word]
    return command, []


def flags_of(command: Any) -> set[str]:
    return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as code hosts make them."""
    headings = re.findall(r"(?m)^#+ (.+)$", prose(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table_rows(page: Path, first_cell: str) -> dict[str, list[str]]:
    """Cells by the first one, of the table whose heading starts with `first_cell`."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {first_cell} |"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip().strip("`") for cell in line.strip("|").split(" |")]
        rows[cells[0]] = cells[1:]
    return rows


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template and room for the examples' contexts."""
    path = tmp_path_factory.mktemp("docs") / "tiny.gguf"
    sizes = {"num_layers": 1, "hidden_size": 64, "ffn_size": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
    metadata = {"tokenizer.chat_template": CHATML}
    return write_tiny(path, "llama", QuantType.Q8_0, metadata=metadata, context_tokens=2048, **sizes)


@pytest.fixture
def load_tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chat_model: Path) -> Callable[..., Any]:
    """`isotherm.load` of whatever a reader may have opens the tiny model instead."""
    load = isotherm.load

    def load_instead(name: str, **options: Any) -> Any:
        assert name in ALIASES or name.endswith(".gguf") or parse_hub_name(name), f"{name} is no alias"
        return load(chat_model, **options)

    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(isotherm, "load", load_instead)
    return load_instead


@pytest.fixture(scope="session")
def served(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server that has the tiny model as smollm2."""
    home = tmp_path_factory.mktemp("served")
    model = home / "smollm2.gguf"
    model.hardlink_to(chat_model)
    with Serving([str(model), "--threads", "1"], home) as server:
        yield server.wait_healthy().url


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
@pytest.mark.usefixtures("load_tiny")
def test_python_examples_run(page: Path, served: str) -> None:
    """Those of a page one after the other, as a reader would type them in."""
    names: dict[str, Any] = {"text": TEXT}
    for block in fenced_blocks(page):
        if block.language == "python":
            tree = ast.parse(block.content.replace(SERVER, served), filename=str(page))
            exec(compile(ast.increment_lineno(tree, block.line - 1), str(page), "exec"), names)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_curl_examples_are_answered(page: Path, served: str) -> None:
    for block in fenced_blocks(page):
        if block.language == "sh" and block.content.startswith("curl ") and SERVER in block.content:
            script = block.content.replace(SERVER, served)
            script = 'set -e; curl() { command curl --fail-with-body --silent --show-error "$@"; }\n' + script
            run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
            assert run.returncode == 0, f"{page.name}:{block.line}: {run.stdout}{run.stderr}"
            assert run.stdout


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_shell_lines_parse(page: Path) -> None:
    for number, line in command_lines(page):
        for arguments in isotherm_calls(line):
            try:
                parse_call(arguments)
            except Exception as error:
                pytest.fail(f"{page.name}:{number}: {line}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_in_prose_exist(page: Path) -> None:
    """Command and flags; arguments may be left out where a sentence only names the command."""
    for quoted in re.findall(r"`isotherm( [^`]+)?`", prose(page)):
        words = re.split(r" (?:\\?\||<) ", quoted)[0].split()
        command, rest = find_command([word for word in words if word not in ("…", "...", "COMMAND")])
        for word in rest:
            assert not word.startswith("-") or word in flags_of(command), f"{page.name}: isotherm{quoted}: {word}"


def test_our_flags_beside_those_of_others_exist() -> None:
    app: Any = typer.main.get_command(build_app())
    flags = {flag for name in app.commands for flag in flags_of(app.commands[name])}
    rows = table_rows(DOCS / "from-ollama-and-llama.cpp.md", "llama-server")
    ours = {flag for cells in rows.values() for flag in re.findall(r"--[a-z-]+", cells[-1])}
    assert len(ours) > 15
    assert ours <= flags


def test_a_wrong_line_is_found() -> None:
    good = 'FOO=1 isotherm run smollm2 "Why?" -n 3 < in.txt | tee out.txt && isotherm cache list  # comment'
    assert list(isotherm_calls(good)) == [["run", "smollm2", "Why?", "-n", "3"], ["cache", "list"]]
    parse_call(["run", "smollm2", "--threads", "2"])
    for wrong in (["rum", "x"], ["run"], ["run", "x", "--thread", "2"], ["run", "x", "--threads", "many"], ["--bad"]):
        with pytest.raises(Exception, match=r"."):
            parse_call(wrong)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{page.name} links to {target}, which does not exist"
        assert linked.is_relative_to(ROOT), f"{page.name} links out of the repository: {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_variables_exist(page: Path) -> None:
    known = {setting.env_name for setting in SETTINGS.values()}
    others = ("CACHE", "CUDA", "DEBUG", "ISA", "NVRTC", "OPENCL", "TEST_GPU", "SHARED", "NAME")  # NAME stands for any
    known |= {f"ISOTHERM_{name}" for name in others}
    assert set(re.findall(r"ISOTHERM_[A-Z_]*[A-Z]", page.read_text(encoding="utf-8"))) <= known


def test_readme_begins_with_the_two_commands() -> None:
    first = fenced_blocks(README)[0]
    make_environment, run, test = first.content.splitlines()
    assert make_environment == "python3 -m venv .venv && . .venv/bin/activate"
    assert run == 'pip install . && isotherm run smollm2 "Why is the sky blue?"'
    assert test == 'pip install ".[test]" && pytest'
    assert first.line == 4, "only the title comes before"


def test_readme_names_every_command() -> None:
    table = " ".join(table_rows(README, "command"))
    app: Any = typer.main.get_command(build_app())
    for name, command in app.commands.items():
        assert command.hidden or f"isotherm {name}" in table


def test_index_lists_every_page() -> None:
    linked = set(re.findall(r"\]\((\w[\w.-]*\.md)\)", (DOCS / "index.md").read_text(encoding="utf-8")))
    assert linked == {page.name for page in DOCS.glob("*.md")} - {"index.md"}


def test_models_lists_the_aliases_families_and_types() -> None:
    page = DOCS / "models.md"
    expected = {
        alias.name: [alias.description, size_text(alias.size_bytes), alias.licence] for alias in ALIASES.values()
    }
    assert table_rows(page, "alias") == expected
    assert set(table_rows(page, "family")) == set(FAMILIES)
    types = re.search(r"\*\*Weights\*\*: ([\w,\s]+)\.", page.read_text(encoding="utf-8"))
    assert types is not None
    assert types[1].replace("\n", " ").split(", ") == [quant_type.value for quant_type in QuantType]


def test_python_lists_the_sampling_fields() -> None:
    listed = {name.strip(" `") for cell in table_rows(DOCS / "python.md", "field") for name in cell.split(",")}
    assert listed == {field.name for field in fields(SamplingParams)}


def test_troubleshooting_has_every_error() -> None:
    headings = set(re.findall(r"(?m)^## (\w+)$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8")))
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and kind is not errors.IsothermError}
    assert headings == kinds


def test_troubleshooting_quotes_messages_that_exist() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # messages of several lines
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    tables = re.findall(r"(?m)^\| message has \|.*\n\|[-|]+\n((?:\|.*\n)+)", page)
    quotes = [quote for table in tables for quote in re.findall(r"(?m)^\| `([^`]+)` \|", table)]
    assert len(quotes) > 15
    for part in chain(*(quote.split("…") for quote in quotes)):
        assert part.strip() in source, part


def test_licences_and_changelog_are_complete() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"].values()
    needed = [*project["project"]["dependencies"], *project["build-system"]["requires"], *chain(*extras)]
    third_party = (ROOT / "THIRD_PARTY_LICENSES.md").read_text(encoding="utf-8")
    for requirement in needed:
        name = re.split(r"[<>=~!\[; ]", requirement)[0]
        assert re.search(rf"(?m)(^|[ (]){re.escape(name)}\b", third_party), name
    for name in project["project"]["license-files"]:
        assert (ROOT / name).is_file()
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert f"## {isotherm.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
