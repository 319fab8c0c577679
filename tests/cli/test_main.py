"""The process as a shell sees it: exit codes, signals, pipes, start-up."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest
from tiny_models import write_tiny

import isotherm
from isotherm.backends.cpu.isa import KNOWN_ISAS
from isotherm.cli import main
from isotherm.types import QuantType

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("ctrl_c")

ISOTHERM = [sys.executable, "-m", "isotherm"]
TIMEOUT_S = 60.0
GLANCE_S = 0.05
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
HEAVY = ("numpy", "rich", "jinja2", "huggingface_hub", "tokenizers", "psutil", "isotherm._native", "pydantic")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(Path(isotherm.__file__).parents[1])  # the package that is under test, installed or not
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])))


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A model whose answers are noise, and long: its context holds more than a test waits for."""
    path = tmp_path / "tiny.gguf"
    metadata = {"tokenizer.chat_template": TEMPLATE}
    return str(write_tiny(path, "llama", QuantType.Q8_0, context_tokens=1 << 15, metadata=metadata))


def _run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    defaults = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": TIMEOUT_S}
    return subprocess.run([*ISOTHERM, *arguments], **{**defaults, **options})  # type: ignore[call-overload,no-any-return]


@contextmanager
def _started(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    pipe = subprocess.PIPE
    with subprocess.Popen([*ISOTHERM, *arguments], stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            process.kill()


def test_version_says_commit_and_instruction_set() -> None:
    ran = _run("--version")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.fullmatch(
        rf"isotherm \d+\.\d+\.\d+\S* \(commit ([0-9a-f]{{7,}}|unknown), ({'|'.join(KNOWN_ISAS)})\)\n", ran.stdout
    )


def test_version_names_the_commit_of_this_source_tree() -> None:
    root = Path(__file__).parents[2]
    if not Path(isotherm.__file__).is_relative_to(root):
        pytest.skip("an installed package names the commit that it was built from")
    git = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
    if git.returncode != 0:
        pytest.skip("not a git checkout")
    commit = re.search(r"commit (\w+)", _run("--version").stdout)
    assert commit is not None
    assert git.stdout.startswith(commit[1])


@pytest.mark.parametrize("arguments", [[], ["--nonsense"], ["nonsense"], ["run"], ["run", "m", "--threads"], ["cache"]])
def test_wrong_usage_is_2(arguments: list[str], capsys: Capture) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    if arguments:
        assert re.fullmatch(r"error: .*see `isotherm.* --help`\n", captured.err)
    else:
        assert "Usage: isotherm" in captured.err


def test_near_command_is_offered(capsys: Capture) -> None:
    assert main(["lsit"]) == 2
    assert "'list'" in capsys.readouterr().err


def test_error_is_one_line_and_1(tmp_path: Path) -> None:
    ran = _run("run", str(tmp_path / "none.gguf"), "Hi")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert re.fullmatch(r"error: .*none\.gguf\n", ran.stderr)


@pytest.mark.parametrize("by_flag", [True, False])
def test_debug_shows_where(tmp_path: Path, by_flag: bool) -> None:
    environment = os.environ | ({} if by_flag else {"ISOTHERM_DEBUG": "1"})
    ran = _run(*(["--debug"] if by_flag else []), "run", str(tmp_path / "none.gguf"), "Hi", env=environment)
    assert ran.returncode == 1
    assert "Traceback" in ran.stderr
    assert ran.stderr.splitlines()[-1].startswith("error: ")


def test_our_own_mistake_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise AssertionError("a promise was broken")

    monkeypatch.setattr("isotherm.load", broken)
    with pytest.raises(AssertionError, match="promise"):
        main(["run", "m", "Hi"])


def test_wrong_isa_is_a_line_and_1(tiny: str) -> None:
    ran = _run("run", tiny, "Hi", env=os.environ | {"ISOTHERM_ISA": "mmx"})
    assert (ran.returncode, ran.stdout) == (1, "")
    assert re.fullmatch(r"error: ISOTHERM_ISA=mmx.*\n", ran.stderr)


def test_answers_are_the_same_for_any_number_of_threads(tiny: str) -> None:
    runs = [_run("run", tiny, "the", "-n", "24", "--threads", threads) for threads in ("1", "2")]
    assert runs[0].returncode == 0
    assert len(runs[0].stdout) > 10
    assert runs[0].stdout == runs[1].stdout


def test_the_reader_may_leave(tiny: str) -> None:
    with _started("run", tiny, "the") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(TIMEOUT_S) == 141
        assert process.stderr.read() in (b"", b"packing the weights for this engine, once\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_quietly(tiny: str, number: int, code: int) -> None:
    with _started("run", tiny, "the") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.send_signal(number)
        assert process.wait(TIMEOUT_S) == code
        assert b"Traceback" not in process.stderr.read()


def test_closed_streams_do_no_harm(tiny: str) -> None:
    shell = f'exec "{sys.executable}" -m isotherm run "{tiny}" the -n 2 <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", shell], timeout=TIMEOUT_S).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_a_line(tiny: str) -> None:
    with Path("/dev/full").open("w") as full:
        ran = _run("run", tiny, "the", "-n", "2", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == "error: No space left on device"
    assert "Traceback" not in ran.stderr


def test_stdout_of_another_encoding_gets_question_marks(tiny: str) -> None:
    ran = _run("run", tiny, "the", "-n", "24", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert ran.returncode == 0
    assert "?" in ran.stdout


def test_commands_import_nothing_heavy() -> None:
    """What makes `isotherm --version` and `--help` quick."""
    code = f"import sys, isotherm.cli.app; print([name for name in {HEAVY} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert ran.stdout == "[]\n"


def test_run_of_a_local_file_opens_no_socket(tiny: str) -> None:
    watched = (
        "import sys\n"
        "def refuse(event, details):\n"
        "    if event.startswith('socket.'): sys.stderr.write(f'SOCKET {event}\\n')\n"
        "sys.addaudithook(refuse)\n"
        "from isotherm.cli import main\n"
        "if sys.argv[1] == 'probe':\n"
        "    import socket; socket.socket().close()\n"
        "else:\n"
        "    sys.exit(main(sys.argv[1:]))\n"
    )

    def watch(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", watched, *arguments]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S)

    probe = watch("probe")
    assert "SOCKET" in probe.stderr, "the watch itself must see a socket"
    ran = watch("run", tiny, "the", "-n", "2")
    assert ran.returncode == 0
    assert "SOCKET" not in ran.stderr


class _Terminal:
    """A person at a terminal: a pseudo terminal with the program at its other end."""

    def __init__(self, *arguments: str) -> None:
        self.process_id, self._handle = pty.fork()
        if self.process_id == 0:
            os.execv(ISOTHERM[0], [*ISOTHERM, *arguments])
        self._seen = b""

    def wait_for(self, text: bytes) -> bytes:
        """Reads until `text` was shown, which must come; what was shown before it."""
        while text not in self._seen:
            more = self._read()
            assert more, self._seen[-500:]
            self._seen += more
        before, _, self._seen = self._seen.partition(text)
        return before

    def wait_for_prompt(self) -> bytes:
        """And until the program sleeps: readline misses a Ctrl-C between its prompt and its wait for a key."""
        before = self.wait_for(b">>> ")
        process, deadline = psutil.Process(self.process_id), time.monotonic() + TIMEOUT_S
        is_asleep = False
        while not is_asleep:
            assert time.monotonic() < deadline, process.status()
            num_switches = process.num_ctx_switches()
            time.sleep(GLANCE_S)
            is_asleep = process.status() == psutil.STATUS_SLEEPING and process.num_ctx_switches() == num_switches
        return before

    def type(self, keys: bytes) -> None:
        os.write(self._handle, keys)

    def exit_code(self) -> int:
        while self._read():
            pass
        _, status = os.waitpid(self.process_id, 0)
        os.close(self._handle)
        return os.waitstatus_to_exitcode(status)

    def _read(self) -> bytes:
        """What comes next; nothing at the end."""
        is_ready, _, _ = select.select([self._handle], [], [], TIMEOUT_S)
        if not is_ready:
            os.kill(self.process_id, signal.SIGKILL)
        try:
            return os.read(self._handle, 4096)
        except OSError:  # so Linux says that the other end is gone
            return b""


def test_chat_at_a_terminal(tiny: str) -> None:
    """Ctrl-C stops the answer only; twice at the prompt it ends."""
    terminal = _Terminal("chat", tiny)
    terminal.wait_for(b"/help for help")
    terminal.wait_for_prompt()
    terminal.type(b"the\r")
    terminal.wait_for(b"the\r\n")
    terminal.wait_for("\N{REPLACEMENT CHARACTER}".encode())  # noise is seldom UTF-8
    terminal.type(b"\x03")
    assert b"tokens is full" not in terminal.wait_for_prompt()  # a full context ends an answer, too
    terminal.type(b"/set\r")
    terminal.wait_for(b"verbose off")
    terminal.wait_for_prompt()
    terminal.type(b"\x03")
    terminal.wait_for(b"Ctrl-C again")
    terminal.wait_for_prompt()
    terminal.type(b"\x03")
    assert terminal.exit_code() == 0


def test_ctrl_d_ends_the_chat(tiny: str) -> None:
    terminal = _Terminal("chat", tiny)
    terminal.wait_for_prompt()
    terminal.type(b"\x04")
    assert terminal.exit_code() == 0


def test_run_at_a_terminal_without_prompt_points_to_chat(tiny: str) -> None:
    terminal = _Terminal("run", tiny)
    terminal.wait_for(b"isotherm chat")
    assert terminal.exit_code() == 2
