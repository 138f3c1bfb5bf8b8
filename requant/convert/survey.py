"""How each kind of tensors of a checkpoint can be cut, and which parallelism they allow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from requant.convert.cut_rules import REPLICABLE, WHOLE, Demand, Rule, helpful_formats, rule_of
from requant.convert.names import Role, in_tower, is_index
from requant.convert.parallel import Parallel
from requant.convert.source import Checkpoint
from requant.convert.weights import Kind, StoredWeight
from requant.errors import FormatError

#: Numbers of ranks that are tried for those that are legal.
MAX_RANKS = 512
#: How many problems an error tells.
_SHOWN = 4


@dataclass(frozen=True, eq=False)
class Cut:
    """How tensors of one name but for its numbers, in one shape and format, are cut.

    `pattern` is the name with `*` for numbers. `demand` is None where nothing is cut. `routed`
    tells tensors of routed experts, `tower` those outside of the language model.
    """

    pattern: str
    rule: Rule
    demand: Demand | None
    routed: bool
    tower: bool
    layer_at: int | None
    expert_at: int | None

    def ways(self, parallel: Parallel) -> int:
        """How many ways its tensors are cut, if at all."""
        return parallel.expert_cut if self.routed else parallel.tp


class Item(NamedTuple):
    """A weight, with the numbers in its name; `prefix` is that of its layer's experts."""

    weight: StoredWeight
    cut: Cut
    layer: int | None
    prefix: str | None
    expert: int | None


