"""Codes and a grid of scales: value = code * scale, the arithmetic that most formats share.

On the CPU compiled loops do it (loops.py), several times faster than torch can; on other devices,
and where Numba is not installed, torch does. Both give the same bits.

Codes are as they are stored: E4M3 and INT8 a byte each, INT4 (plus 8) and E2M1 two a byte, low
nibble first. Scales are float32 [ceil(rows / block[0]), ceil(cols / block[1])], where a side of -1
means all of it.
"""

from __future__ import annotations

import torch

from requant.buffers import empty
from requant.errors import FormatError
from requant.quant.blocks import block_strips, reduce_columns
from requant.quant.codec import Alphabet, require_finite, tile_amax
from requant.quant.compiled import array, loops_for
from requant.quant.e2m1 import e2m1_bytes, e2m1_codes_to_float32
from requant.quant.packing import (
    centred_nibbles,
    e2m1_and_scale,
    e4m3_and_scale,
    pack_nibbles,
)

_E4M3 = torch.float8_e4m3fn
#: Alphabets of which a byte holds two codes.
_PACKED = ("int4", "e2m1")
#: The bits of the smallest float32 that BF16 rounds to infinity.
_BEYOND_BF16 = 0x7F7F8000


def decode(
    alphabet: Alphabet,
    codes: torch.Tensor,
    scale: torch.Tensor,
    block: tuple[int, int],
    cols: int | None = None,
) -> torch.Tensor:
    """Codes [rows, cols], or packed [rows, bytes], times their scales: float32 [rows, cols], each
    product rounded once. `cols` need be told of packed codes only where the last byte or word is
    not full."""
    if cols is None:
        cols = codes.shape[1] * (2 if alphabet in _PACKED else 1)
    shape = codes.shape[0], cols
    if cols > codes.shape[1] * (2 if alphabet in _PACKED else 1):
        raise FormatError(f"{cols} columns of {alphabet} do not fit into {codes.shape[1]} bytes")
    loops = loops_for(codes)
    if loops is not None:
        tile = empty(shape)
        loop = getattr(loops, f"decode_{alphabet}")
        loop(array(codes, torch.uint8), array(scale), *_checked(scale, block, shape), array(tile))
        return tile
    match alphabet:
        case "e4m3":
            tile, scale = e4m3_and_scale(codes, scale)
        case "e2m1":
            tile, scale = e2m1_and_scale(codes, scale)
        case "int4":
            tile = centred_nibbles(codes)[:, :cols].contiguous()
        case "int8":
            tile = codes.to(torch.float32)
    for strip, row_scale in block_strips(tile, scale, *_checked(scale, block, shape)):
        strip.mul_(row_scale)
    return tile


