"""Source files on their way from the Hub: fetched ahead in chunks, kept on disk within a budget.

A chunk is a file of its own, so nothing here can be taken for a checkpoint. Chunks that were passed
stay as long as there is room, so that a run that was killed does not fetch them again. Files are
hashed as a whole while they are read from front to back; what is read of a file beside that (a
scale that lies apart from its codes) comes from chunks whose hashes are compared with that pass's.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, unquote

from requant.convert.header import read_exactly
from requant.convert.writer import writing
from requant.errors import CheckpointError

CHUNK_BYTES = 16 << 20
#: How many chunks are fetched ahead at a time.
CONNECTIONS = 4
#: The smallest budget: what is being fetched, and what is being read.
LEAST_BYTES = (CONNECTIONS + 2) * CHUNK_BYTES

_Key = tuple[str, int]
#: A chunk, and the hash of it.
_Use = tuple[_Key, str]
Fetch = Callable[[str, int, int, Callable[[bytes], object]], None]


class Spool:
    """Chunks of files of the given sizes in bytes, in `folder`, of at most `budget` bytes.

    `fetch(file, begin, end, write)` gets bytes. `name` tells this process from others that share
    the folder.
    """

    def __init__(
        self, folder: Path, budget: int, sizes: Mapping[str, int], fetch: Fetch, name: str = "0"
    ) -> None:
        self._folder, self._budget, self._sizes, self._fetch = folder / name, budget, sizes, fetch
        self._table = folder / f"{name}.sha256"
        self._held: OrderedDict[_Key, int] = OrderedDict()  # the least recently used first
        self._coming: dict[_Key, Future[None]] = {}
        self._fronts: dict[str, int] = {}  # of files that are read: the next chunk
        self._sha256: dict[_Key, str] = {}
        self._pending: dict[str, set[_Use]] = {}  # of files that are read: to tell if it succeeds
        self._told: set[_Use] = set()
        self._failed = self._closed = False
        self._changed = threading.Condition(threading.RLock())
        self._pool = ThreadPoolExecutor(CONNECTIONS, "requant-fetch")
        with writing(folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._take_over()

    def close(self) -> None:
        """Stop fetching."""
        with self._changed:
            self._failed = self._closed = True
        self._pool.shutdown(cancel_futures=True)

    def read(self, target: memoryview, file: str, begin: int, end: int, passing: bool) -> None:
        """Read bytes begin:end of a file; `passing`: as the next of those from front to back."""
        done = 0
        while begin + done < end:
            at = begin + done
            index = at // CHUNK_BYTES
            stop = min(end, (index + 1) * CHUNK_BYTES)
            if passing:
                self._advance(file, index)
            start = index * CHUNK_BYTES
            self._read_chunk((file, index), at - start, stop - start, target[done : stop - begin])
            done += stop - at

    @contextlib.contextmanager
    def passing(self, file: str) -> Iterator[None]:
        """While inside, a file is read from front to back, and fetched ahead."""
        with self._changed:
            self._fronts[file] = 0
            self._pending[file] = set()
        self._order()
        try:
            yield
        finally:
            with self._changed:
                del self._fronts[file]
                self._pending.pop(file, None)

    def passed(self, file: str) -> None:
        """A file was read whole, and is what it should be: record what was used meanwhile."""
        with self._changed:
            self._tell(self._pending.pop(file))

    def forget(self, files: Iterable[str]) -> None:
        """Remove all chunks of these files."""
        gone = set(files)
        with self._changed:
            for key in [key for key in self._held if key[0] in gone]:
                self._remove(key)

    def _read_chunk(self, key: _Key, begin: int, end: int, target: memoryview) -> None:
        """Read from a chunk, which is fetched unless it is held."""
        while True:
            with self._changed:
                if key in self._held:
                    self._held.move_to_end(key)
                    path = self._path(key)
                    with path.open("rb") as chunk:
                        if key not in self._sha256:  # fetched by an earlier run
                            self._sha256[key] = hashlib.file_digest(chunk, "sha256").hexdigest()
                        read_exactly(chunk.fileno(), begin, end, target, path)
                    # A pass that fails is repeated, and what was used meanwhile is not kept.
                    use = key, self._sha256[key]
                    if key[0] in self._pending:
                        self._pending[key[0]].add(use)
                    else:
                        self._tell({use})
                    return
                coming = self._coming.get(key)
                mine = coming is None and self._make_room(key, urgent=True)
                if mine:
                    self._coming[key] = Future()
                elif coming is None:  # wait for what others fetch now to become removable
                    self._changed.wait()
                    continue
            if mine:
                self._get(key)
            else:
                assert coming is not None
                coming.result()

    def _get(self, key: _Key) -> None:
        """Fetch a chunk for which room was made."""
        file, index = key
        path, begin = self._path(key), index * CHUNK_BYTES
        partial = path.with_suffix(".part")
        sha256 = hashlib.sha256()
        failed: BaseException | None = None
        try:
            with writing(path):
                path.parent.mkdir(exist_ok=True)
            with writing(path), partial.open("wb", buffering=0) as out:

                def write(data: bytes) -> None:
                    if self._closed:
                        raise CheckpointError(f"{file}: stopped")
                    sha256.update(data)
                    view = memoryview(data)
                    while view:
                        view = view[out.write(view) :]

                self._fetch(file, begin, begin + self._nbytes(key), write)
            with writing(path):
                partial.rename(path)
        except BaseException as error:
            failed = error
            with contextlib.suppress(OSError):  # never instead of the error that led here
                partial.unlink()
        with self._changed:
            coming = self._coming.pop(key)
            if failed is None:
                self._held[key] = self._nbytes(key)
                self._sha256[key] = sha256.hexdigest()
            self._changed.notify_all()
        if failed is None:
            coming.set_result(None)
        else:
            coming.set_exception(failed)
            raise failed

    def _order(self) -> None:
        """Have the next chunks of the files that are read fetched, as far as there is room."""
        with self._changed:
            for file, front in self._fronts.items():
                for index in range(front, self._count(file)):
                    if len(self._coming) >= CONNECTIONS or self._failed:
                        return
                    key = file, index
                    if key in self._held or key in self._coming:
                        continue
                    if not self._make_room(key, urgent=False):
                        return
                    self._coming[key] = Future()
                    self._pool.submit(self._get_ahead, key)

    def _get_ahead(self, key: _Key) -> None:
        try:
            self._get(key)
        except Exception:  # whoever needs the chunk tries again, and tells
            with self._changed:
                self._failed = True
            return
        self._order()

    def _advance(self, file: str, index: int) -> None:
        with self._changed:
            ahead = index + 1 > self._fronts.get(file, index + 1)
            if ahead:
                self._fronts[file] = index + 1
        if ahead:
            self._order()

    def _make_room(self, key: _Key, urgent: bool) -> bool:
        """Remove chunks until one more fits; only `urgent` ones at the cost of what is ahead."""
        nbytes = self._nbytes(key)
        while self._used() + nbytes > self._budget:
            behind = (k for k in self._held if k[1] + 1 < self._fronts.get(k[0], k[1] + 2))
            victim = next(behind, None)
            if victim is None and urgent:
                victim = max(self._held, key=lambda k: k[1] - self._fronts[k[0]], default=None)
            if victim is None:
                return False
            self._remove(victim)
        return True

    def _used(self) -> int:
        return sum(self._held.values()) + sum(map(self._nbytes, self._coming))

    def _remove(self, key: _Key) -> None:
        del self._held[key]
        self._path(key).unlink(missing_ok=True)

    def _tell(self, uses: set[_Use]) -> None:
        """Record the hashes of chunks whose bytes were used, every one that a chunk ever had."""
        new = sorted(uses - self._told)
        if new:
            with writing(self._table), self._table.open("a") as table:
                table.writelines(f"{sha256} {index} {file}\n" for (file, index), sha256 in new)
            self._told.update(new)

    def _take_over(self) -> None:
        """Find what an earlier run has left."""
        for path in sorted(self._folder.glob("*/*")):
            key = unquote(path.parent.name), int(path.name) if path.name.isdecimal() else -1
            known = key[0] in self._sizes and 0 <= key[1] < self._count(key[0])
            if known and path.stat().st_size == self._nbytes(key):
                self._held[key] = self._nbytes(key)
            else:
                path.unlink()
        while self._used() > self._budget:
            self._remove(next(iter(self._held)))

    def _path(self, key: _Key) -> Path:
        return self._folder / quote(key[0], safe="") / str(key[1])

    def _count(self, file: str) -> int:
        return -(-self._sizes[file] // CHUNK_BYTES)

    def _nbytes(self, key: _Key) -> int:
        return min(CHUNK_BYTES, self._sizes[key[0]] - key[1] * CHUNK_BYTES)


def require_agreement(folder: Path) -> None:
    """Raise CheckpointError when any bytes that were read twice differed; for all processes that
    shared the folder, once all files were read."""
    known: dict[str, str] = {}
    for table in sorted(folder.glob("*.sha256")):
        for line in table.read_text().splitlines():
            sha256, _, key = line.partition(" ")
            if known.setdefault(key, sha256) != sha256:
                index, _, file = key.partition(" ")
                raise CheckpointError(
                    f"{file}: bytes from {int(index) * CHUNK_BYTES} on came differently from the "
                    "Hub when they were fetched twice; start over with --overwrite"
                )


def remove_others(folder: Path, processes: int) -> None:
    """Remove the chunks of more processes than there are now; what their hashes were stays."""
    with writing(folder):
        for path in folder.glob("[0-9]*"):
            if path.name.isdecimal() and int(path.name) >= processes:
                shutil.rmtree(path)


def remove(folder: Path) -> None:
    """Remove what is left of a spool."""
    with writing(folder):
        if folder.exists():
            shutil.rmtree(folder)
