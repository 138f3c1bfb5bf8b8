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
#: Relative error of a layer that ranks run with the source's values: only sums are in another
#: order. A token whose experts are nearly tied may choose others, one in thousands.
SAME_ERROR = 1e-4


@dataclass(frozen=True)
class Measurements:
    """What was found; `sums` is None where nothing could be run."""

    checks: list[WeightCheck] = field(default_factory=list)
    layers: list[LayerCheck] = field(default_factory=list)
    sums: LogitSums | None = None
    mtp: LogitSums | None = None


def default_max_kl(checks: list[WeightCheck]) -> float | None:
    """The largest limit of the formats that changed a value; None where nothing was compared. On
    ranks, what is wrong is damage, no format's doing."""
    if not checks:
        return None
    lossy = (c for c in checks if c.lossy and not (c.rank is not None and c.problem))
    limits = (check.codec.tolerance.max_kl for check in lossy if check.codec)
    return max(limits, default=EXACT_MAX_KL)


def problems_of(found: Measurements, limit: float | None) -> Iterator[str]:
    """What is wrong with the numbers, a sentence each."""
    problems = list(_problems(found, limit))
    if problems:
        yield from _where_ranks_differ(found)
    yield from problems


def _where_ranks_differ(found: Measurements) -> Iterator[str]:
    """Of ranks: which one, and from which layer on. Nothing of a checkpoint that is whole."""
    wrong: dict[int, list[WeightCheck]] = {}
    for check in found.checks:
        if check.rank is not None and check.problem:
            wrong.setdefault(check.rank, []).append(check)
    for rank, checks in sorted(wrong.items()):
        first = _first_layer(checks)
        many = "1 weight differs" if len(checks) == 1 else f"{len(checks)} weights differ"
        where = "outside of the layers" if first is None else f"first in layer {first}"
        yield f"rank {rank}: {many} from the source's, {where}"
    if any(check.lossy and not check.problem for check in found.checks):
        return  # every layer of quantized weights differs
    for layer in found.layers:
        errors = layer.ranks or {}
        differ = [n for n, error in errors.items() if error is None or error > SAME_ERROR]
        if differ:
            error = layer.relative_error
            told = "not finite" if error is None else f"relative error {error:.3g}"
            if len(differ) < len(errors):
                told += f" on rank {', '.join(map(str, differ))}"
            yield f"layer {layer.layer}: the first whose hidden state differs ({told})"
            return


def _first_layer(checks: Iterable[WeightCheck]) -> int | None:
    """The first layer that one of the weights lies in."""
    return min((check.layer for check in checks if check.layer is not None), default=None)


def rank_reports(checks: list[WeightCheck]) -> list[dict[str, Any]]:
    """What was found of each rank, nothing of a checkpoint that is whole; `first_layer` is the
    first with a wrong weight."""
    by_rank: dict[int, list[WeightCheck]] = {}
    for check in checks:
        if check.rank is not None:
            by_rank.setdefault(check.rank, []).append(check)
    return [
        {
            "rank": rank,
            "checked": len(own),
            "identical": sum(check.identical for check in own),
            "wrong": sum(check.problem is not None for check in own),
            "first_layer": _first_layer(check for check in own if check.problem),
        }
        for rank, own in sorted(by_rank.items())
    ]


def _problems(found: Measurements, limit: float | None) -> Iterator[str]:
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
    """`exact`: stored differently, yet every value equal. `worst`: lowest SQNR first. Of ranks,
    what each holds of a weight counts by itself."""
    measured = [(c.sqnr_db, c.name, c.rank) for c in checks if c.sqnr_db is not None]
    return {
        "checked": len(checks),
        "identical": sum(check.identical for check in checks),
        "exact": sum(not check.identical and not check.lossy for check in checks),
        "worst": [
            {"name": name, "sqnr_db": sqnr, **({} if rank is None else {"rank": rank})}
            for sqnr, name, rank in sorted(measured)[:WORST]
        ],
    }


def shortened(problems: list[str]) -> list[str]:
    """The first problems, and how many more there are."""
    if len(problems) <= MAX_PROBLEMS:
        return problems
    return [*problems[:MAX_PROBLEMS], f"and {len(problems) - MAX_PROBLEMS} more"]
