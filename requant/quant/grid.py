"""Codes and a grid of scales: value = code * scale, the arithmetic that most formats share.

A tile is float32 or BF16 [rows, cols], or `Coded`: still codes and scales, which are decoded a row
at a time on their way to what is asked for. On the CPU compiled loops do all that (loops.py),
several times faster than torch can; on other devices, and where Numba is not installed, torch does.
Both give the same bits.

Codes are as they are stored: E4M3 and INT8 a byte each, INT4 (plus 8, or its zero point) and E2M1
two a byte, low nibble first, NF4 and FP4 high nibble first. Scales and zero points are float32
[ceil(rows / block[0]), ceil(cols / block[1])], where a side of -1 means all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from requant.buffers import empty
from requant.errors import FormatError
from requant.quant.blocks import block_range, block_strips, reduce_columns, sum_by_halves
from requant.quant.bnb_maps import nearest, pack_high_first, pair_table
from requant.quant.compiled import array, loops_for
from requant.quant.e2m1 import e2m1_bytes
from requant.quant.packing import (
    centred_nibbles,
    e2m1_and_scale,
    e4m3_and_scale,
    pack_nibbles,
    row_major,
)

#: What codes are, before any scale: signed integers of 4 and 8 bits, two small floats, and
#: bitsandbytes' maps. Formats that share an alphabet can hand codes to each other.
Alphabet = Literal["int4", "int8", "e4m3", "e2m1", "nf4", "fp4"]

_E4M3 = torch.float8_e4m3fn
#: Alphabets of which a byte holds two codes.
_PACKED = ("int4", "e2m1", "nf4", "fp4")
#: The bits of the smallest float32 that BF16 rounds to infinity.
_BEYOND_BF16 = 0x7F7F8000
_NOT_FINITE = "holds NaN or infinity, which no format can keep"


@dataclass(frozen=True)
class Coded:
    """A tile of `cols` columns that is not decoded: codes [rows, cols], or packed [rows, bytes],
    their scales, and of INT4 the zero points 0..15, None for 8. Raises FormatError when they do not
    fit each other."""

    alphabet: Alphabet
    codes: torch.Tensor
    scale: torch.Tensor
    block: tuple[int, int]
    cols: int
    zero: torch.Tensor | None = None

    def __post_init__(self) -> None:
        most = self.codes.shape[1] * (2 if self.alphabet in _PACKED else 1)
        if self.cols > most:
            raise FormatError(
                f"{self.cols} columns of {self.alphabet} do not fit into {self.codes.shape[1]} "
                "bytes"
            )
        _checked(self.scale, self.block, self.shape)
        if self.zero is not None:
            _checked(self.zero, self.block, self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.codes.shape[0], self.cols

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    def grouped(self, index: torch.Tensor) -> Coded:
        """The same codes in groups that are no runs of columns: `index` [cols] is each one's."""
        zero = None if self.zero is None else self.zero.index_select(1, index)
        return replace(self, scale=self.scale.index_select(1, index), block=(1, 1), zero=zero)


Tile = torch.Tensor | Coded


def decode(tile: Tile) -> torch.Tensor:
    """The tile as float32 [rows, cols], each product of code (less its zero point) and scale
    rounded once; itself if that is what it is."""
    if isinstance(tile, torch.Tensor) and tile.dtype == torch.float32:
        return tile
    loops = loops_for(tile)
    if loops is not None:
        decoded = empty(_shape(tile))
        loops.decode(_matrix(loops, tile), array(decoded))
        return decoded
    if isinstance(tile, torch.Tensor):
        return tile.to(torch.float32)
    codes, scale, sides = tile.codes, tile.scale, _sides(tile.block, tile.shape)
    match tile.alphabet:
        case "e4m3":
            decoded, scale = e4m3_and_scale(codes, scale)
        case "e2m1":
            decoded, scale = e2m1_and_scale(codes, scale)
        case "int4":
            decoded = centred_nibbles(codes)[:, : tile.cols].contiguous()
            if tile.zero is not None:
                for strip, row_zero in block_strips(decoded, tile.zero - 8, *sides):
                    strip.sub_(row_zero)
        case "int8":
            decoded = codes.to(torch.float32)
        case "nf4" | "fp4":
            index = codes.flatten().to(torch.int32)
            pairs = pair_table(tile.alphabet, codes.device).index_select(0, index)
            decoded = pairs.view(torch.float32).view(len(codes), -1)[:, : tile.cols].contiguous()
    for strip, row_scale in block_strips(decoded, scale, *sides):
        strip.mul_(row_scale)
    return decoded


