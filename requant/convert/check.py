"""What was written, read again before it counts as a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from requant.convert.claim import Receiver, has
from requant.convert.folder import CONFIG_NAME, Folder
from requant.convert.journal import JOURNAL_NAME, Digest, read_manifest
from requant.convert.plan import Plan, PlannedFile
from requant.convert.source import Checkpoint
from requant.convert.writer import side_files
from requant.errors import CheckpointError, RequantError


def check_finished(plan: Plan, out: Path, receiver: Receiver | None) -> None:
    """Raise when a finished OUT is no longer what was written, as far as its headers show. What was
    not handed over yet is."""
    damaged = f"{out}: was finished, and is damaged now; remove it and repeat the command"
    folder = Folder(out)
    if receiver is not None:  # whose own errors are no damage
        recorded = (read_manifest(out) or {})["written"]
        written = {file.name: Digest(**recorded[file.name]) for file in plan.files}
        for name, digest in written.items():
            if not has(out, name, digest, receiver):
                raise CheckpointError(f"{damaged}: {name} is not there as {digest.nbytes} bytes")
        for name, digest in written.items():
            receiver.file(name, digest)
        folder = receiver.settle()
    try:
        check_output(plan, folder)
        missing = [name for name in side_files(plan.source.path) if not (out / name).is_file()]
        if missing:
            raise CheckpointError(f"{out / missing[0]}: is missing")
    except RequantError as error:
        raise CheckpointError(f"{damaged}: {error}") from error
    (out / JOURNAL_NAME).unlink(missing_ok=True)  # of a run that was killed at its last step


def check_output(plan: Plan, folder: Folder) -> None:
    """Reopen what was written, with our reader and the reference one, and compare with the plan."""
    written = Checkpoint.open(folder)
    if json.dumps(written.config, sort_keys=True) != json.dumps(plan.config, sort_keys=True):
        raise CheckpointError(f"{folder.path / CONFIG_NAME}: differs from what was planned")
    for name, codec in plan.reads_back.items():
        found = written.weights.get(name)
        if found is None or found.codec != codec:
            raise CheckpointError(f"{folder.label}: {name} reads back as {found}")
    for file in plan.files:
        if (folder.path / file.name).is_file():  # else checked before it was handed over
            check_file(file, folder.path / file.name)


def check_file(file: PlannedFile, path: Path) -> None:
    """Raise CheckpointError when the reference reader finds other tensors than planned."""
    try:
        with safe_open(path, "pt") as opened:
            names = set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: safetensors refuses it: {error}") from error
    if names != set(file.ranges):
        raise CheckpointError(f"{path}: holds other tensors than planned")
