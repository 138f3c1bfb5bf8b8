"""The floor of a conversion: the fastest that plain `dd` reads the source and writes the output.

Buffered or direct, whichever is faster, for each of the two. Needs GNU dd and Linux.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

BLOCK = "bs=8M"


def read_seconds(files: Sequence[Path]) -> dict[str, float]:
    """Seconds to read all files, cold, for each way that the file system offers."""
    found = {}
    for way, flags in {"buffered": [], "direct": ["iflag=direct"]}.items():
        drop_cache(files)
        seconds = [_dd(f"if={file}", "of=/dev/null", BLOCK, *flags) for file in files]
        if None not in seconds:
            found[way] = sum(filter(None, seconds))
    return found


def write_seconds(folder: Path, sizes: Sequence[int]) -> dict[str, float]:
    """Seconds to write and fsync files of these sizes, for each way that the file system offers."""
    found = {}
    for way, flags in {"buffered": [], "direct": ["oflag=direct"]}.items():
        with tempfile.TemporaryDirectory(prefix="floor-", dir=folder) as target:
            seconds = [
                _dd("if=/dev/zero", f"of={target}/{number}", BLOCK, "conv=fsync", *flags,
                    f"count={size}", "iflag=count_bytes")
                for number, size in enumerate(sizes)
            ]  # fmt: skip
        if None not in seconds:
            found[way] = sum(filter(None, seconds))
    return found


def drop_cache(files: Sequence[Path]) -> None:
    """Make the next read of these files come from the disk."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _dd(*arguments: str) -> float | None:
    """Seconds that one dd takes; None when it refuses, as for O_DIRECT where there is none."""
    started = time.perf_counter()
    done = subprocess.run(["dd", *arguments], stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - started if done.returncode == 0 else None
