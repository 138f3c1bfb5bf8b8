"""Large pieces of memory that are used again."""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref

import torch

#: The sizes of memory that is kept for the next tensor, powers of two in bytes.
_LEAST, _MOST = 12, 24
#: Of each size so many bytes are kept, but that many buffers at least.
_KEPT_BYTES, _KEPT = 1 << 24, 8


class Buffers:
    """Page-aligned memory of one size that is used again: touching fresh pages takes longer than
    reading a disk."""

    def __init__(self, nbytes: int, most: float = math.inf) -> None:
        """Keep `most` pieces of memory that came back; the system gets the others."""
        self._nbytes, self._most = nbytes, most
        self._free: list[mmap.mmap] = []

    def take(self, count: int = -1, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """The first `count` elements of a buffer, or all; it comes back when nothing views the
        tensor any more."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = mmap.mmap(-1, self._nbytes)
        lent = (ctypes.c_ubyte * self._nbytes).from_buffer(memory)
        weakref.finalize(lent, self._keep, memory)
        return torch.frombuffer(lent, dtype=dtype, count=count)

    def _keep(self, memory: mmap.mmap) -> None:
        if len(self._free) < self._most:
            self._free.append(memory)


_BUFFERS = {
    power: Buffers(1 << power, max(_KEPT_BYTES >> power, _KEPT))
    for power in range(_LEAST, _MOST + 1)
}


def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Like torch.empty on the CPU, in memory that comes back for the next such tensor.

    Threads that free what others allocated leave malloc with ever more memory in pieces.
    """
    count = math.prod(shape)
    buffers = _BUFFERS.get(max((count * dtype.itemsize - 1).bit_length(), _LEAST))
    if buffers is None or not count:
        return torch.empty(shape, dtype=dtype)
    return buffers.take(count, dtype).view(shape)


def release() -> None:
    """Hand free memory back that malloc keeps in pieces, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
