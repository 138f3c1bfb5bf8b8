"""Weights as the model asks for them: float32, decoded when needed, kept while they fit.

Of a model that several processes run, each has its own pieces; what they give is put together here.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch.nn import functional

from requant.convert.source import Checkpoint, iter_tiles
from requant.errors import CheckpointError
from requant.runner.ranks import Rank

DEFAULT_CACHE_BYTES = 4 << 30

#: Elements of a tile of a matrix that is not kept whole: 64 MiB in float32.
_TILE_ELEMENTS = 16 << 20


class Weights:
    """A checkpoint's weights in float32 on `device`, behind a least-recently-used cache.

    Memory: at most `cache_bytes` of decoded weights, plus what is being decoded. A weight of more
    than a quarter of the cache is not kept, lest one embedding evict whole layers: `linear` and
    `rows` then decode it in tiles of 64 MiB, `get` decodes all of it. A model that fits stays
    decoded from token to token; a larger one is read and decoded again for each pass.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        rank: Rank | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.rank = rank or Rank.alone(checkpoint.weights)
        self.device = torch.device(device)
        self.cache_bytes = cache_bytes
        self.cached_bytes = 0
        self._cache: OrderedDict[str, torch.Tensor] = OrderedDict()

    def has(self, name: str) -> bool:
        """Whether the model has a tensor of this name, here or on another rank."""
        return name in self.rank.names

    def get(self, name: str) -> torch.Tensor:
        """The whole of what is held of a tensor, decoded. Raises CheckpointError for none."""
        if name in self._cache:
            self._cache.move_to_end(name)
            return self._cache[name]
        if not self._is_kept(name):
            return self.checkpoint.decode(name, self.device)
        nbytes = self._nbytes(name)
        # Room is made before decoding, so that the bound holds at every moment.
        while self.cached_bytes + nbytes > self.cache_bytes:
            _, evicted = self._cache.popitem(last=False)
            self.cached_bytes -= evicted.nbytes
            del evicted
        tensor = self.checkpoint.decode(name, self.device)
        self._cache[name] = tensor
        self.cached_bytes += tensor.nbytes
        return tensor

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` [...] of a matrix [rows, cols] -> [..., cols], whichever rank has them.

        Only they are decoded if it is not kept: the embedding of DeepSeek-V3 is 3.7 GB.
        """
        axis, start, stop = self.rank.span(name)
        if axis is None:
            return self._own_rows(name, ids)
        elsewhere = (ids < start) | (ids >= stop)
        own = self._own_rows(name, (ids - start).clamp(0, stop - start - 1))
        return self.rank.tensor.sum(own.masked_fill(elsewhere[..., None], 0.0))

    def _own_rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """Rows of what is held."""
        if self._is_kept(name):
            return functional.embedding(ids, self.get(name))
        weight = self.checkpoint.weights[name]
        alignment = weight.row_alignment
        total, cols = weight.shape
        wanted, places = torch.unique(ids, return_inverse=True)
        table = torch.empty(len(wanted), cols, device=self.device)
        starts = wanted // alignment * alignment
        for start in torch.unique(starts).tolist():
            stop = min(start + alignment, total)
            tile = self.checkpoint.decode_rows(weight, start, stop, self.device)
            here = starts == start
            table[here] = tile[wanted[here] - start]
        return functional.embedding(places, table)

    def linear(self, module: str, x: torch.Tensor) -> torch.Tensor:
        """Apply `<module>.weight` [out, in], and `<module>.bias` if there is one, to x [..., in].

        Of a weight cut by rows, the rank's part of the outputs; of one cut by columns, x is its
        part of the inputs, and the result the sum of what all of them give.
        """
        y = self.partial(module, x)
        return self.rank.tensor.sum(y) if self.rank.span(f"{module}.weight").axis == 1 else y

    def joined(self, module: str, x: torch.Tensor) -> torch.Tensor:
        """`linear`, with all outputs, also of a weight that is cut by rows."""
        y = self.linear(module, x)
        return self.rank.tensor.join(y) if self.rank.span(f"{module}.weight").axis == 0 else y

    def partial(self, module: str, x: torch.Tensor) -> torch.Tensor:
        """`linear` before the sum; the bias is in what the first columns give.

        A weight that is not kept is decoded and multiplied tile by tile.
        """
        name = f"{module}.weight"
        axis, start, _ = self.rank.span(name)
        biased = self.has(f"{module}.bias") and (axis != 1 or start == 0)
        bias = self.get(f"{module}.bias") if biased else None
        if self._is_kept(name):
            return functional.linear(x, self.get(name), bias)
        y = torch.cat([functional.linear(x, tile) for tile in self._tiles(name)], dim=-1)
        return y if bias is None else y + bias

    def _tiles(self, name: str) -> Iterator[torch.Tensor]:
        """The rows of a matrix in order, decoded in tiles of whole rows."""
        weight = self.checkpoint.weights[name]
        alignment = weight.row_alignment
        rows, cols = weight.shape
        for start, stop in iter_tiles(rows, cols, alignment, _TILE_ELEMENTS):
            yield self.checkpoint.decode_rows(weight, start, stop, self.device)

    def _is_kept(self, name: str) -> bool:
        """Whether a tensor is small enough for the cache."""
        return self._nbytes(name) <= self.cache_bytes // 4

    def _nbytes(self, name: str) -> int:
        """Bytes of a tensor once decoded."""
        if name not in self.checkpoint.weights:
            raise CheckpointError(f"{self.checkpoint.path}: has no tensor {name}")
        return 4 * math.prod(self.checkpoint.weights[name].shape)
