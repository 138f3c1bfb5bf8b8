"""Which expert lies where: contiguous ranges, or balanced by how often each one was chosen.

A load file is JSON: `{"3": [counts of layer 3's experts], ...}` with every layer that has experts
(`"mtp.0"` for one that is numbered apart), or one list of counts for all layers.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from requant.convert.names import is_index
from requant.errors import CheckpointError, RequantError

#: Longest load file that is read.
MAX_LOAD_BYTES = 100_000_000

#: For every expert the groups that hold it, ascending.
Holders = tuple[tuple[int, ...], ...]
#: Counts by layer; by None where one list serves all layers.
Loads = Mapping[str | None, Sequence[float]]


def layer_key(prefix: str) -> str:
    """What a load file calls the layer of the experts under `prefix`."""
    components = prefix.split(".")
    number = next(filter(is_index, components), prefix)
    return f"mtp.{number}" if "mtp" in components else number


def read_loads(path: Path) -> Loads:
    """Read a load file. Raises CheckpointError saying what is wrong and where."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_LOAD_BYTES:
            raise CheckpointError(f"{path}: not a file of at most {MAX_LOAD_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; cannot read it") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    lists = {None: value} if isinstance(value, list) else value
    if not isinstance(lists, dict) or not lists:
        raise CheckpointError(
            f'{path}: expected a list of counts, or {{"3": [counts], ...}} by layer'
        )
    for layer, counts in lists.items():
        where = f"{path}: " + ("" if layer is None else f"layer {layer}: ")
        if not isinstance(counts, list) or not counts:
            raise CheckpointError(f"{where}expected a list of counts, one for each expert")
        for expert, count in enumerate(counts):
            number = isinstance(count, int | float) and not isinstance(count, bool)
            if not number or not 0 <= count < math.inf:
                raise CheckpointError(
                    f"{where}the count of expert {expert} is {count!r}, expected a number from 0"
                )
    return lists


def contiguous(experts: int, groups: int) -> Holders:
    """Equal ranges in order, as DeepSeek's loader assumes; `groups` divides `experts`."""
    return tuple((expert * groups // experts,) for expert in range(experts))


def place(
    experts: Mapping[str, int], groups: int, loads: Loads, redundant: int
) -> dict[str, Holders]:
    """Balanced placement of each layer's experts, of which `experts` tells the number by prefix.

    Raises RequantError for counts that are not those of these experts.
    """
    layers = {prefix: layer_key(prefix) for prefix in experts}
    if None not in loads:
        missing = [layer for layer in layers.values() if layer not in loads]
        unknown = [str(layer) for layer in loads if layer not in layers.values()]
        if missing or unknown:
            what = f"no counts for layer {missing[0]}" if missing else f"no layer {unknown[0]}"
            raise RequantError(
                f"expert loads: {what} ({len(missing)} layers are missing and {len(unknown)} have "
                "no experts here); give every layer with experts, or one list for all"
            )
    placed: dict[str, Holders] = {}
    for prefix, layer in layers.items():
        counts = loads[None] if None in loads else loads[layer]
        if len(counts) != experts[prefix]:
            raise RequantError(
                f"expert loads: {len(counts)} counts for the {experts[prefix]} experts of {prefix}"
            )
        placed[prefix] = balance(counts, groups, redundant)
    return placed


def balance(counts: Sequence[float], groups: int, redundant: int = 0) -> Holders:
    """As many experts in each group, the heaviest first into the least loaded group with room.

    The `redundant` heaviest lie in two groups and share their load. `groups` divides the experts
    with their copies. Ties go to the lower number.
    """
    order = sorted(range(len(counts)), key=lambda expert: (-counts[expert], expert))
    twice = set(order[:redundant])
    share = {e: counts[e] / 2 if e in twice else counts[e] for e in order}
    room = (len(counts) + redundant) // groups
    held: list[set[int]] = [set() for _ in range(groups)]
    with_room = [(0.0, 0, group) for group in range(groups)]  # a heap of load, experts, group

    def loaded(group: int) -> tuple[float, int, int]:
        return sum(share[expert] for expert in sorted(held[group])), len(held[group]), group

    for expert in sorted((*order, *twice), key=lambda expert: (-share[expert], expert)):
        changed = []
        if expert in held[with_room[0][2]]:  # the other copy
            changed.append(heapq.heappop(with_room)[2])
        if with_room:
            changed.append(heapq.heappop(with_room)[2])
        else:  # the only room is beside the other copy: an expert of another group moves there
            target = min((g for g in range(groups) if expert not in held[g]), key=loaded)
            moved = min(held[target] - held[changed[0]], key=lambda other: (share[other], other))
            held[target].remove(moved)
            held[changed[0]].add(moved)
            changed.append(target)
        held[changed[-1]].add(expert)
        for group in changed:
            if len(held[group]) < room:
                heapq.heappush(with_room, loaded(group))
    return tuple(
        tuple(g for g in range(groups) if expert in held[g]) for expert in range(len(counts))
    )
