"""What would fit instead: another format, more GPUs, a shorter context, experts in RAM."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from requant.convert.recipe import Recipe, default_recipe, load_recipe
from requant.quant import format_name
from requant.serving.fit import Fit
from requant.serving.hardware import Gpus
from requant.serving.inventory import Inventory, ways
from requant.serving.quality import damage
from requant.serving.support import common_engines

#: How many are told.
SHOWN = 3
#: Formats whose default recipes are tried, and presets.
_FORMATS = (
    "bf16", "fp8-block", "fp8-channel", "int8-channel", "int4[group_size=32]", "int4",
    "nvfp4", "mxfp4",
)  # fmt: skip
_PRESETS = ("deepseek-int4-experts", "ampere-int4", "blackwell-nvfp4", "kimi-style")
#: Numbers of GPUs that are tried: those that machines, and racks of them, have.
COUNTS = (2, 4, 8, 16, 32, 64, 128, 256)
#: A context shorter than this is no way out.
MIN_CONTEXT = 1024


def alternatives(
    inventory: Inventory, recipe: Recipe, fit: Fit, gpus: Gpus, offloaded: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """The three best ways to serve what does not `fit`, each of which does: the best format first,
    then more GPUs, a shorter context, experts in RAM, and further formats."""
    formats = list(_formats(inventory, recipe, fit, gpus))
    found = [*formats[:1], *_ranks(inventory, recipe, fit, gpus), *_context(fit)]
    if offloaded is not None and offloaded["possible"]:
        apart = offloaded["ram_experts"] + offloaded["disk_experts"]
        how = "routed experts in RAM" if apart else "MTP layers left off the GPUs"
        sizes = {"gpus": fit.parallel.ranks, "gpu_bytes": fit.gpu_bytes}
        found.append({"kind": "offload", "how": how, **sizes, **offloaded})
    return (found + formats[1:])[:SHOWN]


def _formats(
    inventory: Inventory, recipe: Recipe, fit: Fit, gpus: Gpus
) -> Iterator[dict[str, Any]]:
    """Other recipes that fit on the same GPUs and run there, the least damage first."""
    tried = [(f"--to {text}", default_recipe(text)) for text in _FORMATS]
    tried += [(f"--recipe {name}", load_recipe(name)) for name in _PRESETS]
    found = []
    for how, other in tried:
        sized = inventory.sized(other, fit.parallel)
        if other.sha256 == recipe.sha256 or sized is None:
            continue
        weights = sum(each.rank_bytes for each in sized)
        written = {p.written_codec for _, p, _, _ in sized if p.written_codec is not None}
        names = sorted({format_name(codec) for codec in written})
        fits = Fit.of(fit.config, gpus, fit.parallel, fit.demand, weights)
        engines = common_engines(names, gpus.architecture)
        if fits.fits and engines:
            way = {"kind": "format", "how": how, "engines": engines, **_sizes(fits)}
            found.append((damage(inventory, sized), weights, how, way))
    seen: set[int] = set()
    for _, weights, _, way in sorted(found, key=lambda each: each[:3]):
        if weights not in seen:
            seen.add(weights)
            yield way


def _ranks(inventory: Inventory, recipe: Recipe, fit: Fit, gpus: Gpus) -> Iterator[dict[str, Any]]:
    """The fewest GPUs of the same make that hold it."""
    for count in COUNTS:
        if count <= fit.parallel.ranks:
            continue
        for parallel in ways(inventory.survey, count):
            weights = inventory.rank_bytes(recipe, parallel)
            if weights is None:
                continue
            fits = Fit.of(fit.config, gpus, parallel, fit.demand, weights)
            if fits.fits:
                more = dataclasses.replace(gpus, count=count)
                how = f"--gpu '{more}'"
                cut = {"tp": parallel.tp, "ep": parallel.ep}
                yield {"kind": "ranks", "how": how, **cut, **_sizes(fits)}
                return


def _context(fit: Fit) -> Iterator[dict[str, Any]]:
    """The longest context that fits."""
    most = fit.max_context
    if MIN_CONTEXT <= most < fit.demand.context:
        shorter = dataclasses.replace(fit, demand=fit.demand._replace(context=most))
        yield {"kind": "context", "how": f"--context {most}", **_sizes(shorter)}


def _sizes(fit: Fit) -> dict[str, Any]:
    return {
        "gpus": fit.parallel.ranks,
        "weights_bytes": fit.weights,
        "needed_bytes": fit.needed,
        "gpu_bytes": fit.gpu_bytes,
        "max_context": fit.max_context,
    }
