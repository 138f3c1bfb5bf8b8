"""Memory that is used again, without two tensors ever sharing it."""

from __future__ import annotations

import threading

import pytest
import torch

from requant.buffers import Buffers, empty, release
from requant.memory import peak_bytes


def test_a_buffer_comes_back_when_nothing_views_it() -> None:
    """Not before the last view of the tensor is gone, whatever was made of it."""
    buffers = Buffers(4096)
    first = buffers.take()
    place, view = first.data_ptr(), first[100:200].view(torch.float32)
    del first
    other = buffers.take()
    assert other.data_ptr() != place
    del view
    assert buffers.take().data_ptr() == place


def test_no_more_are_kept_than_told() -> None:
    buffers = Buffers(4096, 2)
    held = [buffers.take() for _ in range(5)]
    places = {tensor.data_ptr() for tensor in held}
    held.clear()
    again = [buffers.take() for _ in range(2)]
    assert {tensor.data_ptr() for tensor in again} <= places
    assert not buffers._free


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (1024, 1024), (0, 4), (1 << 23,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16])
def test_empty(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A tensor like any other, of all sizes: none, kept ones, and those too large to be kept."""
    tensor = empty(shape, dtype)
    assert tensor.shape == torch.Size(shape) and tensor.dtype == dtype
    assert tensor.is_contiguous() and tensor.data_ptr() % 64 == 0
    tensor.fill_(3)
    assert bool((tensor == 3).all())


def test_threads_never_share() -> None:
    """Each writes its own number for a while and finds it there."""
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            held = [empty((2048,)).fill_(number) for _ in range(4)]
            if any(bool((tensor != number).any()) for tensor in held):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_is_used_again() -> None:
    """Touching and dropping many times what is held at a time does not add up; releasing what
    malloc has is always allowed."""
    for _ in range(4):
        empty((1 << 20,)).fill_(0)
    before = peak_bytes()
    for _ in range(64):
        empty((1 << 20,)).fill_(0)
    release()
    assert peak_bytes() - before < 32 << 20
