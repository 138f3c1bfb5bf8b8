"""What the format tests share: random weights, and equality of bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


def _weight(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """Normal values that BF16 holds exactly, each row on its own power of two: [rows, cols]."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-12, 1, (rows, 1), generator=generator).to(torch.float32)
    values = torch.randn(rows, cols, generator=generator) * torch.exp2(exponents)
    return values.to(torch.bfloat16).to(torch.float32)


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes: tells -0 from 0, and works for every dtype."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    # A clone has the usual strides where a side of one leaves them open.
    left, right = (t.clone(memory_format=torch.contiguous_format) for t in (left, right))
    return torch.equal(left.flatten().view(torch.uint8), right.flatten().view(torch.uint8))


@pytest.fixture(scope="session")
def weight() -> Callable[..., torch.Tensor]:
    """`weight(rows, cols, seed=0)`: a float32 weight without rounding in BF16."""
    return _weight


@pytest.fixture(scope="session")
def same() -> Callable[[torch.Tensor, torch.Tensor], bool]:
    """`same(a, b)`: bit for bit."""
    return _same
