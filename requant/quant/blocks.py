"""Two-dimensional blocks with one scale each; those at the right and lower edge may be partial."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def block_amax(tile: torch.Tensor, block_rows: int, block_cols: int) -> torch.Tensor:
    """The largest magnitude of each block: [rows, cols] -> the ceil grid of blocks."""
    peaks = torch.stack([strip.abs().amax(0) for strip in tile.split(block_rows)])
    return reduce_columns(peaks, block_cols)


def reduce_columns(values: torch.Tensor, block_cols: int, fill: float = 0.0) -> torch.Tensor:
    """The largest of each run of block_cols columns, the last one filled up with `fill`:
    [n, cols] -> [n, ceil(cols / block_cols)]."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % block_cols), value=fill)
    return padded.view(len(padded), -1, block_cols).amax(2)


def block_strips(
    tile: torch.Tensor, scale: torch.Tensor, block_rows: int, block_cols: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of a block row of the tile [<= block_rows, cols] and its scales per column [cols]."""
    columns = scale.repeat_interleave(block_cols, dim=1)[:, : tile.shape[1]]
    return zip(tile.split(block_rows), columns, strict=True)
