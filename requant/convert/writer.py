"""Writing files so that nothing half-done looks done.

A weight file is written from front to back under a temporary name, fsynced and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from requant.convert.header import DATA_ALIGNMENT
from requant.convert.journal import JOURNAL_NAME, MANIFEST_NAME, RANKS_NAME, Digest
from requant.errors import CheckpointError

PARTIAL_SUFFIX = ".partial"
#: Bytes that are hashed and written at a time, and how many such buffers there are.
WINDOW_BYTES = 8 << 20
WINDOWS = 4
#: The smallest such buffer of one of many files: smaller writes take a disk longer.
LEAST_WINDOW_BYTES = 1 << 18

#: What is never copied beside the weights: weights in any container, and what describes them.
_WEIGHT_SUFFIXES = frozenset(".safetensors .bin .pt .pth .ckpt .gguf .onnx .h5 .msgpack".split())
_DESCRIPTIONS = frozenset(
    ["config.json", "hf_quant_config.json", "quantize_config.json"]
    + [MANIFEST_NAME, JOURNAL_NAME, RANKS_NAME]
)


class OutputFile:
    """A file of known size that is written from front to back and hashed on the way.

    Bytes gather in aligned windows; full ones are hashed and written by threads of their own, past
    the page cache where the file system lets us (fresh cache pages cost more than the disk).
    """

    def __init__(self, path: Path, nbytes: int, together: int = 1, begin: int = 0) -> None:
        """`together`: how many files are written at a time; they share the windows' memory.
        `begin`: continue after so many bytes, which an earlier `sync` has made durable."""
        self.path = path
        self.nbytes = nbytes
        self._partial = path.with_name(path.name + PARTIAL_SUFFIX)
        self._sha256 = hashlib.sha256()
        self._position = 0
        self._committed = False
        with writing(self._partial):
            self._descriptor = _open_direct(self._partial, anew=not begin)
        # One thread hashes, as order matters; the other writes.
        self._hasher = ThreadPoolExecutor(1, "requant-hash")
        self._writer = ThreadPoolExecutor(1, "requant-write")
        size, count = windows_of(together)
        size = min(-(-size // DATA_ALIGNMENT), -(-nbytes // DATA_ALIGNMENT)) * DATA_ALIGNMENT
        self._free = [_Window(size) for _ in range(count if nbytes > size else 1)]
        self._busy: deque[tuple[_Window, Future[None], Future[None]]] = deque()
        self._window = self._free.pop()
        self._synced = begin > 0
        if begin:
            self._reread(begin)

    def append(self, data: bytes | torch.Tensor) -> None:
        """Add bytes, or a contiguous CPU tensor's bytes, at the end of what was written."""
        if isinstance(data, torch.Tensor):
            flat = data.contiguous().view(-1).view(torch.uint8)
        else:
            flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        while flat.numel():
            window = self._window
            count = min(flat.numel(), window.size - window.filled)
            window.tensor[window.filled : window.filled + count].copy_(flat[:count])
            window.filled += count
            flat = flat[count:]
            if window.filled == window.size:
                self._flush()
                self._window = self._next_window()

    def commit(self) -> Digest:
        """Make the file durable and give it its name; the digest of its bytes."""
        with writing(self.path):
            self._flush()
            while self._busy:
                self._finish_oldest()
            assert self._position == self.nbytes, f"{self._position} of {self.nbytes} bytes"
            os.ftruncate(self._descriptor, self.nbytes)
            os.fsync(self._descriptor)
            self._close()
            os.rename(self._partial, self.path)
            self._committed = True
            sync_folder(self.path.parent)
        return Digest(self.nbytes, self._sha256.hexdigest())

    def sync(self) -> int:
        """Make all that was appended durable; how many bytes that is. A new OutputFile can continue
        from there."""
        while self._busy:
            self._finish_oldest()
        with writing(self._partial):
            self._write(self._window, self._position)
            os.fsync(self._descriptor)
        self._synced = True
        return self._position + self._window.filled

    def abandon(self) -> None:
        """Close the file, unless it was committed, and remove it, unless it can be continued."""
        if self._committed:
            return
        with contextlib.suppress(OSError):
            self._close()
        if self._synced:
            return
        with contextlib.suppress(OSError):  # never instead of the error that led here
            self._partial.unlink()

    def _reread(self, begin: int) -> None:
        """Hash what is there, and take up the bytes of the window that was not full."""
        whole = begin // DATA_ALIGNMENT * DATA_ALIGNMENT
        with open(self._partial, "rb") as file:
            left = whole
            while left:
                chunk = file.read(min(left, WINDOW_BYTES))
                if not chunk:
                    break
                self._sha256.update(chunk)
                left -= len(chunk)
            rest = file.read(begin - whole)
        if left or len(rest) != begin - whole:
            raise CheckpointError(
                f"{self._partial}: has {os.path.getsize(self._partial)} bytes, the journal says "
                f"{begin}; start over with --overwrite"
            )
        self._position = whole
        self._window.view[: len(rest)] = rest
        self._window.filled = len(rest)

    def _close(self) -> None:
        self._hasher.shutdown()
        self._writer.shutdown(cancel_futures=True)
        os.close(self._descriptor)

    def _flush(self) -> None:
        """Hand the current window to the threads."""
        window, offset = self._window, self._position
        if window.filled:
            self._position += window.filled
            hashed = self._hasher.submit(self._sha256.update, window.view[: window.filled])
            written = self._writer.submit(self._write, window, offset)
            self._busy.append((window, hashed, written))

    def _next_window(self) -> _Window:
        """An empty window; waits for one when all are being written."""
        if not self._free:
            self._finish_oldest()
        return self._free.pop()

    def _finish_oldest(self) -> None:
        window, hashed, written = self._busy.popleft()
        hashed.result()
        with writing(self._partial):
            written.result()
        window.filled = 0
        self._free.append(window)

    def _write(self, window: _Window, offset: int) -> None:
        """Write a window; the last one with padding, which `commit` cuts off."""
        end = -(-window.filled // DATA_ALIGNMENT) * DATA_ALIGNMENT
        window.view[window.filled : end] = bytes(end - window.filled)
        view = window.view[:end]
        while view:
            try:
                count = os.pwrite(self._descriptor, view, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not _through_cache(self._descriptor):
                    raise
                continue  # this file system takes no direct writes after all
            view, offset = view[count:], offset + count


def windows_of(together: int) -> tuple[int, int]:
    """The size of a window, in bytes, and how many each of so many files has."""
    if together == 1:
        return WINDOW_BYTES, WINDOWS
    return max(2 * WINDOW_BYTES // together, LEAST_WINDOW_BYTES), 2


class _Window:
    """A page-aligned buffer that is filled from the front."""

    def __init__(self, size: int) -> None:
        self.size = max(size, DATA_ALIGNMENT)
        self.filled = 0
        memory = mmap.mmap(-1, self.size)  # lives as long as what views it
        self.view = memoryview(memory)
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)


def _open_direct(path: Path, anew: bool = True) -> int:
    """Create a file for writing past the page cache, or through it where that is not possible."""
    flags = os.O_RDWR | os.O_CREAT | (os.O_TRUNC if anew else 0)
    direct = getattr(os, "O_DIRECT", 0)
    try:
        return os.open(path, flags | direct, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL or not direct:
            raise
        return os.open(path, flags, 0o644)


def _through_cache(descriptor: int) -> bool:
    """Turn direct writing off; whether it was on."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    direct = getattr(os, "O_DIRECT", 0)
    if flags & direct:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~direct)
    return bool(flags & direct)


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


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_json(path: Path, value: Mapping[str, Any]) -> Digest:
    """Write a JSON file under a temporary name, then rename it."""
    return write_bytes(path, json_bytes(value))


def write_bytes(path: Path, data: bytes) -> Digest:
    """Write a small file under a temporary name, then rename it."""
    return _write_chunks(path, len(data), [data])


def _write_chunks(path: Path, nbytes: int, chunks: Iterable[bytes]) -> Digest:
    """Write a file of this size."""
    file = OutputFile(path, nbytes)
    try:
        for chunk in chunks:
            file.append(chunk)
        return file.commit()
    except BaseException:
        file.abandon()
        raise


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
            if not is_side_file(name) or name.endswith((".index.json", PARTIAL_SUFFIX)):
                continue
            if str(relative) in _DESCRIPTIONS:
                continue
            _require_inside(path, source)
            found.append(str(relative))
    return found


def is_side_file(name: str) -> bool:
    """Whether a file of a repository is no weight in any container, and not hidden."""
    path = PurePosixPath(name)
    return path.suffix not in _WEIGHT_SUFFIXES and not any(p.startswith(".") for p in path.parts)


def copy_side_files(source: Path, out: Path) -> dict[str, Digest]:
    """Copy every side file byte for byte; the digest of each."""
    copied = {}
    for relative in side_files(source):
        target = out / relative
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        chunks = chunks_of(source / relative)
        copied[relative] = _write_chunks(target, (source / relative).stat().st_size, chunks)
    return copied


def chunks_of(path: Path) -> Iterator[bytes]:
    """The bytes of a file that is as long as it was when asked last."""
    left = path.stat().st_size
    try:
        with path.open("rb") as file:
            while chunk := file.read(min(WINDOW_BYTES, left)):
                left -= len(chunk)
                yield chunk
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; cannot copy it") from error
    if left:
        raise CheckpointError(f"{path}: became shorter by {left} bytes while it was copied")


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
