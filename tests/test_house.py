"""The rules of the house (ARCHITECTURE.md): arrows between rooms, sizes, names. An exception has its reason by it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "isotherm"
NATIVE = ROOT / "native"

MAX_FILE_LINES = 400
MAX_MODEL_LINES = 90
MAX_INIT_LINES = 40  # of code: blank lines and docstrings are free
MAX_ASSEMBLE_LINES = 200
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
MAX_UNDOCUMENTED_LINES = 20

DATA = {"errors", "types", "facts"}
# room: what it may import of isotherm
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "types": set(),
    "facts": {"types"},
    "probe": DATA | {"_native"},
    # _native: loops over strings; quantization: what a file stores in blocks along the wrong axis is rounded anew
    "formats": DATA | {"_native", "quantization"},
    "tokenization": DATA | {"_native"},  # _native: merges of byte-level BPE
    "dialogue": DATA | {"tokenization"},
    "quantization": DATA | {"_native"},  # _native: pages of a mapped file
    "program": DATA | {"quantization"},
    "models": DATA | {"program"},
    "backends": DATA | {"program", "quantization", "_native"},
    "engine": DATA | {"backends", "program", "_native"},  # _native: the sampler
    "grammar": DATA | {"tokenization"},
    "answer": DATA | {"tokenization", "engine"},
    "text": DATA | {"dialogue", "answer", "grammar", "tokenization", "engine", "program"},
    "sparsity": DATA | {"backends", "program", "quantization", "text"},
    # program: what a recording holds; backends: the limits of a GPU
    "evaluation": DATA | {"backends", "engine", "program", "text", "probe"},
    "quality": DATA | {"backends", "evaluation", "load_options", "program", "quantization", "sparsity", "text"},
    "fitting": DATA | {"backends", "engine", "formats", "probe", "program", "quantization"},
    "assemble": DATA
    | {"quality", "backends", "engine", "fitting", "formats", "load_options", "models", "probe", "quantization", "text"}
    | {"program", "sparsity", "tokenization"},
    "load_options": DATA,
    "": {"assemble", "types", "text", "formats"},  # the door; text and formats for the names of its types only
    "__main__": {"cli"},
    "server": DATA | {"", "answer", "dialogue", "engine", "text"},
    "cli": DATA | {"", "answer", "text", "evaluation", "formats"},  # every command finds and loads a model, and says so
}
# what a command may import beside what all commands may: the room that it is about
COMMANDS: dict[str, set[str]] = {
    "cache": {"quantization"},
    "rm": {"quantization"},  # removes the packed twin of a model with it
    "config": {"backends"},  # names the instruction set that a setting forces
    "serve": {"server", "probe"},
    "version": {"backends"},
    "tokenize": {"tokenization"},
    "profile": {"sparsity"},
    "tune": {"quality", "load_options", "models"},
    "train_predictor": {"sparsity"},
    "diagnosis": {"_native", "backends", "probe", "quantization"},  # `doctor` looks into every room
}
# library: the rooms that may import it
LIBRARIES: dict[str, set[str]] = {
    "numpy": {
        *{"backends", "engine", "evaluation", "formats", "grammar", "program", "quality", "quantization", "sparsity"},
        *{"text", "tokenization"},
    },
    "llguidance": {"grammar"},
    "huggingface_hub": {"formats"},
    "jinja2": {"tokenization"},
    "tokenizers": {"tokenization"},
    "fastapi": {"server"},
    "starlette": {"server"},  # which fastapi is made of
    "pydantic": {"server"},
    "pydantic_core": {"server"},  # which pydantic is made of
    "uvicorn": {"server"},
    "uvloop": {"server"},
    "prometheus_client": {"server"},
    "psutil": {"probe", "cli"},
    "matplotlib": {"sparsity"},
    "rich": {"cli"},
    "typer": {"cli"},
    "click": {"cli"},
}
BANNED_NAMES = re.compile(r"^_*(utils?|common|misc|helpers?)$|(_utils?|_helpers?|_manager)$|Manager|Helper|Utils")

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
SOURCES = [*MODULES, *sorted(path for path in NATIVE.rglob("*") if path.suffix in (".cpp", ".h", ".inl"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def room_of(path: Path) -> str:
    """The first name below the package; "" for its __init__."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports_of(path: Path) -> Iterator[str]:
    """Every module imported anywhere in the file, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: imports are absolute"
            assert node.module is not None
            if node.module == "isotherm":
                yield from (_below_door(alias.name) for alias in node.names)
            else:
                yield node.module


def _below_door(name: str) -> str:
    """`from isotherm import errors` names a module, `from isotherm import load` the door."""
    is_module = (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir() or name == "_native"
    return f"isotherm.{name}" if is_module else "isotherm"


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (n for n in ast.walk(tree_of(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


@cache
def tracked_files() -> tuple[Path, ...]:
    """What git tracks, or would: new files that are not ignored too."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listing.stdout.decode().split("\0") if name)
    return tuple(path for path in paths if path.is_file())


# --- arrows ---


def test_every_room_is_known() -> None:
    rooms = {room_of(path) for path in MODULES}
    assert rooms == set(ARROWS), "a new room needs its row in ARROWS and in ARCHITECTURE.md"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_arrows(path: Path) -> None:
    room = room_of(path)
    allowed = ARROWS[room] | {room}
    if room == "cli":
        allowed = allowed | COMMANDS.get(path.stem, set())
    for module in imports_of(path):
        library, _, below = module.partition(".")
        if library == "isotherm":
            target = below.partition(".")[0]
            assert target in allowed, f"{room} may not import {target or 'the door'}"
        elif library not in sys.stdlib_module_names:
            assert room in LIBRARIES.get(library, ()), f"{room} may not import {library}"


