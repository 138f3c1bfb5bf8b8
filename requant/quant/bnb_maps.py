"""The value maps of bitsandbytes: NF4's and FP4's sixteen values, and the 256 of nested scales.

Source: bitsandbytes 0.50.2, functional.py (create_dynamic_map), backends/default/ops.py and
csrc/cpu_ops.cpp (the thresholds between values, and how nested scales find theirs).
"""

from __future__ import annotations

import functools

import torch

#: Values of absmax to one of nested_absmax.
NESTED_BLOCK = 256
#: What the codes 0..15 stand for, before absmax: float32 values, written in full.
MAPS: dict[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0),
        *(0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
        *(0.0, -0.0052083334885537624, -0.6666666865348816, -1.0),
        *(-0.3333333432674408, -0.5, -0.1666666716337204, -0.25),
    ),
}
#: Cells of the search table between 0 and 1: narrower than the gap between any two thresholds.
_CELLS = 512


def middles(kind: str) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The points halfway between two values that follow each other, float32; the codes of the map
    in the order of their values."""
    values = torch.tensor(MAPS[kind])
    order = values.argsort(stable=True)
    middle = (values[order[:-1]] + values[order[1:]]) / 2
    return tuple(middle.tolist()), tuple(order.tolist())


def nearest(values: torch.Tensor, kind: str) -> torch.Tensor:
    """The codes [n] uint8 of the map's nearest values to `values` in -1..1; ties go down.

    A table of cells does it, several times as fast as a binary search: a cell has at most one
    threshold, so it and one comparison with that threshold give the code. `values` may be beyond
    1 by an ulp or two, which lies in the last cell.
    """
    threshold, codes = _cell_tables(kind, values.device)
    cell = (values * _CELLS).add_(_CELLS).to(torch.int32)
    above = values > threshold.index_select(0, cell)
    return codes.index_select(0, cell.mul_(2).add_(above))


@functools.cache
def _cell_tables(kind: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Per cell its threshold (infinity for none), and the codes up to it and above it.

    The cell of a threshold is found with the operations that find the cell of a value. Rounding is
    monotonic, so no value in a lower cell is above the threshold, and none in a higher one is not.
    """
    between, codes = middles(kind)
    middle, order = torch.tensor(between), torch.tensor(codes)
    cell = (middle * _CELLS).add_(_CELLS).to(torch.int64)
    threshold = torch.full((2 * _CELLS + 1,), torch.inf)
    threshold[cell] = middle
    below = (torch.arange(len(threshold))[:, None] > cell).sum(1)
    steps = torch.stack((below, below + threshold.isfinite()), 1).flatten()
    return threshold.to(device), order[steps].to(torch.uint8).to(device)


def pack_high_first(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [2n] -> bytes [n], the first of each pair in the high nibble."""
    pairs = codes.view(torch.int16)
    return (pairs << 4).bitwise_or_(pairs >> 8).to(torch.uint8)


@functools.cache
def pair_table(kind: str, device: torch.device) -> torch.Tensor:
    """One entry a byte, two float32 moved as one int64: high nibble's value, then the low one's."""
    byte = torch.arange(256)
    value = torch.tensor(MAPS[kind])
    return torch.stack((value[byte >> 4], value[byte & 0xF]), 1).view(torch.int64)[:, 0].to(device)


def dynamic_map() -> torch.Tensor:
    """bitsandbytes' dynamic 8-bit map [256], ascending: seven decades of 1, 2, .. 64 values each
    side of zero, evenly spaced within a decade; zero and one."""
    sides = torch.cat([_decade(exponent) for exponent in range(7)])
    return torch.cat((-sides, torch.tensor([0.0, 1.0]), sides)).sort().values


def _decade(exponent: int) -> torch.Tensor:
    """2^exponent centres of equal intervals from 10^(exponent - 7) to 10^(exponent - 6)."""
    edges = torch.linspace(0.1, 1, 2**exponent + 1)
    return (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)


def quantize_absmax(centred: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """absmax less its mean [n] -> uint8 indices [n] and their own absmax [ceil(n / 256)].

    bitsandbytes looks up the nearest of 65536 evenly spaced values, not the value itself; a block
    of zeros has the index 0 and the absmax 0.
    """
    blocks = torch.nn.functional.pad(centred, (0, -len(centred) % NESTED_BLOCK))
    blocks = blocks.view(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(1)
    reciprocal = absmax.reciprocal().clamp_max_(torch.finfo(torch.float32).max)
    place = (blocks * reciprocal[:, None]).clamp_(-1, 1).add_(1).mul_(65535 / 2).add_(0.5)
    index = _dynamic_table(centred.device).index_select(0, place.to(torch.int32).flatten())
    index.view(blocks.shape)[absmax == 0] = 0
    return index[: len(centred)], absmax


@functools.cache
def _dynamic_table(device: torch.device) -> torch.Tensor:
    """uint8 [65536]: the index in the dynamic map nearest to -1 + 2 i / 65535."""
    values = dynamic_map()
    middle = (values[:-1] + values[1:]) * 0.5
    place = torch.arange(65536).to(torch.float32).mul_(2).div_(65535).sub_(1)
    return torch.bucketize(place, middle).to(torch.uint8).to(device)
