"""Bytes from the Hub, whatever happens to connections on the way.

A request that is cut, stalls, or is refused for now (408, 429, 5xx) is repeated from where it
stopped; waits double, and a Retry-After is obeyed. Only what brings no progress is given up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from requant.errors import CheckpointError

#: How often in a row a request for bytes may bring nothing, and any other may fail; the seconds to
#: wait after the first time and at most.
ATTEMPTS, CALLS, FIRST_WAIT, LONGEST_WAIT = 8, 5, 0.5, 60.0
#: A connection that brings fewer bytes a second over as long as the client waits for one is stuck.
LEAST_RATE = 4096

T = TypeVar("T")


class _Stuck(Exception):
    """A connection from which too little comes, or something else than what was asked for."""


def fetch(url: str, begin: int, end: int, write: Callable[[bytes], object]) -> None:
    """Hand bytes begin:end of what lies at `url` to `write`, in order and each once.

    Raises CheckpointError when the Hub refuses, or nothing comes for too long.
    """
    at = begin
    failures = 0
    while at < end:
        before = at
        wait = 0.0
        try:
            for piece in _stream(url, at, end):
                write(piece)
                at += len(piece)
        except (httpx2.TransportError, _Stuck) as error:
            reason = str(error) or type(error).__name__
        except HfHubHTTPError as error:
            wait, reason = _patience(error, url), str(error)
        else:
            reason = "the connection ended early"
        if at < end:
            failures = 0 if at > before else failures + 1
            _wait(failures, ATTEMPTS, wait, url, reason)


def patiently(what: str, call: Callable[[], T]) -> T:
    """Call the Hub, again while it cannot be reached or refuses for now. Raises CheckpointError."""
    failures = 0
    while True:
        try:
            return call()
        except (httpx2.TransportError, ConnectionError) as error:
            wait, reason = 0.0, str(error) or type(error).__name__
        except HfHubHTTPError as error:
            wait, reason = _patience(error, what), str(error)
        failures += 1
        _wait(failures, CALLS, wait, what, reason)


def _stream(url: str, begin: int, end: int) -> Iterator[bytes]:
    """Bytes from `begin` on, as long as the connection holds. Raises what httpx2 and the Hub's
    client do."""
    headers = build_hf_headers(library_name="requant")
    headers |= {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    seconds = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    with get_session().stream("GET", url, headers=headers, timeout=seconds) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        told = response.headers.get("Content-Range", "")
        if response.status_code != 206 or not told.startswith(f"bytes {begin}-"):
            raise _Stuck(
                f"asked for bytes {begin} to {end}, it answers {response.status_code} {told}"
            )
        left, since, come = end - begin, time.monotonic(), 0
        for piece in response.iter_raw():  # as it comes: a cut would take along what is gathered
            yield piece[:left]
            left -= min(len(piece), left)
            come += len(piece)
            passed = time.monotonic() - since
            if not left:
                return
            if passed > seconds:
                if come < LEAST_RATE * passed:
                    raise _Stuck(f"{come} bytes came in {passed:.0f} seconds")
                since, come = time.monotonic(), 0


def _patience(error: HfHubHTTPError, what: str) -> float:
    """How long the Hub wants us to wait, in seconds; 0 if it does not say. Raises CheckpointError
    for what waiting does not cure."""
    status = error.response.status_code
    if status in (408, 429) or status >= 500:
        told = error.response.headers.get("Retry-After", "")
        return float(told) if told.isdecimal() else 0.0
    raise CheckpointError(f"{what}: {_refusal(error)}") from error


def _refusal(error: HfHubHTTPError) -> str:
    """What the Hub refuses, and what to do."""
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return (
            f"the repository is gated ({status}); ask for access on its page on the Hub, then log "
            "in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no such revision ({status}); give a branch, tag or commit"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"the repository has no such file ({status})"
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return (
            f"the Hub has no such repository, or you may not see it ({status}); check the name, "
            "log in with `hf auth login` or set HF_TOKEN"
        )
    return f"the Hub refuses: {str(error).strip().splitlines()[0]}"


def _wait(failures: int, most: int, told: float, what: str, reason: str) -> None:
    """Wait before the next attempt. Raises CheckpointError when there were `most` in vain."""
    if failures >= most:
        raise CheckpointError(
            f"{what}: tried {failures} times in a row in vain ({reason.strip().splitlines()[0]}); "
            "check the network, then repeat the command to continue"
        )
    time.sleep(max(told, min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT) if failures else 0.0))
