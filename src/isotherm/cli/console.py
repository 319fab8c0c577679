"""The two streams: results on stdout, everything else on stderr."""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from isotherm.errors import OptionError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_MAX_STDIN_BYTES = 64 << 20
# Terminals obey control characters: a model, or a name in its file, must not speak to ours.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_VISIBLE_CONTROLS = {code: _REPLACEMENT for code in (*range(32), *range(0x7F, 0xA0)) if code not in (9, 10)}


def printable(text: str) -> str:
    """`text` without control characters, but for tabs and line ends."""
    return text.translate(_VISIBLE_CONTROLS)


def notice(text: str) -> None:
    """One line for the person who watches."""
    print(printable(text), file=sys.stderr, flush=True)


def write_text(text: str) -> None:
    """A part of a result, at once; as it is, unless it goes to a terminal."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def print_json(value: Any) -> None:
    is_unicode = sys.stdout.encoding.lower().replace("-", "") == "utf8"
    print(json.dumps(value, indent=2, ensure_ascii=not is_unicode))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns, never cut: a pipe has no width."""
    table = [header, *([printable(cell).replace("\n", _REPLACEMENT) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, num_left: int) -> list[str]:
    """Lines of a Markdown table, aligned: the first `num_left` columns left, the others right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    rules = ["-" * width if column < num_left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if column < num_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    return [line(header), line(rules), *map(line, rows)]


def read_stdin() -> str | None:
    """What is piped in; None where stdin is a terminal. Raises OptionError for what is no text."""
    if sys.stdin.isatty():
        return None
    data = sys.stdin.buffer.read(_MAX_STDIN_BYTES + 1)
    if len(data) > _MAX_STDIN_BYTES:
        raise OptionError(f"stdin holds more than {_MAX_STDIN_BYTES >> 20} MiB; no context is that long")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"stdin is not UTF-8 (byte {error.start}); convert it first") from error


def check_text(text: str, what: str) -> str:
    """Raises OptionError where an argument holds bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OptionError(f"{what} is not UTF-8 (character {error.start})") from error
    return text


class TerminalReporter:
    """A `FetchReporter`: sentences on stderr, and a bar where stderr is a terminal. A context manager."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def notice(self, text: str) -> None:
        self._hide_bar()
        notice(text)

    def progress(self, done_bytes: int, total_bytes: int | None) -> None:
        if not sys.stderr.isatty():
            return
        if self._bar is None or self._task is None:
            self._bar = _make_bar()
            self._task = self._bar.add_task("", total=total_bytes)
            self._bar.start()
        self._bar.update(self._task, completed=done_bytes, total=total_bytes)

    def _hide_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._hide_bar()


def _make_bar() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
