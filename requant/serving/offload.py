"""Routed experts that lie in RAM or on disk because they do not fit on the GPUs, and how fast a
sequence can then be decoded at most.

On the GPUs stay attention, shared experts, dense MLPs, norms, embeddings and the KV cache, and as
many routed experts as there is room for: the ones chosen most often, if their loads are known. MTP
layers stay away, as decoding without speculation does not read them. The bound is that of reading:
every byte that a token needs once, at the full bandwidth of where it lies, one place after another.
Real engines come near it and never pass it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from requant.convert.parallel import Parallel
from requant.convert.placement import Loads, layer_key
from requant.errors import RequantError
from requant.serving.hardware import Gpus

#: Bytes/s that a desktop with two channels of DDR5-5600 (89.6 GB/s) sustains when a CPU computes on
#: what it reads. Servers have several times as much.
RAM_BANDWIDTH = 60e9
#: What large copies reach of a link's nominal bandwidth, and the link of a GPU that is not known
#: (PCIe 4.0, 16 lanes, one direction).
LINK_SHARE, LINK_BANDWIDTH = 0.8, 32e9
#: Bytes/s of large reads from an NVMe disk of PCIe 4.0.
DISK_BANDWIDTH = 5e9
#: RAM that the system and the engine take for themselves.
RAM_RESERVE = 4 * 10**9


@dataclass(frozen=True)
class Experts:
    """Routed experts of the main model: their number in each layer by prefix, how many of them a
    token visits there, and the bytes of one, in the mean."""

    counts: Mapping[str, int]
    top_k: int
    nbytes: float

    @property
    def number(self) -> int:
        """Experts of all layers."""
        return sum(self.counts.values())

    def visits(self, loads: Loads | None) -> list[float]:
        """How often a token visits each expert, the most visited first.

        Raises RequantError for loads that are not those of these experts.
        """
        found: list[float] = []
        for prefix, count in self.counts.items():
            counts = [1.0] * count if loads is None else _counts(loads, prefix, count)
            total = sum(counts) or 1.0
            found += [min(1.0, self.top_k * each / total) for each in counts]
        return sorted(found, reverse=True)


@dataclass(frozen=True)
class Resident:
    """What every GPU holds beside routed experts: bytes that stay, and those that a token reads."""

    nbytes: int
    read: int


def offload(
    room: int,
    resident: Resident,
    experts: Experts,
    gpus: Gpus,
    parallel: Parallel,
    ram: int | None = None,
    loads: Loads | None = None,
) -> dict[str, Any]:
    """Where experts lie, what crosses the bus, and tokens/s of one sequence at most.

    `room`: bytes of a GPU for weights. `ram`: that of the machine; None for as much as it takes.
    Bandwidths that are not known bound nothing.
    """
    free = room - resident.nbytes
    if free < 0 or not experts.number:
        return {"possible": False, "missing_bytes": max(-free, 0)}
    visits = experts.visits(loads)
    each = int(free * parallel.expert_cut / experts.nbytes)
    hot = min(len(visits), each * (parallel.ranks // parallel.expert_cut))
    rest = len(visits) - hot
    warm = rest if ram is None else min(rest, int(max(0, ram - RAM_RESERVE) / experts.nbytes))
    shares = visits[:hot], visits[hot : hot + warm], visits[hot + warm :]
    on_gpu, in_ram, on_disk = (sum(share) * experts.nbytes for share in shares)
    link = (gpus.host_bandwidth or LINK_BANDWIDTH) * LINK_SHARE * parallel.ranks
    seconds = in_ram / max(RAM_BANDWIDTH, link) + on_disk / DISK_BANDWIDTH
    if gpus.bandwidth is not None:
        seconds += (resident.read + on_gpu / parallel.ranks) / gpus.bandwidth
    return {
        "possible": True,
        "gpu_experts": hot,
        "ram_experts": warm,
        "disk_experts": rest - warm,
        "expert_bytes": round(experts.nbytes),
        "hot_share": sum(shares[0]) / (sum(visits) or 1.0),
        "ram_bytes": round(warm * experts.nbytes),
        "disk_bytes": round((rest - warm) * experts.nbytes),
        "bus_bytes_per_token": round(in_ram + on_disk),
        "disk_bytes_per_token": round(on_disk),
        "ram_experts_run_on": "cpu" if RAM_BANDWIDTH >= link else "gpu",
        "tokens_per_second_bound": speed(seconds),
    }


def speed(seconds: float) -> float | None:
    """Tokens/s from the seconds of one; None where nothing bounds it."""
    return round(1 / seconds, 3) if seconds > 0 else None


def _counts(loads: Loads, prefix: str, count: int) -> list[float]:
    layer = layer_key(prefix)
    counts = loads[None] if None in loads else loads.get(layer)
    if counts is None or len(counts) != count:
        found = "no" if counts is None else len(counts)
        raise RequantError(
            f"expert loads: {found} counts for the {count} experts of {prefix}; give every layer "
            "with experts, or one list for all"
        )
    return list(counts)
