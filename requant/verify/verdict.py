"""What the measurements mean: limits, sentences, and the report's numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from requant.verify.metrics import LogitSums
from requant.verify.stream import LayerCheck
from requant.verify.tensors import WeightCheck

#: Weights listed as the worst.
WORST = 10
#: Sentences in `problems`; a wholly wrong output would have one for each of 46,000 weights.
MAX_PROBLEMS = 100
#: KL limit of an output that changes no value.
EXACT_MAX_KL = 1e-5


@dataclass(frozen=True)
class Measurements:
    """What was found; `sums` is None where nothing could be run."""

    checks: list[WeightCheck] = field(default_factory=list)
    layers: list[LayerCheck] = field(default_factory=list)
    sums: LogitSums | None = None
    mtp: LogitSums | None = None


def default_max_kl(checks: list[WeightCheck]) -> float | None:
    """The largest limit of the formats that changed a value; None where nothing was compared."""
    if not checks:
        return None
    limits = (check.codec.tolerance.max_kl for check in checks if check.codec and check.lossy)
    return max(limits, default=EXACT_MAX_KL)


def problems_of(found: Measurements, limit: float | None) -> Iterator[str]:
    """What is wrong with the numbers, a sentence each."""
    yield from (check.problem for check in found.checks if check.problem)
    yield from (check.problem for check in found.layers if check.problem)
    for what, sums in (("KL", found.sums), ("KL of the MTP layers", found.mtp)):
        if sums is None or not sums.positions:
            continue
        if sums.mean_kl is None:
            yield f"{what}: not a number; the logits of one model are NaN or infinite"
        elif limit is not None and sums.mean_kl > limit:
            yield f"{what}: {sums.mean_kl:.4g} nats per token, over the limit of {limit:g}" + (
                _worst_layer(found.layers, mtp=sums is found.mtp)
            )


def _worst_layer(layers: Iterable[LayerCheck], mtp: bool) -> str:
    """Where to look first."""
    errors = [(c.relative_error, c.layer) for c in layers if c.mtp == mtp and c.relative_error]
    if not errors:
        return ""
    error, layer = max(errors)
    return f"; layer {layer} changes most (relative error {error:.3g})"


def numbers(found: Measurements, limit: float | None) -> dict[str, Any]:
    """The numbers, under verify's stable JSON keys; None where there is none."""
    sums, mtp = found.sums, found.mtp
    source, output = sums.perplexities if sums else (None, None)
    return {
        "kl": sums.mean_kl if sums else None,
        "max_kl": limit,
        "top1_agreement": sums.top1_agreement if sums else None,
        "perplexity_source": source,
        "perplexity_output": output,
        "tokens": sums.positions if sums else 0,
        "mtp": None
        if mtp is None
        else {
            "kl": mtp.mean_kl,
            "top1_agreement": mtp.top1_agreement,
            "tokens": mtp.positions,
        },
        "layers": [check.as_json() for check in found.layers],
        "tensors": _tensors(found.checks),
    }


def _tensors(checks: list[WeightCheck]) -> dict[str, Any]:
    """`exact`: stored differently, yet every value equal. `worst`: lowest SQNR first."""
    measured = [(c.sqnr_db, c.name) for c in checks if c.sqnr_db is not None]
    return {
        "checked": len(checks),
        "identical": sum(check.identical for check in checks),
        "exact": sum(not check.identical and not check.lossy for check in checks),
        "worst": [{"name": name, "sqnr_db": sqnr} for sqnr, name in sorted(measured)[:WORST]],
    }


def shortened(problems: list[str]) -> list[str]:
    """The first problems, and how many more there are."""
    if len(problems) <= MAX_PROBLEMS:
        return problems
    return [*problems[:MAX_PROBLEMS], f"and {len(problems) - MAX_PROBLEMS} more"]
