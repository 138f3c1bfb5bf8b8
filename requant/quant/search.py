"""`method=mse`: for every group, the scale that stores it with the least squared error.

A group's largest value decides its scale (`method=rtn`), though clipping that one value often
serves the others better. The search tries the scales of a fixed grid of clips and keeps, group by
group, the one whose stored codes and stored scale decode nearest to the weight. Plain rounding is
the first candidate and ties keep the earlier one, so the error is never larger than rtn's.

How a format uses it, for groups [rows, groups, n] of float32:

    def restore(groups, scale):                          # what encode and decode do together
        step = scale.to(torch.float32)[..., None]
        return (groups / step).clamp_(-8, 7).round_().mul_(step)

    amax = groups.abs().amax(-1)
    scales = ((amax * clip / 7.5).to(torch.bfloat16) for clip in CLIPS)   # the dtype as stored
    (scale,) = search(groups, ((scale,) for scale in scales), restore)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

METHODS = ("rtn", "mse")

#: What a group's largest value is multiplied by: plain rounding first, then 1.06 down to 0.8. Above
#: 1 the largest value itself is kept better (INT4's code 7 is half a step short of amax).
CLIPS = (1.0, *(percent / 100 for percent in range(106, 78, -2) if percent != 100))


def search(
    groups: torch.Tensor,
    candidates: Iterable[tuple[torch.Tensor, ...]],
    restore: Callable[..., torch.Tensor],
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Per group of `groups` [..., n] float32, finite, the candidate of the least squared error.

    A candidate is what is stored for each group (scale; or scale and zero point), tensors [...] in
    their stored values. `restore(groups, *candidate)` gives the float32 [..., n] that the groups
    decode to when stored so, in memory of its own: it is overwritten. `importance` [n] or
    [..., n], >= 0, weights the squares. The answer does not depend on how a weight was cut into
    tiles. Memory: a copy of the groups, and what `restore` takes for one candidate.
    """
    groups = _spread(groups)
    unit = _unit(groups)
    best: tuple[torch.Tensor, ...] = ()
    least: torch.Tensor | None = None
    for candidate in candidates:
        error = restore(groups, *candidate).sub_(groups).mul_(unit).square_()
        if importance is not None:
            error.mul_(importance)
        total = _sum(error)
        if least is None:
            best, least = candidate, total
            continue
        better = total < least
        least = torch.where(better, total, least)
        best = tuple(torch.where(better, n, o) for n, o in zip(candidate, best, strict=True))
    return best


def _spread(groups: torch.Tensor) -> torch.Tensor:
    """The same groups, neighbours in memory being the same element of neighbouring groups: sums
    over a group then add long runs, several times faster for groups of 32."""
    return groups.flatten(0, -2).T.contiguous().T.view(groups.shape)


def _unit(groups: torch.Tensor) -> torch.Tensor:
    """Powers of two [..., 1] that bring each group near 1, so that its squares are normal."""
    exponent: torch.Tensor = torch.frexp(groups.abs().amax(-1, keepdim=True)).exponent
    bits: torch.Tensor = torch.clamp(127 - exponent, 1, 254) << 23
    return bits.view(torch.float32)


def _sum(values: torch.Tensor) -> torch.Tensor:
    """The sum along the last dim [..., n] -> [...], in place, by halves.

    Each addition is elementwise, so unlike torch.sum the order of additions depends on n alone,
    not on the number of groups, threads or the device.
    """
    while (count := values.shape[-1]) > 1:
        half = (count + 1) // 2
        values[..., : count - half].add_(values[..., half:])
        values = values[..., :half]
    return values[..., 0]
