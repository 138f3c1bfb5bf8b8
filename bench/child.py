"""Children that are measured, and the options that the benchmarks which run them share.

The kernel counts this process's memory at the fork into a child's peak, so torch is not imported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Child:
    """What a child process printed on stdout and took."""

    printed: str
    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int

    @property
    def document(self) -> dict[str, Any]:
        """What it printed, as JSON."""
        document: dict[str, Any] = json.loads(self.printed)
        return document


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Child:
    """Run a command to its end; a failure ends this process with the last words of the child."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=stderr, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        words = []
        for stream in (stdout, stderr):
            stream.seek(0)
            words.append(stream.read().decode(errors="replace"))
    if process.returncode != 0:
        raise SystemExit(
            f"{''.join(words)[-3000:]}{' '.join(command)}: exit status {process.returncode}"
        )
    return Child(words[0], seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def requant(*arguments: str) -> Child:
    """Run requant with --json."""
    return run([sys.executable, "-m", "requant", *arguments, "--json"])


def options_parser(description: str | None, size_gb: float) -> argparse.ArgumentParser:
    """A parser with --size-gb, --dir and --json."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    folder = Path(tempfile.gettempdir(), "requant-bench")
    what = f"size of the source ({size_gb:g})"
    parser.add_argument("--size-gb", type=float, default=size_gb, help=what)
    parser.add_argument("--dir", type=_folder, default=folder, help=f"working folder ({folder})")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


def say(message: str) -> None:
    """Tell on stderr what is going on."""
    print(message, file=sys.stderr, flush=True)


def _folder(text: str) -> Path:
    return Path(text).resolve()
