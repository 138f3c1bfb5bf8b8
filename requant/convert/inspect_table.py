"""What `inspect` found, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from requant.output import size

_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def render(facts: Mapping[str, Any]) -> RenderableType:
    """The facts in two tables: the model as a whole, and its tensors by role."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("checkpoint", str(facts["path"]))
    table.add_row("model", _model_line(facts))
    table.add_row("parameters", _parameter_line(facts))
    table.add_row("compute", _compute_line(facts))
    context = facts["context_length"]
    table.add_row("context", "unknown" if context is None else f"{context} tokens")
    table.add_row("KV cache", _cache_line(facts))
    if (other := _alternatives_line(facts)) is not None:
        table.add_row("", other)
    table.add_row("tokenizer", _tokenizer_line(facts))
    table.add_row("license", facts["license"] or "unknown")
    method = facts["quantization"]
    declared = f"; config declares {method}" if method else "; config declares no quantization"
    table.add_row("stored", f"{size(facts['total_bytes'])} in {facts['files']} files{declared}")
    roles = Table("role", "format", box=None, pad_edge=False)
    for column in ("tensors", "size", "of all"):
        roles.add_column(column, justify="right")
    whole = max(facts["total_bytes"], 1)
    for role, counted in facts["roles"].items():
        for form, counts in counted["formats"].items():
            share = f"{100 * counts['bytes'] / whole:.1f} %"
            roles.add_row(role, form, str(counts["tensors"]), size(counts["bytes"]), share)
    return Group(table, "", roles)


def _model_line(facts: Mapping[str, Any]) -> str:
    layers = "unknown number of" if facts["layers"] is None else facts["layers"]
    experts = f", {facts['experts']} routed experts" if facts["experts"] else ""
    return f"{facts['model_type'] or 'unknown model_type'}, {layers} layers{experts}"


def _parameter_line(facts: Mapping[str, Any]) -> str:
    active = facts["active_parameters"]
    line = _amount(facts["parameters"])
    line += ", active unknown" if active is None else f", {_amount(active)} active per token"
    if not facts["mtp_parameters"]:
        return line
    layers = facts["mtp_layers"]
    more = f" in {layers} layers" if layers > 1 else ""
    return f"{line}, plus {_amount(facts['mtp_parameters'])} MTP{more}"


def _compute_line(facts: Mapping[str, Any]) -> str:
    flops, full = facts["flops_per_token"], facts["flops_per_token_full_context"]
    if flops is None:
        return "unknown"
    line = f"{_scaled(flops, 'FLOP')} per token"
    return line if full is None else f"{line}, {_scaled(full, 'FLOP')} at the end of the context"


def _cache_line(facts: Mapping[str, Any]) -> str:
    cache, full = facts["kv_cache_bytes_per_token"], facts["kv_cache_bytes_full_context"]
    if cache is None:
        return "unknown"
    line = f"{cache} bytes per token in BF16"
    return line if full is None else f"{line}, {size(full)} for the whole context"


def _alternatives_line(facts: Mapping[str, Any]) -> str | None:
    """The same model with other kinds of attention."""
    cache, others = facts["kv_cache_bytes_per_token"], facts["kv_cache_alternatives"]
    if not cache or not others:
        return None
    names = {"mla": "MLA", "gqa-8": "8 KV heads", "mha": "MHA"}
    if others["gqa-8"] == others["mha"]:  # eight heads or fewer
        del names["gqa-8"]
    lines = (
        f"{shown} {size(others[name])} ({others[name] / cache:.1f}x)"
        for name, shown in names.items()
        if others[name] != cache
    )
    return "compare: " + ", ".join(lines)


def _tokenizer_line(facts: Mapping[str, Any]) -> str:
    found, vocabulary = facts["tokenizer"], facts["vocabulary_size"]
    kind = "none in the folder" if found is None else f"{found['file']} ({found['kind']})"
    return kind if vocabulary is None else f"{kind}, vocabulary of {vocabulary}"


def _amount(number: int) -> str:
    """A number of parameters for people."""
    for power, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= power:
            return f"{number / power:.2f} {unit}"
    return str(number)


def _scaled(number: int, unit: str) -> str:
    """A number for people, in powers of 1000."""
    for power, prefix in _UNITS:
        if number >= power:
            return f"{number / power:.2f} {prefix}{unit}"
    return f"{number} {unit}"
