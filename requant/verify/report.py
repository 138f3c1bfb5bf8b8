"""How a verdict looks on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from requant.output import size


def render(verdict: Mapping[str, Any]) -> RenderableType:
    """Verify's document for people: numbers, layers, worst weights, problems; the verdict last."""
    parts: list[RenderableType] = [_summary(verdict)]
    if verdict["layers"]:
        parts += [Text(), _layers(verdict)]
    if verdict["ranks"]:
        parts += [Text(), _ranks(verdict)]
    if verdict["tensors"]["worst"]:
        parts += [Text(), _worst(verdict)]
    if verdict["problems"]:
        parts += [Text(), Text("problems")]
        parts += [Text(f"- {problem}", overflow="fold") for problem in verdict["problems"]]
    return Group(*parts, Text(), _verdict(verdict))


def _verdict(verdict: Mapping[str, Any]) -> Text:
    """One line that says it all."""
    word, style = ("PASS", "bold green") if verdict["ok"] else ("FAIL", "bold red")
    kl = verdict["kl"]
    if kl is None:
        measured = "KL was not measured"
    else:
        relation = "within" if kl <= verdict["max_kl"] else "over"
        measured = f"KL {kl:.3g} nats per token, {relation} the limit of {verdict['max_kl']:g}"
    count = len(verdict["problems"])
    problems = "" if not count else f"; {count} problem{'s' if count > 1 else ''}"
    return Text.assemble((word, style), f"  {measured}{problems}")


def _summary(verdict: Mapping[str, Any]) -> Table:
    table = _table("", "", header=False)
    table.add_row("source", str(verdict["source"]))
    table.add_row("output", f"{verdict['output']} ({verdict['format'] or 'cannot be opened'})")
    tensors = verdict["tensors"]
    table.add_row(
        "tensors",
        f"{tensors['checked']} compared, {tensors['identical']} bit-identical, "
        f"{tensors['exact']} stored differently with equal values",
    )
    if verdict["kl"] is not None:
        table.add_row("tokens", str(verdict["tokens"]))
        limit = f"{verdict['kl']:.3g} nats per token, limit {verdict['max_kl']:g}"
        table.add_row("KL", limit)
        table.add_row("top-1 agreement", _percent(verdict["top1_agreement"]))
        perplexities = (verdict["perplexity_source"], verdict["perplexity_output"])
        table.add_row("perplexity", "source {}, output {}".format(*map(_number, perplexities)))
    if verdict["mtp"] is not None:
        mtp = verdict["mtp"]
        agreement = _percent(mtp["top1_agreement"])
        table.add_row("MTP", f"KL {_number(mtp['kl'])}, top-1 agreement {agreement}")
    memory = size(verdict["peak_rss_bytes"])
    table.add_row("took", f"{verdict['seconds']:.1f} s, peak memory {memory}")
    return table


def _layers(verdict: Mapping[str, Any]) -> Table:
    table = _table("layer", "relative error")
    for layer in verdict["layers"]:
        name = f"{layer['layer']} (MTP)" if layer.get("mtp") else str(layer["layer"])
        table.add_row(name, _number(layer["relative_error"]))
    return table


def _ranks(verdict: Mapping[str, Any]) -> Table:
    table = _table("rank", "weights", "bit-identical", "wrong", "first in layer")
    for rank in verdict["ranks"]:
        first = "" if rank["first_layer"] is None else str(rank["first_layer"])
        counts = (str(rank[key]) for key in ("rank", "checked", "identical", "wrong"))
        table.add_row(*counts, first)
    return table


def _worst(verdict: Mapping[str, Any]) -> Table:
    table = _table("SQNR", "worst weights")
    for weight in verdict["tensors"]["worst"]:
        where = f" (rank {weight['rank']})" if "rank" in weight else ""
        table.add_row(f"{weight['sqnr_db']:.1f} dB", weight["name"] + where)
    return table


def _table(*columns: str, header: bool = True) -> Table:
    """A table without lines, so that it stays readable where it is piped to; names are whole."""
    table = Table(box=None, pad_edge=False, show_header=header)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.2f} %"


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4g}"
