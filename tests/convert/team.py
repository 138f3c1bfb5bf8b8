"""Conversions in processes of their own. They are forked from a server that has imported torch, so
that a test can start many. As a program: the `requant` command, which tells what it writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

import requant.convert.run as run
import requant.convert.steps as steps
from requant.cli import main

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.convert.team", "requant.convert.budget", "torch.distributed"])

#: No test waits longer for anything.
PATIENCE_SECONDS = 60

Hook = Callable[[], None]


@dataclass
class Child:
    """One process of a run, and what it said."""

    process: ForkServerProcess
    out: Path
    err: Path

    @property
    def stdout(self) -> str:
        return self.out.read_text()

    @property
    def stderr(self) -> str:
        return self.err.read_text()

    @property
    def wrote(self) -> list[str]:
        """The weight files that it has written (with the hook `tell`)."""
        lines = self.stderr.splitlines()
        return [line.removeprefix("wrote ") for line in lines if line.startswith("wrote ")]

    def signal(self, sign: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, sign)

    def wait(self) -> int:
        """Its exit status."""
        self.process.join(PATIENCE_SECONDS)
        assert self.process.exitcode is not None, "still running"
        return self.process.exitcode


@contextlib.contextmanager
def launched(
    count: int, arguments: Callable[[int], Sequence[object]], place: Path, *hooks: Hook
) -> Iterator[list[Child]]:
    """`count` processes that convert together, told who they are as torchrun does; `arguments` of
    each. Hooks are called before. What is left of them in the end is killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(count):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count,
                     "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": port}  # fmt: skip
        out, err = place / f"stdout-{rank}", place / f"stderr-{rank}"
        command = ["requant", "convert", *map(str, arguments(rank))]
        told = {key: str(value) for key, value in variables.items()} if count > 1 else {}
        process = SERVER.Process(target=_child, args=(command, told, out, err, hooks))
        process.start()
        children.append(Child(process, out, err))
    try:
        yield children
    finally:
        for child in children:
            child.process.kill()
            child.process.join()


def together(
    count: int, arguments: Sequence[object], place: Path, *hooks: Hook
) -> tuple[list[int], list[Child]]:
    """Launch, and wait for the end: exit statuses and children."""
    with launched(count, lambda rank: arguments, place, *hooks) as children:
        return [child.wait() for child in children], children


def wait_until(happened: Callable[[], object]) -> None:
    """Wait for what other processes do."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def _child(
    command: list[str], variables: dict[str, str], out: Path, err: Path, hooks: Sequence[Hook]
) -> None:
    os.environ.update(variables)
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    torch.set_num_threads(1)
    for hook in hooks:
        hook()
    sys.argv = command
    main()


def tell() -> None:
    """Say on stderr which weight files were written."""
    write_group = run._write_group

    def telling(*args: Any) -> None:
        write_group(*args)
        for file in args[2]:
            os.write(2, f"wrote {file.name}\n".encode())

    run._write_group = telling


def meet_first() -> None:
    """Finish no file before every process of the run has begun one."""
    write_group = run._write_group

    def waiting(*args: Any) -> None:
        place = args[3].out.parent
        (place / f"begun-{os.environ['RANK']}").touch()
        count = int(os.environ["WORLD_SIZE"])
        wait_until(lambda: len(list(place.glob("begun-*"))) == count)
        write_group(*args)

    run._write_group = waiting


def without_privileges() -> None:
    """Let permissions bind this process, even that of root, to whom nothing is forbidden."""
    version_3_of_this_process = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if os.geteuid() == 0:
        assert ctypes.CDLL(None).capset(version_3_of_this_process, (ctypes.c_uint32 * 6)()) == 0


def slowly() -> None:
    """Take some time for each of many small steps."""
    convert = steps._convert

    def slow(*args: object) -> object:
        time.sleep(0.03)
        return convert(*args)  # type: ignore[arg-type]

    steps._convert = slow  # type: ignore[assignment]
    steps.TILE_ELEMENTS = steps.CHUNK_ELEMENTS = 1 << 13


if __name__ == "__main__":
    tell()
    main()
