"""Repositories of the test Hub as conversions and downloads meet them: chunks so small that a small
checkpoint has many, waits so short that a test can have many, and what the server's log tells.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner, Result

import requant.convert.readahead as readahead
import requant.convert.reader as reader
import requant.convert.steps as steps
import requant.hub.repository as hub_module
import requant.hub.retries as retries
import requant.hub.spool as spool
from requant.cli import app
from requant.convert.journal import STAGING_NAME
from tests.hub.faults import Corrupt, Fault, Faults, Request
from tests.hub.server import HubServer, reached

REPO = "org/model"
FILES = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
CHUNK = 1 << 14
#: The smallest budget of a spool with such chunks.
LEAST = (spool.CONNECTIONS + 2) * CHUNK

SETTINGS = (
    (spool, "CHUNK_BYTES", CHUNK),
    (hub_module, "LEAST_BYTES", LEAST),
    (hub_module, "HEADER_BYTES", 1 << 9),
    (retries, "FIRST_WAIT", 0.001),
    (readahead, "WINDOW_BYTES", 1 << 13),
    (reader, "DIRECT_BYTES", 1 << 12),
    (steps, "TILE_ELEMENTS", 1 << 13),
    (steps, "CHUNK_ELEMENTS", 1 << 13),
    (constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3),
)
#: What `reach` has opened, until the process ends.
_OPEN = contextlib.ExitStack()


@contextlib.contextmanager
def small_hub(home: Path) -> Iterator[HubServer]:
    """A server that this process reaches, with small chunks and short waits."""
    with HubServer() as server, reached(server, home), pytest.MonkeyPatch.context() as patch:
        for module, name, value in SETTINGS:
            patch.setattr(module, name, value)
        yield server


def reach(endpoint: str, home: Path) -> None:
    """The same in another process, as a hook of team.launched: a server that runs already."""
    server = HubServer()
    server.endpoint = endpoint
    _OPEN.enter_context(reached(server, home))
    for module, name, value in SETTINGS:
        setattr(module, name, value)


def invoke(*args: object) -> Result:
    """Run `requant` in this process."""
    return CliRunner().invoke(app, [str(arg) for arg in args])


def done(*args: object) -> Result:
    """Run `requant`, which must come to its end."""
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    return result


def refused(*args: object) -> str:
    """Run `requant`, which must refuse in one line; the line."""
    result = invoke(*args, "--json")
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and result.stderr.count("\n") == 1, result.output
    return result.stderr


def bodies(server: HubServer, since: int = 0) -> list[Request]:
    """The answers so far, from request `since` on, with bytes of .safetensors files."""
    answered = [request for request in server.requests if request.number >= since]
    return [r for r in answered if r.status == 206 and (r.file or "").endswith(".safetensors")]


def chunks_asked(server: HubServer, since: int = 0) -> list[tuple[str, int]]:
    """The chunks that a spool began to fetch, as file and number, in order."""
    found = []
    for request in bodies(server, since):
        begin = first_byte(request)
        if begin % CHUNK == 0 and request.nbytes > hub_module.HEADER_BYTES:
            assert request.file is not None
            found.append((request.file.removeprefix(f"{REPO}/"), begin // CHUNK))
    return found


def first_byte(request: Request) -> int:
    """Where the range that was asked for begins."""
    assert request.range is not None
    return int(request.range.removeprefix("bytes=").partition("-")[0])


def in_chunk(file: str, index: int, fault: Fault, times: int = 1) -> Faults:
    """Answer the first requests for a chunk of a file with the fault."""
    left = times

    def get(request: Request) -> Fault | None:
        nonlocal left
        wanted = request.range == f"bytes={index * CHUNK}-{(index + 1) * CHUNK - 1}"
        if left and wanted and request.nbytes == CHUNK and request.file == f"{REPO}/{file}":
            left -= 1
            return fault
        return None

    return get


def corrupt_until(finished: Path, file: str, at: int) -> Faults:
    """Invert a byte of a file in each answer that has it, until the file `finished` is there."""

    def get(request: Request) -> Fault | None:
        if request.file != f"{REPO}/{file}" or not request.nbytes or finished.exists():
            return None
        begin = first_byte(request) if request.range else 0
        return Corrupt(at - begin) if begin <= at < begin + request.nbytes else None

    return get


def staged_bytes(at: Path) -> int | None:
    """Bytes of the source on the disk, whole or not; None if they changed while we looked."""
    try:
        before = _chunks(at)
        total = sum(path.stat().st_size for path in before)
        return total if _chunks(at) == before else None
    except OSError:  # a file or a folder that is gone
        return None


def _chunks(at: Path) -> list[Path]:
    return sorted(p for p in at.rglob("*") if p.suffix != ".sha256" and not p.is_dir())


@contextlib.contextmanager
def sampled(out: Path) -> Iterator[list[int]]:
    """While inside, how many bytes of the source lie in OUT, looked at all the time."""
    found: list[int] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.002):
            nbytes = staged_bytes(out / STAGING_NAME)
            if nbytes is not None:
                found.append(nbytes)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
