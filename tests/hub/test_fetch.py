"""Bytes from the Hub, in order and each once, whatever happens to connections; and when to stop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_url

import requant.hub.retries as retries
from requant.errors import CheckpointError
from requant.hub.fetch import fetch
from requant.hub.retries import QUICK_ATTEMPTS, attempt
from tests.hub.server import (
    Corrupt,
    Cut,
    Fault,
    HubServer,
    Request,
    Slow,
    Stall,
    Status,
    WrongLength,
    first,
    random_cuts,
    reached,
)

REPO, FILE = "org/model", "model.safetensors"
WEIGHTS = bytes(range(251)) * 2000
CDN = "?Expires"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    with HubServer() as server, reached(server, tmp_path / "home"):
        server.add(REPO, {FILE: WEIGHTS, "small.txt": WEIGHTS[:5000]})
        yield server


def get(begin: int, end: int, file: str = FILE) -> bytes:
    found = bytearray()
    fetch(file, hf_hub_url(REPO, file), begin, end, found.extend)
    return bytes(found)


def asked(hub: HubServer) -> list[str | None]:
    """The ranges that the files' origin was asked for."""
    return [request.range for request in hub.requests if CDN in request.path]


@pytest.mark.parametrize(
    ("begin", "end"), [(0, 1), (0, len(WEIGHTS)), (77, 78), (1000, 300_000), (5, 5)]
)
def test_a_range(begin: int, end: int, hub: HubServer) -> None:
    assert get(begin, end) == WEIGHTS[begin:end]
    assert asked(hub) == ([f"bytes={begin}-{end - 1}"] if begin < end else [])
    assert get(0, 5000, "small.txt") == WEIGHTS[:5000]  # which the Hub itself sends


@pytest.mark.parametrize("seed", range(5))
def test_cuts_go_on_where_they_were(seed: int, hub: HubServer) -> None:
    hub.fault = random_cuts(seed, 20, share=0.5, least_bytes=1)
    pieces = range(100, 400_100, 10_000)
    assert b"".join(get(at, at + 10_000) for at in pieces) == WEIGHTS[100:400_100]
    begins = [int((text or "").removeprefix("bytes=").split("-")[0]) for text in asked(hub)]
    assert len(begins) == len(pieces) + 20 and begins == sorted(begins)
    assert set(begins) > set(pieces)  # some go on where a connection was cut
    sent = sum(request.sent for request in hub.requests if CDN in request.path)
    assert sent == 400_000  # and no byte comes twice


PASSING: list[Fault] = [
    Status(500), Status(502), Status(503), Status(504), Status(408), Status(429), Cut(0),
    Cut(70_000), Stall(0, 30), Stall(70_000, 30), WrongLength(-1), WrongLength(1), Slow(1000),
]  # fmt: skip


@pytest.mark.parametrize("fault", PASSING, ids=str)
def test_what_passes(fault: Fault, hub: HubServer) -> None:
    hub.fault = first(2, fault, "GET", CDN)
    assert get(0, 200_000) == WEIGHTS[:200_000]


def test_a_trickle_is_given_up_and_what_it_brought_is_kept(hub: HubServer) -> None:
    hub.fault = first(1, Slow(2000), "GET", CDN)
    assert get(0, 200_000) == WEIGHTS[:200_000]
    (_, second) = asked(hub)
    begin = int((second or "").removeprefix("bytes=").split("-")[0])
    assert 0 < begin < 20_000


def test_slow_but_steady_is_not_given_up(hub: HubServer) -> None:
    hub.fault = first(1, Slow(20_000), "GET", CDN)
    assert get(0, 14_000) == WEIGHTS[:14_000]
    assert asked(hub) == ["bytes=0-13999"]


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_obeyed(status: int, hub: HubServer) -> None:
    times: list[float] = []

    def fault(request: Request) -> Fault | None:
        if request.status == 0 and CDN in request.path:
            times.append(time.monotonic())
            return Status(status, retry_after=1) if len(times) == 1 else None
        return None

    hub.fault = fault
    assert get(0, 1000) == WEIGHTS[:1000]
    assert len(times) == 2 and times[1] - times[0] >= 1


def test_waits_double_and_progress_starts_them_over(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retries, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(retries, "LONGEST_WAIT", 5.0)
    monkeypatch.setattr(retries.time, "sleep", waits.append)
    faults: list[Fault] = [Status(500)] * 5 + [Cut(70_000)] + [Status(500)] * 2
    left = iter(faults)
    hub.fault = lambda request: next(left, None) if CDN in request.path else None
    assert get(0, 200_000) == WEIGHTS[:200_000]
    server = 0.001  # how it waits itself, before it cuts
    assert [wait for wait in waits if wait != server] == [1, 2, 4, 5, 5, 0, 1, 2]


def test_what_brings_nothing_is_given_up(hub: HubServer) -> None:
    hub.fault = lambda request: Status(503) if CDN in request.path else None
    with pytest.raises(
        CheckpointError,
        match="^model.safetensors: the Hub answers 503 .*, 8 times",
    ):
        get(0, 1000)
    assert len(asked(hub)) == 8


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "set HF_TOKEN|no such repository, or you may"), (403, "use a token that may do this"),
     (404, "has no such file|answers 404"), (416, "answers 416"), (400, "answers 400")],
)  # fmt: skip
def test_what_waiting_does_not_cure(status: int, message: str, hub: HubServer) -> None:
    hub.fault = lambda request: Status(status) if CDN in request.path else None
    with pytest.raises(CheckpointError, match=message):
        get(0, 1000)
    assert len(asked(hub)) == 1


def test_a_server_that_ignores_ranges_is_not_believed(hub: HubServer) -> None:
    """It would send the file's beginning for its middle."""
    with pytest.raises(CheckpointError, match="answers 200"):
        fetch(
            "x", f"{hub.endpoint}/api/models/{REPO}", 10, 20, lambda data: pytest.fail("was told")
        )


def test_wrong_bytes_are_for_those_who_know_the_hash(hub: HubServer) -> None:
    hub.fault = first(1, Corrupt(7), "GET", CDN)
    found = get(0, 1000)
    assert [n for n in range(1000) if found[n] != WEIGHTS[n]] == [7]


def test_what_the_reader_of_the_bytes_raises_is_not_tried_again(hub: HubServer) -> None:
    def full(data: bytes) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fetch(FILE, hf_hub_url(REPO, FILE), 0, 1000, full)
    assert len(asked(hub)) == 1


def test_patience_with_calls(hub: HubServer) -> None:
    calls = 0

    def call() -> str:
        nonlocal calls
        calls += 1
        if calls < 4:
            raise ConnectionError("no route")
        return "done"

    assert attempt("org/model", call) == "done" and calls == 4
    calls = -9
    with pytest.raises(CheckpointError, match="^org/model: cannot reach the Hub .no route"):
        attempt("org/model", call, QUICK_ATTEMPTS)
    assert calls == QUICK_ATTEMPTS - 9
