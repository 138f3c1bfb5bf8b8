"""What `plan --gpu` tells: exact bytes, whether they fit, what does otherwise, what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from requant.convert.kv_cache import top_k
from requant.convert.parallel import Parallel, usual
from requant.convert.placement import Loads
from requant.convert.plan import Plan
from requant.errors import RequantError
from requant.quant import format_name
from requant.serving.alternatives import alternatives
from requant.serving.cost import conversion_cost
from requant.serving.fit import Fit
from requant.serving.hardware import Gpus
from requant.serving.inventory import Inventory
from requant.serving.memory import Demand, context_length, kv_cache_bytes
from requant.serving.offload import Experts, Resident, offload
from requant.serving.support import common_engines, runs

#: Context that is planned for unless one is given; no more than the model was made for.
DEFAULT_CONTEXT = 32768


def serving_report(
    plan: Plan,
    gpus: Gpus,
    context: int | None = None,
    batch: int = 1,
    ram: int | None = None,
    kv_bytes: float = 2.0,
    loads: Loads | None = None,
    probe: bool = True,
) -> dict[str, Any]:
    """Everything about serving the output of a plan on these GPUs, under stable keys.

    `plan`: of the whole, or spread over ranks (`Cutting.of`), which then must be as many as there
    are GPUs or fewer. `ram`: of the machine in bytes, for experts that do not fit. `kv_bytes` of an
    element of the cache. `probe`: measure for the time that converting takes. `fits` tells whether
    the exit status is 0 or 1. Raises RequantError for demands that make no sense.
    """
    demand = demand_of(plan.config, context, batch, kv_bytes)
    inventory = Inventory.of(plan.source, plan.reads_back)
    parallel, largest, note = _spread(plan, inventory, gpus)
    weights = sum(largest.values())
    fit = Fit.of(plan.config, gpus, parallel, demand, weights)
    written = written_by_role(plan)
    experts = Experts(inventory.experts, top_k(plan.config) or 0, _expert_bytes(written, inventory))
    resident = _resident(largest, fit)
    placed = offload(fit.room, resident, experts, gpus, parallel, ram, loads)
    apart = placed if experts.number and not fit.fits else None
    used = sorted({format_name(codec) for codec in set(plan.reads_back.values()) if codec})
    return {
        "gpus": str(gpus),
        "gpu_count": gpus.count,
        "architecture": gpus.architecture,
        "ranks": parallel.ranks,
        "tp": parallel.tp,
        "ep": parallel.ep,
        "pp": parallel.pp,
        "note": note,
        "context": demand.context,
        "batch": demand.batch,
        "role_bytes": written,
        "header_bytes": plan.written_bytes - sum(written.values()),
        "rank_role_bytes": largest,
        "weights_bytes": weights,
        "kv_cache_bytes": fit.kv_cache,
        "activation_bytes": fit.activations,
        "reserve_bytes": fit.reserve,
        "needed_bytes": fit.needed,
        "gpu_bytes": fit.gpu_bytes,
        "fits": fit.fits,
        "max_context": fit.max_context,
        "max_batch": fit.max_batch,
        "tokens_per_second_bound": _bound(resident, experts, fit.parallel, gpus)
        if fit.fits
        else None,
        "offload": apart,
        "alternatives": [] if fit.fits else alternatives(inventory, plan.recipe, fit, gpus, apart),
        "support": {name: runs(name, gpus.architecture) for name in used},
        "engines": common_engines(used, gpus.architecture),
        "cost": conversion_cost(plan, probe),
    }


def demand_of(
    config: Mapping[str, Any], context: int | None, batch: int, kv_bytes: float = 2.0
) -> Demand:
    """What is to be served. Raises RequantError for numbers that are none."""
    most = context_length(config)
    chosen = min(DEFAULT_CONTEXT, most or DEFAULT_CONTEXT) if context is None else context
    for name, value in (("context", chosen), ("batch", batch)):
        if value < 1:
            raise RequantError(f"{name} {value}: expected at least 1")
    if most is not None and chosen > most:
        raise RequantError(
            f"context {chosen}: the model was made for {most} tokens (max_position_embeddings); "
            f"give at most {most}"
        )
    return Demand(chosen, batch, kv_bytes)


def written_by_role(plan: Plan) -> dict[str, int]:
    """Bytes of the tensors that are written, by role; with the headers, `Plan.written_bytes`."""
    roles: Counter[str] = Counter()
    for file in plan.files:
        for piece in file.pieces:
            nbytes = sum(spec.nbytes for spec in piece.specs.values())
            roles[piece.weight.source.role] += nbytes
    return dict(roles)


def _spread(
    plan: Plan, inventory: Inventory, gpus: Gpus
) -> tuple[Parallel, dict[str, int], str | None]:
    """The parallelism, the fullest rank's bytes by role, and what is to be said about it."""
    if plan.ranks is not None:
        ranks = plan.ranks
        if ranks["ranks"] > gpus.count:
            raise RequantError(
                f"{ranks['ranks']} ranks for {gpus.count} GPUs; give as many GPUs, or fewer ranks"
            )
        largest = ranks["rank_bytes"].index(ranks["max_rank_bytes"])
        parallel = Parallel(ranks["tp"], ranks["ep"], ranks["pp"])
        return parallel, dict(ranks["rank_role_bytes"][largest]), None
    parallel = inventory.parallel_for(plan.recipe, gpus.count)
    sized = inventory.sized(plan.recipe, parallel)
    if sized is None:  # not even one rank: what convert would refuse
        raise RequantError(f"{plan.source.path}: cannot be spread over {gpus.count} GPUs")
    roles: Counter[str] = Counter()
    for stack, _, _, rank_bytes in sized:
        roles[stack.item.weight.role] += rank_bytes
    usually = usual(plan.source, gpus.count)
    note = None
    if parallel != usually:
        note = (
            f"{usually} is not legal for this model in these formats, so {parallel} is planned, on "
            f"{parallel.ranks} of {gpus.count} GPUs; `requant plan --ranks {gpus.count}` says why"
        )
    return parallel, dict(roles), note


def _expert_bytes(written: dict[str, int], inventory: Inventory) -> float:
    """Bytes of one routed expert of one layer, in the mean."""
    number = sum(inventory.experts.values())
    return written.get("routed_expert", 0) / number if number else 0.0


def _resident(roles: dict[str, int], fit: Fit) -> Resident:
    """What stays on a GPU when routed experts and MTP do not, and what one token reads of it."""
    held = sum(n for role, n in roles.items() if role not in ("routed_expert", "mtp"))
    table = roles.get("embedding", 0) if "lm_head" in roles else 0  # of which one row is read
    alone = fit.demand._replace(batch=1)
    return Resident(held, held - table + kv_cache_bytes(fit.config, alone, fit.parallel))


def _bound(resident: Resident, experts: Experts, parallel: Parallel, gpus: Gpus) -> float | None:
    """Tokens/s of one sequence at most where all is on the GPUs; None for unknown bandwidth."""
    if gpus.bandwidth is None:
        return None
    visited = sum(experts.visits(None)) * experts.nbytes / parallel.ranks
    return round(gpus.bandwidth / (resident.read + visited), 3)