def test_rooms_stand_in_one_direction() -> None:
    """The table itself has no ring, so that each room can be understood without those above it."""
    left = {room: ARROWS[room] - {"_native"} for room in ARROWS}
    while left:
        free = {room for room, needs in left.items() if not needs & set(left)}
        assert free, f"a ring among {sorted(left)}"
        left = {room: needs for room, needs in left.items() if room not in free}


@pytest.mark.parametrize("layer", ["kernels", "gpu", "runtime"])
def test_native_layers(layer: str) -> None:
    """Kernels and GPU include themselves; the runtime both and itself; only bindings have heard of Python."""
    allowed = {"kernels": ("kernels",), "gpu": ("gpu",), "runtime": ("kernels", "gpu", "runtime")}[layer]
    for path in sorted((NATIVE / layer).iterdir()):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"nanobind|Python\.h|PyErr", text), f"{name_of(path)} has heard of Python"
        for quoted in re.findall(r'#include "([^"]+)"', text):
            target = (path.parent / quoted).resolve()
            assert target.exists(), f"{name_of(path)} includes {quoted}, which is not there"
            assert target.parent.name in allowed, f"{name_of(path)} includes {quoted}"


def test_architecture_has_every_room() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text[text.index("## Rooms") : text.index("## Seams")]
    missing = [room for room in ARROWS if room not in ("", "__main__") and f"`{room}`" not in table]
    assert not missing, f"ARCHITECTURE.md, Rooms, says nothing of {missing}"


# --- sizes ---


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_file_lines(path: Path) -> None:
    limit = MAX_FILE_LINES
    if path.parent.name == "models" and path.name != "__init__.py":
        limit = MAX_MODEL_LINES
    if path == PACKAGE / "assemble.py":
        limit = MAX_ASSEMBLE_LINES
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= limit, f"{num_lines} lines"


@pytest.mark.parametrize("path", [p for p in MODULES if p.name == "__init__.py"], ids=name_of)
def test_init_lines(path: Path) -> None:
    tree = tree_of(path)
    docstrings = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node)
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    lines = path.read_text(encoding="utf-8").splitlines()
    code = [line for number, line in enumerate(lines, 1) if line.strip() and number not in docstrings]
    assert len(code) <= MAX_INIT_LINES


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions(path: Path) -> None:
    for function in functions_of(path):
        where = f"{function.name}, line {function.lineno}"
        num_lines = (function.end_lineno or 0) - function.lineno + 1
        assert num_lines <= MAX_FUNCTION_LINES, f"{where}: {num_lines} lines"
        a = function.args
        names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs) if arg.arg not in ("self", "cls")]
        assert len(names) <= MAX_PARAMETERS, f"{where}: {len(names)} parameters"


# --- names and words ---


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_docstrings(path: Path) -> None:
    """Every module says what it is for; so does what is public and long. A short signature may speak for itself."""
    tree = tree_of(path)
    if tree.body:
        assert ast.get_docstring(tree), "a module without a docstring"
    for node in public_definitions(tree):
        is_short = (node.end_lineno or 0) - node.lineno < MAX_UNDOCUMENTED_LINES
        assert is_short or ast.get_docstring(node), f"{node.name}, line {node.lineno}, has no docstring"


def public_definitions(scope: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Functions, classes and their methods, down to what is private."""
    for node in scope.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node)


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))], ids=name_of)
def test_names_say_something(path: Path) -> None:
    if path.suffix == ".py":
        defined = {n.name for n in ast.walk(tree_of(path)) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    else:
        defined = set(re.findall(r"\b(?:class|struct)\s+(\w+)", path.read_text(encoding="utf-8")))
    bad = [name for name in (path.stem, path.parent.name, *defined) if BANNED_NAMES.search(name)]
    assert not bad, f"names that say nothing: {bad}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_is_swallowed(path: Path) -> None:
    """No bare except, and none of everything that goes on as if nothing had been."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"
            is_empty = all(isinstance(statement, ast.Pass) for statement in node.body)
            assert not is_empty, f"line {node.lineno}: an except that only passes; contextlib.suppress says it is meant"


def test_one_child_is_no_family() -> None:
    """No class of ours is the base of exactly one other; Protocols, errors and registries of kinds are not meant."""
    bases: dict[str, list[str]] = {}
    own = {node.name for path in MODULES for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef)}
    for path in MODULES:
        if path.stem == "errors":
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    if isinstance(base, ast.Name) and base.id in own:
                        bases.setdefault(base.id, []).append(node.name)
    errors = {n.name for n in ast.walk(tree_of(PACKAGE / "errors.py")) if isinstance(n, ast.ClassDef)}
    alone = {base: children for base, children in bases.items() if len(children) == 1 and base not in errors}
    assert not alone, f"bases with one child: {alone}"


def test_no_hosts_and_no_paths_of_a_machine() -> None:
    """Registries are asked through their own clients; a path of one machine means nothing on another."""
    hosts = [
        "pypi" + ".org",
        "python" + "hosted",
        "hugging" + "face.co",
        "hf" + ".co/",
        "docker" + ".io",
        "ghcr" + ".io",
    ]
    folders = ["/wo" + "rk/", "/ro" + "ot/", "/tmp/" + "dev", "/tmp/" + "nb/"]
    found = []
    for path in tracked_files():
        data = path.read_bytes()
        if b"\0" in data[:4096]:
            continue
        text = data.decode("utf-8", errors="replace")
        found += [f"{name_of(path)}: {word}" for word in hosts + folders if word in text]
    assert not found
