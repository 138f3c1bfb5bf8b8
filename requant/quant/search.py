"""`method=mse`: for every group, the scale that stores it with the least squared error.

A group's largest value decides its scale (`method=rtn`), though clipping that one value often
serves the others better. The search tries the scales of a fixed grid of clips and keeps, group by
group, the one whose stored codes and stored scale decode nearest to the weight. Plain rounding is
the first candidate and ties keep the earlier one, so the error is never larger than rtn's.

How a format uses it, for a tile whose groups of `size` columns have the largest magnitudes `amax`:

    def store(scale):
        return grid.coded("int4", tile, scale.to(torch.float32), (1, size))

    scales = ((amax * clip / 7.5).to(torch.bfloat16) for clip in CLIPS)   # the dtype as stored
    (scale,) = search(tile, amax, ((scale,) for scale in scales), store)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from requant.quant import grid
from requant.quant.grid import Coded, Tile

METHODS = ("rtn", "mse")

#: What a group's largest value is multiplied by: plain rounding first, then 1.06 down to 0.8. Above
#: 1 the largest value itself is kept better (INT4's code 7 is half a step short of amax).
CLIPS = (1.0, *(percent / 100 for percent in range(106, 78, -2) if percent != 100))


def search(
    tile: Tile,
    amax: torch.Tensor,
    candidates: Iterable[tuple[torch.Tensor, ...]],
    store: Callable[..., Coded],
) -> tuple[torch.Tensor, ...]:
    """Per group of columns of a finite tile, the candidate of the least squared error.

    A candidate is what is stored for each group (scale; or scale and zero point), tensors [rows,
    groups] in their stored values. `store(*candidate)` gives the tile as it is when stored so.
    `amax`: the groups' largest magnitudes, float32 [rows, groups]. The answer does not depend on
    how a weight was cut into tiles. Memory: the codes of one candidate.
    """
    unit = _unit(amax)
    best: tuple[torch.Tensor, ...] = ()
    least: torch.Tensor | None = None
    for candidate in candidates:
        total = grid.squared_errors(tile, store(*candidate), unit)
        if least is None:
            best, least = candidate, total
            continue
        better = total < least
        least = torch.where(better, total, least)
        best = tuple(torch.where(better, n, o) for n, o in zip(candidate, best, strict=True))
    return best


def _unit(amax: torch.Tensor) -> torch.Tensor:
    """Powers of two that bring each group near 1, so that its squares are normal."""
    exponent: torch.Tensor = torch.frexp(amax).exponent
    bits: torch.Tensor = torch.clamp(127 - exponent, 1, 254) << 23
    return bits.view(torch.float32)
