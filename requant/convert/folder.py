"""The files of a checkpoint's folder: which hold weights, what its JSON says, where it came from.

Nothing here knows formats.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from requant.convert.fused import StoredPart
from requant.convert.header import parse_header, raw_header
from requant.convert.journal import Digest
from requant.convert.reader import Files
from requant.errors import CheckpointError

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MODELOPT_NAME = "hf_quant_config.json"
#: Beside a download: of which repository and commit it is, and what was checked.
TRACE_NAME = ".requant-download.jsonl"

#: How a repository on the Hub is named, at a branch, tag or commit.
REPOSITORY = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?")
#: Longest JSON file that is read: the index of a million tensors.
MAX_JSON_BYTES = 100_000_000
#: Levels of a JSON file that makes sense.
MAX_JSON_DEPTH = 64


@dataclass(frozen=True)
class FileFacts:
    """What tells whether a file is still the same: its size in bytes, and when it was written or
    the hash of what is in it."""

    nbytes: int
    version: str


class Folder:
    """The files of a checkpoint, in a folder on a disk; those of a Hub repository derive from it.

    `path` is where the small files lie: all but the weights.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def label(self) -> str:
        """What people call it."""
        return str(self.path)

    @property
    def origin(self) -> dict[str, str | None]:
        """The Hub repository and revision that it is a copy of, as far as the Hub's client left
        traces: {source_repo, source_revision}."""
        real = Path(os.path.realpath(self.path))
        if real.parent.name == "snapshots" and real.parents[1].name.startswith("models--"):
            repo = real.parents[1].name.removeprefix("models--").replace("--", "/")
            return {"source_repo": repo, "source_revision": real.name}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            with (self.path / TRACE_NAME).open("rb") as trace:
                event = json.loads(trace.readline())
            return {key: event[key] for key in ("source_repo", "source_revision")}
        traces = (self.path / ".cache" / "huggingface" / "download").glob("*.safetensors.metadata")
        revisions = {trace.read_text("utf-8", "replace").partition("\n")[0] for trace in traces}
        return {
            "source_repo": None,
            "source_revision": revisions.pop() if len(revisions) == 1 else None,
        }

    @cached_property
    def reader(self) -> Files:
        """What reads the weights."""
        return Files(self.path)

    def require(self) -> None:
        """Raise CheckpointError when there is no such folder."""
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: no such folder; give a checkpoint, or `demo`")

    def weight_files(self) -> list[str]:
        """The names of the .safetensors files, of subfolders not."""
        return sorted(path.name for path in self.path.glob("*.safetensors"))

    def holds(self, file: str) -> bool:
        """Whether there is such a file of weights."""
        return (self.path / file).is_file()

    def facts(self, file: str) -> FileFacts:
        """What tells whether a file is the same later."""
        path = self.path / file
        try:
            found = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}; cannot read it") from error
        return FileFacts(found.st_size, str(found.st_mtime_ns))

    def raw_headers(self, files: Iterable[str]) -> Iterator[tuple[str, bytes, int]]:
        """Of each file its name, its first bytes, up to its data, and its size."""
        for file in files:
            yield file, *raw_header(self.path / file)

    def tensors(self, files: Iterable[str]) -> Iterator[tuple[str, dict[str, StoredPart]]]:
        """Of each file its name and the tensors in it."""
        for file, header, size in self.raw_headers(files):
            found = parse_header(header, size, self.path / file, file)
            yield file, {name: StoredPart(name, spec, at) for name, (spec, at) in found.items()}

    def require_unchanged(self, file: str, facts: FileFacts, read: Digest) -> None:
        """Raise CheckpointError when a file, as it was read, is not the one that was opened."""
        if self.facts(file) != facts:
            raise CheckpointError(
                f"{self.path / file}: changed while being read; keep the source as it is, and "
                "start over"
            )

    def release(self, files: Iterable[str]) -> None:
        """Nothing more is read of these files."""

    def disk_bytes(self, disk: int | None) -> int:
        """How much of the source is brought to the disk at a time; `disk`: at most."""
        return 0

    @contextlib.contextmanager
    def staged(self, at: Path, disk: int | None, rank: int, processes: int) -> Iterator[None]:
        """While inside, what is read is brought to `at` first, where it lies elsewhere, by several
        processes in at most `disk` bytes together."""
        yield

    def settle(self, at: Path) -> None:
        """Everything was read; nothing is left at `at`."""


def folder_at(where: Path | Folder) -> Folder:
    """The folder at a path."""
    return where if isinstance(where, Folder) else Folder(where)


def last_name(file: str) -> str:
    """The last component of a file's name."""
    return file.rpartition("/")[2]


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path}: not a regular file of at most {MAX_JSON_BYTES} bytes, as a JSON file is"
            )
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; {missing}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        children = (node.values() if isinstance(node, dict) else node for node in level)
        level = [child for found in children for child in found if isinstance(child, dict | list)]
    if level:  # json may take what recursive functions cannot copy
        raise CheckpointError(f"{path}: nested deeper than {MAX_JSON_DEPTH} levels")
    return value


def indexed_files(folder: Folder) -> tuple[tuple[str, ...], dict[str, str] | None]:
    """The files that hold the weights, and the index's weight_map where there is one."""
    path, single = folder.path, folder.holds(SINGLE_NAME)
    if (path / INDEX_NAME).is_file():
        index = read_json(path / INDEX_NAME, "")
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path / INDEX_NAME}: has no weight_map")
        files = tuple(sorted(set(map(str, weight_map.values()))))
        if single and files != (SINGLE_NAME,):
            raise CheckpointError(
                f"{path}: holds both {SINGLE_NAME} and {INDEX_NAME}, and loaders disagree which "
                "counts; remove the stale one"
            )
        for file in files:
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{path / INDEX_NAME}: names {file!r}, which is not a .safetensors file of "
                    "this folder"
                )
            if not folder.holds(file):
                raise CheckpointError(
                    f"{path / INDEX_NAME}: names {file}, which is absent; download it again"
                )
        return files, weight_map
    if single:
        return (SINGLE_NAME,), None
    found = folder.weight_files()
    if found:
        raise CheckpointError(
            f"{path}: holds {len(found)} .safetensors files ({found[0]}, ...) and no {INDEX_NAME}; "
            "download the index, or a conversion into this folder was interrupted"
        )
    pickled = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    hint = (
        f"; it has {pickled[0]}, but pickle files are never opened: "
        "save the model as safetensors first"
        if pickled
        else ""
    )
    raise CheckpointError(f"{path}: holds no .safetensors file{hint}")
