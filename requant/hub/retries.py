"""Calls of the Hub that are tried again, and the Hub's errors as ours.

The Hub's client repeats most requests for half a minute, but no commits; a conversion that runs for
hours is worth more patience.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import httpx2
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

from requant.errors import CheckpointError

T = TypeVar("T")

#: How often a call is made before it has failed; of calls for which somebody waits.
ATTEMPTS, QUICK_ATTEMPTS = 10, 4
#: Seconds between two attempts: doubled from the first up to the longest, unless the Hub says.
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0
#: Seconds: longer than the window of any of the Hub's limits.
LONGEST_RETRY_AFTER = 3600.0
#: Statuses that another attempt may get rid of; 412: somebody else's commit came between.
_TRANSIENT = frozenset([408, 412, 429, 500, 502, 503, 504])


def attempt(where: str, call: Callable[[], T], attempts: int = ATTEMPTS) -> T:
    """Call until it succeeds. Raises CheckpointError, beginning with `where`, for what the Hub
    refuses for good, or when so many `attempts` have failed."""
    number = 0
    while True:
        try:
            return call()
        except (HfHubHTTPError, httpx2.TransportError, OSError, RuntimeError) as error:
            failure = _failure(error)
            if failure is None:
                raise
        except ValueError as error:  # how the client tells of metadata or quotas that are refused
            raise CheckpointError(f"{where}: {' '.join(str(error).split())}") from error
        number += 1
        pause(where, failure, number, attempts)


def pause(where: str, failure: BaseException, number: int, attempts: int) -> None:
    """Wait after the attempt of this `number` in a row that brought nothing, 0: one that brought
    something. Raises CheckpointError for what another would not cure, or after the last."""
    wait = _seconds_to_wait(failure, number)
    if wait is None or number >= attempts:
        raise _told(where, failure, attempts) from failure
    time.sleep(wait)


def _failure(error: BaseException) -> BaseException | None:
    """What went wrong between us and the Hub; None for anything else. The client wraps what goes
    wrong in an upload into a RuntimeError, and its Xet module raises them itself."""
    found = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
    known = (HfHubHTTPError, httpx2.TransportError, ConnectionError, TimeoutError)
    return found if isinstance(found, known) or type(found) is RuntimeError else None


def _seconds_to_wait(failure: BaseException, number: int) -> float | None:
    """Until the next attempt; None when it would fail alike."""
    wait = min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** (number - 1)) if number else 0.0
    if isinstance(failure, OfflineModeIsEnabled):
        return None
    if not isinstance(failure, HfHubHTTPError):
        return wait
    response = failure.response
    if response.status_code not in _TRANSIENT:
        return None
    limit = parse_ratelimit_headers(response.headers)
    after = response.headers.get("Retry-After", "").strip()
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        wait = max(wait, float(limit.reset_in_seconds))
    elif after.isdecimal():
        wait = max(wait, float(after))
    return min(wait, LONGEST_RETRY_AFTER)


def _told(where: str, failure: BaseException, attempts: int) -> CheckpointError:
    """The error in one line, and what to do."""
    if not isinstance(failure, HfHubHTTPError):
        reason = _first_line(failure)
        return CheckpointError(
            f"{where}: cannot reach the Hub ({reason}); check the network, then repeat the command"
        )
    status = failure.response.status_code
    known = _known(failure)
    if known is not None:
        what, to_do = known
        return CheckpointError(f"{where}: {what} ({status}); {to_do}")
    message = failure.server_message or _first_line(failure)
    told = f"{where}: the Hub answers {status} ({_first_line(message)})"
    if status in (401, 403):
        return CheckpointError(
            f"{told}; use a token that may do this: set HF_TOKEN, or run `hf auth login`"
        )
    if status in _TRANSIENT:
        return CheckpointError(f"{told}, {attempts} times; repeat the command later")
    return CheckpointError(f"{told}; check the name, and what your token may do")


def _known(failure: HfHubHTTPError) -> tuple[str, str] | None:
    """What the client knows an answer to mean, and what to do."""
    login = "set HF_TOKEN, or run `hf auth login`"
    if isinstance(failure, GatedRepoError):
        return "the repository is gated", f"ask for access on its page on the Hub, then {login}"
    if isinstance(failure, RevisionNotFoundError):
        return "the repository has no such revision", "give a branch, tag or commit"
    if isinstance(failure, RemoteEntryNotFoundError):
        return "the repository has no such file", "check the name"
    if isinstance(failure, RepositoryNotFoundError):
        return "the Hub has no such repository, or you may not see it", f"check the name, {login}"
    return None


def _first_line(error: BaseException | str) -> str:
    """What it says, without the rest of a page."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