@dataclass(frozen=True)
class Survey:
    """All tensors of a checkpoint, in source order, and what they ask of a parallelism.

    `redundant` experts of each layer lie in two groups; the roles `kept` are whole on every rank.
    """

    checkpoint: Checkpoint
    items: tuple[Item, ...]
    redundant: int
    kept: frozenset[Role]

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, redundant: int = 0, kept: frozenset[Role] = frozenset()
    ) -> Survey:
        """Find out how each kind of tensors is cut."""
        return cls(checkpoint, tuple(_items(checkpoint, kept)), redundant, kept)

    @cached_property
    def demands(self) -> tuple[Cut, ...]:
        """Of what is cut, in source order."""
        return tuple(cut for cut in dict.fromkeys(item.cut for item in self.items) if cut.demand)

    @cached_property
    def experts(self) -> dict[str, int]:
        """The number of routed experts, by prefix. Raises FormatError where one is missing."""
        numbers: dict[str, set[int]] = {}
        for item in self.items:
            if item.cut.routed and item.prefix is not None and item.expert is not None:
                numbers.setdefault(item.prefix, set()).add(item.expert)
        for prefix, found in numbers.items():
            if len(found) != max(found) + 1:
                raise FormatError(
                    f"{self.checkpoint.path}: {prefix}: has {len(found)} experts, numbered up to "
                    f"{max(found)}; download the missing files"
                )
        return {prefix: len(found) for prefix, found in numbers.items()}

    @cached_property
    def layers(self) -> list[int]:
        """The numbers of the main model's layers, ascending."""
        main = (i for i in self.items if i.weight.role != "mtp" and not i.cut.tower)
        return sorted({item.layer for item in main if item.layer is not None})

    def refused(self, parallel: Parallel) -> list[tuple[Demand, int]]:
        """The cuts that are not legal, and how many ways each would be."""
        asked = [(c.demand, c.ways(parallel)) for c in self.demands if c.demand is not None]
        return [(demand, ways) for demand, ways in asked if not demand.allows(ways)]

    def fits(self, parallel: Parallel) -> bool:
        """Whether stages and groups of experts can be filled evenly."""
        counts = set(self.experts.values())
        even = all((count + self.redundant) % parallel.ep == 0 for count in counts)
        apart = parallel.ep > 1 or not self.redundant
        return even and apart and (parallel.pp <= len(self.layers) or parallel.pp == 1)

    def allows(self, parallel: Parallel) -> bool:
        """Whether a parallelism is legal."""
        return self.fits(parallel) and not self.refused(parallel)

    def legal_ranks(self, like: Parallel) -> tuple[int, ...]:
        """The numbers of ranks up to MAX_RANKS that can be had with as many stages as `like`, where
        tp and ep grow together if they are equal there, else the larger of them."""
        tried = (
            _of_size(like, size, bool(self.experts)) for size in range(1, MAX_RANKS // like.pp + 1)
        )
        return tuple(p.ranks for p in tried if p is not None and self.allows(p))

    def alternatives(self, ranks: int) -> list[Parallel]:
        """Other ways to use as many ranks, the fewest stages first, then the widest cut."""
        found: list[Parallel] = []
        for pp in _divisors(ranks):
            size = ranks // pp
            pairs = {(size, n) for n in _divisors(size)} | {(n, size) for n in _divisors(size)}
            pairs = pairs if self.experts else {(size, 1)}
            ordered = sorted(pairs, key=lambda pair: (-pair[0] * pair[1], -pair[0]))
            found += [Parallel(tp, ep, pp) for tp, ep in ordered]
        return [parallel for parallel in found if self.allows(parallel)]

    def require(self, parallel: Parallel) -> None:
        """Raise FormatError unless a parallelism is legal: why, which are, and the ways out."""
        problems = list(self._problems(parallel))
        if not problems:
            return
        hidden = len(problems) - _SHOWN
        shown = problems[:_SHOWN] + ([f"so it is with {hidden} more kinds"] if hidden > 0 else [])
        legal = ", ".join(map(str, self.legal_ranks(parallel))) or "none"
        raise FormatError(
            f"{self.checkpoint.path}: {parallel} is not legal: {'; '.join(shown)}. "
            f"Of up to {MAX_RANKS} ranks these are legal in this way: {legal}. "
            + self._ways_out(parallel)
        )

    def _problems(self, parallel: Parallel) -> Iterator[str]:
        """Why a parallelism is not legal, once for tensors that are alike."""
        if parallel.pp > max(len(self.layers), 1):
            yield f"{len(self.layers)} layers do not fill {parallel.pp} stages"
        for count in sorted(set(self.experts.values())):
            slots = count + self.redundant
            if slots % parallel.ep:
                more = f" and {self.redundant} copies" if self.redundant else ""
                what = f"{count} routed experts{more} do not divide into {parallel.ep} groups"
                yield f"{what} ({slots} % {parallel.ep} = {slots % parallel.ep})"
        told: set[tuple[Any, ...]] = set()
        for demand, ways in self.refused(parallel):
            alike = demand.rule, demand.shape, demand.codec
            if alike not in told:
                told.add(alike)
                yield demand.problem(ways)

    def _ways_out(self, parallel: Parallel) -> str:
        ways = [f"use {other}" for other in self.alternatives(parallel.ranks)[:3]]
        refused = self.refused(parallel)
        copies = -max(self.experts.values(), default=0) % parallel.ranks
        if copies and not self.redundant and copies <= min(self.experts.values(), default=0):
            others = replace(self, redundant=copies).alternatives(parallel.ranks)
            wide = (other for other in others if other.ep == parallel.ranks)
            ways += [f"use {other} with redundant_experts={copies}" for other in wide][:1]
        if refused and self.fits(parallel):
            roles = {demand.rule.role for demand, _ in refused}
            if roles <= set(REPLICABLE):
                ways.append(f"replicate {', '.join(sorted(roles | self.kept))}")
            what = f"convert {', '.join(sorted(roles))}"
            ways += [f"{what} to {form} first" for form in helpful_formats(refused)]
        if not ways:
            return "Use another number of ranks"
        return f"For {parallel.ranks} ranks: {'; or '.join(ways)}"


def _items(checkpoint: Checkpoint, kept: frozenset[Role]) -> Iterator[Item]:
    cuts: dict[Kind, Cut] = {}
    alike: dict[tuple[Any, ...], Cut] = {}
    for kind, weights in checkpoint.kinds.items():
        pattern = ".".join("*" if is_index(c) else c for c in kind.name.split("."))
        key = kind.name, kind.shape, kind.codec, len(weights[0].activations)
        if key not in alike:
            alike[key] = _cut(checkpoint, weights[0], pattern, kept)
        cuts[kind] = alike[key]
    for name, weight in checkpoint.weights.items():
        cut = cuts[weight.alike]
        components = name.split(".")
        layer = None if cut.layer_at is None else int(components[cut.layer_at])
        if cut.expert_at is None:
            yield Item(weight, cut, layer, None, None)
        else:
            prefix = ".".join(components[: cut.expert_at])
            yield Item(weight, cut, layer, prefix, int(components[cut.expert_at]))


def _cut(checkpoint: Checkpoint, weight: StoredWeight, pattern: str, kept: frozenset[Role]) -> Cut:
    rule = rule_of(weight, checkpoint.weights)
    rule = WHOLE if rule.role in kept else rule
    demand = None if rule.axis is None else Demand.of(weight, rule, checkpoint.config)
    tower = in_tower(weight.name)
    numbered = [
        (c, i + 1) for i, (c, n) in enumerate(pairwise(weight.name.split("."))) if is_index(n)
    ]
    places = dict(reversed(numbered))  # the first of each, as TensorName has it
    expert_at = None if tower else places.get("experts")
    return Cut(pattern, rule, demand, expert_at is not None, tower, places.get("layers"), expert_at)


def _of_size(like: Parallel, size: int, moe: bool) -> Parallel | None:
    """The like of a parallelism with stages of another size, if there is one."""
    if like.tp == like.ep and moe:
        return Parallel(size, size, like.pp)
    tp, ep = (like.tp, size) if like.ep > like.tp else (size, like.ep)
    small, large = sorted((tp, ep))
    return Parallel(tp, ep, like.pp) if large == size and large % small == 0 else None


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
