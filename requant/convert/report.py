"""How plans, formats and recipes look on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from requant.output import size


def plan_table(summary: Mapping[str, Any]) -> RenderableType:
    """What a plan would do, or, with `seconds` in it, what a conversion did."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("source", str(summary["source"]))
    if "output" in summary:
        table.add_row("output", str(summary["output"]))
    table.add_row("recipe", f"{summary['recipe']} ({summary['format']})")
    table.add_row(
        "tensors",
        f"{summary['tensors']}: {summary['requantized_tensors']} requantized, "
        f"{summary['lossless_tensors']} lossless, {summary['identical_tensors']} bit-identical",
    )
    table.add_row("", ", ".join(f"{n} {name}" for name, n in summary["formats"].items()))
    table.add_row("read", size(summary["read_bytes"]))
    table.add_row("written", f"{size(summary['written_bytes'])} in {summary['files']} files")
    if "ranks" in summary:
        _add_ranks(table, summary["ranks"])
    if "seconds" in summary:
        resumed = summary["resumed_files"]
        again = f", {resumed} of {summary['files']} files were finished before" if resumed else ""
        table.add_row("time", f"{summary['seconds']:.1f} s{again}")
        table.add_row("peak memory", size(summary["peak_rss_bytes"]))
    notices = [
        *_reasons(summary["not_lossless"]),
        *map(Text, summary["engine_notes"]),
        *map(Text, summary.get("ranks", {}).get("engine_notes", [])),
        *_notice("left out, as they belong to the old format", summary["dropped_tensors"]),
        *_notice("copied as they are, role unknown", summary["unknown_tensors"]),
        *_notice("not converted, because the index does not name them", summary["ignored_files"]),
    ]
    return Group(table, *notices) if notices else table


def _add_ranks(table: Table, ranks: Mapping[str, Any]) -> None:
    """How a checkpoint is spread: bytes a rank, by role, and what is on all of them."""
    least, most = size(ranks["min_rank_bytes"]), size(ranks["max_rank_bytes"])
    table.add_row(
        "ranks", f"{ranks['ranks']}: tp={ranks['tp']} ep={ranks['ep']} pp={ranks['pp']}, "
        f"{least} to {most} each, {size(ranks['replicated_bytes'])} of all in copies"
    )  # fmt: skip
    largest = ranks["rank_bytes"].index(ranks["max_rank_bytes"])
    roles = sorted(ranks["rank_role_bytes"][largest].items(), key=lambda item: -item[1])
    table.add_row("", f"rank {largest}: " + ", ".join(f"{n} {size(b)}" for n, b in roles))
    if ranks["replicated_bytes"]:
        leaves = {name.split(".")[-2] for name in ranks["replicated_tensors"]}
        table.add_row("", f"on several ranks: {', '.join(sorted(leaves))}")


def _notice(what: str, names: Sequence[str]) -> list[Text]:
    """One line about some names, the first five of them written out; none for none."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [Text(f"{what}: {', '.join(names[:5])}{more}")] if names else []


def _reasons(refused: Sequence[Mapping[str, str]]) -> list[Text]:
    """One line a reason why codes of the same kind are requantized, with an example."""
    by_reason: dict[str, list[str]] = {}
    for entry in refused:
        by_reason.setdefault(entry["reason"], []).append(entry["tensor"])
    lines = []
    for reason, names in list(by_reason.items())[:5]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(Text(f"not lossless: {names[0]}{more}: {reason}"))
    if len(by_reason) > 5:
        lines.append(Text(f"not lossless for {len(by_reason) - 5} more reasons; see --json"))
    return lines


def formats_table(formats: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One row a format, with bits per weight; every one is read and written. Then the options."""
    table = Table("format", "bits", "what it is", "loaded by", "checked with")
    options = Table("format", "options and their defaults, e.g. int4[group_size=32]")
    for row in formats:
        about = row["summary"], row["loaded_by"], row["checked_against"]
        table.add_row(row["name"], f"{row['bits_per_weight']:.3f}", *about)
        if row["options"]:
            given = ", ".join(f"{k}={_text(v)}" for k, v in row["options"].items())
            options.add_row(row["name"], given)
    return Group(table, options)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def recipes_table(recipes: Sequence[Mapping[str, Any]]) -> Table:
    """One row a preset."""
    table = Table("recipe", "formats", "what it does")
    for row in recipes:
        table.add_row(row["name"], row["format"], row["description"])
    return table
