"""Finished files on their way to the Hub while the next ones are made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from requant.convert.folder import Folder
from requant.convert.hub import HubFolder, Repository
from requant.convert.journal import Digest
from requant.convert.push import Push
from requant.convert.writer import writing


class Delivery:
    """An output folder whose files of weights are uploaded; with `keep` they stay in it, too, else
    at most two of them lie there at a time once the Hub takes them at once."""

    def __init__(self, push: Push, out: Path, keep: bool) -> None:
        self._push, self._out, self._keep = push, out, keep
        self._pool = ThreadPoolExecutor(1, "requant-push")
        self._last: Future[object] | None = None

    def holds(self, name: str, digest: Digest) -> bool:
        """Whether a file is safe on the Hub, and need not lie in the folder any more."""
        return not self._keep and self._push.holds(name, digest)

    def file(self, name: str, digest: Digest) -> None:
        """Upload a finished file, after the one before. Raises CheckpointError where that failed."""
        self._wait()
        self._last = self._pool.submit(self._push.file, self._out / name, name, digest)

    def committed(self, name: str) -> None:
        """A file is safe on the Hub."""
        if not self._keep:
            with writing(self._out / name):
                (self._out / name).unlink(missing_ok=True)

    def settle(self) -> Folder:
        """Wait until all files are on the Hub; where the checkpoint can be read then."""
        self._wait()
        self._push.flush()
        if self._keep:
            return Folder(self._out)
        return HubFolder(Repository.find(self._push.repo, self._push.branch), self._out)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """While inside, files may be given to it."""
        try:
            yield
        finally:
            self._pool.shutdown(cancel_futures=True)

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()
