"""What converting costs: bytes read and written, room on disk, memory, and an estimate of the time.

The time is estimated from a probe: one step of the weights that most of the work is on, read,
decoded and encoded on this machine.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from requant.convert.budget import needed_bytes, usual_windows, usual_workers
from requant.convert.claim import bytes_beside
from requant.convert.forms import PlannedWeight
from requant.convert.plan import Plan
from requant.convert.steps import Steps

#: Bytes/s that an NVMe-class disk reads and writes past the page cache at the same time, together:
#: 4.1 GB read and 7.8 GB written took 6 to 8 s on a virtual machine with one.
DISK_BANDWIDTH = 1.6e9
#: Bytes hashed to find out how fast this machine does it.
_HASH_BYTES = 16 << 20


def conversion_cost(plan: Plan, probe: bool = True) -> dict[str, Any]:
    """Cost of a plan under stable keys; `estimated_seconds` None without a probe.

    `output_disk_bytes` are what OUT takes in the end, `peak_disk_bytes` that and the source, which
    is never changed: bytes are not there twice at any time.
    """
    workers = usual_workers()
    output = plan.written_bytes + bytes_beside(plan)
    source = sum(facts.nbytes for facts in plan.source.facts.values())
    return {
        "read_bytes": plan.read_bytes,
        "written_bytes": plan.written_bytes,
        "output_disk_bytes": output,
        "peak_disk_bytes": output + source,
        "ram_bytes": needed_bytes(plan, workers, usual_windows(plan)),
        "workers": workers,
        "estimated_seconds": round(_seconds(plan, workers), 1) if probe else None,
    }


def _seconds(plan: Plan, workers: int) -> float:
    """Disk, or computing and hashing on all cores, whichever takes longer."""
    moved = plan.read_bytes + plan.written_bytes
    hashing = moved / _hash_rate()
    computing = _computing_seconds(plan)
    return max(moved / DISK_BANDWIDTH, (computing + hashing) / workers)


def _computing_seconds(plan: Plan) -> float:
    """Of one core, at the speed of the kind of weight that most elements are of."""
    elements: Counter[tuple[object, ...]] = Counter()
    examples: dict[tuple[object, ...], PlannedWeight] = {}
    for weight in plan.weights:
        if weight.codec is not None:
            rows, cols = weight.source.shape
            kind = weight.source.codec, weight.codec, weight.repack, rows, cols
            elements[kind] += rows * cols
            examples.setdefault(kind, weight)
    if not elements:
        return 0.0
    (most, _), *_ = elements.most_common(1)
    weight = examples[most]
    with ThreadPoolExecutor(1) as pool:
        step = next(Steps(plan.source, torch.device("cpu"), pool).of([weight]))
        step()  # the first is slower: memory is touched, tables are made
        started = time.perf_counter()
        done = step()
        seconds = time.perf_counter() - started
    share = done.read_bytes / weight.source.nbytes
    rows, cols = weight.source.shape
    return seconds / (share * rows * cols) * elements.total()


def _hash_rate() -> float:
    """SHA-256 of this machine in bytes/s; every byte read and written is hashed."""
    data = bytes(_HASH_BYTES)
    started = time.perf_counter()
    hashlib.sha256(data)
    return _HASH_BYTES / (time.perf_counter() - started)
