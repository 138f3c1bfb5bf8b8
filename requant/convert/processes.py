"""The processes of one conversion, on one machine or several that share OUT.

`torchrun` or `accelerate launch` start them and say by environment variables who is who; without
one of them a conversion is a team of one. Process 0 leads: it claims OUT, reports and completes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from requant.errors import CheckpointError, RequantError, ToldError

#: How long processes wait for each other: the last file of another may take hours. One that died
#: is noticed at once, by its closed connection.
PATIENCE = timedelta(days=30)
#: How long the first ones wait for the last to join.
JOINING = timedelta(minutes=20)
#: How long they try to reach a launcher that was there before them; torch tries twice. One that
#: does not answer was killed.
ANSWERING = timedelta(seconds=10)
#: Seconds between two looks at the others' progress while waiting for them.
LOOK_SECONDS = 0.1

T = TypeVar("T")


class Team:
    """A team of one; the methods are what several processes need to share work."""

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that claims OUT and reports."""
        return self.rank == 0

    def first(self, work: Callable[[], T]) -> T:
        """Let process 0 do something; what it gave, or its error, in every process."""
        return work()

    def each(self, work: Callable[[], T]) -> T:
        """Let each process do something of its own; what it gave, or the first error of any, in
        every process."""
        return work()

    def gather(self, value: T) -> list[T]:
        """What each process has, in order, in every process."""
        return [value]

    def share(self, count: int) -> Iterator[int]:
        """The numbers below `count`, each in one process only, whichever asks first."""
        yield from range(count)

    def done(self, nbytes: int) -> int:
        """Tell of bytes that were done. Returns what process 0 has to add to its progress: the
        bytes that all of them did since it asked last."""
        return nbytes

    def meet(self, meanwhile: Callable[[int], None]) -> None:
        """Wait until all processes are here; `meanwhile` is told of bytes the others did."""


class Processes(Team):
    """Several processes that talk over gloo. Raises CheckpointError when another one is gone."""

    def __init__(self) -> None:
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        self._dist = dist
        waiting = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            store, self.rank, self.size = next(
                rendezvous("env://", timeout=ANSWERING if waiting else JOINING)
            )
            store.set_timeout(JOINING)
            group = dist.PrefixStore("requant-gloo", store)  # type: ignore[attr-defined]
            dist.init_process_group(
                "gloo", store=group, rank=self.rank, world_size=self.size, timeout=PATIENCE
            )
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"cannot reach the other processes of this run: {error}"
            ) from error
        self._store = dist.PrefixStore("requant", store)  # type: ignore[attr-defined]
        self._seen = self._shares = 0

    def close(self) -> None:
        """Leave the others."""
        self._dist.destroy_process_group()

    def first(self, work: Callable[[], T]) -> T:
        answer: list[Any] = [None, None]
        failed: RequantError | None = None
        if self.leads:
            try:
                answer[0] = work()
            except RequantError as error:
                failed, answer[1] = error, str(error)
        with noticing():
            self._dist.broadcast_object_list(answer, src=0)
        if failed is not None:
            raise failed
        if answer[1] is not None:
            raise ToldError(answer[1])
        result: T = answer[0]
        return result

    def each(self, work: Callable[[], T]) -> T:
        failed: RequantError | None = None
        try:
            result = work()
        except RequantError as error:
            failed = error
        told = next(filter(None, self.gather(failed and str(failed))), None)
        if told is not None:
            raise (CheckpointError(told) if self.leads else ToldError(told)) from failed
        return result

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        with noticing():
            self._dist.all_gather_object(values, value)
        return values

    def share(self, count: int) -> Iterator[int]:
        self._shares += 1
        key = f"share-{self._shares}"
        while (number := self._next(key)) < count:
            yield number

    def _next(self, key: str) -> int:
        with noticing():
            return int(self._store.add(key, 1)) - 1

    def done(self, nbytes: int) -> int:
        with noticing():
            total = int(self._store.add("bytes", nbytes))
        news, self._seen = total - self._seen, total
        return news if self.leads else 0

    def meet(self, meanwhile: Callable[[int], None]) -> None:
        with noticing():
            work = self._dist.barrier(async_op=True)
            while not work.is_completed():
                time.sleep(LOOK_SECONDS)
                if self.leads:
                    meanwhile(self.done(0))
            work.wait()
        if self.leads:  # only it has to be there still
            meanwhile(self.done(0))


@contextlib.contextmanager
def team() -> Iterator[Team]:
    """The team that this process belongs to."""
    if _number("WORLD_SIZE", 1) == 1:
        yield Team()
        return
    processes = Processes()
    try:
        yield processes
    finally:
        processes.close()


def launched() -> bool:
    """Whether a launcher such as torchrun or `accelerate launch` started this process."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def local_processes() -> int:
    """How many processes of the team share this machine."""
    return max(1, _number("LOCAL_WORLD_SIZE", 1))


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return _number("LOCAL_RANK", 0)


def _number(variable: str, default: int) -> int:
    found = os.environ.get(variable) or str(default)
    if not found.isdecimal():
        raise RequantError(f"{variable}={found}: a launcher such as torchrun sets it to a number")
    return int(found)


@contextlib.contextmanager
def noticing() -> Iterator[None]:
    """Translate a lost connection."""
    try:
        yield
    except RuntimeError as error:
        raise CheckpointError(
            f"another process of this run is gone ({str(error).splitlines()[0]}); "
            "repeat the command to continue"
        ) from error
