"""Finished files on their way to the Hub while the next ones are made."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

from requant.convert.claim import FILES_AT_A_TIME
from requant.convert.documents import SourceTexts
from requant.convert.folder import Folder
from requant.convert.inspect import inspect
from requant.convert.journal import MANIFEST_NAME, Digest, read_manifest
from requant.convert.plan import Plan
from requant.convert.source import Checkpoint
from requant.convert.writer import write_bytes, write_json, writing
from requant.errors import CheckpointError
from requant.hub.model_card import model_card
from requant.hub.push import CARD_NAME, COMMIT_SECONDS, MAX_PENDING, Push
from requant.hub.repository import HubFolder, Repository

#: Seconds between commits where files wait on the disk for theirs.
SHORT_SECONDS = 30.0


class Delivery:
    """An output folder whose files of weights are uploaded to a repository as they are finished;
    unless it `keeps` them, they are removed once the Hub has them. A context manager."""

    def __init__(
        self, plan: Plan, out: Path, target: str, *, keeps: bool, private: bool, overwrite: bool
    ) -> None:
        """Claim the repository. Raises CheckpointError where we may not write to it."""
        self.keeps = keeps
        self._plan, self._out = plan, out
        self._push = Push(
            target,
            plan.key,
            private=private,
            overwrite=overwrite,
            on_committed=self._committed,
            commit_seconds=COMMIT_SECONDS if keeps else SHORT_SECONDS,
            # Besides those that wait, one is being written.
            max_pending=MAX_PENDING if keeps else FILES_AT_A_TIME - 1,
        )
        self._last: Future[bool] | None = None

    def __enter__(self) -> Delivery:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for the upload that is under way, unless somebody presses Ctrl-C: the next run makes
        it anew."""
        if self._last is not None and not isinstance(error, KeyboardInterrupt):
            wait([self._last])

    def holds(self, name: str, digest: Digest) -> bool:
        """Whether a file is on the Hub, and need not lie in the folder any more."""
        return not self.keeps and self._push.holds(name, digest)

    def file(self, name: str, digest: Digest) -> None:
        """Upload a finished file, once the one before it is. Raises CheckpointError."""
        self._wait()
        self._last = done = Future[bool]()

        def upload() -> None:
            try:
                done.set_result(self._push.file(self._out / name, name, digest))
            except BaseException as error:
                done.set_exception(error)

        # A daemon, as no process is to stay for an upload that nobody waits for.
        Thread(target=upload, name="requant-push", daemon=True).start()

    def settle(self) -> Folder:
        """Wait until all files are on the Hub; where the checkpoint can be read then."""
        self._wait()
        self._push.flush()
        if self.keeps:
            return Folder(self._out)
        return HubFolder(Repository.find(self._push.repo, self._push.branch), self._out)

    def publish(self, verdict: Mapping[str, Any] | None) -> str:
        """Upload all small files in one last commit, with a model card that says how good it is;
        where to look at it. Raises CheckpointError."""
        manifest = read_manifest(self._out)
        if manifest is None:
            raise CheckpointError(f"{self._out / MANIFEST_NAME}: is missing; convert again")
        card = model_card(
            manifest,
            verdict,
            repo=self._push.target,
            roles=inspect(Checkpoint.open(self.settle()))["roles"],
            recipe=self._plan.recipe.text,
            source=SourceTexts.read(self._plan.source.path),
        )
        # The folder is what the repository is, so that its checksums hold for both.
        digest = write_bytes(self._out / CARD_NAME, card.encode())
        manifest["written"][CARD_NAME] = asdict(digest)
        manifest |= _published(manifest)
        write_json(self._out / MANIFEST_NAME, manifest)
        weights = {file.name for file in self._plan.files}
        self._push.finish(self._out, [*set(manifest["written"]) - weights, MANIFEST_NAME], card)
        return self._push.url

    def _committed(self, name: str) -> None:
        """A file is safe on the Hub."""
        if not self.keeps:
            with writing(self._out / name):
                (self._out / name).unlink(missing_ok=True)

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()


def _published(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Source and recipe, without where they lie on this disk, which is nobody's business."""
    repo, revision = manifest["source_repo"], manifest["source_revision"]
    source = Path(manifest["source"]).name if repo is None else f"{repo}@{revision}"
    return {"source": source, "recipe": Path(manifest["recipe"]).name}
