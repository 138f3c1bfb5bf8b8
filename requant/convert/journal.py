"""What is finished in an output folder, so that the same command continues after a crash.

One JSON line per event in OUT/.requant-journal.jsonl: first the plan's key, then each finished file
with its size and SHA-256. It is removed when the conversion is complete; from then on
OUT/requant.json, which holds the same key, says what the folder is.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from requant.errors import CheckpointError

JOURNAL_NAME = ".requant-journal.jsonl"
MANIFEST_NAME = "requant.json"


@dataclass(frozen=True)
class Finished:
    """What a complete file has: its size in bytes, and the SHA-256 of them in hex."""

    nbytes: int
    sha256: str


class Journal:
    """The open journal of one conversion; holds a lock on OUT until closed."""

    def __init__(self, out: Path, key: str) -> None:
        """Claim `out`. Raises CheckpointError when it holds anything but this conversion."""
        self.path = out / JOURNAL_NAME
        resuming = self.path.exists()
        if not resuming and any(out.iterdir()):
            raise CheckpointError(
                f"{out}: already holds something else ({min(p.name for p in out.iterdir())}, ...); "
                + (
                    "start over with --overwrite, or choose an empty folder"
                    if (out / MANIFEST_NAME).is_file()
                    else "choose an empty folder, or remove it"
                )
            )
        # Unbuffered: a line that a full disk refused must not be tried again on close.
        self._file = self.path.open("a+b", buffering=0)
        try:
            self.finished = self._claim(out, key)
        except BaseException:
            self.close()
            raise

    def finish(self, file: str, facts: Finished) -> None:
        """Record that a file is complete under its final name."""
        self._append({"file": file, **asdict(facts)})
        self.finished[file] = facts

    def remove(self) -> None:
        """The conversion is complete."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Release the folder."""
        self._file.close()

    def _claim(self, out: Path, key: str) -> dict[str, Finished]:
        """Lock the folder; what is finished in it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{out}: another requant is writing to it; wait for it"
            ) from error
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise CheckpointError(f"{out}: another requant has just finished it")
        try:
            events = self._read()
            finished = {
                str(event["file"]): Finished(int(event["nbytes"]), str(event["sha256"]))
                for event in events[1:]
            }
            found = events[0]["key"] if events else key
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path}: damaged ({error}); remove {out}") from error
        if found != key:
            raise CheckpointError(
                f"{out}: holds an unfinished conversion of another source, recipe or version; "
                "repeat that command to finish it, or start over with --overwrite"
            )
        if not events:
            self._append({"key": key})
        return finished

    def _read(self) -> list[dict[str, Any]]:
        """All whole lines; a last line that a crash cut short does not count."""
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) != len(data):
            os.truncate(self.path, len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def _append(self, event: dict[str, Any]) -> None:
        line = json.dumps(event).encode() + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._file.fileno())


def clear(out: Path) -> None:
    """Empty a folder that requant wrote or began to write, so that a conversion can start over.

    What engines load first goes first. Raises CheckpointError for a folder with anything else in it
    to begin with, or one that is being written to.
    """
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / JOURNAL_NAME).exists() and read_manifest(out) is None:
        raise CheckpointError(
            f"{out}: holds no conversion of requant's ({min(p.name for p in out.iterdir())}, ...), "
            "and --overwrite removes nothing else; remove it yourself"
        )
    with (out / JOURNAL_NAME).open("a+b") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{out}: another requant is writing to it; wait for it"
            ) from error
        (out / "config.json").unlink(missing_ok=True)
        for path in sorted(out.iterdir(), key=lambda path: path.name == MANIFEST_NAME):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != JOURNAL_NAME:
                path.unlink()
        (out / JOURNAL_NAME).unlink()


def read_manifest(out: Path) -> dict[str, Any] | None:
    """OUT/requant.json of a finished conversion, or None."""
    try:
        manifest = json.loads((out / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None
