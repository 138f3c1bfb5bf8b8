"""What one of several processes has of a model that they run together, and who has the rest.

As an engine does it: a stage of ranks runs some of the layers, each with its own attention heads,
its part of MLPs and vocabulary (the tensor-parallel group) and its own experts (the whole stage).
Where there are more ranks in a stage than heads were cut for, groups of them compute the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from requant.convert.journal import RANKS_NAME
from requant.convert.names import TensorName
from requant.convert.parallel import Parallel
from requant.convert.processes import Team
from requant.convert.rank_folders import Layout, Span, span_of
from requant.convert.source import Checkpoint
from requant.errors import CheckpointError
from requant.runner.groups import Group


@dataclass(frozen=True)
class Rank:
    """One rank: `tables` say of every rank which piece it holds of each weight.

    The groups `tensor`, `stage` and `world` are those it exchanges results with.
    """

    number: int
    parallel: Parallel
    tables: tuple[Mapping[str, str], ...]
    tensor: Group
    stage: Group
    world: Group

    @classmethod
    def alone(cls, names: Iterable[str]) -> Rank:
        """The one that runs a whole checkpoint with weights of these names."""
        table = dict.fromkeys(names, "replicated")
        return cls(0, Parallel(1, 1), (table,), Group(), Group(), Group())

    @classmethod
    def of(cls, held: Checkpoint, layout: Layout, team: Team, device: torch.device) -> Rank:
        """The rank of this process, which opened what it holds; all processes call this alike.

        Raises RequantError, in every process, where ranks.json contradicts itself or a rank.
        """
        team.each(lambda: _require_consistent(held, layout, team))
        parallel, every = layout.parallel, range(team.size)
        size = parallel.stage_size
        stages = [tuple(every[n : n + size]) for n in range(0, team.size, size)]
        tensors = [tuple(every[n : n + parallel.tp]) for n in range(0, team.size, parallel.tp)]
        groups = [Group.of(team, partition, device) for partition in (tensors, stages, [every])]
        return cls(team.rank, parallel, layout.tables, *groups)

    @cached_property
    def names(self) -> frozenset[str]:
        """All weights of the model, whichever rank has them."""
        return frozenset(name for table in self.tables for name in table)

    def span(self, name: str) -> Span:
        """Which piece of a weight this rank has."""
        return span_of(self.tables[self.number][name])

    @property
    def at(self) -> int:
        """The stage of this rank."""
        return self.parallel.place(self.number)[0]

    @property
    def last(self) -> int:
        """The stage that has the output head, and the prediction layers."""
        return self.parallel.pp - 1

    def stage_of(self, name: str) -> int:
        """The first stage that has a weight."""
        return self._stages[name]

    def layer_stage(self, layer: int) -> int | None:
        """The stage that runs a layer; None where no weight is of it."""
        return self._layers.get(layer)

    def ranks_of(self, layer: int) -> range:
        """The ranks that run a layer."""
        size = self.parallel.stage_size
        first = (self.layer_stage(layer) or 0) * size
        return range(first, first + size)

    def turn(self, name: str) -> tuple[int, int] | None:
        """Of an expert's weight: which of how many copies this rank's is; None where it has none.

        A copy lies in one group of experts, cut over its ranks where there are several.
        """
        if name not in self.tables[self.number]:
            return None
        groups = {
            self.parallel.place(rank)[2] for rank in self.stage.members if name in self.tables[rank]
        }
        own = self.parallel.place(self.number)[2]
        return sorted(groups).index(own), len(groups)

    def moved(self, x: torch.Tensor, giver: int, taker: int) -> torch.Tensor:
        """A tensor that the ranks of one stage have, in those of another; elsewhere as it was."""
        steps = (taker - giver) * self.parallel.stage_size
        if giver != taker and self.at == giver:
            self.world.hand(x, steps)
        if giver != taker and self.at == taker:
            return self.world.take(x, steps)
        return x

    @cached_property
    def _stages(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for rank, table in enumerate(self.tables):
            stage = self.parallel.place(rank)[0]
            for name in table:
                found.setdefault(name, stage)
        return found

    @cached_property
    def _layers(self) -> dict[int, int]:
        parsed = ((TensorName.parse(name).layer, at) for name, at in self._stages.items())
        return {layer: stage for layer, stage in parsed if layer is not None}


def _require_consistent(held: Checkpoint, layout: Layout, team: Team) -> None:
    """Raise CheckpointError unless what ranks.json says of this rank can be run."""
    parallel, where = layout.parallel, held.path / RANKS_NAME
    smaller, larger = sorted((parallel.tp, parallel.ep))
    if parallel.ranks != len(layout.tables) or larger % smaller:
        raise CheckpointError(
            f"{where}: {parallel} is for {parallel.ranks} ranks, it lists {len(layout.tables)}"
        )
    table, size = layout.tables[team.rank], parallel.stage_size
    folder = held.path / layout.folders[team.rank]
    first = team.rank // size * size
    for name, said in layout.tables[first].items():
        if not said.startswith("experts") and name not in table:
            raise CheckpointError(
                f"{folder}: has no {name}, which rank {first} of the same stage has; "
                "only experts may differ"
            )
    for name in table:
        held_span = span_of(table[name])
        if held_span.axis is not None:
            _require_extent(held, name, held_span)


def _require_extent(held: Checkpoint, name: str, span: Span) -> None:
    weight = held.weights[name]
    assert span.axis is not None
    found = weight.shape[span.axis] if span.axis < len(weight.shape) else None
    if found != span.stop - span.start:
        raise CheckpointError(
            f"{held.path}: {name}: {RANKS_NAME} tells of {span.stop - span.start} rows or columns "
            f"({span.start}:{span.stop}), the rank has {list(weight.shape)}"
        )
