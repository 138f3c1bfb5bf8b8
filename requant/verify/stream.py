"""Run source and output side by side, one layer at a time.

Two hidden states travel: the source's, and the output's own (end to end). Each layer of the output
is also given the source's hidden state, which shows what that layer alone changes.

An output that was cut is run by one process for each rank, all of which call the same functions in
the same order; process 0 runs the source for all of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from requant.convert.processes import Team
from requant.runner.model import Model
from requant.verify.metrics import LogitSums, compare_logits

Head = Callable[[torch.Tensor], torch.Tensor]

#: Logits of one model held at a time: 128 MiB in float32 (259 positions of 129,280 tokens).
_LOGIT_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class Stream:
    """Both hidden states [B, T, D], for the token ids [B, T]; the output's in the ranks that made
    it."""

    team: Team
    source: Model
    output: Model
    ids: torch.Tensor
    x_source: torch.Tensor
    x_output: torch.Tensor


@dataclass(frozen=True)
class LayerCheck:
    """||L_out(x) - L_src(x)|| / ||L_src(x)|| for the source's x, and who is not finite.

    `ranks`: that of each rank that ran the layer, where several did; the largest is the layer's.
    """

    layer: int
    relative_error: float | None
    mtp: bool = False
    problem: str | None = None
    ranks: Mapping[int, float | None] | None = None

    def as_json(self) -> dict[str, Any]:
        """An entry of the report's `layers`."""
        entry: dict[str, Any] = {"layer": self.layer, "relative_error": self.relative_error}
        if self.ranks is not None:
            entry["ranks"] = {str(rank): error for rank, error in self.ranks.items()}
        return {**entry, "mtp": True} if self.mtp else entry


def start(team: Team, source: Model, output: Model, ids: torch.Tensor) -> Stream:
    """Embed the tokens."""
    own = output.embed(ids)
    return Stream(team, source, output, ids, _told(output, lambda: source.embed(ids), own), own)


def step(stream: Stream, layer: int) -> tuple[Stream, LayerCheck]:
    """Run one layer of both models."""
    x, own = stream.x_source, stream.x_output
    if stream.team.size == 1 and torch.equal(x, own):
        same_input = end_to_end = stream.output.layer(layer, x)
    else:
        # One call for both, so that every weight is read and decoded once.
        both = stream.output.layer(layer, torch.cat((own, x)))
        end_to_end, same_input = both.split(len(x))
    y = _told(stream.output, lambda: stream.source.layer(layer, x), x)
    after = dataclasses.replace(stream, x_source=y, x_output=end_to_end)
    return after, _checked(stream, layer, x, y, same_input)


def finish(stream: Stream) -> LogitSums:
    """Compare the logits at every position."""
    targets = following(stream.ids)
    heads = (stream.source.logits, stream.output.logits)
    return _logits(stream, heads, stream.x_source, stream.x_output, targets)


def mtp_step(stream: Stream, layer: int) -> tuple[LayerCheck, LogitSums]:
    """Run one multi-token-prediction layer of both on the source's final hidden state.

    The k-th such layer is given the tokens k + 1 places ahead and predicts those after them. It is
    not chained to the one before, so that each is judged by itself.
    """
    ahead = 1 + layer - stream.source.config.num_hidden_layers
    hidden = stream.source.final_norm(stream.x_source)[:, :-ahead]
    next_ids = stream.ids[:, ahead:]

    def run(model: Model) -> torch.Tensor:
        return model.layer(layer, model.mtp_input(layer, next_ids, hidden))

    theirs = run(stream.output)
    ours = _told(stream.output, lambda: run(stream.source), theirs)
    heads = (
        lambda x: stream.source.mtp_logits(layer, x),
        lambda x: stream.output.mtp_logits(layer, x),
    )
    sums = _logits(stream, heads, ours, theirs, following(next_ids))
    return dataclasses.replace(_checked(stream, layer, hidden, ours, theirs), mtp=True), sums


def following(ids: torch.Tensor) -> torch.Tensor:
    """The token after each, [B, T] -> [B, T]; -1 at the end of a sequence."""
    targets = torch.full_like(ids, -1)
    targets[:, :-1] = ids[:, 1:]
    return targets


def _told(output: Model, work: Callable[[], torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """What process 0 makes of the source, in every process."""
    return output.rank.world.tell(work, like)


def _checked(
    stream: Stream, layer: int, x: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor
) -> LayerCheck:
    """What `_check` says in the ranks that ran the layer: the worst of it."""
    found = stream.team.gather(_check(layer, x, ours, theirs))
    if stream.team.size == 1:
        return found[0]
    ran = {rank: found[rank] for rank in stream.output.rank.ranks_of(layer)}
    errors = {rank: check.relative_error for rank, check in ran.items()}
    return dataclasses.replace(max(ran.values(), key=_badness), ranks=errors)


def _badness(check: LayerCheck) -> float:
    return math.inf if check.relative_error is None else check.relative_error


def _check(layer: int, x: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> LayerCheck:
    """Compare what a layer of both models makes of x; a fault that x came with is not its own."""
    sides = {"source": ours, "output": theirs}
    guilty = [side for side, y in sides.items() if not _is_finite(y)]
    if guilty:
        sentence = f"layer {layer}: gives NaN or infinity in the {' and in the '.join(guilty)}"
        return LayerCheck(layer, None, problem=sentence if _is_finite(x) else None)
    norm = float(torch.linalg.vector_norm(ours, dtype=torch.float64))
    error = float(torch.linalg.vector_norm(theirs - ours, dtype=torch.float64))
    return LayerCheck(layer, error / norm if norm > 0 else (0.0 if error == 0 else None))


def _is_finite(x: torch.Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def _logits(
    stream: Stream,
    heads: tuple[Head, Head],
    ours: torch.Tensor,
    theirs: torch.Tensor,
    targets: torch.Tensor,
) -> LogitSums:
    """Apply both heads to [B, T, D] each and compare in process 0, in chunks of positions."""
    totals = LogitSums()
    a, b, following = ours.flatten(0, 1), theirs.flatten(0, 1), targets.flatten()
    positions = max(1, _LOGIT_ELEMENTS // stream.source.config.vocab_size)
    for begin in range(0, len(a), positions):
        chunk = slice(begin, begin + positions)
        logits = heads[1](b[None, chunk])[0]
        if stream.team.leads:
            totals += compare_logits(heads[0](a[None, chunk])[0], logits, following[chunk])
    return totals
