"""What can go wrong with an answer of the test Hub (server.py), on purpose."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Request:
    """One request. `nbytes`: of the answer's body, or of the request's where it has one; `file`:
    "org/name/path" of what is read or written, if that is known. `status` and `sent` (bytes of the
    answer's body) are told once it is answered."""

    number: int
    method: str
    path: str
    range: str | None = None
    nbytes: int = 0
    file: str | None = None
    status: int = 0
    sent: int = 0


@dataclass(frozen=True)
class Cut:
    """Reset the connection after so many bytes of the answer's body, or of an uploaded one. What a
    POST asks for is done by then: only the answer is lost."""

    after_bytes: int


@dataclass(frozen=True)
class Status:
    """Answer with this status instead, and do nothing. Seconds to wait are told the old way, or
    the Hub's own (`reset`)."""

    code: int
    retry_after: int | None = None
    reset: int | None = None


@dataclass(frozen=True)
class Slow:
    """Send no more than this."""

    bytes_per_second: int


@dataclass(frozen=True)
class Stall:
    """Wait in the middle of the body."""

    after_bytes: int
    seconds: float


@dataclass(frozen=True)
class Corrupt:
    """Invert one byte of the body."""

    offset: int


@dataclass(frozen=True)
class WrongLength:
    """Promise so many bytes more than are sent before the connection is closed; below zero, leave
    out the body's end and promise what is sent."""

    by: int


Fault = Cut | Status | Slow | Stall | Corrupt | WrongLength
Faults = Callable[[Request], Fault | None]


def random_cuts(
    seed: int, number: int, share: float = 0.5, least_bytes: int = 65536, method: str = "GET"
) -> Faults:
    """Cut this many bodies at random: each of `least_bytes` or more, with probability `share`."""
    generator, lock, left = random.Random(seed), threading.Lock(), number

    def fault(request: Request) -> Fault | None:
        nonlocal left
        if request.method != method or request.nbytes < max(least_bytes, 1):
            return None
        with lock:
            if not left or generator.random() >= share:
                return None
            left -= 1
            return Cut(generator.randrange(request.nbytes))

    return fault


def first(number: int, fault: Fault, method: str, contains: str = "") -> Faults:
    """Answer the first so many requests of that method, with that text in the path or in the file's
    name, with the fault."""
    lock, left = threading.Lock(), number

    def get(request: Request) -> Fault | None:
        nonlocal left
        named = contains in request.path or contains in (request.file or "")
        with lock:
            if request.method != method or not named or not left:
                return None
            left -= 1
            return fault

    return get
