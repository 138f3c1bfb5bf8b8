"""KL divergence, top-1 agreement and perplexity of two models' logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch.nn import functional

#: Logits of one model held in float64 at a time: 16 MiB.
_CHUNK_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class LogitSums:
    """Sums over positions: `kl` in nats, `agreed` top-1 choices, negative log likelihoods in nats.

    `positions` counts all, `predicted` those whose next token is known.
    """

    kl: float = 0.0
    agreed: int = 0
    positions: int = 0
    nll_source: float = 0.0
    nll_output: float = 0.0
    predicted: int = 0

    def __add__(self, other: LogitSums) -> LogitSums:
        names = [field.name for field in fields(self)]
        return LogitSums(*(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def mean_kl(self) -> float | None:
        """Nats per token; None when it is not a finite number."""
        # Equal distributions give exactly 0; nearly equal ones may round to just below it.
        mean = self.kl / self.positions if self.positions else math.nan
        return max(mean, 0.0) if math.isfinite(mean) else None

    @property
    def top1_agreement(self) -> float | None:
        """Share of positions where both choose the same token."""
        return self.agreed / self.positions if self.positions else None

    @property
    def perplexities(self) -> tuple[float | None, float | None]:
        """Of source and output; None when not finite."""
        return self._perplexity(self.nll_source), self._perplexity(self.nll_output)

    def _perplexity(self, nll: float) -> float | None:
        mean = nll / self.predicted if self.predicted else math.nan
        return math.exp(mean) if mean < math.log(1e300) else None


def compare_logits(source: torch.Tensor, output: torch.Tensor, targets: torch.Tensor) -> LogitSums:
    """Compare logits [N, V] of both models; targets [N] are next tokens, -1 where unknown.

    KL(source || output) = sum over the vocabulary of p (log p - log q), in float64.
    """
    totals = LogitSums()
    step = max(1, _CHUNK_ELEMENTS // source.shape[-1])
    chunks = (tensor.split(step) for tensor in (source, output, targets))
    for ours, theirs, following in zip(*chunks, strict=True):
        log_p = functional.log_softmax(ours.to(torch.float64), dim=-1)
        log_q = functional.log_softmax(theirs.to(torch.float64), dim=-1)
        known = torch.where(following >= 0)[0]
        chosen = following[known]
        totals += LogitSums(
            kl=float((log_p.exp() * (log_p - log_q)).sum()),
            agreed=int((ours.argmax(-1) == theirs.argmax(-1)).sum()),
            positions=len(following),
            nll_source=-float(log_p[known, chosen].sum()),
            nll_output=-float(log_q[known, chosen].sum()),
            predicted=len(known),
        )
    return totals
