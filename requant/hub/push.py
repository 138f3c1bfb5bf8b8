"""Uploading a conversion to the Hub, file by file as they are finished.

Large files are sent at once and committed together every few minutes, since commits are limited
(128 an hour). What engines load first, config.json and the index, comes in the last commit, with
all small files: until then the repository holds weights and a marker that names the conversion. The
same conversion continues where it was, also from another machine; what the Hub has is not sent
again.

Source: huggingface_hub's HfApi (https://huggingface.co/docs/huggingface_hub/guides/upload,
"Preupload LFS files before commit").
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    hf_hub_url,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    disable_progress_bars,
    get_session,
    hf_raise_for_status,
    validate_repo_id,
)

import requant
from requant.convert.folder import CONFIG_NAME
from requant.convert.journal import MANIFEST_NAME, Digest
from requant.errors import CheckpointError
from requant.hub.retries import attempt

#: Says in an unfinished repository which conversion is being uploaded to it.
MARKER_NAME = ".requant-push.json"
CARD_NAME = "README.md"
#: Seconds between two commits of weights, and files that wait for one at most.
COMMIT_SECONDS = 120.0
MAX_PENDING = 50

#: What makes a repository hold a model already.
_MODEL_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")

T = TypeVar("T")


@dataclass(frozen=True)
class _File:
    """A file to commit: where it lies, or its bytes; `digest` where it is known."""

    content: Path | bytes
    digest: Digest | None = None

    def added(self, name: str) -> CommitOperationAdd:
        """A new operation: the client keeps in it what it has asked the Hub."""
        made = CommitOperationAdd(name, self.content)
        if self.digest is not None:
            made.upload_info.sha256 = bytes.fromhex(self.digest.sha256)
        return made


class Push:
    """An upload to "org/name[@branch]", which is created if need be; a context manager.

    Used by one thread at a time. All methods raise CheckpointError for what the Hub refuses.
    """

    def __init__(
        self,
        target: str,
        key: str,
        *,
        private: bool = False,
        overwrite: bool = False,
        on_committed: Callable[[str], None] = lambda name: None,
        commit_seconds: float = COMMIT_SECONDS,
        max_pending: int = MAX_PENDING,
    ) -> None:
        """Check that we may write there, before anything is converted.

        `key` identifies the conversion (Plan.key): a branch that holds another model is refused
        unless `overwrite`. `private` is for a repository that is to be created; one that exists
        must be private then. `on_committed` is told the name of each file that is safe on the Hub.
        At most `max_pending` files wait for a commit, `commit_seconds` at most while others come.
        """
        self.target, self.key = target, key
        self.repo, self.branch = _parsed(target)
        self._on_committed = on_committed
        self._commit_seconds, self._max_pending = commit_seconds, max_pending
        self._api = HfApi(library_name="requant", library_version=requant.__version__)
        self._pending: dict[str, _File] = {}
        self._sent: dict[str, CommitOperationAdd] = {}
        self._pushed: dict[str, Digest] = {}
        self._last_commit = -float("inf")
        if get_token() is None:
            raise CheckpointError(
                f"{target}: no token to upload with; set HF_TOKEN, or run `hf auth login`"
            )
        self._create(private)
        self._there = self._call(self._look)
        self._outdated = self._claim(overwrite)

    def __enter__(self) -> Push:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Commit what was sent; after an error, the next run does that."""
        if error is None:
            self.flush()

    @property
    def url(self) -> str:
        """Where people look at it."""
        tree = "" if self.branch == constants.DEFAULT_REVISION else f"/tree/{self.branch}"
        return f"{self._api.endpoint}/{self.repo}{tree}"

    def file(self, path: Path, name: str, digest: Digest) -> bool:
        """Upload a finished file under `name`; whether it is committed already.

        `digest` is trusted; a file that the Hub has need not lie at `path` any more.
        """
        self._pushed[name] = digest
        if self.holds(name, digest):
            self._on_committed(name)
            return True
        if not path.is_file():
            raise CheckpointError(
                f"{self.target}: {name} is not there, and no longer at {path}; convert it again "
                "with --overwrite"
            )
        file = _File(path, digest)
        self._sent[name] = self._call(lambda: self._send(file.added(name)), name)
        self._pending[name] = file
        waited = time.monotonic() - self._last_commit
        if waited >= self._commit_seconds or len(self._pending) >= self._max_pending:
            self.flush()
        return name not in self._pending

    def flush(self) -> None:
        """Commit all that was sent."""
        if not self._pending:
            return
        names, files = list(self._pending), dict(self._pending)
        if MARKER_NAME not in self._there or MARKER_NAME in self._outdated:
            text = {"key": self.key, "requant": requant.__version__}
            files[MARKER_NAME] = _File(json.dumps(text).encode())
        title = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        self._commit(files, self._outdated - set(self._pushed), f"Add {title}")
        self._pending.clear()
        self._outdated = frozenset()
        self._last_commit = time.monotonic()
        self._require(names)
        for name in names:
            self._on_committed(name)

    def finish(self, out: Path, names: Iterable[str], card: str) -> str:
        """Commit the small files of `out` and the model card, in one last commit; returns its hash.

        Raises CheckpointError, and leaves the repository unfinished, when a file that was uploaded
        is not there.
        """
        self.flush()
        self._there = self._call(self._look)
        self._require(self._pushed)
        files = {name: _File(out / name) for name in sorted({*names} - {CARD_NAME})}
        files[CARD_NAME] = _File(card.encode())
        stale = {MARKER_NAME, *self._outdated} - set(files) - set(self._pushed)
        return self._commit(files, stale, "Add config, tokenizer and model card")

    def _create(self, private: bool) -> None:
        """Make repository and branch, and ask whether we may write to them."""
        self._call(lambda: self._api.create_repo(self.repo, private=private or None, exist_ok=True))
        self._call(lambda: self._api.auth_check(self.repo, write=True))
        if private and not self._call(lambda: self._api.model_info(self.repo)).private:
            raise CheckpointError(
                f"{self.target}: exists already, and is public; make it private on the Hub, or "
                "choose another name"
            )
        branches = self._call(lambda: self._api.list_repo_refs(self.repo)).branches
        if self.branch not in [branch.name for branch in branches]:
            # From the first commit, which holds no model.
            first = self._call(lambda: self._api.list_repo_commits(self.repo))[-1].commit_id
            self._call(
                lambda: self._api.create_branch(
                    self.repo, branch=self.branch, revision=first, exist_ok=True
                )
            )

    def _look(self) -> dict[str, RepoFile]:
        """What the branch holds."""
        tree = self._api.list_repo_tree(self.repo, recursive=True, revision=self.branch)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def _claim(self, overwrite: bool) -> frozenset[str]:
        """The files of another model, which are to go; refuses to touch one that we may not."""
        documents = [name for name in (MARKER_NAME, MANIFEST_NAME) if name in self._there]
        if any(self._read(name).get("key") == self.key for name in documents):
            return frozenset()
        models = [n for n in self._there if n == CONFIG_NAME or n.endswith(_MODEL_SUFFIXES)]
        if models and not overwrite:
            raise CheckpointError(
                f"{self.target}: already holds something else ({min(models)}, ...); choose another "
                f"repository, a branch of its own such as {self.repo}@requant, or --overwrite"
            )
        return frozenset([*models, *documents])

    def _read(self, name: str) -> dict[str, Any]:
        """A JSON object that lies there; an empty one for anything else."""
        url = hf_hub_url(self.repo, name, revision=self.branch)

        def fetch() -> bytes:
            response = get_session().get(url, headers=build_hf_headers())
            hf_raise_for_status(response)
            return response.content

        try:
            found = json.loads(self._call(fetch, name))
        except ValueError:  # of somebody else's making
            return {}
        return found if isinstance(found, dict) else {}

    def holds(self, name: str, digest: Digest) -> bool:
        """Whether the Hub has this file."""
        entry = self._there.get(name)
        return entry is not None and entry.lfs is not None and entry.lfs.sha256 == digest.sha256

    def _require(self, names: Iterable[str]) -> None:
        """Raise unless the Hub has these files as they were pushed."""
        for name in names:
            entry = self._there.get(name)
            small = entry is not None and entry.lfs is None  # git's hash says nothing of SHA-256
            if not small and not self.holds(name, self._pushed[name]):
                raise CheckpointError(
                    f"{self.target}: {name} is not what was uploaded; has somebody else written "
                    "to it? Repeat the command"
                )

    def _send(self, added: CommitOperationAdd) -> CommitOperationAdd:
        """Upload one file without a commit; a small one goes with the commit."""
        with disable_progress_bars():
            self._api.preupload_lfs_files(
                self.repo, [added], revision=self.branch, free_memory=False
            )
        return added

    def _commit(self, files: Mapping[str, _File], deleted: Iterable[str], title: str) -> str:
        """Make one commit, and see what is there then; returns its hash."""
        tried = False

        def make() -> str:
            nonlocal tried
            if tried:  # the commit may have been made, and only the answer lost
                self._there = self._look()
            tried = True
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                CommitOperationDelete(name) for name in sorted(deleted) if name in self._there
            ]
            for name, file in files.items():
                sent = name in self._sent
                operations.append(self._sent.pop(name) if sent else file.added(name))
            with disable_progress_bars():
                made = self._api.create_commit(
                    self.repo, operations, commit_message=title, revision=self.branch
                )
            return made.oid

        oid = self._call(make)
        self._there = self._call(self._look)
        return oid

    def _call(self, call: Callable[[], T], name: str | None = None) -> T:
        where = self.target if name is None else f"{self.target}: {name}"
        return attempt(where, call)


def _parsed(target: str) -> tuple[str, str]:
    """Repository and branch of "org/name[@branch]"."""
    repo, at, branch = target.partition("@")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise CheckpointError(f"{target}: {error}") from error
    if "/" not in repo or (at and not branch):
        raise CheckpointError(f"{target}: not a repository; give org/name, or org/name@branch")
    return repo, branch or constants.DEFAULT_REVISION
