"""Whether weights, cache and activations fit into the memory of each GPU, and what still would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from requant.convert.parallel import Parallel
from requant.serving.hardware import Gpus
from requant.serving.memory import (
    Demand,
    activation_bytes,
    context_length,
    kv_cache_bytes,
    reserve_bytes,
)

#: Contexts and batches that are tried, at most, where the model sets no limit.
MAX_CONTEXT, MAX_BATCH = 1 << 24, 1 << 16


@dataclass(frozen=True)
class Fit:
    """Bytes on the fullest GPU, for a demand and a parallelism."""

    config: Mapping[str, Any]
    gpu_bytes: int
    parallel: Parallel
    demand: Demand
    weights: int

    @classmethod
    def of(
        cls, config: Mapping[str, Any], gpus: Gpus, parallel: Parallel, demand: Demand, weights: int
    ) -> Fit:
        """`weights`: bytes of the largest rank."""
        return cls(config, gpus.memory_bytes, parallel, demand, weights)

    @property
    def kv_cache(self) -> int:
        """Bytes of KV cache."""
        return kv_cache_bytes(self.config, self.demand, self.parallel)

    @property
    def activations(self) -> int:
        """Bytes of activations, estimated."""
        return activation_bytes(self.config, self.demand, self.parallel, self.gpu_bytes)

    @property
    def reserve(self) -> int:
        """Bytes that stay free, and the driver's."""
        return reserve_bytes(self.gpu_bytes)

    @property
    def room(self) -> int:
        """Bytes that are left for weights."""
        return self.gpu_bytes - self.kv_cache - self.activations - self.reserve

    @property
    def needed(self) -> int:
        """All of it."""
        return self.weights + self.gpu_bytes - self.room

    @property
    def fits(self) -> bool:
        """Whether the weights have room."""
        return self.weights <= self.room

    @property
    def max_context(self) -> int:
        """The longest context that fits with the same batch; 0 for none, and no more than the
        model was made for."""
        most = context_length(self.config) or MAX_CONTEXT
        return _largest(most, lambda n: self._with(context=n).fits)

    @property
    def max_batch(self) -> int:
        """The most sequences that fit at the same context; 0 for none."""
        return _largest(MAX_BATCH, lambda n: self._with(batch=n).fits)

    def _with(self, **changes: int) -> Fit:
        return replace(self, demand=self.demand._replace(**changes))


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `most` for which something holds that holds for all smaller ones; 0
    for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
