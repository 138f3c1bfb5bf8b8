"""Bytes from the Hub, whatever happens to connections on the way.

A request that is cut, stalls, or is refused for now is repeated from where it stopped (retries.py).
Only what brings no progress is given up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from requant.hub.retries import pause

#: How often in a row a request may bring nothing.
ATTEMPTS = 8
#: A connection that brings fewer bytes a second over as long as the client waits for one is stuck.
LEAST_RATE = 4096


class _Stuck(ConnectionError):
    """A connection from which too little comes, or something else than what was asked for."""


def fetch(where: str, url: str, begin: int, end: int, write: Callable[[bytes], object]) -> None:
    """Hand bytes begin:end of what lies at `url` to `write`, in order and each once.

    Raises CheckpointError, beginning with `where`, when the Hub refuses, or nothing comes for too
    long.
    """
    at = begin
    failures = 0
    while at < end:
        before = at
        try:
            for piece in _stream(url, at, end):
                write(piece)
                at += len(piece)
            failure: Exception = _Stuck("the connection ended early")
        except (HfHubHTTPError, httpx2.TransportError, _Stuck) as error:
            failure = error
        if at < end:
            failures = 0 if at > before else failures + 1
            pause(where, failure, failures, ATTEMPTS)


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
