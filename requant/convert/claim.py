"""Before the first byte and after a failure: whose OUT is, what is done in it, what fits."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from requant.convert.folder import Folder
from requant.convert.journal import (
    JOURNAL_NAME,
    MANIFEST_NAME,
    STAGING_NAME,
    Digest,
    Journal,
)
from requant.convert.plan import Plan
from requant.convert.writer import PARTIAL_SUFFIX, json_bytes, side_files, writing
from requant.errors import CheckpointError

#: Files that lie in OUT at a time, at most, where finished ones are taken from it; more where those
#: of several ranks are written together.
FILES_AT_A_TIME = 4


class Receiver(Protocol):
    """Who is handed finished files of weights; takes them out of the folder unless it `keeps`."""

    keeps: bool

    def holds(self, name: str, digest: Digest) -> bool:
        """Whether it has a file, which need not lie in the folder any more."""

    def file(self, name: str, digest: Digest) -> None:
        """Take a finished file."""

    def settle(self) -> Folder:
        """Wait until all files were taken; where the checkpoint can be read then."""


def claim(plan: Plan, out: Path, receiver: Receiver | None) -> Journal:
    """Make OUT ours, or refuse before the first byte."""
    side_files(plan.source.path)  # raises for what could not be copied at the end
    require_apart(plan, out)
    with writing(out):
        if out.exists() and not out.is_dir():
            raise CheckpointError(f"{out}: is a file; choose a folder")
        out.mkdir(parents=True, exist_ok=True)
    with writing(out / MANIFEST_NAME):
        journal = Journal(out, plan.key, origin=plan.source.folder.origin)
        try:
            journal.absorb()
        except BaseException:
            journal.close()
            raise
    sizes = {file.name: file.nbytes for file in plan.files}
    for name, facts in list(journal.finished.items()):
        nbytes = facts.written.nbytes
        if sizes.get(name) != nbytes or not has(out, name, facts.written, receiver):
            del journal.finished[name]
    return journal


def has(out: Path, name: str, digest: Digest, receiver: Receiver | None) -> bool:
    """Whether a finished file is where it was written, or was taken from there."""
    path = out / name
    if path.is_file() and path.stat().st_size == digest.nbytes:
        return True
    return receiver is not None and receiver.holds(name, digest)


def require_apart(plan: Plan, out: Path) -> None:
    """Raise CheckpointError when OUT lies in the source folder, or the source in OUT."""
    # Not Path.resolve: it raises RuntimeError for a link to itself.
    target, source = Path(os.path.realpath(out)), Path(os.path.realpath(plan.source.path))
    if target.is_relative_to(source):
        raise CheckpointError(f"{out}: lies in the source folder; choose another one")
    if source.is_relative_to(target):
        raise CheckpointError(f"{out}: holds the source folder; choose another one")


def bytes_beside(plan: Plan) -> int:
    """Bytes that OUT takes beside the files of weights: documents, and what is copied."""
    path = plan.source.path
    documents = plan.config, *plan.documents.values()
    copied = sum((path / name).stat().st_size for name in side_files(path))
    return copied + sum(len(json_bytes(document)) for document in documents)


def require_room(
    plan: Plan, out: Path, journal: Journal, disk: int | None, receiver: Receiver | None
) -> None:
    """Raise CheckpointError when the disk cannot hold what is still to be written."""
    kept = {name: n for half in journal.halfway.values() for name, n in half.positions.items()}
    for file in plan.files:  # what a killed run left half-written and cannot continue is room
        if file.name not in kept:
            with writing(out):
                (out / (file.name + PARTIAL_SUFFIX)).unlink(missing_ok=True)
    needed = plan.written_bytes - sum(facts.written.nbytes for facts in journal.finished.values())
    needed -= sum(nbytes for name, nbytes in kept.items() if name not in journal.finished)
    if receiver is not None and not receiver.keeps:
        waiting = (FILES_AT_A_TIME - 1) * max(file.nbytes for file in plan.files)
        together = max(sum(file.nbytes for file in group.files) for group in plan.groups)
        needed = min(needed, waiting + together)
    needed += bytes_beside(plan)
    staged = [path.stat().st_size for path in (out / STAGING_NAME).rglob("*") if path.is_file()]
    needed += max(0, plan.source.folder.disk_bytes(disk) - sum(staged))
    free = shutil.disk_usage(out).free
    if needed > free:
        raise CheckpointError(
            f"{out}: {needed} bytes are to be written, {free} are free; "
            "make room or choose another disk, then repeat the command"
        )


@contextlib.contextmanager
def leaving_behind(journal: Journal, created: bool) -> Iterator[Journal]:
    """Close the journal in the end; after a failure, keep what can be resumed, and remove what is
    nothing yet."""
    try:
        yield journal
    except BaseException:
        with contextlib.suppress(OSError):  # never instead of the error that led here
            if not journal.finished and os.listdir(journal.out) == [JOURNAL_NAME]:
                journal.remove()
                if created:
                    journal.out.rmdir()
        raise
    finally:
        journal.close()
