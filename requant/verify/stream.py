"""Run source and output side by side, one layer at a time.

Two hidden states travel: the source's, and the output's own (end to end). Each layer of the output
is also given the source's hidden state, which shows what that layer alone changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from requant.runner.model import Model
from requant.verify.metrics import LogitSums, compare_logits

Head = Callable[[torch.Tensor], torch.Tensor]

#: Logits of one model held at a time: 128 MiB in float32 (259 positions of 129,280 tokens).
_LOGIT_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class Stream:
    """Both hidden states [B, T, D], for the token ids [B, T]."""

    source: Model
    output: Model
    ids: torch.Tensor
    x_source: torch.Tensor
    x_output: torch.Tensor


@dataclass(frozen=True)
class LayerCheck:
    """||L_out(x) - L_src(x)|| / ||L_src(x)|| for the source's x, and who is not finite."""

    layer: int
    relative_error: float | None
    mtp: bool = False
    problem: str | None = None

    def as_json(self) -> dict[str, Any]:
        """An entry of the report's `layers`."""
        entry: dict[str, Any] = {"layer": self.layer, "relative_error": self.relative_error}
        return {**entry, "mtp": True} if self.mtp else entry


def start(source: Model, output: Model, ids: torch.Tensor) -> Stream:
    """Embed the tokens."""
    return Stream(source, output, ids, source.embed(ids), output.embed(ids))


def step(stream: Stream, layer: int) -> tuple[Stream, LayerCheck]:
    """Run one layer of both models."""
    x, own = stream.x_source, stream.x_output
    y = stream.source.layer(layer, x)
    if torch.equal(x, own):
        same_input = end_to_end = stream.output.layer(layer, x)
    else:
        # One call for both, so that every weight is read and decoded once.
        both = stream.output.layer(layer, torch.cat((own, x)))
        end_to_end, same_input = both.split(len(x))
    after = Stream(stream.source, stream.output, stream.ids, y, end_to_end)
    return after, _check(layer, x, y, same_input)


def finish(stream: Stream) -> LogitSums:
    """Compare the logits at every position."""
    targets = following(stream.ids)
    heads = (stream.source.logits, stream.output.logits)
    return _logits(
        heads, stream.x_source, stream.x_output, targets, stream.source.config.vocab_size
    )


def mtp_step(stream: Stream, layer: int) -> tuple[LayerCheck, LogitSums]:
    """Run one multi-token-prediction layer of both on the source's final hidden state.

    The k-th such layer is given the tokens k + 1 places ahead and predicts those after them. It is
    not chained to the one before, so that each is judged by itself.
    """
    ahead = 1 + layer - stream.source.config.num_hidden_layers
    hidden = stream.source.final_norm(stream.x_source)[:, :-ahead]
    next_ids = stream.ids[:, ahead:]
    ours, theirs = (
        model.layer(layer, model.mtp_input(layer, next_ids, hidden))
        for model in (stream.source, stream.output)
    )
    heads = (
        lambda x: stream.source.mtp_logits(layer, x),
        lambda x: stream.output.mtp_logits(layer, x),
    )
    sums = _logits(heads, ours, theirs, following(next_ids), stream.source.config.vocab_size)
    return dataclasses.replace(_check(layer, hidden, ours, theirs), mtp=True), sums


def following(ids: torch.Tensor) -> torch.Tensor:
    """The token after each, [B, T] -> [B, T]; -1 at the end of a sequence."""
    targets = torch.full_like(ids, -1)
    targets[:, :-1] = ids[:, 1:]
    return targets


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
    heads: tuple[Head, Head],
    ours: torch.Tensor,
    theirs: torch.Tensor,
    targets: torch.Tensor,
    vocabulary: int,
) -> LogitSums:
    """Apply both heads to [B, T, D] each and compare, in chunks of positions."""
    totals = LogitSums()
    a, b, following = ours.flatten(0, 1), theirs.flatten(0, 1), targets.flatten()
    positions = max(1, _LOGIT_ELEMENTS // vocabulary)
    for begin in range(0, len(a), positions):
        chunk = slice(begin, begin + positions)
        logits = (heads[0](a[None, chunk])[0], heads[1](b[None, chunk])[0])
        totals += compare_logits(*logits, following[chunk])
    return totals
