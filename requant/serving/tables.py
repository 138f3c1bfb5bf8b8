"""How the serving report looks on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from requant.output import size


def render(report: Mapping[str, Any]) -> RenderableType:
    """What `serving_report` found, for people."""
    memory = Table("per GPU", box=None, pad_edge=False)
    memory.add_column("size", justify="right")
    for what, key in (
        ("weights", "weights_bytes"),
        ("KV cache", "kv_cache_bytes"),
        ("activations, estimated", "activation_bytes"),
        ("reserve", "reserve_bytes"),
        ("needed", "needed_bytes"),
        ("there", "gpu_bytes"),
    ):
        memory.add_row(what, size(report[key]))
    lines = [Text(report["note"])] if report["note"] else []
    return Group(
        _roles(report), "", memory, "", Text(verdict(report)), *lines, *_ways_out(report),
        *_running(report), Text(_cost(report["cost"])),
    )  # fmt: skip


def verdict(report: Mapping[str, Any]) -> str:
    """One sentence: fits or not, with both numbers."""
    how = f"tp={report['tp']} ep={report['ep']} pp={report['pp']}"
    served = f"context {report['context']}, batch {report['batch']}"
    needed, there = size(report["needed_bytes"]), size(report["gpu_bytes"])
    if not report["fits"]:
        return f"does not fit on {report['gpus']} ({how}, {served}): {needed} needed, {there} each"
    told = f"fits on {report['gpus']} ({how}, {served}): {needed} of {there} each"
    told += f"; up to context {report['max_context']} or batch {report['max_batch']}"
    bound = report["tokens_per_second_bound"]
    return told + (f"; at most {bound:.4g} tokens/s a sequence" if bound else "")


def _roles(report: Mapping[str, Any]) -> Table:
    """Bytes of what is written and of the fullest rank, by role."""
    table = Table("role", box=None, pad_edge=False)
    for column in ("written", "fullest GPU"):
        table.add_column(column, justify="right")
    held = report["rank_role_bytes"]
    for role, nbytes in sorted(report["role_bytes"].items(), key=lambda item: -item[1]):
        table.add_row(role, size(nbytes), size(held.get(role, 0)))
    return table


def _ways_out(report: Mapping[str, Any]) -> Iterator[Text]:
    for way in report["alternatives"]:
        if way["kind"] == "offload":
            yield Text(_offloaded(way))
            continue
        told = f"fits with {way['how']}: {size(way['needed_bytes'])} of {size(way['gpu_bytes'])}"
        if way["kind"] == "format":
            told += f", context up to {way['max_context']} ({', '.join(way['engines'])})"
        elif way["kind"] == "ranks":
            told += f" on each of {way['gpus']} GPUs (tp={way['tp']} ep={way['ep']})"
        yield Text(told)
    offloaded = report["offload"]
    kinds = {way["kind"] for way in report["alternatives"]}
    if offloaded is not None and offloaded["possible"] and "offload" not in kinds:
        yield Text(_offloaded(offloaded))


def _offloaded(way: Mapping[str, Any]) -> str:
    bound = way["tokens_per_second_bound"]
    if not way["ram_experts"] + way["disk_experts"]:
        return "fits with MTP layers left off the GPUs: without speculative decoding"
    told = (
        f"fits with experts apart: {way['gpu_experts']} on the GPUs, {way['ram_experts']} in RAM "
        f"({size(way['ram_bytes'])})"
    )
    if way["disk_experts"]:
        told += f", {way['disk_experts']} on disk ({size(way['disk_bytes'])})"
    told += f"; {size(way['bus_bytes_per_token'])} a token from there"
    return told + (f", at most {bound:.3g} tokens/s" if bound else "")


def _running(report: Mapping[str, Any]) -> Iterator[Text]:
    engines = ", ".join(report["engines"]) or "no engine that is known"
    where = report["architecture"] or "Ampere, Ada, Hopper and Blackwell"
    yield Text(f"in these formats on {where}: {engines}")
    for name, by_engine in report["support"].items():
        yield Text(f"  {name}: " + ", ".join(f"{e} {how}" for e, how in by_engine.items()))


def _cost(cost: Mapping[str, Any]) -> str:
    told = f"converting reads {size(cost['read_bytes'])}, writes {size(cost['written_bytes'])}"
    told += f", takes {size(cost['ram_bytes'])} of memory"
    told += f" and {size(cost['peak_disk_bytes'])} of disk, source included"
    seconds = cost["estimated_seconds"]
    return told + ("" if seconds is None else f"; about {seconds:.0f} s (estimated)")
