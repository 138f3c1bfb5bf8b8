"""Bytes and patches of stored tensors, read from the files of a checkpoint.

A file that is converted is read ahead, past the page cache, which it would only wash out: it is
read once, and fresh cache pages cost more than the disk.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from requant.buffers import Buffers
from requant.convert.fused import StoredPart, StoredPiece
from requant.convert.header import DATA_ALIGNMENT, read_exactly
from requant.convert.readahead import ReadAhead
from requant.errors import CheckpointError, FormatError
from requant.quant.codec import TORCH_DTYPES
from requant.quant.cutting import Patch

#: While a file is read ahead, other reads of at least this size go past the page cache, too.
DIRECT_BYTES = 1 << 18


class Files:
    """The files of a folder: opened when first read, closed with this."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ahead: dict[str, ReadAhead] = {}
        self._buffers: dict[int, Buffers] = {}
        self._open: dict[tuple[str, bool], int] = {}
        self._lock = threading.Lock()

    def read(self, part: StoredPart, shape: tuple[int, ...], row: int, column: int) -> torch.Tensor:
        """A patch of the given shape, in its own dtype: whole rows from `row` on, or, of a matrix,
        columns from `column` on."""
        dtype = TORCH_DTYPES.get(part.spec.dtype)
        if dtype is None:
            raise FormatError(f"{part.name}: torch has no dtype for {part.spec.dtype}")
        stored = part.spec.shape
        if part.spec.dtype == "F4" and stored:  # two codes a byte, one element of TORCH_DTYPES
            stored, shape = (*stored[:-1], stored[-1] // 2), (*shape[:-1], shape[-1] // 2)
        location, itemsize = part.location, dtype.itemsize
        line = math.prod(shape[1:]) * itemsize  # bytes of a row of the patch
        step, element = part.strides or (math.prod(stored[1:]) * itemsize, None)
        rows = shape[0] if shape else 1
        if element is not None:  # a transposed view: read its columns, each with gaps or without
            begin = location.begin + row * step + column * element
            span = (rows - 1) * step + itemsize if rows else 0
            starts = range(begin, begin + shape[1] * element, element)
            gaps = [self.read_bytes(location.file, at, at + span) for at in starts]
            lines = torch.stack(gaps) if gaps else torch.empty(0, 0, dtype=torch.uint8)
            picked = lines.as_strided((len(gaps), rows, itemsize), (span, step, 1))
            return picked.contiguous().view(dtype).reshape(len(gaps), rows).t().contiguous()
        begin = row * step + column * itemsize
        if line == step or rows == 1 or not rows:
            return self.read_part(part, begin, begin + rows * line).view(dtype).reshape(shape)
        if (column == 0 and line * 4 >= step) or part.pieces:  # small gaps: read over them
            raw = self.read_part(part, begin, begin + (rows - 1) * step + line)
            picked = raw.as_strided((rows, line), (step, 1)).contiguous()
        else:
            starts = range(begin, begin + rows * step, step)
            picked = torch.stack([self.read_part(part, at, at + line) for at in starts])
        return picked.view(dtype).reshape(shape)

    def read_part(self, part: StoredPart, begin: int, end: int) -> torch.Tensor:
        """Bytes begin:end of a stored tensor as uint8, wherever its pieces lie."""
        if not part.pieces:
            place = part.location
            return self.read_bytes(place.file, place.begin + begin, place.begin + end)
        patch = part.pieces[0].patch
        if patch is None:
            return self._agreed(part, begin, end)
        first, last = begin // patch.pitch, -(-end // patch.pitch)
        lines = torch.empty(last - first, patch.pitch, dtype=torch.uint8)
        seen: set[Patch] = set()
        for piece in part.pieces:
            assert piece.patch is not None
            (top, bottom), (left, right) = piece.patch.lines, piece.patch.span
            a, z, width = max(first, top), min(last, bottom), right - left
            if a < z:
                data = self._piece(piece, (a - top) * width, (z - top) * width).view(z - a, width)
                target = lines[a - first : z - first, left:right]
                if piece.patch in seen and not torch.equal(target, data):
                    raise CheckpointError(
                        f"{self._path / piece.location.file}: {part.name} differs from the same "
                        "piece on another rank; one is damaged"
                    )
                target.copy_(data)
                seen.add(piece.patch)
        return lines.flatten()[begin - first * patch.pitch : end - first * patch.pitch]

    def _agreed(self, part: StoredPart, begin: int, end: int) -> torch.Tensor:
        """Bytes of a tensor that every rank has. Raises CheckpointError when they differ."""
        first, *others = part.pieces
        found = self._piece(first, begin, end)
        for piece in others:
            if not torch.equal(found, self._piece(piece, begin, end)):
                raise CheckpointError(
                    f"{self._path / piece.location.file}: {part.name} differs from the one in "
                    f"{first.location.file}, and all ranks have it alike; one is damaged"
                )
        return found

    def _piece(self, piece: StoredPiece, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Bytes begin:end of a piece, as the whole tensor has them."""
        place = piece.location
        size = place.end - place.begin
        if piece.moved is not None:
            return piece.moved(self.read_bytes(place.file, place.begin, place.end))[begin:end]
        stop = size if end is None else end
        return self.read_bytes(place.file, place.begin + begin, place.begin + stop)

    def read_bytes(self, file: str, begin: int, end: int) -> torch.Tensor:
        """Bytes begin:end of a file as uint8."""
        large = end - begin >= DIRECT_BYTES
        if self._ahead:
            ahead = self._ahead.get(file)
            held = ahead.take(begin, end, wait=large) if ahead is not None else None
            if held is None and large:
                held = self._read_direct(file, begin, end)
            if held is not None:  # torch views 8 bytes as a number only where they are aligned
                return held if begin % 8 == 0 else held.clone()
        raw = torch.empty(end - begin, dtype=torch.uint8)
        if end > begin:
            self._fill(memoryview(raw.numpy().data), file, begin, end)
        return raw

    def _fill(self, target: memoryview, file: str, begin: int, end: int) -> None:
        """Read bytes begin:end of a file."""
        read_exactly(self._descriptor(file), begin, end, target, self._path / file)

    def _read_direct(
        self, file: str, begin: int, end: int, buffers: Buffers | None = None
    ) -> torch.Tensor:
        """Read past the page cache: whole aligned pages into an aligned buffer."""
        first = begin // DATA_ALIGNMENT * DATA_ALIGNMENT
        size = -(-(end - first) // DATA_ALIGNMENT) * DATA_ALIGNMENT
        raw = (buffers or Buffers(size)).take()[:size]
        target = memoryview(raw.numpy().data)
        try:
            read_exactly(self._descriptor(file, True), first, end, target, self._path / file)
        except CheckpointError:  # a file system may give up half-way; what is really wrong recurs
            self._fill(memoryview(raw[: end - first].numpy().data), file, first, end)
        return raw[begin - first : end - first]

    @contextlib.contextmanager
    def reading(self, file: str, nbytes: int, windows: int, size: int) -> Iterator[ReadAhead]:
        """While inside, a file of `nbytes` is read ahead in windows of `size` bytes, and large
        reads of any leave the page cache alone, where the file system lets them."""
        buffers = self._buffers.setdefault(size, Buffers(size))
        ahead = ReadAhead(nbytes, partial(self._read_direct, file, buffers=buffers), windows, size)
        self._ahead[file] = ahead
        try:
            yield ahead
        finally:
            del self._ahead[file]
            ahead.close()

    def _descriptor(self, file: str, direct: bool = False) -> int:
        """The descriptor of a file; for direct reads one of its own, where they are possible."""
        with self._lock:
            if (file, direct) not in self._open:
                self._open[file, direct] = self._opened(self._path / file, direct)
            return self._open[file, direct]

    def _opened(self, path: Path, direct: bool) -> int:
        flag = getattr(os, "O_DIRECT", 0) if direct else 0
        try:
            return os.open(path, os.O_RDONLY | flag)
        except OSError as error:
            if error.errno == errno.EINVAL and flag:
                return self._opened(path, False)
            raise CheckpointError(f"{path}: {error.strerror}") from error

    def __del__(self) -> None:
        for descriptor in self._open.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)