def encode(
    alphabet: Alphabet, tile: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:
    """The codes nearest to finite float32 [rows, cols] divided by their scales, ties to the even
    one; what lies beyond the alphabet gets its last code.

    float8_e4m3fn or int8 [rows, cols]; packed, uint8 [rows, cols / 2] for "e2m1" and [rows,
    4 * ceil(cols / 8)] for "int4", zero bits behind the last column.
    """
    rows, cols = tile.shape
    loops = loops_for(tile)
    if loops is not None:
        width = {"e2m1": cols // 2, "int4": -(-cols // 8) * 4}.get(alphabet, cols)
        codes = empty((rows, width), torch.uint8)
        loop = getattr(loops, f"encode_{alphabet}")
        loop(array(tile), array(scale), *_checked(scale, block, (rows, cols)), array(codes))
        return codes.view({"e4m3": _E4M3, "int8": torch.int8}.get(alphabet, torch.uint8))
    quotient = tile.clone()
    for strip, row_scale in block_strips(quotient, scale, *_checked(scale, block, (rows, cols))):
        strip.div_(row_scale)
    match alphabet:
        case "e4m3":
            return quotient.clamp_(-448, 448).to(_E4M3)
        case "e2m1":
            return e2m1_bytes(quotient)
        case "int4":
            return pack_nibbles(quotient.clamp_(-8, 7).round_().add_(8).to(torch.uint8)).view(
                torch.uint8
            )
        case "int8":
            return quotient.clamp_(-128, 127).round_().to(torch.int8)


def upcast_e2m1(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """E2M1 codes, one a byte uint8 [rows, cols], times scales with which they are E4M3 values:
    float8_e4m3fn of the same shape."""
    shape = codes.shape[0], codes.shape[1]
    loops = loops_for(codes)
    if loops is not None:
        wide = empty(shape, torch.uint8)
        loops.upcast_e2m1(array(codes), array(scale), *_checked(scale, block, shape), array(wide))
        return wide.view(_E4M3)
    values = e2m1_codes_to_float32(codes)
    for strip, row_scale in block_strips(values, scale, *_checked(scale, block, shape)):
        strip.mul_(row_scale)
    return values.to(_E4M3)


def column_peaks(tile: torch.Tensor, block_rows: int) -> torch.Tensor:
    """The largest magnitude in each column of each run of rows, NaN the largest of all: float32
    [rows, cols] -> [ceil(rows / block_rows), cols]."""
    loops = loops_for(tile)
    if loops is None:
        return torch.stack([strip.abs().amax(0) for strip in tile.split(block_rows)])
    peaks = empty((-(-tile.shape[0] // block_rows), tile.shape[1]))
    loops.peaks(array(tile), block_rows, array(peaks))
    return peaks


def amax(tile: torch.Tensor, block_cols: int = -1) -> torch.Tensor:
    """The largest magnitude of each run of columns: float32 [rows, cols] -> [rows, ceil(cols /
    block_cols)]. Raises FormatError for NaN or infinity."""
    rows, cols = tile.shape
    block_cols = _sides((1, block_cols), (rows, cols))[1]
    loops = loops_for(tile)
    if loops is None:
        largest = reduce_columns(tile.abs(), block_cols)
    else:
        largest = empty((rows, -(-cols // block_cols)))
        loops.amax(array(tile), block_cols, array(largest))
    require_finite(largest.amax() if largest.numel() else largest)
    return largest


def largest(
    alphabet: Alphabet, codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:
    """The largest magnitude that `decode` gives, NaN the largest of all: float32 [1]."""
    loops = loops_for(codes)
    loop = getattr(loops, f"largest_{alphabet}", None)
    if loop is None:
        return tile_amax(decode(alphabet, codes, scale, block))
    shape = codes.shape[0], codes.shape[1] * (2 if alphabet in _PACKED else 1)
    bits = loop(array(codes, torch.uint8), array(scale), *_checked(scale, block, shape))
    return torch.tensor([bits], dtype=torch.uint32).view(torch.float32)


def round_to_bf16(tile: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Float32 rounded to BF16, a tie to the even one; whether all of it is finite, which is only
    sure where this says so."""
    loops = loops_for(tile)
    if loops is None:
        rounded = tile.to(torch.bfloat16)
        return rounded, bool(torch.isfinite(rounded.sum()))
    rounded = empty(tuple(tile.shape), torch.bfloat16)
    largest = loops.encode_bf16(array(tile).reshape(-1), array(rounded, torch.uint16).reshape(-1))
    return rounded, largest < _BEYOND_BF16


def _checked(
    scale: torch.Tensor, block: tuple[int, int], shape: tuple[int, int]
) -> tuple[int, int]:
    """The rows and columns of a block of scales, which compiled loops trust. Raises FormatError
    unless there is one scale for each block of a tile of `shape`."""
    rows, cols = _sides(block, shape)
    expected = (-(-shape[0] // rows), -(-shape[1] // cols))
    if scale.shape != expected or scale.dtype != torch.float32:
        raise FormatError(
            f"scales are {scale.dtype} {list(scale.shape)}, expected float32 {list(expected)} for "
            f"blocks of {rows}x{cols} of a {list(shape)} tile"
        )
    return rows, cols


def _sides(block: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """The rows and columns of a block, all that there are for -1."""
    rows, cols = (b if b > 0 else max(side, 1) for b, side in zip(block, shape, strict=True))
    return rows, cols
