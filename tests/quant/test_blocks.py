"""Short cuts of the encoders and decoders give what the plain words for them give."""

from __future__ import annotations

import pytest
import torch

from requant.quant.blocks import block_range, block_strips
from requant.quant.packing import e4m3_and_scale


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (9, 16), (20, 21)])
def test_blocks(shape: tuple[int, int]) -> None:
    """The range of each block, with 0; a scale for each, partial ones at the edges included."""
    values = torch.randint(-99, 99, shape, generator=torch.Generator().manual_seed(0))
    low, high = block_range(values, 4, 8)
    spread = torch.empty(shape, dtype=torch.int64)
    for row in range(low.shape[0]):
        for col in range(low.shape[1]):
            block = values[4 * row : 4 * row + 4, 8 * col : 8 * col + 8]
            assert low[row, col] == min(0, int(block.min()))
            assert high[row, col] == max(0, int(block.max()))
            spread[4 * row : 4 * row + 4, 8 * col : 8 * col + 8] = low[row, col]
    product = values.clone()
    for strip, scale in block_strips(product, low, 4, 8):
        strip.mul_(scale)
    assert torch.equal(product, values * spread)


@pytest.mark.parametrize("nan", [None, 0x7F, 0xFF])
@pytest.mark.parametrize("power", [-149, -127, -126, 0, 119, 120, 127])
def test_scaled_e4m3(power: int, nan: int | None) -> None:
    """Every code times scales from the smallest to those that have no 256-fold in float32."""
    byte = torch.arange(256, dtype=torch.int16)
    kept = byte[(byte & 0x7F != 0x7F) | (byte == (-1 if nan is None else nan))]
    codes = kept.to(torch.uint8).view(torch.float8_e4m3fn)[None]
    scale = torch.tensor([[2.0**power]])
    for signed in (scale, -scale):
        values, moved = e4m3_and_scale(codes, signed)
        expected = codes.to(torch.float32) * signed
        torch.testing.assert_close(values * moved, expected, rtol=0, atol=0, equal_nan=True)
