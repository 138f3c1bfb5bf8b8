"""A file read once, from front to back: large reads ahead of who asks, hashed on the way.

Disks and network file systems are fastest that way, and the hash of what was read costs no second
pass. The last windows stay in memory, for a second look at a weight.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from requant.buffers import empty
from requant.convert.header import DATA_ALIGNMENT
from requant.convert.journal import Digest

#: Bytes that are read at a time.
WINDOW_BYTES = 8 << 20
#: How many of them are held, unless told: for reading ahead, and for a second look at an expert of
#: 60 MB while the next is looked at.
WINDOWS, WINDOWS_TWICE = 8, 18
#: How many each of several files has, and the least size of them.
SHARED_WINDOWS = 16
LEAST_BYTES = 1 << 18
#: Windows that may wait for their hash.
UNHASHED = 4


def windows_of(files: int, windows: int) -> tuple[int, int]:
    """How many windows each of so many files has that are read together, and their size in bytes:
    in all about as much as `windows` of one file."""
    if files <= 1:
        return windows, WINDOW_BYTES
    budget = (windows + UNHASHED + 1) * WINDOW_BYTES
    size = budget // (files * (SHARED_WINDOWS + UNHASHED + 1)) // DATA_ALIGNMENT * DATA_ALIGNMENT
    return SHARED_WINDOWS, max(size, LEAST_BYTES)


class ReadAhead:
    """The windows of one file, read in order by a thread of its own.

    `read(begin, end)` gives bytes of the file as uint8; at most `windows` of `size` bytes are held,
    half of them ahead of what was asked for last.
    """

    def __init__(
        self, nbytes: int, read: Callable[[int, int], torch.Tensor], windows: int, size: int
    ) -> None:
        self._nbytes, self._read, self._windows, self._size = nbytes, read, max(windows, 2), size
        self._count = -(-nbytes // self._size)
        self._held: dict[int, torch.Tensor] = {}  # consecutive, up to but without self._next
        self._next = 0
        self._asked = 0
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._sha256 = hashlib.sha256()
        # A daemon: Ctrl-C may come before anybody has it to close.
        self._thread = threading.Thread(target=self._run, name="requant-read", daemon=True)
        self._thread.start()

    def take(self, begin: int, end: int, wait: bool) -> torch.Tensor | None:
        """Bytes begin:end; None when they are no longer held, or too many to be, or when they lie
        far ahead and are not worth a `wait`."""
        first, last = begin // self._size, (end - 1) // self._size
        if end <= begin or last - first >= self._windows // 2:
            return None
        with self._changed:
            gone = first < self._next - len(self._held)
            if gone or (last >= self._asked and not wait):
                return None
            self._ask(last + 1 + self._windows // 2)
            self._changed.wait_for(lambda: self._next > last or self._error or self._closed)
            if self._error is not None:
                raise self._error
            if first not in self._held or last not in self._held:
                return None
            held = [self._held[index] for index in range(first, last + 1)]
        start = begin - first * self._size
        if len(held) == 1:
            return held[0][start : start + end - begin]
        middle = [held[0][start:], *held[1:-1], held[-1][: end - last * self._size]]
        joined = empty((end - begin,), torch.uint8)
        return torch.cat(middle, out=joined)

    def finish(self) -> Digest:
        """Read the rest; the digest of the whole file."""
        with self._changed:
            self._ask(self._count)
            self._changed.wait_for(lambda: self._next == self._count or self._error)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return Digest(self._nbytes, self._sha256.hexdigest())

    def close(self) -> None:
        """Stop reading."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._held.clear()

    def _ask(self, stop: int) -> None:
        if stop > self._asked:
            self._asked = min(stop, self._count)
            self._changed.notify_all()

    def _run(self) -> None:
        unhashed: deque[Future[None]] = deque()
        try:
            with ThreadPoolExecutor(1, "requant-hash-source") as hasher:
                while self._wait_for_demand():
                    begin = self._next * self._size
                    window = self._read(begin, min(begin + self._size, self._nbytes))
                    unhashed.append(hasher.submit(self._sha256.update, window.numpy().data))
                    if len(unhashed) > UNHASHED:
                        unhashed.popleft().result()
                    self._hold(window)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _wait_for_demand(self) -> bool:
        """Whether there is a window to read; waits until one is asked for."""
        with self._changed:
            done = self._next == self._count
            self._changed.wait_for(lambda: done or self._closed or self._next < self._asked)
            return not done and not self._closed

    def _hold(self, window: torch.Tensor) -> None:
        with self._changed:
            self._held[self._next] = window
            self._next += 1
            if len(self._held) > self._windows:
                del self._held[next(iter(self._held))]
            self._changed.notify_all()
