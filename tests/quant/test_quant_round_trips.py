"""What comes back after encode, decode and encode again: FP8 all of it, integers nearly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from requant.quant import parse_format
from requant.quant.fp8_block import AMAX_FLOOR, E4M3_MAX, Fp8Block
from requant.quant.integer import quantize_symmetric

BLOCK = 16
GRID = 64


def fp8_weight(
    scale: torch.Tensor, block: int, largest: float = E4M3_MAX, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random codes whose largest magnitude in each block is `largest`, with the given scales."""
    generator = torch.Generator().manual_seed(seed)
    shape = (scale.shape[0] * block, scale.shape[1] * block)
    codes = (torch.randn(shape, generator=generator) * 60).clamp(-largest, largest)
    codes[::block, ::block] = largest
    codes[1::block, 1::block] = -(2.0**-9)  # the smallest code
    return {"weight": codes.to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def random_scales(rows: int, cols: int, seed: int = 1) -> torch.Tensor:
    """Any float32, not only quotients by 448: 2^-20 to 4."""
    generator = torch.Generator().manual_seed(seed)
    return torch.exp2(torch.rand(rows, cols, generator=generator) * 22 - 20)


def again(
    codec: Fp8Block, parts: dict[str, torch.Tensor], via: torch.dtype
) -> dict[str, torch.Tensor]:
    shape = (parts["weight"].shape[0], parts["weight"].shape[1])
    return codec.encode(codec.decode(parts, shape).to(via).to(torch.float32), shape)


@pytest.mark.parametrize(("block", "grid"), [(BLOCK, GRID), (128, 8)])
def test_fp8_to_fp32_to_fp8_is_bit_identical(block: int, grid: int, same: Any) -> None:
    """Thousands of blocks with arbitrary scales. amax / 448 alone would miss some of them by one
    ulp, because 448 * s was rounded: that is what the second look is for."""
    scale = random_scales(grid, grid)
    parts = fp8_weight(scale, block)
    result = again(Fp8Block(block, block), parts, torch.float32)
    assert same(result["weight"], parts["weight"])
    assert same(result["weight_scale_inv"], scale)
    assert (448 * scale / 448 != scale).any()


def test_fp8_second_look_by_hand(same: Any) -> None:
    """s = 1 + 1198380 * 2^-23 is the smallest scale above 1 that amax / 448 misses, by one ulp."""
    scale = torch.tensor([[1 + 1198380 * 2.0**-23]])
    plain = 448 * scale / 448
    assert plain.view(torch.int32) - scale.view(torch.int32) == -1
    parts = fp8_weight(scale, 128)
    assert same(again(Fp8Block(), parts, torch.float32)["weight_scale_inv"], scale)


def test_fp8_second_look_is_needed_for_one_scale_in_nine() -> None:
    """Over arbitrary scales. Never for quotients by 448: q = fl(a / 448) has fl(fl(448 q) / 448)
    = q, because either 448 q rounds back to a, or its error is under half an ulp of q."""
    scale = random_scales(1, 1 << 16)
    assert 0.1 < (448 * scale / 448 != scale).float().mean() < 0.115
    quotient = scale / 448
    assert torch.equal(448 * quotient / 448, quotient)


def test_fp8_second_look_does_not_depend_on_the_neighbours(same: Any) -> None:
    """s = 448 s / 448 + 1 ulp with 448 s exact in BF16: the block's amax looks like a BF16
    source's, yet its codes need the second look, alone as well as beside others."""
    amax = torch.tensor(131 * 2.0**-10)
    scale = ((amax / 448).view(torch.int32) + 1).view(torch.float32)
    assert 448 * scale == amax and amax / 448 != scale
    parts = fp8_weight(scale.reshape(1, 1), 128)
    assert same(again(Fp8Block(), parts, torch.float32)["weight_scale_inv"], scale.reshape(1, 1))


@pytest.mark.parametrize("side", [1, 2, 16, 128])
@pytest.mark.parametrize("exact_in_bf16", [True, False])
def test_fp8_repeats_itself(side: int, exact_in_bf16: bool, weight: Any, same: Any) -> None:
    """Scales that are amax / 448 need no power-of-two code to come back: 1x1 blocks do too."""
    codec = Fp8Block(side, side)
    source = weight(130, 300) * (1.0 if exact_in_bf16 else 1.1)
    first = codec.encode(source, (130, 300))
    second = again(codec, first, torch.float32)
    assert same(first["weight"], second["weight"])
    assert same(first["weight_scale_inv"], second["weight_scale_inv"])


def test_fp8_to_bf16_to_fp8_keeps_the_codes_and_moves_the_scales(same: Any) -> None:
    """BF16 (8 bits) rounds code * scale and amax by up to 2^-8 each, together under 2^-7; half the
    gap between E4M3 codes is at least 2^-5 of a code. So codes come back, and scales move by up
    to 2^-8."""
    scale = random_scales(GRID, GRID)
    parts = fp8_weight(scale, BLOCK)
    result = again(Fp8Block(BLOCK, BLOCK), parts, torch.bfloat16)
    assert same(result["weight"], parts["weight"])
    change = ((result["weight_scale_inv"] - scale) / scale).abs()
    assert 2.0**-9 < change.max() <= 2.0**-8


def test_every_code_comes_back_through_bf16(same: Any) -> None:
    """All 254 finite codes in one block, for 256 scales over one octave."""
    every = torch.arange(256, dtype=torch.uint8)
    every = every[(every & 0x7F) != 0x7F]  # 0x7f and 0xff are NaN
    codes = every.view(torch.float8_e4m3fn).repeat(256, 1)
    scale = torch.exp2(torch.arange(256) / 256 - 7)[:, None]
    codec = Fp8Block(1, 254)
    parts = {"weight": codes, "weight_scale_inv": scale}
    assert same(again(codec, parts, torch.bfloat16)["weight"], codes)
    assert same(again(codec, parts, torch.float32)["weight"], codes)


@pytest.mark.parametrize("via", [torch.bfloat16, torch.float32])
def test_blocks_that_do_not_reach_448_are_quantized_anew(via: torch.dtype) -> None:
    """With power-of-two (UE8M0) scales the largest code is anywhere in (224, 448]. Decoding is
    then exact in BF16, but amax / 448 is another scale; the values stay within half a step."""
    scale = torch.exp2(torch.arange(-8.0, 8.0)).reshape(4, 4)
    parts = fp8_weight(scale, BLOCK, largest=256.0)
    codec, shape = Fp8Block(BLOCK, BLOCK), (4 * BLOCK, 4 * BLOCK)
    decoded = codec.decode(parts, shape)
    assert torch.equal(decoded.to(torch.bfloat16).to(torch.float32), decoded)
    result = again(codec, parts, via)
    assert torch.equal(result["weight_scale_inv"], 256 * scale / 448)
    amax = 256 * scale.max()
    assert (codec.decode(result, shape) - decoded).abs().max() <= amax / 28


def test_scales_below_the_floor_are_raised_to_it() -> None:
    """A scale under 1e-4 / 448 (transformers writes them, DeepSeek's formula does not)."""
    floor = torch.tensor(AMAX_FLOOR) / E4M3_MAX
    parts = fp8_weight(floor.reshape(1, 1) / 4, BLOCK)
    result = again(Fp8Block(BLOCK, BLOCK), parts, torch.float32)
    assert result["weight_scale_inv"].item() == floor
    assert result["weight"][0, 0].to(torch.float32) == 112.0  # 448 / 4


@pytest.mark.parametrize("via", [torch.bfloat16, torch.float32])
def test_blocks_at_the_floor_come_back(via: torch.dtype, same: Any) -> None:
    floor = (torch.tensor(AMAX_FLOOR) / E4M3_MAX).reshape(1, 1)
    parts = fp8_weight(floor, BLOCK, largest=256.0)
    result = again(Fp8Block(BLOCK, BLOCK), parts, via)
    assert same(result["weight"], parts["weight"])
    assert same(result["weight_scale_inv"], floor)


@pytest.mark.parametrize("text", ["int8-channel", "int4", "int4[group_size=32]"])
@pytest.mark.parametrize("arithmetic", ["fp32", "bf16"])
def test_integers_move_by_about_a_step_at_most(text: str, arithmetic: str, weight: Any) -> None:
    """compressed-tensors divides amax by h = 7.5 (127.5), but the largest codes are 7 and -8: the
    decoded amax is (h - 0.5) s or (h + 0.5) s, never h s, so the grid shifts at every trip. The
    next step is at most (h + 0.5) / h * (1 + 2^-8) s, and the error half of it, plus h * 2^-8 of
    it at the clamped end for a scale that BF16 rounded down, plus as much again twice when BF16
    rounds the weight and the quotient."""
    name, _, options = text.rstrip("]").partition("[")
    inside = ",".join(filter(None, (options, f"arithmetic={arithmetic}")))
    codec, shape = parse_format(f"{name}[{inside}]"), (160, 256)
    first = codec.encode(weight(*shape), shape)
    decoded = codec.decode(first, shape)
    second = codec.encode(decoded, shape)
    moved = (codec.decode(second, shape) - decoded).abs()
    scale = first["weight_scale"].to(torch.float32)
    half_range = 127.5 if name == "int8-channel" else 7.5
    roundings = 1 if arithmetic == "fp32" else 3
    limit = 0.5 + roundings * half_range * 2.0**-8
    limit *= (half_range + 0.5) / half_range * (1 + 2.0**-8)
    assert limit < {7.5: 0.64, 127.5: {1: 1.01, 3: 2.02}[roundings]}[half_range]
    steps = moved / scale.repeat_interleave(shape[1] // scale.shape[1], dim=1)
    assert 0.25 < steps.max() <= limit
    assert not torch.equal(first["weight_scale"], second["weight_scale"])


def test_the_integer_grid_shifts_by_hand() -> None:
    """amax 7.5 on the negative side: scale 1, code -8. Decoded amax 8: scale 8 / 7.5 in BF16."""
    row = torch.tensor([[-7.5, 3.0]])
    codes, scale = quantize_symmetric(row, -1, 4)
    assert scale.item() == 1.0 and codes.tolist() == [[0xB0, 0, 0, 0]]  # plus 8, low nibble first
    row = torch.tensor([[-8.0, 3.0]])
    codes, scale = quantize_symmetric(row, -1, 4)
    assert scale.item() == 1.0703125 and codes.tolist() == [[0xB1, 0, 0, 0]]
