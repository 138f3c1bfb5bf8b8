"""A Hugging Face Hub on loopback, as far as the real huggingface_hub client needs one.

Models only. Large files are answered with a redirect to another origin with a link that expires, as
the Hub's CDN does. Sources: huggingface_hub 2.4 (hf_api.py, _commit_api.py, lfs.py, utils/_http.py)
and the Git LFS batch API (https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md).

`python -m tests.hub.server org/name=FOLDER ... [--cuts N --seed S]` serves folders until it
is terminated; its first line of output is the endpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import huggingface_hub
import pytest
from huggingface_hub.utils import close_session

from tests.hub.answers import Listener
from tests.hub.faults import (
    Corrupt,
    Cut,
    Fault,
    Faults,
    Request,
    Slow,
    Stall,
    Status,
    WrongLength,
    first,
    random_cuts,
)
from tests.hub.repos import Blob, Commit, Content, Repo, content_files

__all__ = [
    "CLIENT_WARNING",
    "READER",
    "WRITER",
    "Corrupt",
    "Cut",
    "Fault",
    "HubServer",
    "Request",
    "Slow",
    "Stall",
    "Status",
    "WrongLength",
    "environment",
    "first",
    "random_cuts",
    "reached",
]

#: For tests that upload: what the client's own use of its HTTP library warns of.
CLIENT_WARNING = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
#: The tokens of the server's only user, who owns the namespaces.
WRITER, READER = "hf_writer", "hf_reader"
USER, NAMESPACES = "tester", ("tester", "org")


class HubServer:
    """A context manager; `endpoint` is what HF_ENDPOINT would be.

    `fault` is asked once per request. `link_seconds`: how long a link to a large file holds.
    `page`: entries of a listing before the client must ask for the next ones.
    """

    def __init__(self, fault: Faults | None = None) -> None:
        self.fault: Faults = fault or (lambda request: None)
        self.link_seconds = 3600.0
        self.page = 1000
        self.user_tokens = {WRITER: "write", READER: "read"}
        self.user, self.namespaces = USER, NAMESPACES
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        #: Large files that were uploaded, and those that served repositories hold, by SHA-256.
        self.large: dict[str, Blob] = {}
        self.closing = threading.Event()
        self._answered: list[Request] = []
        self._asked = 0
        self._idle = threading.Condition()

    def __enter__(self) -> HubServer:
        self._temporary = tempfile.TemporaryDirectory(prefix="hub-")
        self.uploads = Path(self._temporary.name)
        self._hub, self._cdn = Listener(self, cdn=False), Listener(self, cdn=True)
        self.endpoint, self.cdn_endpoint = self._hub.endpoint, self._cdn.endpoint
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.closing.set()
        self._hub.stop()
        self._cdn.stop()
        self._temporary.cleanup()

    def add(
        self,
        repo: str,
        files: Path | Mapping[str, Content],
        *,
        private: bool = False,
        gated: bool = False,
        token: str | None = None,
    ) -> str:
        """Serve exactly these files as `main` of "org/name", in a new commit; returns its hash.

        Files on disk are served from there, and must stay as they are. `token` opens a private or
        gated repository besides the owner's tokens; a gated one is closed to the owner's too.
        """
        made = content_files(files)
        with self.lock:
            entry = self.repos.setdefault(repo, Repo(repo))
            entry.private, entry.gated, entry.token = private, gated, token
            self.large |= {blob.sha256: blob for blob in made.values() if blob.lfs}
            return entry.commit(made, "served").sha

    def uploaded(self, repo: str, revision: str = "main") -> dict[str, Content]:
        """What a repository holds, by path."""
        return {path: blob.content for path, blob in self.head(repo, revision).files.items()}

    def head(self, repo: str, revision: str = "main") -> Commit:
        """The commit of a branch."""
        with self.lock:
            return self.repos[repo].branches[revision]

    @property
    def requests(self) -> list[Request]:
        """All requests so far; waits a moment for those whose answers are on their way."""
        with self._idle:
            self._idle.wait_for(lambda: len(self._answered) == self._asked, timeout=1)
            return sorted(self._answered, key=lambda request: request.number)

    def begin(self, method: str, path: str, range_header: str | None) -> Request:
        """Log a request that came in."""
        with self._idle:
            self._asked += 1
            return Request(self._asked - 1, method, path, range_header)

    def end(self, request: Request) -> None:
        """Log that it was answered."""
        with self._idle:
            self._answered.append(request)
            self._idle.notify_all()

    def signed(self, blob: Blob, repo: str, path: str) -> str:
        """A link to a large file that holds for `link_seconds`."""
        expires = time.time() + self.link_seconds
        query = f"Expires={expires:.3f}&Signature={blob.sha256[:16]}"
        return f"{self.cdn_endpoint}/{blob.sha256}/{repo}/{path}?{query}"


@contextlib.contextmanager
def reached(server: HubServer, home: Path) -> Iterator[HubServer]:
    """Make the server what huggingface_hub's functions reach in this process, with nothing of the
    user's: no token, no cache but the one in `home`, no Xet."""
    constants = huggingface_hub.constants
    names = {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setattr(constants, name, value)
        for variable in "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT":
            patch.delenv(variable, raising=False)
        yield server
        close_session()


def environment(server_endpoint: str, home: Path) -> dict[str, str]:
    """What another process needs for the same."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**ours, **switches, "HF_ENDPOINT": server_endpoint, "HF_HOME": str(home)}


def main() -> None:
    """Serve folders."""
    parser = argparse.ArgumentParser(prog="python -m tests.hub.server")
    parser.add_argument("repos", nargs="+", metavar="ORG/NAME=FOLDER")
    parser.add_argument("--cuts", type=int, default=0, help="downloads to cut at random")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with HubServer(random_cuts(given.seed, given.cuts)) as server:
        for entry in given.repos:
            repo, _, folder = entry.partition("=")
            server.add(repo, Path(folder))
        print(server.endpoint, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
