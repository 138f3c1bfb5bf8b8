"""How many ways a model is spread: tensor, expert and pipeline parallelism."""

from __future__ import annotations

from dataclasses import dataclass

from requant.convert.source import Checkpoint
from requant.errors import RequantError


@dataclass(frozen=True)
class Parallel:
    """Of each of the `pp` stages, runs of layers, attention heads, dense and shared MLPs and the
    vocabulary are cut `tp` ways, and the routed experts lie in `ep` groups.

    One of `tp` and `ep` divides the other: where `ep` is the larger, several ranks have the same
    cut; where `tp` is, the experts of a group are themselves cut. With tp = ep and one stage this
    is DeepSeek's own layout.
    """

    tp: int
    ep: int
    pp: int = 1

    @property
    def stage_size(self) -> int:
        """Ranks of a stage."""
        return max(self.tp, self.ep)

    @property
    def ranks(self) -> int:
        """Ranks of all stages."""
        return self.pp * self.stage_size

    @property
    def expert_cut(self) -> int:
        """How many ways each routed expert is cut."""
        return max(1, self.tp // self.ep)

    def place(self, rank: int) -> tuple[int, int, int]:
        """The stage of a rank, its tensor-parallel index, and its group of experts."""
        stage, inside = divmod(rank, self.stage_size)
        return stage, inside % self.tp, inside // (self.stage_size // self.ep)

    def meaning(self, moe: bool) -> str:
        """What it does, in a sentence; `moe` tells of routed experts."""
        told = f"heads, MLPs and vocabulary in {self.tp} pieces"
        if self.ep > self.tp:
            told += f", each on {self.ep // self.tp} ranks"
        if moe:
            told += f", routed experts in {self.ep} groups"
            told += f", each expert in {self.expert_cut} pieces" if self.expert_cut > 1 else ""
        return told + (f", layers in {self.pp} stages" if self.pp > 1 else "")

    def __str__(self) -> str:
        return f"tp={self.tp} ep={self.ep} pp={self.pp}"


def usual(
    checkpoint: Checkpoint,
    ranks: int | None,
    tp: int | None = None,
    ep: int | None = None,
    pp: int | None = None,
) -> Parallel:
    """What `--ranks` means together with those of the three that are given: with routed experts
    tp = ep, as DeepSeek has it, else tp alone. Raises RequantError for numbers that contradict."""
    given = {"ranks": ranks, "tp": tp, "ep": ep, "pp": pp}
    said = ", ".join(f"{name} {number}" for name, number in given.items() if number is not None)
    for name, number in given.items():
        if number is not None and number < 1:
            raise RequantError(f"{name} is {number}, expected at least 1")
    stages = pp or 1
    if ranks is None:
        if tp is None and ep is None:
            raise RequantError("give the number of ranks, or tp or ep")
        ranks = stages * max(tp or 1, ep or 1)
    size, rest = divmod(ranks, stages)
    if rest:
        raise RequantError(f"{said}: {ranks} ranks do not divide into {stages} stages")
    moe = any(weight.kind == "routed_expert" for weight in checkpoint.weights.values())
    if not moe and (ep or 1) > 1:
        raise RequantError(f"{said}: {checkpoint.path} has no routed experts; leave out ep")
    tp, ep = tp or size, ep or (size if moe else 1)
    parallel = Parallel(tp, ep, stages)
    if parallel.ranks != ranks:
        raise RequantError(
            f"{said}: {parallel} is for {parallel.ranks} ranks, pp * max(tp, ep), not {ranks}"
        )
    if max(tp, ep) % min(tp, ep):
        raise RequantError(f"{said}: of tp {tp} and ep {ep} neither divides the other")
    return parallel
