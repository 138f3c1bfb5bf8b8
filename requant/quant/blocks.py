"""Groups along a row and two-dimensional blocks, which have one scale each; the blocks at the right
and lower edge may be partial."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from requant.errors import FormatError

#: A tile holds whole blocks, so a hostile config must not ask for enormous ones.
MAX_BLOCK_SIDE = 1 << 16


def require_block(block_rows: int, block_cols: int, whose: str) -> None:
    """Raise FormatError for a block without rows or columns."""
    if block_rows < 1 or block_cols < 1:
        raise FormatError(
            f"block_rows={block_rows}, block_cols={block_cols}: "
            f"a block has at least one row and one column; {whose} have 128 and 128"
        )


def stored_block(told: object, where: str) -> tuple[int, int]:
    """The block that a config's key `where` tells, 128x128 when it tells none. Raises FormatError
    for what is no block."""
    block = told or [128, 128]
    if not (
        isinstance(block, list)
        and len(block) == 2
        and all(type(side) is int and 0 < side <= MAX_BLOCK_SIDE for side in block)
    ):
        raise FormatError(f"{where} is {block!r}, expected two integers from 1 to {MAX_BLOCK_SIDE}")
    return block[0], block[1]


def block_range(
    values: torch.Tensor, block_rows: int, block_cols: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest integer of each block, as far as they are below and above 0:
    [rows, cols] -> two ceil grids of blocks."""
    missing = -values.shape[1] % block_cols
    padded = torch.nn.functional.pad(values, (0, missing)) if missing else values  # a copy
    groups = padded.unflatten(1, (-1, block_cols))
    low, high = groups.amin(2).clamp_max_(0), groups.amax(2).clamp_min_(0)
    return (
        torch.stack([strip.amin(0) for strip in low.split(block_rows)]),
        torch.stack([strip.amax(0) for strip in high.split(block_rows)]),
    )


def reduce_columns(values: torch.Tensor, block_cols: int, fill: float = 0.0) -> torch.Tensor:
    """The largest of each run of block_cols columns, the last one filled up with `fill`:
    [n, cols] -> [n, ceil(cols / block_cols)]."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % block_cols), value=fill)
    return padded.view(len(padded), -1, block_cols).amax(2)


def sum_by_halves(groups: torch.Tensor) -> torch.Tensor:
    """The sum of each group of n: float32 [groups, n] -> [groups].

    Each addition is elementwise, so unlike torch.sum the order of additions depends on n alone, not
    on the number of groups, threads or the device. Neighbours in memory become the same element of
    neighbouring groups: adding long runs is several times faster.
    """
    values = groups.T.contiguous()
    while (count := len(values)) > 1:
        half = (count + 1) // 2
        values[: count - half].add_(values[half:])
        values = values[:half]
    return values[0]


def block_strips(
    tile: torch.Tensor, scale: torch.Tensor, block_rows: int, block_cols: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of a block row of the tile and its scales, of shapes that broadcast: [<= block_rows,
    blocks, block_cols] and [blocks, 1], or [<= block_rows, cols] and [cols] where the last block is
    partial, which is slower. Rows that are blocks of their own come in one strip."""
    if tile.shape[1] % block_cols == 0:
        tile, columns = tile.unflatten(1, (-1, block_cols)), scale[..., None]
    else:
        columns = scale.repeat_interleave(block_cols, dim=1)[:, : tile.shape[1]]
    if block_rows == 1:
        return iter([(tile, columns)])
    return zip(tile.split(block_rows), columns, strict=True)
