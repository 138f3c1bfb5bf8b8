"""What a checkpoint's weights come to in any recipe and for any ranks, without planning each.

Tens of thousands of weights are of some forty kinds. One example of each kind is planned as it
would be in the whole, and counted as often as there are of it: bytes are exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from requant.convert.forms import PlannedWeight
from requant.convert.names import Role
from requant.convert.parallel import Parallel, usual
from requant.convert.plan import make_plan
from requant.convert.ranks import pieces_of
from requant.convert.recipe import Recipe
from requant.convert.shard import as_written
from requant.convert.source import Checkpoint
from requant.convert.survey import Cut, Item, Survey
from requant.errors import FormatError
from requant.quant import Codec


class Stack(NamedTuple):
    """So many weights (`number`) that are alike, with the first of them.

    `edge`: of the first or last layers of their role. `modules`: how a recipe names those.
    """

    item: Item
    number: int
    edge: bool
    modules: tuple[str, ...]


class Sized(NamedTuple):
    """A stack as a recipe writes it: bytes of all its weights, and on each rank of one stage."""

    stack: Stack
    planned: PlannedWeight
    nbytes: int
    rank_bytes: int


@dataclass(frozen=True)
class Inventory:
    """A checkpoint's weights in stacks, in source order."""

    survey: Survey
    stacks: tuple[Stack, ...]

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, written: Mapping[str, Codec | None] | None = None
    ) -> Inventory:
        """Count the weights of a checkpoint; those that are `written` differently, by name, apart,
        so that it is exact for the plan that has them as its `reads_back`."""
        return cls.counted(Survey.of(checkpoint), written or {})

    @classmethod
    def counted(
        cls, survey: Survey, written: Mapping[str, Codec | None], edges: int = 0
    ) -> Inventory:
        """Count, with so many of the first and of the last layers of each role apart."""
        ends = _ends(survey.items, edges) if edges else {}
        stacked: dict[tuple[Cut, Role, bool, Codec | None], list[Item]] = {}
        for item in survey.items:
            role, name = item.weight.role, item.weight.name
            edge = item.layer in ends.get((role, item.weight.kind), ())
            stacked.setdefault((item.cut, role, edge, written.get(name)), []).append(item)
        stacks = (
            Stack(items[0], len(items), edge, _modules(items) if edge else ())
            for (_, _, edge, _), items in stacked.items()
        )
        return cls(survey, tuple(stacks))

    def with_edges(self, edges: int) -> Inventory:
        """The same, with so many layers at both ends apart."""
        return Inventory.counted(self.survey, {}, edges)

    @property
    def checkpoint(self) -> Checkpoint:
        """What is counted."""
        return self.survey.checkpoint

    @cached_property
    def experts(self) -> dict[str, int]:
        """The number of routed experts of each layer of the main model, by prefix."""
        main = {i.prefix for i in self.survey.items if i.weight.role == "routed_expert"}
        return {prefix: n for prefix, n in self.survey.experts.items() if prefix in main}

    def sized(
        self, recipe: Recipe, parallel: Parallel, stacks: Sequence[Stack] | None = None
    ) -> list[Sized] | None:
        """What each stack (of `stacks`, or all) comes to in a recipe, whose patterns need not match
        anything; None where ranks cannot be cut so, or the recipe cannot be written."""
        chosen = self.stacks if stacks is None else stacks
        weights = {stack.item.weight.name: stack.item.weight for stack in chosen}
        examples = dataclasses.replace(self.checkpoint, weights=weights)
        try:
            plan = make_plan(examples, dataclasses.replace(recipe, preset=True))
        except FormatError:
            return None
        survey = Survey.of(as_written(plan))
        if survey.refused(parallel) or not self.survey.fits(parallel):
            return None
        planned = {weight.source.name: weight for weight in plan.weights}
        found = []
        for stack, item in zip(chosen, survey.items, strict=True):
            count, nbytes = pieces_of(item, parallel)
            each = item.weight.nbytes if count == 1 else nbytes
            held = stack.number
            if item.prefix is not None and item.expert is not None:
                held = -(-stack.number // parallel.ep)
            whole = stack.number * item.weight.nbytes
            found.append(Sized(stack, planned[item.weight.name], whole, held * each))
        return found

    def parallel_for(self, recipe: Recipe, count: int) -> Parallel:
        """The first of `ways` that a recipe can be cut in, for so many GPUs or for the most of them
        that can share it; one rank where none can."""
        for ranks in range(count, 1, -1):
            for parallel in ways(self.survey, ranks):
                if self.sized(recipe, parallel) is not None:
                    return parallel
        return usual(self.checkpoint, 1)

    def rank_bytes(self, recipe: Recipe, parallel: Parallel) -> int | None:
        """Bytes of every rank of one stage, in a recipe; None as `sized`."""
        found = self.sized(recipe, parallel)
        return None if found is None else sum(each.rank_bytes for each in found)


def ways(survey: Survey, ranks: int) -> list[Parallel]:
    """How so many GPUs can share a model in one stage: the usual way, then with the routed experts
    over all of them and the rest cut into fewer pieces, the most first."""
    found = [usual(survey.checkpoint, ranks)]
    if survey.experts:
        found += [Parallel(tp, ranks) for tp in range(ranks - 1, 0, -1) if ranks % tp == 0]
    return found


def _ends(items: Iterable[Item], edges: int) -> dict[tuple[Role, Role], frozenset[int]]:
    """The first and the last layers of each role and kind."""
    layers: dict[tuple[Role, Role], set[int]] = {}
    for item in items:
        if item.layer is not None:
            layers.setdefault((item.weight.role, item.weight.kind), set()).add(item.layer)
    ordered = {place: sorted(found) for place, found in layers.items()}
    return {place: frozenset(n[:edges] + n[-edges:]) for place, n in ordered.items()}


def _modules(items: list[Item]) -> tuple[str, ...]:
    """Patterns that match exactly these weights: of experts, those of a layer at once."""
    names = (f"{i.prefix}.*" if i.cut.routed else i.weight.module for i in items)
    return tuple(dict.fromkeys(names))
