"""Which piece of which weight lies on which rank: planned from headers and config alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from requant.convert.cut_rules import REPLICABLE
from requant.convert.names import Role
from requant.convert.parallel import Parallel
from requant.convert.placement import Holders, Loads, contiguous, place
from requant.convert.source import Checkpoint
from requant.convert.survey import Cut, Item, Survey
from requant.convert.weights import StoredWeight
from requant.errors import RequantError
from requant.quant.cutting import plan_cut

#: A stage, and the group of experts that holds a weight (None: all ranks of the stage do).
_Slot = tuple[int, int | None]


class Piece(NamedTuple):
    """Rows (axis 0) or columns (axis 1) start:stop of a weight; all of it where axis is None.

    `nbytes`: of all its parts. `expert`: whether it belongs to a routed expert.
    """

    weight: StoredWeight
    axis: int | None
    start: int
    stop: int
    nbytes: int
    expert: bool

    @property
    def where(self) -> str:
        """`replicated`, `rows a:b`, `cols a:b`, `experts`, or `experts, rows a:b`."""
        if self.axis is None:
            return "experts" if self.expert else "replicated"
        cut = f"{'cols' if self.axis else 'rows'} {self.start}:{self.stop}"
        return f"experts, {cut}" if self.expert else cut


class Share(NamedTuple):
    """A weight, the `stages` that have it, and in them the `groups` of experts (None: all ranks).

    It is cut into `pieces`, of `nbytes` each, which consecutive ranks may have alike.
    """

    item: Item
    stages: tuple[int, ...]
    groups: tuple[int, ...] | None
    pieces: int
    nbytes: int

    def piece(self, index: int, ways: int) -> Piece:
        """What the rank of this index among `ways` holds."""
        weight, rule = self.item.weight, self.item.cut.rule
        axis = rule.axis if self.pieces > 1 else None
        extent = weight.shape[axis or 0] if weight.shape else 1
        number, size = index * self.pieces // ways, extent // self.pieces
        start, stop = number * size, (number + 1) * size
        return Piece(weight, axis, start, stop, self.nbytes, self.groups is not None)


@dataclass(frozen=True)
class Split:
    """A checkpoint spread over ranks: one share for every weight, in source order."""

    survey: Survey
    parallel: Parallel
    shares: tuple[Share, ...]

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """What a rank holds, in source order."""
        stage, index, group = self.parallel.place(rank)
        everyone, ours = (self._slots.get((stage, g), []) for g in (None, group))
        numbers = sorted(everyone + ours)
        return tuple(self._piece(self.shares[number], index) for number in numbers)

    def table(self, rank: int) -> dict[str, str]:
        """Of every weight that a rank holds, which piece."""
        return {piece.weight.name: piece.where for piece in self.pieces(rank)}

    def summary(self) -> dict[str, Any]:
        """Bytes by rank and role, balance, and what is replicated. Rank bytes are those of the
        tensors, without headers; their sum is that of the source's and the replicated ones."""
        roles = [self._role_bytes(rank) for rank in range(self.parallel.ranks)]
        totals = [sum(of_role.values()) for of_role in roles]
        source = self.survey.checkpoint.nbytes
        whole = [share.item for share in self.shares if share.groups is None and share.pieces == 1]
        unknown = (i for i in whole if i.weight.kind == "other")
        return {
            "ranks": self.parallel.ranks,
            "tp": self.parallel.tp,
            "ep": self.parallel.ep,
            "pp": self.parallel.pp,
            "meaning": self.parallel.meaning(bool(self.survey.experts)),
            "redundant_experts": self.survey.redundant,
            "source_bytes": source,
            "rank_bytes": totals,
            "rank_role_bytes": roles,
            "min_rank_bytes": min(totals),
            "max_rank_bytes": max(totals),
            "balance": max(totals) * len(totals) / max(sum(totals), 1),
            "replicated_bytes": sum(totals) - source,
            "replicated_tensors": dict(Counter(item.cut.pattern for item in whole)),
            "unknown_tensors": dict(Counter(item.cut.pattern for item in unknown)),
            "legal_ranks": list(self.survey.legal_ranks(self.parallel)),
        }

    def _piece(self, share: Share, index: int) -> Piece:
        if share.groups is None:
            return share.piece(index, self.parallel.tp)
        return share.piece(index % share.pieces, share.pieces)

    @cached_property
    def _slots(self) -> dict[_Slot, list[int]]:
        """The numbers of the shares in each slot, in order."""
        slots: dict[_Slot, list[int]] = {}
        for number, share in enumerate(self.shares):
            for stage in share.stages:
                for group in (None,) if share.groups is None else share.groups:
                    slots.setdefault((stage, group), []).append(number)
        return slots

    @cached_property
    def _slot_bytes(self) -> dict[_Slot, Counter[str]]:
        counted: dict[_Slot, Counter[str]] = {}
        for slot, numbers in self._slots.items():
            counted[slot] = Counter()
            for number in numbers:
                share = self.shares[number]
                counted[slot][share.item.weight.role] += share.nbytes
        return counted

    def _role_bytes(self, rank: int) -> dict[str, int]:
        stage, _, group = self.parallel.place(rank)
        everyone, ours = (self._slot_bytes.get((stage, g), Counter()) for g in (None, group))
        return dict(everyone + ours)


