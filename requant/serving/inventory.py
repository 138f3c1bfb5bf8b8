"""What a checkpoint's weights come to in any recipe and for any ranks, without planning each.

Tens of thousands of weights are of some forty kinds. One example of each kind is planned as it
would be in the whole, and counted as often as there are of it: bytes are exact.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from requant.convert.names import Role
from requant.convert.parallel import Parallel, usual
from requant.convert.plan import PlannedWeight, make_plan
from requant.convert.ranks import pieces_of
from requant.convert.recipe import Recipe
from requant.convert.shard import as_written
from requant.convert.source import Checkpoint
from requant.convert.survey import Item, Kind, Survey
from requant.errors import FormatError

#: Of the layers that hold most of a model, so many at each end are told apart from those between:
#: they are the most sensitive (first and last layers).
EDGE_LAYERS = 2


class Stack(NamedTuple):
    """`count` weights that are alike, with the first of them.

    `edge`: of the first or last layers of their role. `modules`: how a recipe names them.
    """

    item: Item
    count: int
    edge: bool
    modules: tuple[str, ...]


class Sized(NamedTuple):
    """A stack as a recipe writes it: bytes of all its weights, and on each rank."""

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
    def of(cls, checkpoint: Checkpoint) -> Inventory:
        """Count the weights of a checkpoint."""
        survey = Survey.of(checkpoint)
        layers: dict[tuple[str, str], set[int]] = {}
        for item in survey.items:
            if item.layer is not None:
                layers.setdefault(_place(item), set()).add(item.layer)
        ends = {place: _ends(sorted(found)) for place, found in layers.items()}
        stacked: dict[tuple[Kind, Role, bool], list[Item]] = {}
        for item in survey.items:
            edge = item.layer is not None and item.layer in ends[_place(item)]
            stacked.setdefault((item.kind, item.weight.role, edge), []).append(item)
        stacks = (
            Stack(items[0], len(items), edge, _modules(items) if edge else ())
            for (_, _, edge), items in stacked.items()
        )
        return cls(survey, tuple(stacks))

    @property
    def checkpoint(self) -> Checkpoint:
        """What is counted."""
        return self.survey.checkpoint

    @cached_property
    def _examples(self) -> Checkpoint:
        weights = {s.item.weight.name: s.item.weight for s in self.stacks}
        return dataclasses.replace(self.checkpoint, weights=weights)

    def sized(self, recipe: Recipe, parallel: Parallel) -> list[Sized] | None:
        """What each stack comes to in a recipe, whose patterns need not match anything; None where
        ranks cannot be cut so, or the recipe cannot be written."""
        try:
            plan = make_plan(self._examples, dataclasses.replace(recipe, preset=True))
        except FormatError:
            return None
        survey = Survey.of(as_written(plan))
        if survey.refused(parallel) or not self.survey.fits(parallel):
            return None
        planned = {weight.source.name: weight for weight in plan.weights}
        found = []
        for stack, item in zip(self.stacks, survey.items, strict=True):
            count, nbytes = pieces_of(item, parallel)
            each = item.weight.nbytes if count == 1 else nbytes
            held = stack.count
            if item.prefix is not None and item.expert is not None:
                held = -(-stack.count // parallel.ep)
            whole = stack.count * item.weight.nbytes
            found.append(Sized(stack, planned[item.weight.name], whole, held * each))
        return found

    def rank_bytes(self, recipe: Recipe, parallel: Parallel) -> int | None:
        """Bytes of every rank of one stage, in a recipe; None as `sized`."""
        found = self.sized(recipe, parallel)
        return None if found is None else sum(each.rank_bytes for each in found)


def parallel_for(survey: Survey, count: int) -> Parallel:
    """The usual parallelism for so many GPUs, or for the most of them that is legal; one for none
    that is."""
    for ranks in range(count, 1, -1):
        parallel = usual(survey.checkpoint, ranks)
        if survey.allows(parallel):
            return parallel
    return usual(survey.checkpoint, 1)


def _place(item: Item) -> tuple[str, str]:
    return item.weight.role, item.weight.kind


def _ends(layers: list[int]) -> frozenset[int]:
    """The first and last layers; none where they would be most of them."""
    if len(layers) <= 4 * EDGE_LAYERS:
        return frozenset()
    return frozenset(layers[:EDGE_LAYERS] + layers[-EDGE_LAYERS:])


def _modules(items: list[Item]) -> tuple[str, ...]:
    """Patterns that match exactly these weights: of experts, those of a layer at once."""
    names = (f"{i.prefix}.*" if i.kind.routed else i.weight.module for i in items)
    return tuple(dict.fromkeys(names))
