"""A copy of a repository on the Hub: continued after any interruption, checked, whole or not there.

Files are fetched under temporary names, weights first; config.json and the index get their names
last. A journal in the folder keeps the commit, so that a branch that moves meanwhile changes
nothing, and which files were checked.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import try_to_load_from_cache

from requant.convert.folder import CONFIG_NAME, TRACE_NAME
from requant.convert.writer import PARTIAL_SUFFIX, chunks_of, sync_folder, writing
from requant.errors import CheckpointError
from requant.hub.repository import HubFile, Repository, repository_name

#: How many files are fetched at a time.
CONNECTIONS = 4
#: Bytes of a file on the disk that are hashed at a time.
PIECE_BYTES = 1 << 20

Progress = Callable[[int], None]


def download(
    source: str, folder: Path, watch: Callable[[int], contextlib.AbstractContextManager[Progress]]
) -> dict[str, Any]:
    """Copy `org/name[@revision]` into `folder`, or go on with that; {repo, revision, path, files,
    total_bytes, fetched_bytes, seconds}.

    `watch` is given the bytes of all files, and gives what is told of bytes as they are there.
    Raises CheckpointError; what has come by then is kept, and the same call goes on.
    """
    started = time.monotonic()
    name, revision = repository_name(source)
    with writing(folder):
        created = not os.path.lexists(folder)
        folder.mkdir(parents=True, exist_ok=True)
    try:
        copy = _Copy(folder, name, revision)
    except BaseException:
        if created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    with copy:
        found = copy.repository
        copy.require_room()
        total = sum(file.nbytes for file in found.files.values())
        with watch(total) as progress:
            copy.run(progress)
    return {
        "repo": found.name,
        "revision": found.commit,
        "path": str(folder),
        "files": len(found.files),
        "total_bytes": total,
        "fetched_bytes": copy.fetched,
        "seconds": round(time.monotonic() - started, 3),
    }


class _Copy:
    """A folder that is a copy of a repository, or becomes one; locked until it is closed."""

    def __init__(self, folder: Path, name: str, revision: str | None) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.fetched = 0
        others = [path.name for path in folder.iterdir()]
        if others and TRACE_NAME not in others:
            raise CheckpointError(
                f"{folder}: holds something else ({min(others)}, ...); choose an empty folder"
            )
        with writing(folder):
            self._journal = (folder / TRACE_NAME).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._journal.close()
            raise CheckpointError(f"{folder}: another requant is filling it") from error
        try:
            self.repository = self._begin(name, revision)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> _Copy:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others have the folder."""
        empty = os.fstat(self._journal.fileno()).st_size == 0
        self._journal.close()
        if empty:
            (self._folder / TRACE_NAME).unlink(missing_ok=True)

    def _begin(self, name: str, revision: str | None) -> Repository:
        """The commit that was begun with, or that a branch is at now."""
        if os.fstat(self._journal.fileno()).st_nlink == 0:
            raise CheckpointError(f"{self._folder}: another requant has just left it; repeat")
        self._journal.seek(0)
        text = self._journal.read()
        whole = text[: text.rfind("\n") + 1]  # a crash may have cut the last line short
        self._journal.truncate(len(whole.encode()))
        try:
            events = [dict(json.loads(line)) for line in whole.splitlines()]
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{self._folder / TRACE_NAME}: damaged ({error}); remove {self._folder}"
            ) from error
        first = events[0] if events else {}
        self._checked = {event["file"] for event in events[1:] if "file" in event}
        begun, asked = first.get("source_repo", name), first.get("asked")
        commit = first.get("source_revision")
        if begun != name or (first and revision not in (asked, commit)):
            raise CheckpointError(
                f"{self._folder}: is a copy of {begun}@{commit}; choose "
                "another folder, or remove it"
            )
        found = Repository.find(name, commit or revision)
        for file in found.files:
            if file == TRACE_NAME or file.endswith(PARTIAL_SUFFIX):
                raise CheckpointError(f"{found.label}: {file}: a name that requant uses; not taken")
        if not first:
            self._note(source_repo=name, source_revision=found.commit, asked=revision)
        return found

    def _note(self, **event: str | None) -> None:
        with self._lock, writing(self._folder / TRACE_NAME):
            self._journal.write(json.dumps(event) + "\n")
            self._journal.flush()
            os.fsync(self._journal.fileno())

    def require_room(self) -> None:
        """Raise CheckpointError when the disk cannot hold what is still to come."""
        there = sum(
            path.stat().st_size
            for name in self.repository.files
            for path in (self._folder / name, self._partial(name))
            if path.is_file()
        )
        needed = sum(file.nbytes for file in self.repository.files.values()) - there
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise CheckpointError(
                f"{self._folder}: {needed} bytes are to come, {free} are free; make room or choose "
                "another disk, then repeat the command"
            )

    def run(self, progress: Progress) -> None:
        """Fetch and check what is not there yet: weights, then the rest, at last what tells a
        folder with a model."""
        files = self.repository.files
        weights = {n for n in files if n.endswith(".safetensors")}
        indices = {n for n in files if n.endswith(".index.json")}
        config = {n for n in files if n == CONFIG_NAME}
        for names in (weights, set(files) - weights - indices - config, indices, config):
            with ThreadPoolExecutor(CONNECTIONS, "requant-download") as pool:
                jobs = [pool.submit(self._take, name, progress) for name in sorted(names)]
                try:
                    for job in as_completed(jobs):
                        job.result()
                except BaseException:  # of one of them, or an interruption
                    self._stop.set()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

    def _take(self, name: str, progress: Progress) -> None:
        """Have one file in the folder, checked."""
        file, path = self.repository.files[name], self._folder / name
        if path.is_file() and path.stat().st_size == file.nbytes and name in self._checked:
            with self._lock:
                progress(file.nbytes)
            return
        partial = self._partial(name)
        with writing(partial):
            partial.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                path.rename(partial)
        wrong, local = self._fill(partial, name, progress)
        if wrong is not None and local:  # the disk's bytes may be damaged: all of it comes again
            partial.unlink()
            with self._lock:
                progress(-file.nbytes)
            wrong, _ = self._fill(partial, name, progress, cached=False)
        if wrong is not None:
            partial.unlink()
            raise CheckpointError(
                f"{self.repository.label}: {name}: {wrong}; it was damaged on the way: repeat the "
                "command to fetch it again"
            )
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.rename(path)
            sync_folder(path.parent)
        self._note(file=name)

    def _fill(
        self, partial: Path, name: str, progress: Progress, cached: bool = True
    ) -> tuple[str | None, bool]:
        """Go on with what there is of a file, to its end; what is wrong with it, and whether any of
        it was on this disk, also in the client's cache."""
        file = self.repository.files[name]
        found = _Hashes(file)
        with writing(partial), partial.open("a+b") as out:
            out.seek(0)
            come = 0
            for data in _pieces(out, file.nbytes):
                found.update(data)
                come += len(data)
            out.truncate(come)
            with self._lock:
                progress(come)

            def write(data: bytes) -> None:
                if self._stop.is_set():
                    raise CheckpointError(f"{name}: stopped, as another file could not be fetched")
                out.write(data)
                found.update(data)
                with self._lock:
                    self.fetched += len(data)
                    progress(len(data))

            copy = self._cached(name, file) if cached and not come else None
            if copy is not None:
                for data in copy:
                    write(data)
            else:
                self.repository.fetch(name, come, file.nbytes, write)
            out.flush()
            os.fsync(out.fileno())
        return found.difference(), come > 0 or copy is not None

    def _cached(self, name: str, file: HubFile) -> Iterator[bytes] | None:
        """The bytes of a file that the Hub's client has in its cache."""
        where = try_to_load_from_cache(self.repository.name, name, revision=self.repository.commit)
        if not isinstance(where, str) or Path(where).stat().st_size != file.nbytes:
            return None
        return chunks_of(Path(where))

    def _partial(self, name: str) -> Path:
        path = PurePosixPath(name)
        return self._folder / path.with_name(path.name + PARTIAL_SUFFIX)


class _Hashes:
    """What a file's bytes have to give: SHA-256 of a large one, git's SHA-1 of a small one."""

    def __init__(self, file: HubFile) -> None:
        self._file = file
        self._nbytes = 0
        self._hash = hashlib.sha256()
        if file.sha256 is None:  # git hashes a header first
            self._hash = hashlib.sha1(b"blob %d\0" % file.nbytes)

    def update(self, data: bytes) -> None:
        self._hash.update(data)
        self._nbytes += len(data)

    def difference(self) -> str | None:
        """What is wrong with the bytes; None if they are those of the Hub."""
        if self._nbytes != self._file.nbytes:
            return f"{self._nbytes} bytes came, the Hub says {self._file.nbytes}"
        expected = self._file.sha256 or self._file.blob
        if expected is not None and self._hash.hexdigest() != expected:
            kind = "SHA-256" if self._file.sha256 else "SHA-1 of the git blob"
            return f"{kind} {self._hash.hexdigest()}, the Hub says {expected}"
        return None


def _pieces(file: Any, nbytes: int) -> Iterator[bytes]:
    """At most so many bytes of a file from where it is."""
    left = nbytes
    while left and (data := file.read(min(PIECE_BYTES, left))):
        left -= len(data)
        yield data
