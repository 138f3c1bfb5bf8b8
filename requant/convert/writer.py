"""Writing files so that nothing half-done looks done.

A weight file is written at known offsets under a temporary name, fsynced and renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from requant.convert.journal import JOURNAL_NAME, MANIFEST_NAME
from requant.errors import CheckpointError
from requant.quant.codec import TensorSpec

PARTIAL_SUFFIX = ".partial"

#: What is never copied beside the weights: weights in any container, and what describes them.
_WEIGHT_SUFFIXES = frozenset(".safetensors .bin .pt .pth .ckpt .gguf .onnx .h5 .msgpack".split())
_DESCRIPTIONS = frozenset(
    {"config.json", "hf_quant_config.json", "quantize_config.json", MANIFEST_NAME, JOURNAL_NAME}
)


class OutputFile:
    """A file of known size being filled in any order, from any thread."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self.nbytes = nbytes
        self._partial = path.with_name(path.name + PARTIAL_SUFFIX)
        with writing(self._partial):
            self._descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                os.ftruncate(self._descriptor, nbytes)
            except BaseException:
                self.abandon()
                raise

    def write(self, offset: int, data: bytes | torch.Tensor) -> None:
        """Write bytes, or a contiguous CPU tensor's bytes, at an absolute offset."""
        if isinstance(data, torch.Tensor):
            flat = data.contiguous().view(-1).view(torch.uint8)
            view = memoryview(flat.numpy().data)
        else:
            view = memoryview(data)
        with writing(self._partial):
            while view:
                count = os.pwrite(self._descriptor, view, offset)
                view, offset = view[count:], offset + count

    def write_part(self, begin: int, spec: TensorSpec, first: int, piece: torch.Tensor) -> None:
        """Write what a tile has of a part that lies at `begin`: from `first` on along its axis."""
        if spec.axis == 0:
            rows = spec.shape[0] if spec.shape else 1
            self.write(begin + first * (spec.nbytes // rows), piece)
            return
        raw = piece.contiguous().view(-1).view(torch.uint8).view(len(piece), -1)
        stride = spec.nbytes // spec.shape[0]
        offset = begin + first * piece.element_size()
        for row in raw:
            self.write(offset, row)
            offset += stride

    def commit(self) -> None:
        """Make the file durable and give it its name."""
        with writing(self.path):
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            os.rename(self._partial, self.path)
            sync_folder(self.path.parent)

    def abandon(self) -> None:
        """Close and remove the unfinished file."""
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
        self._partial.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Translate an operating system's refusal to write into an error that says what to do."""
    try:
        yield
    except OSError as error:
        free = ""
        with contextlib.suppress(OSError):
            free = f" ({shutil.disk_usage(path.parent).free} bytes free)"
        raise CheckpointError(
            f"{path}: cannot write: {error.strerror or error}{free}; "
            "solve that and repeat the command, finished files are kept"
        ) from error


def sync_folder(path: Path) -> None:
    """Make a rename durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file under a temporary name, then rename it."""
    data = (json.dumps(value, indent=2) + "\n").encode()
    file = OutputFile(path, len(data))
    file.write(0, data)
    file.commit()


def side_files(source: Path) -> list[str]:
    """Everything a checkpoint needs that is no weight: tokenizer, templates, licence, code, ...

    Relative paths. Hidden files and folders are left out; a link that leads out of the checkpoint
    is refused (links into the blobs of a Hub cache are what a cache is made of, and followed).
    """
    found: list[str] = []
    for folder, folders, files in os.walk(source, onerror=_refuse):
        for name in folders:
            if Path(folder, name).is_symlink() and not name.startswith("."):
                raise CheckpointError(f"{Path(folder, name)}: a link to a folder; copy it instead")
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            relative = path.relative_to(source)
            if name.startswith(".") or path.suffix in _WEIGHT_SUFFIXES:
                continue
            if name.endswith(".index.json") or str(relative) in _DESCRIPTIONS:
                continue
            if name.endswith(PARTIAL_SUFFIX):
                continue
            _require_inside(path, source)
            found.append(str(relative))
    return found


def copy_side_files(source: Path, out: Path) -> None:
    """Copy every side file byte for byte."""
    for relative in side_files(source):
        target = out / relative
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / relative, target)


def _refuse(error: OSError) -> None:
    raise CheckpointError(f"{error.filename}: {error.strerror}; cannot copy it") from error


def _require_inside(path: Path, source: Path) -> None:
    """Refuse special files and links out of the folder."""
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(source))
    cache = root.parent.parent / "blobs"
    if not (real.is_relative_to(root) or (real.is_relative_to(cache) and path.is_symlink())):
        raise CheckpointError(f"{path}: links to {real}, out of the checkpoint; remove the link")
    if not real.is_file():
        raise CheckpointError(f"{path}: not a regular file; remove it")
