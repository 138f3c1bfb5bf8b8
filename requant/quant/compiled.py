"""Whether compiled loops (loops.py) can do a piece of work, and tensors as they take them."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch


def loops_for(work: _Placed) -> Any:
    """The module of compiled loops; None for what is on other devices than the CPU, and where Numba
    is not installed: then torch does the same work, to the same bits."""
    return _loops() if work.device.type == "cpu" else None


def available() -> bool:
    """Whether there are compiled loops for what is on the CPU."""
    return _loops() is not None


def flat(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Any:
    """The same in one dimension."""
    return array(tensor, dtype).reshape(-1)


class _Placed(Protocol):
    @property
    def device(self) -> torch.device: ...


def array(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Any:
    """A tensor's memory as a C-contiguous numpy array, copied only if it lies otherwise; as
    another dtype where one is told."""
    tensor = tensor.contiguous()
    return (tensor if dtype in (None, tensor.dtype) else tensor.view(dtype)).numpy()


@functools.cache
def _loops() -> Any:
    try:
        from requant.quant import loops
    except ImportError:
        return None
    return loops
