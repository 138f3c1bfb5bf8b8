"""Parameters of a model: all of them, those that one token uses, those that it is multiplied with.

Logical elements, whatever they are stored in, without scales. Publishers count differently: the
embedding is looked up, so one row of it is active here, while `lm_head` is all active, as OpenAI
and DeepSeek count. Qwen's active parameters include the embedding; GLM's have neither, and its
total has the MTP layer, but no embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from requant.convert.names import in_tower, is_index
from requant.convert.weights import StoredWeight


@dataclass
class Parameters:
    """`total` of the main model. `active`, `multiplied`: of a token, None when there are experts
    and nothing tells how many of them it uses. `experts`: routed ones of the layer that has most.
    """

    total: int
    active: int | None
    multiplied: int | None
    experts: int


@dataclass
class _Experts:
    """The routed experts of one layer."""

    elements: int = 0
    matrices: int = 0
    indices: set[int] = field(default_factory=set)
    fused: int = 0

    @property
    def number(self) -> int:
        return max(self.fused, max(self.indices, default=-1) + 1)


def count_parameters(weights: Iterable[StoredWeight], top_k: int | None) -> Parameters:
    """Count the weights of a main model, of whose routed experts a token uses `top_k` a layer."""
    weights = list(weights)
    tied = all(weight.role != "lm_head" for weight in weights)
    layers: dict[str, _Experts] = {}
    total = active = multiplied = 0
    for weight in weights:
        number = elements(weight)
        matrix = number if len(weight.shape) > 1 and not in_tower(weight.name) else 0
        total += number
        place = _expert_place(weight)
        if place is not None:
            layer = layers.setdefault(place[0], _Experts())
            layer.elements += number
            layer.matrices += matrix
            if place[1] is None:
                layer.fused = max(layer.fused, weight.shape[0])
            else:
                layer.indices.add(place[1])
        elif weight.role == "embedding" and not tied:
            active += weight.shape[1]
        else:
            active += number
            multiplied += matrix
    experts = max((layer.number for layer in layers.values()), default=0)
    if layers and top_k is None:
        return Parameters(total, None, None, experts)
    for layer in layers.values():
        used = min(top_k or 0, layer.number)
        active += layer.elements * used // max(layer.number, 1)
        multiplied += layer.matrices * used // max(layer.number, 1)
    return Parameters(total, active, multiplied, experts)


def elements(weight: StoredWeight) -> int:
    """Logical elements; lookup tables of integers are no parameters."""
    if weight.codec is None and weight.format.startswith(("I", "U", "BOOL")):
        return 0
    return math.prod(weight.shape)


def _expert_place(weight: StoredWeight) -> tuple[str, int | None] | None:
    """`model.layers.3.mlp.experts` and the number of the expert, None for all of them in a tensor
    of three dimensions; None for a weight that is no routed expert's."""
    components = weight.module.split(".")
    if "experts" not in components:
        return None
    place = components.index("experts")
    prefix, after = ".".join(components[: place + 1]), components[place + 1 : place + 2]
    if after and is_index(after[0]):
        return prefix, int(after[0])
    return (prefix, None) if len(weight.shape) == 3 else None
