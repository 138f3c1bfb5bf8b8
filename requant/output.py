"""The one place that prints: results to stdout, everything else to stderr.

The mode (human, json or quiet) is resolved once per command. In json mode stdout gets exactly one
document.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from requant.errors import RequantError


@dataclass(frozen=True)
class Output:
    """Where a command's words go."""

    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False

    def of(self, speaks: bool) -> Output:
        """The same, but silent in a process that leaves speaking to another."""
        return self if speaks else Output(json=False, quiet=True)

    def result(self, data: Any, human: Callable[[], RenderableType] | None = None) -> None:
        """Print a command's result: the document in json mode, else what `human` renders."""
        if self.json:
            # ASCII: whatever the locale, and for paths that are not UTF-8.
            _write(json.dumps(data, allow_nan=False) + "\n")
        elif human is not None and not self.quiet:
            _write(_render(human()))

    def status(self, message: str) -> None:
        """Say on stderr what is going on, unless quiet."""
        if not self.quiet and not self.json:
            _console(sys.stderr, sys.stderr.isatty()).print(message, soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, total_bytes: int, what: str) -> Iterator[Callable[[int], None]]:
        """A bar of bytes with rate and ETA, only when stderr is a terminal and nobody minds."""
        if self.json or self.quiet or not sys.stderr.isatty():
            yield lambda nbytes: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(),
                   TransferSpeedColumn(), TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=_console(sys.stderr, True), transient=True) as bar:
            task = bar.add_task(what, total=total_bytes)
            yield lambda nbytes: bar.advance(task, nbytes)


def error(message: str) -> None:
    """Print an error to stderr, in every mode: one line, whatever bytes a name in it holds."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    sys.stderr.write(f"error: {line}\n")


def _render(found: RenderableType) -> str:
    """What rich makes of it for stdout; what its encoding has no letter for is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    page = io.TextIOWrapper(io.BytesIO(), encoding, "backslashreplace", newline="")
    console = _console(page, sys.stdout.isatty())
    console.print(found, soft_wrap=isinstance(found, (str, Text)))
    page.seek(0)
    return page.read()


def _write(text: str) -> None:
    """Write to stdout at once. A reader that has gone away changes nothing, not even the verdict.

    Raises RequantError when stdout is a file that cannot be written.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as refused:
        # What is still buffered must not fail again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(refused, BrokenPipeError):
            raise RequantError(f"cannot write to stdout: {refused.strerror}") from refused


def _console(stream: Any, terminal: bool) -> Console:
    """A console that prints brackets as brackets, and never wraps piped output."""
    return Console(
        file=stream,
        force_terminal=terminal,
        width=None if terminal else 10_000,
        markup=False,
        highlight=False,
        emoji=False,
    )


def size(nbytes: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def plain(text: str) -> Text:
    """Text as it is, for a result that is no table."""
    return Text(text)


def parse_size(option: str, text: str) -> int:
    """Bytes from what people write: 700MB, 1.5 GB, 2GiB, or a plain number."""
    pattern = r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*(?:([kmgt]?)(i?)b)?\s*"
    match = re.fullmatch(pattern, text, re.ASCII | re.I)
    if match is None:
        raise RequantError(f"{option} {text}: expected a size such as 700MB or 2GiB")
    number, letter, binary = match.groups()
    power = " kmgt".index((letter or " ").lower())
    return int(float(number) * (1024 if binary else 1000) ** power)
