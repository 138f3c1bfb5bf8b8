"""What is finished in an output folder, so that the same command continues after a crash.

One JSON line per event in OUT/.requant-journal.jsonl: first the plan's key, then each finished file
with its size and hashes. Other processes of the same run keep one each, .requant-journal-1.jsonl
and so on, which the next run takes over. They are removed when the conversion is complete; from
then on OUT/requant.json, which holds the same key, says what the folder is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from requant.errors import CheckpointError

JOURNAL_NAME = ".requant-journal.jsonl"
PART_NAME = ".requant-journal-{}.jsonl"
MANIFEST_NAME = "requant.json"
#: Where files that are fetched from elsewhere lie until they are converted.
STAGING_NAME = ".requant-source"
#: Says of a checkpoint that was cut into ranks what each holds.
RANKS_NAME = "ranks.json"


@dataclass(frozen=True)
class Digest:
    """What identifies the content of a file: its size in bytes, and SHA-256 in hex."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Finished:
    """A complete file, and the source's files that were read for it from front to back."""

    written: Digest
    read: dict[str, Digest]


@dataclass(frozen=True)
class Halfway:
    """How far a group of files has come: the `stage` that is next, the bytes of each file that are
    on disk, what is to come at its end already (by tensor, base64), and what was read."""

    stage: int
    positions: dict[str, int]
    late: dict[str, dict[str, str]]
    read: dict[str, Digest]


class Journal:
    """The open journal of one conversion; holds a lock on OUT until closed."""

    def __init__(
        self,
        out: Path,
        key: str,
        process: int = 0,
        origin: Mapping[str, str | None] = MappingProxyType({}),
    ) -> None:
        """Claim `out`; for another process than the first, its journal only. Raises CheckpointError
        when `out` holds anything but this conversion, of a source of this `origin`."""
        self.out, self.key, self._origin = out, key, origin
        self.path = out / (PART_NAME.format(process) if process else JOURNAL_NAME)
        # Other processes may have outlived the first one, and left their journals alone.
        others = {path.name for path in out.iterdir()} - {path.name for path in _parts(out)}
        if others and not process and not self.path.exists():
            raise CheckpointError(
                f"{out}: already holds something else ({min(others)}, ...); "
                + (
                    "start over with --overwrite, or choose an empty folder"
                    if (out / MANIFEST_NAME).is_file()
                    else "choose an empty folder, or remove it"
                )
            )
        # Unbuffered: a line that a full disk refused must not be tried again on close.
        self._file = self.path.open("a+b", buffering=0)
        self.finished: dict[str, Finished] = {}
        self.halfway: dict[str, Halfway] = {}
        try:
            self._claim()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def finish(self, file: str, facts: Finished) -> None:
        """Record that a file is complete under its final name."""
        self._append({"file": file, **asdict(facts)})
        self.finished[file] = facts

    def reach(self, group: str, halfway: Halfway) -> None:
        """Record how far a group of files, named after its first one, has come."""
        self._append({"group": group, **asdict(halfway)})
        self.halfway[group] = halfway

    def absorb(self) -> None:
        """Take over what other processes have finished, in this run or an earlier one. Raises
        CheckpointError when one of them is still at work."""
        for path in _parts(self.out):
            with Journal(self.out, self.key, int(path.stem.rpartition("-")[2])) as part:
                for file, facts in part.finished.items():
                    self.finish(file, facts)
                for group, halfway in part.halfway.items():
                    self.reach(group, halfway)
                path.unlink()

    def remove(self) -> None:
        """The conversion is complete."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Release the folder."""
        self._file.close()

    def _claim(self) -> None:
        """Lock the folder; find out what is finished in it."""
        _lock(self._file, self.out)
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise CheckpointError(f"{self.out}: another requant has just finished it")
        try:
            events = self._read()
            found = events[0]["key"] if events else self.key
            for event in events[1:]:
                self._take(event)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.path}: damaged ({error}); remove {self.out}") from error
        if found != self.key:
            raise CheckpointError(
                f"{self.out}: holds an unfinished conversion of another source, recipe or version; "
                "repeat that command to finish it, or start over with --overwrite"
            )
        if not events:
            self._append({"key": self.key, **self._origin})

    def _take(self, event: dict[str, Any]) -> None:
        read = {name: Digest(**facts) for name, facts in event.pop("read").items()}
        group = event.pop("group", None)
        if group is not None:
            self.halfway[str(group)] = Halfway(**event, read=read)
        else:
            self.finished[str(event["file"])] = Finished(Digest(**event["written"]), read)

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


def begun_with(out: Path) -> tuple[str, str] | None:
    """The Hub repository and revision whose conversion is unfinished in a folder."""
    try:
        with (out / JOURNAL_NAME).open("rb") as journal:
            event = json.loads(journal.readline())
        repo, revision = event["source_repo"], event["source_revision"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (repo, revision) if isinstance(repo, str) and isinstance(revision, str) else None


def clear(out: Path) -> None:
    """Empty a folder that requant wrote or began to write, so that a conversion can start over.

    What engines load first goes first. Raises CheckpointError for a folder with anything else in it
    to begin with, or one that is being written to.
    """
    if not out.is_dir() or not any(out.iterdir()):
        return
    known = (out / JOURNAL_NAME).exists() or _parts(out) or read_manifest(out) is not None
    if not known:
        raise CheckpointError(
            f"{out}: holds no conversion of requant's ({min(p.name for p in out.iterdir())}, ...), "
            "and --overwrite removes nothing else; remove it yourself"
        )
    with contextlib.ExitStack() as locks:
        for path in [out / JOURNAL_NAME, *_parts(out)]:
            _lock(locks.enter_context(path.open("a+b")), out)
        (out / "config.json").unlink(missing_ok=True)
        for path in sorted(out.iterdir(), key=lambda path: path.name == MANIFEST_NAME):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != JOURNAL_NAME:
                path.unlink()
        (out / JOURNAL_NAME).unlink()


def _parts(out: Path) -> list[Path]:
    """The journals of other processes than the first."""
    return sorted(out.glob(PART_NAME.format("[0-9]*")))


def _lock(journal: IO[bytes], out: Path) -> None:
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError(f"{out}: another requant is writing to it; wait for it") from error


def read_manifest(out: Path) -> dict[str, Any] | None:
    """OUT/requant.json of a finished conversion, or None."""
    try:
        manifest = json.loads((out / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None
