"""What a command ends with: an exit code, and one line on stderr instead of a traceback.

0 done · 1 failed · 2 wrong usage · 130 Ctrl-C · 141 the reader of stdout went away · 143 SIGTERM
"""

import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import typer

from isotherm.cli.console import printable
from isotherm.errors import IsothermError, OptionError

DEBUG_VARIABLE = "ISOTHERM_DEBUG"

FAILURE = 1
USAGE = 2
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + 13  # SIGPIPE, which not every system has
TERMINATED = 128 + signal.SIGTERM

# typer keeps the class in a private module, and not in the same one in each version
_UsageError = typer.BadParameter.__mro__[1]


def exit_code_of(run: Callable[[], object]) -> int:
    """Runs a command to its end and says how it ended. What is nobody's fault but ours leaves as it is."""
    _prepare_streams()
    code = _run(run)
    if code == INTERRUPTED and sys.stderr.isatty():
        print(file=sys.stderr)  # the terminal wrote ^C, and the shell's prompt comes next
    return code


def _run(run: Callable[[], object]) -> int:
    try:
        with _sigterm_unwinds():
            code = run()
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except IsothermError as error:
        return _fail(str(error), USAGE if isinstance(error, OptionError) else FAILURE)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except OSError as error:
        return BROKEN_PIPE if _is_broken_pipe(error) else _fail(_system_text(error), FAILURE)
    except SystemExit as end:
        if _is_broken_pipe(end.__context__):  # which typer answers with an exit of its own
            return BROKEN_PIPE
        return end.code if isinstance(end.code, int) else FAILURE
    except Exception as error:
        if not isinstance(error, _UsageError):
            raise
        return _fail(_usage_text(error), USAGE)
    finally:
        _let_go_of_closed_streams()


def _fail(message: str, code: int) -> int:
    if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        traceback.print_exc()
    with suppress(OSError):  # stderr is gone: nobody is left to tell
        print(f"error: {printable(message)}", file=sys.stderr, flush=True)
    return code


def _usage_text(error: Exception) -> str:
    message = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "isotherm"
    return f"{message}{'' if message.endswith('?') else ';'} see `{command} --help`"


def _system_text(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}"


def _is_broken_pipe(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EPIPE


def _prepare_streams() -> None:
    """A stream that was closed before we started swallows; a character that one cannot show becomes a `?`."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # open to the end
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _let_go_of_closed_streams() -> None:
    """Python flushes both streams once more as it ends, and would complain of a pipe that nobody reads."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """SIGTERM leaves like Ctrl-C, so that locks and temporary files go. Off the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)