def split(
    checkpoint: Checkpoint,
    parallel: Parallel,
    loads: Loads | None = None,
    redundant: int = 0,
    replicate: Iterable[Role] = (),
) -> Split:
    """Spread a checkpoint over ranks.

    `loads` places experts by how often each was chosen, the `redundant` hottest of each layer
    twice. The roles `replicate` are whole on every rank. Raises RequantError for options that
    contradict the checkpoint or have no effect, FormatError for a cut that is not legal.
    """
    survey = Survey.of(checkpoint, redundant, _replicated(checkpoint, parallel, replicate))
    _require_effect(survey, parallel, loads)
    survey.require(parallel)
    holders = {p: contiguous(count, parallel.ep) for p, count in survey.experts.items()}
    if loads is not None:
        holders = place(survey.experts, parallel.ep, loads, redundant)
    stages = _layer_stages(survey.layers, parallel.pp)
    tied = all(item.weight.role != "lm_head" for item in survey.items)
    pieces: dict[Cut, tuple[int, int]] = {}
    shares = []
    for item in survey.items:
        if item.cut not in pieces:
            pieces[item.cut] = pieces_of(item, parallel)
        count, nbytes = pieces[item.cut]
        nbytes = item.weight.nbytes if count == 1 else nbytes
        held = _stages_of(item, parallel.pp, stages, tied)
        shares.append(Share(item, held, _groups(item, holders), count, nbytes))
    return Split(survey, parallel, tuple(shares))


def pieces_of(item: Item, parallel: Parallel) -> tuple[int, int]:
    """How many pieces a kind of tensor is cut into, and the bytes of each."""
    demand, weight = item.cut.demand, item.weight
    count = 1 if demand is None else demand.pieces(item.cut.ways(parallel))
    if demand is None or count == 1:
        return 1, weight.nbytes
    if weight.codec is None:
        return count, weight.nbytes // count
    shape = weight.shape[0], weight.shape[1]
    parts = plan_cut(weight.codec, shape, demand.axis, 0, demand.extent // count).values()
    beside = sum(part.spec.nbytes for part in weight.activations.values())
    return count, sum(part.spec.nbytes for part in parts) + beside


def _groups(item: Item, holders: Mapping[str, Holders]) -> tuple[int, ...] | None:
    if item.prefix is None or item.expert is None:
        return None
    return holders[item.prefix][item.expert]


def _layer_stages(layers: Sequence[int], count: int) -> dict[int, int]:
    """The stage of every layer: as many layers in each; where they do not divide the first stages
    have one more, since the last has the output head."""
    each, more = divmod(len(layers), count)
    stages = [stage for stage in range(count) for _ in range(each + (stage < more))]
    return dict(zip(layers, stages, strict=True))


def _stages_of(item: Item, count: int, by_layer: Mapping[int, int], tied: bool) -> tuple[int, ...]:
    """The stages that hold a weight. The embedding lies on the first (and where it is the output
    head, too, on the last), what follows the layers and MTP on the last, and what is unknown and
    in no layer on all."""
    first, last = (0,), (count - 1,)
    if count == 1 or item.cut.tower:
        return first
    if item.weight.role == "mtp":
        return last
    if item.layer is not None:
        return (by_layer[item.layer],)
    if item.weight.kind == "embedding":
        return first + last if tied else first
    return tuple(range(count)) if item.weight.kind == "other" else last


def _replicated(
    checkpoint: Checkpoint, parallel: Parallel, replicate: Iterable[Role]
) -> frozenset[Role]:
    kept = frozenset(replicate)
    kinds = {weight.kind for weight in checkpoint.weights.values()} if kept else set()
    for role in sorted(kept):
        if role not in REPLICABLE:
            raise RequantError(f"replicate {role}: expected one of {', '.join(REPLICABLE)}")
        if role not in kinds:
            raise RequantError(f"replicate {role}: {checkpoint.path} has no tensor of this role")
        if parallel.tp == 1:
            raise RequantError(f"replicate {role}: with tp 1 it is on every rank anyway")
    return kept


def _require_effect(survey: Survey, parallel: Parallel, loads: Loads | None) -> None:
    """Raise RequantError for settings of experts that say nothing here."""
    copies, experts = survey.redundant, survey.experts
    if copies < 0:
        raise RequantError(f"{copies} redundant experts: expected at least 0")
    if copies and loads is None:
        raise RequantError(
            f"{copies} redundant experts: give their loads as well, which tell the hottest"
        )
    if loads is None:
        return
    if not experts or parallel.ep == 1:
        what = f"into {parallel.ep} group" if experts else f"in {survey.checkpoint.path}"
        raise RequantError(f"expert loads: no routed experts to place {what}")
    fewest = min(experts.values())
    if copies > fewest:
        raise RequantError(
            f"{copies} redundant experts of {fewest}: one copy of each at most; give up to {fewest}"
        )
