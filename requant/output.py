"""The one place that prints: results to stdout, everything else to stderr.

The mode (human, json or quiet) is resolved once per command. In json mode stdout gets exactly one
document.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@dataclass(frozen=True)
class Output:
    """Where a command's words go."""

    json: bool = False
    quiet: bool = False

    def result(self, data: Any, human: Callable[[], RenderableType] | None = None) -> None:
        """Print a command's result: the document in json mode, else what `human` renders."""
        if self.json:
            sys.stdout.write(json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n")
        elif human is not None and not self.quiet:
            _console(sys.stdout).print(human())

    def status(self, message: str) -> None:
        """Say on stderr what is going on, unless quiet."""
        if not self.quiet and not self.json:
            _console(sys.stderr).print(message, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, total_bytes: int, what: str) -> Iterator[Callable[[int], None]]:
        """A bar of bytes with rate and ETA, only when stderr is a terminal and nobody minds."""
        if self.json or self.quiet or not sys.stderr.isatty():
            yield lambda nbytes: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(),
                   TransferSpeedColumn(), TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=_console(sys.stderr), transient=True) as bar:
            task = bar.add_task(what, total=total_bytes)
            yield lambda nbytes: bar.advance(task, nbytes)


def error(message: str) -> None:
    """Print an error to stderr, in every mode."""
    sys.stderr.write(f"error: {message}\n")


def _console(stream: Any) -> Console:
    """A console that never wraps piped output to a terminal's width."""
    width = None if stream.isatty() else 200
    return Console(file=stream, width=width)


def size(nbytes: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"
