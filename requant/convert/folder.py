"""The files of a checkpoint's folder: which hold weights, what its JSON says, where it came from.

Nothing here knows formats.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.convert.fused import StoredPart
from requant.convert.header import read_header
from requant.errors import CheckpointError

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MODELOPT_NAME = "hf_quant_config.json"

#: Longest JSON file that is read: the index of a million tensors.
MAX_JSON_BYTES = 100_000_000


@dataclass(frozen=True)
class FileFacts:
    """What tells whether a file is still the same: its size in bytes and when it was written."""

    nbytes: int
    mtime_ns: int


def origin(path: Path) -> dict[str, str | None]:
    """The Hub repository and revision that a folder is a copy of, as far as the Hub's client left
    traces: {source_repo, source_revision}."""
    real = Path(os.path.realpath(path))
    if real.parent.name == "snapshots" and real.parents[1].name.startswith("models--"):
        repo = real.parents[1].name.removeprefix("models--").replace("--", "/")
        return {"source_repo": repo, "source_revision": real.name}
    traces = sorted((path / ".cache" / "huggingface" / "download").glob("*.safetensors.metadata"))
    revisions = {trace.read_text("utf-8", "replace").partition("\n")[0] for trace in traces}
    return {
        "source_repo": None,
        "source_revision": revisions.pop() if len(revisions) == 1 else None,
    }


def read_tensors(path: Path, file: str) -> dict[str, StoredPart]:
    """The tensors of one file of a folder."""
    found = read_header(path / file, file)
    return {name: StoredPart(name, spec, place) for name, (spec, place) in found.items()}


def last_name(file: str) -> str:
    """The last component of a file's name."""
    return file.rpartition("/")[2]


def file_facts(path: Path) -> FileFacts:
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; cannot read it") from error
    return FileFacts(found.st_size, found.st_mtime_ns)


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
    return value


def weight_files(path: Path) -> tuple[tuple[str, ...], dict[str, str] | None]:
    """The files that hold the weights, and the index's weight_map where there is one."""
    single = (path / SINGLE_NAME).is_file()
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
            if not (path / file).is_file():
                raise CheckpointError(
                    f"{path / INDEX_NAME}: names {file}, which is absent; download it again"
                )
        return files, weight_map
    if single:
        return (SINGLE_NAME,), None
    found = sorted(p.name for p in path.glob("*.safetensors"))
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
