"""How much memory a conversion takes, and how widely it may work within a budget.

Memory is what Python, torch and the plan take, the windows of the source that are held, those of
the output that are being written, and what each worker computes on; nothing in it grows with the
model but the plan (its tensors' names) and, for formats that are written along the columns
(GPTQ, AWQ), the largest weight's codes.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch

from requant.convert import steps, writer
from requant.convert.plan import Plan
from requant.convert.processes import Team, local_processes
from requant.convert.readahead import UNHASHED, WINDOW_BYTES, WINDOWS, WINDOWS_TWICE, windows_of
from requant.convert.run import Runtime
from requant.errors import RequantError
from requant.memory import peak_bytes
from requant.output import size
from requant.quant import grid

#: More workers than this wait for the disk.
MAX_WORKERS = 16
#: The fewest windows of the source that still let reading and computing overlap, and the most that
#: are of use for a second look: enough to hold any expert.
MIN_WINDOWS, MAX_WINDOWS = 4, 32
#: Bytes of temporaries, at most, for every element of the tile that a worker computes on, if it is
#: decoded and if not, and of the pieces that wait to be written for every element of them.
TILE_BYTES, LEAN_BYTES, PIECE_BYTES = 40, 4, 4


def runtime(
    plan: Plan, device: torch.device, workers: int | None, ram: int | None, team: Team
) -> Runtime:
    """How to run a plan with at most `ram` bytes of memory in this process.

    Raises RequantError, saying what is needed, when it is too small.
    """
    wanted = workers or usual_workers()
    if ram is None:
        return Runtime(device, wanted, usual_windows(plan), team)
    sizes = _sizes(plan)
    most = MAX_WINDOWS if _looks_twice(plan) else WINDOWS
    for count in range(wanted, 0, -1) if workers is None else [wanted]:
        least = _needed(plan, sizes, count, MIN_WINDOWS)
        if least <= ram:
            windows = min(MIN_WINDOWS + (ram - least) // WINDOW_BYTES, most)
            return Runtime(device, count, windows, team)
    raise RequantError(
        f"--ram: {size(ram)} are too few, {size(least)} are needed with --workers {count} "
        f"({size(_now())} of them by Python, torch and Numba); give more"
    )


def usual_workers() -> int:
    """Tiles that are computed at a time unless told: the cores of this process's share."""
    return max(1, min(_cores() // local_processes(), MAX_WORKERS))


def usual_windows(plan: Plan) -> int:
    """Windows of the source that are held unless told."""
    return WINDOWS_TWICE if _looks_twice(plan) else WINDOWS


def needed_bytes(plan: Plan, workers: int, windows: int) -> int:
    """Memory of this process while it converts, in bytes, at most."""
    return _needed(plan, _sizes(plan), workers, windows)


class _Sizes(NamedTuple):
    """Bytes that the largest tile takes while it is computed, elements of the largest piece, bytes
    of what is written after the rest of its weight."""

    tile: int
    piece: int
    held: int


def _sizes(plan: Plan) -> _Sizes:
    tile = piece = held = 0
    for weight in plan.weights:
        if weight.codec is None:
            continue
        stored, codec = weight.source, weight.codec
        each = LEAN_BYTES if steps.is_lean(stored, codec) else TILE_BYTES
        tile = max(tile, each * steps.largest(weight, steps.tile_elements(stored, codec)))
        piece = max(piece, steps.largest(weight, steps.step_elements(stored, codec)))
        parts = weight.specs.items()
        held = max(held, sum(s.nbytes for p, s in parts if p != weight.streamed))
    return _Sizes(tile, piece, held)


def _looks_twice(plan: Plan) -> bool:
    return any(w.codec is not None and w.codec.two_pass and not w.repack for w in plan.weights)


def _needed(plan: Plan, sizes: _Sizes, workers: int, windows: int) -> int:
    files = max(len(stage.sources) for group in plan.groups for stage in group.stages)
    count, nbytes = windows_of(files, windows)
    reading = max(files, 1) * (count + UNHASHED + 1) * nbytes
    together = max(len(group.files) for group in plan.groups)
    writing = writer.WINDOW_BYTES + together * math.prod(writer.windows_of(together))
    computing = workers * sizes.tile + 2 * (workers + 1) * sizes.piece * PIECE_BYTES
    return _now() + reading + writing + computing + 2 * sizes.held


def _cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _now() -> int:
    """Memory of this process so far, with compiled loops at work: its peak, as the system does not
    give back all of it."""
    grid.amax(torch.zeros(1, 1))
    return peak_bytes()
