"""Whether the files of a conversion still are what was written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from requant.convert.journal import MANIFEST_NAME, Digest, read_manifest
from requant.errors import CheckpointError

CHUNK_BYTES = 1 << 23


def recorded(folder: Path) -> Mapping[str, Digest]:
    """Size and SHA-256 of every file, from requant.json. Raises CheckpointError without."""
    try:
        written = (read_manifest(folder) or {})["written"]
        found = {
            str(name): Digest(int(facts["nbytes"]), str(facts["sha256"]))
            for name, facts in written.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{folder / MANIFEST_NAME}: holds no checksums; only a finished conversion has them"
        ) from None
    for name in found:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{folder / MANIFEST_NAME}: names {name!r}, outside the folder")
    return found


def check(folder: Path, progress: Callable[[int], None] = lambda nbytes: None) -> dict[str, Any]:
    """Hash every file: {ok, files, problems}. `progress` is told of bytes."""
    problems = []
    files = recorded(folder)
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: is missing")
            continue
        digest, size = _sha256(path, progress)
        if size != facts.nbytes:
            problems.append(f"{path}: has {size} bytes, {facts.nbytes} were written")
        elif digest != facts.sha256:
            problems.append(f"{path}: SHA-256 is {digest}, {facts.sha256} was written")
    return {"ok": not problems, "files": len(files), "problems": problems}


def _sha256(path: Path, progress: Callable[[int], None]) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                progress(len(chunk))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror} at byte {size}; check the disk") from error
    return digest.hexdigest(), size
