"""Whether compiled loops (loops.py) can do a piece of work, and tensors as they take them."""

from __future__ import annotations

import functools
from typing import Any

import torch


def loops_for(tensor: torch.Tensor) -> Any:
    """The module of compiled loops; None for tensors on other devices than the CPU, and where
    Numba is not installed: then torch does the same work, to the same bits."""
    return _loops() if tensor.device.type == "cpu" else None


def array(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Any:
    """A tensor's memory as a C-contiguous numpy array, copied only if it lies otherwise; `dtype` is
    another one of the same size."""
    tensor = tensor.contiguous()
    return (tensor if dtype is None else tensor.view(dtype)).numpy()


@functools.cache
def _loops() -> Any:
    try:
        from requant.quant import loops
    except ImportError:
        return None
    return loops
