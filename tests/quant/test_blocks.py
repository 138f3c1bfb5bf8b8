"""Short cuts of the encoders and decoders give what the plain words for them give."""

from __future__ import annotations

import pytest
import torch

from requant.errors import FormatError
from requant.quant.blocks import block_range, block_strips, finite_amax
from requant.quant.packing import e4m3_and_scale


@pytest.mark.parametrize("n", [8, 16, 24, 32, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_amax(n: int, dtype: torch.dtype) -> None:
    """Of groups of any length, from zeros and subnormals to huge values; and of none."""
    generator = torch.Generator().manual_seed(n)
    powers = torch.randint(-149, 120, (16, 12, n), generator=generator).to(torch.float32).exp2_()
    groups = torch.randn(16, 12, n, generator=generator).mul_(powers).to(dtype)
    groups[0], groups[1] = 0.0, -0.0
    assert torch.equal(finite_amax(groups), groups.abs().amax(-1))
    assert torch.equal(finite_amax(groups, torch.empty_like(groups)), groups.abs().amax(-1))
    assert finite_amax(groups[:0]).shape == (0, 12)


@pytest.mark.parametrize("n", [8, 16, 32, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_amax_refuses(n: int, dtype: torch.dtype, value: float, sign: float) -> None:
    """NaN and infinity of either sign, wherever they are."""
    bad = torch.tensor(value).copysign(torch.tensor(sign))
    for position in (0, n // 2, n - 1):
        groups = torch.ones(4, 8, n, dtype=dtype)
        groups[2, 5, position] = bad
        with pytest.raises(FormatError, match="NaN or infinity"):
            finite_amax(groups)


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