def encode(
    alphabet: Alphabet, tile: Tile, scale: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:
    """The codes nearest to a finite tile divided by these scales, ties to the even one; what lies
    beyond the alphabet gets its last code. Of "nf4" and "fp4", whose values are at most 1, the
    nearest to the tile multiplied by `scale`, a tie to the lower one.

    float8_e4m3fn or int8 [rows, cols]; packed, uint8 [rows, cols / 2], for "int4" [rows,
    4 * ceil(cols / 8)] with zero bits behind the last column.
    """
    rows, cols = _shape(tile)
    sides = _checked(scale, block, (rows, cols))
    loops = loops_for(tile)
    if loops is not None:
        codes = empty((rows, _width(alphabet, cols)), torch.uint8)
        kind = getattr(loops, alphabet.upper())
        loops.encode(_matrix(loops, tile), kind, array(scale), *sides, cols, array(codes))
        return codes.view({"e4m3": _E4M3, "int8": torch.int8}.get(alphabet, torch.uint8))
    match alphabet:
        case "e4m3":
            return _quotient(tile, scale, sides).clamp_(-448, 448).to(_E4M3)
        case "e2m1":
            return e2m1_bytes(_quotient(tile, scale, sides))
        case "int4":
            return _int4_bytes(_quotient(tile, scale, sides))
        case "int8":
            return _quotient(tile, scale, sides).clamp_(-128, 127).round_().to(torch.int8)
        case "nf4" | "fp4":
            product = _copy(tile)
            for strip, factor in block_strips(product, scale, *sides):
                strip.mul_(factor)
            return pack_high_first(nearest(product.flatten(), alphabet)).view(rows, -1)


def coded(alphabet: Alphabet, tile: Tile, scale: torch.Tensor, block: tuple[int, int]) -> Coded:
    """The tile as it is once `encode` has stored it with these scales, which codes are multiplied
    by; of "nf4" and "fp4", which divide them, there is none."""
    return Coded(alphabet, encode(alphabet, tile, scale, block), scale, block, tile.shape[1])


def encode_with_zeros(
    tile: Tile, scale: torch.Tensor, zero: torch.Tensor, size: int, first: bool = False
) -> torch.Tensor:
    """INT4 codes 0..15 of a finite tile divided by scales, with zero points 0..15, both float32
    [rows, ceil(cols / size)]: packed as `encode` does. Quotients are rounded to nearest even, and
    zero points are added to them: `first`, or after that."""
    rows, cols = _shape(tile)
    block = (1, size)
    sides = _checked(scale, block, (rows, cols))
    _checked(zero, block, (rows, cols))
    loops = loops_for(tile)
    if loops is not None:
        codes = empty((rows, _width("int4", cols)), torch.uint8)
        grids = array(scale), array(zero)
        loops.encode_with_zeros(_matrix(loops, tile), *grids, sides[1], first, cols, array(codes))
        return codes
    quotient = _quotient(tile, scale, sides)
    if not first:
        quotient.round_()
    for strip, row_zero in block_strips(quotient, zero - 8, *sides):
        strip.add_(row_zero)
    return _int4_bytes(quotient)


def round_to_bf16(tile: Tile) -> tuple[torch.Tensor, bool]:
    """The tile rounded to BF16, a tie to the even one; whether all of it is finite, which is only
    sure where this says so."""
    loops = loops_for(tile)
    if loops is None:
        rounded = decode(tile).to(torch.bfloat16)
        return rounded, bool(torch.isfinite(rounded.sum()))
    rounded = empty(_shape(tile), torch.bfloat16)
    largest = loops.encode_bf16(_matrix(loops, tile), array(rounded, torch.uint16))
    return rounded, largest < _BEYOND_BF16


def amax(tile: Tile, block_cols: int = -1) -> torch.Tensor:
    """The largest magnitude of each run of columns: float32 [rows, ceil(cols / block_cols)]. Raises
    FormatError for NaN or infinity."""
    found, most = _amax(tile, block_cols)
    if not math.isfinite(most):
        raise FormatError(_NOT_FINITE)
    return found


def ranges(tile: Tile, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest number of each run of `size` columns, as far as they are below and
    above 0: twice float32 [rows, ceil(cols / size)]. Raises FormatError for NaN or infinity."""
    rows, cols = shape = _shape(tile)
    size = _sides((1, size), shape)[1]
    loops = loops_for(tile)
    if loops is None:
        decoded = decode(tile)
        low, high = -reduce_columns(-decoded, size), reduce_columns(decoded, size)
    else:
        low, high = (empty((rows, -(-cols // size))) for _ in range(2))
        loops.ranges(_matrix(loops, tile), cols, size, array(low), array(high))
    require_finite(low)
    require_finite(high)
    return low.clamp_max_(0), high.clamp_min_(0)


def largest(tile: Tile) -> torch.Tensor:
    """The largest magnitude of a tile, NaN the largest of all: float32 [1]."""
    return torch.tensor([_amax(tile, -1)[1]], device=tile.device)


def column_peaks(tile: Tile, block_rows: int) -> torch.Tensor:
    """The largest magnitude in each column of each run of rows, NaN the largest of all: float32
    [ceil(rows / block_rows), cols]."""
    loops = loops_for(tile)
    if loops is None:
        return torch.stack([strip.abs().amax(0) for strip in decode(tile).split(block_rows)])
    rows, cols = _shape(tile)
    peaks = empty((-(-rows // block_rows), cols))
    loops.peaks(_matrix(loops, tile), block_rows, array(peaks))
    return peaks


def differences(tile: Tile, other: Coded) -> tuple[torch.Tensor, torch.Tensor]:
    """By how many ulps the magnitudes of a tile exceed those of E4M3 codes and scales: the least
    and the most in each of these scales' blocks, or 0: two int32 grids. Signs are the same."""
    loops = loops_for(tile)
    if loops is None:
        ulps = decode(tile).view(torch.int32) - decode(other).view(torch.int32)
        return block_range(ulps, *_sides(other.block, other.shape))
    low, high = (empty(tuple(other.scale.shape), torch.int32) for _ in range(2))
    loops.differences(_matrix(loops, tile), _matrix(loops, other), array(low), array(high))
    return low, high


def squared_errors(tile: Tile, coded: Coded, factor: torch.Tensor) -> torch.Tensor:
    """What a tile's codes lose: float32 [rows, groups], of each group of columns the sum of the
    squared differences, each multiplied by its group's `factor`, float32 [rows, groups], first.
    Sums are by halves, so that they depend on nothing but the size of a group."""
    rows, cols = shape = _shape(tile)
    size = _checked(factor, (1, coded.block[1]), shape)[1]
    loops = loops_for(tile)
    if loops is not None:
        sums = empty(tuple(factor.shape))
        matrices = _matrix(loops, tile), _matrix(loops, coded)
        loops.squared_errors(*matrices, array(factor), cols, array(sums))
        return sums
    errors = decode(coded).sub_(decode(tile))
    for strip, row_factor in block_strips(errors, factor, 1, size):
        strip.mul_(row_factor)
    squares = torch.nn.functional.pad(errors.square_(), (0, -cols % size))
    return sum_by_halves(squares.view(-1, size)).view(rows, -1)


def require_finite(extreme: torch.Tensor) -> None:
    """Raise FormatError unless `extreme` (amax values; NaN propagates through them) is finite."""
    if not bool(torch.isfinite(extreme).all()):
        raise FormatError(_NOT_FINITE)


def _amax(tile: Tile, block_cols: int) -> tuple[torch.Tensor, float]:
    """The largest magnitude of each run of columns, and of all."""
    rows, cols = shape = _shape(tile)
    block_cols = _sides((1, block_cols), shape)[1]
    loops = loops_for(tile)
    if loops is None:
        found = reduce_columns(decode(tile).abs(), block_cols)
        return found, float(found.amax()) if found.numel() else 0.0
    found = empty((rows, -(-cols // block_cols)))
    bits = loops.amax(_matrix(loops, tile), cols, block_cols, array(found))
    return found, float(np.uint32(bits).view(np.float32))


def _copy(tile: Tile) -> torch.Tensor:
    """The tile as float32 in memory of its own."""
    decoded = decode(tile)
    return decoded.clone() if decoded is tile else decoded


def _quotient(tile: Tile, scale: torch.Tensor, sides: tuple[int, int]) -> torch.Tensor:
    """The tile divided by scales, in memory of its own."""
    quotient = _copy(tile)
    for strip, row_scale in block_strips(quotient, scale, *sides):
        strip.div_(row_scale)
    return quotient


def _int4_bytes(quotient: torch.Tensor) -> torch.Tensor:
    """Codes of quotients, which are overwritten, as they are stored."""
    return pack_nibbles(quotient.clamp_(-8, 7).round_().add_(8).to(torch.uint8)).view(torch.uint8)


def _matrix(loops: Any, tile: Tile) -> tuple[Any, ...]:
    """A tile as compiled loops take it."""
    if isinstance(tile, Coded):
        kind = getattr(loops, tile.alphabet.upper())
        zero = _NONE if tile.zero is None else array(tile.zero)
        sides = _sides(tile.block, tile.shape)
        return kind, array(tile.codes, torch.uint8), array(tile.scale), zero, *sides
    kind = loops.BF16 if tile.dtype == torch.bfloat16 else loops.FP32
    stored = array(row_major(tile), torch.uint8)
    return kind, stored, _NONE, _NONE, *_sides((-1, -1), _shape(tile))


def _width(alphabet: Alphabet, cols: int) -> int:
    """The bytes of a row of codes."""
    if alphabet == "int4":
        return -(-cols // 8) * 4
    return cols // 2 if alphabet in _PACKED else cols


def _shape(tile: Tile) -> tuple[int, int]:
    rows, cols = tile.shape
    return rows, cols


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


_NONE = torch.zeros(0, 0).numpy()
