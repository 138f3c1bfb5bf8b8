"""What a checkpoint is, from its headers and config alone: formats by role, sizes, parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from requant.convert.names import ROLES, TensorName, language_config
from requant.convert.source import Checkpoint
from requant.convert.weights import StoredWeight
from requant.output import size
from requant.quant import Codec, format_name

_TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")


def inspect(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe a checkpoint under the stable JSON keys of `requant inspect`.

    `tensors` counts weights, `bytes` all their stored parts. `parameters` are logical elements of
    the main model, without scales; `active_parameters` those that one token reads: top_k of each
    layer's routed experts, one row of the embedding (all of it where it is the output head too).
    What the config does not tell is None.
    """
    config = language_config(checkpoint.config)
    weights = list(checkpoint.weights.values())
    main = [weight for weight in weights if weight.role != "mtp"]
    experts = _experts(main)
    by_role = {role: [w for w in weights if w.role == role] for role in ROLES}
    quantization = checkpoint.quantization_config or {}
    return {
        "path": str(checkpoint.path),
        "model_type": _text(config.get("model_type")),
        "quantization": _text(quantization.get("quant_method")),
        "layers": _first(config, ["num_hidden_layers"]),
        "experts": max(experts.values(), default=0),
        "context_length": _first(config, ["max_position_embeddings"]),
        "parameters": sum(map(_elements, main)),
        "active_parameters": _active_parameters(main, experts, _first(config, _TOP_K_KEYS)),
        "mtp_parameters": sum(map(_elements, by_role["mtp"])),
        "kv_cache_bytes_per_token": _kv_cache_bytes(config),
        "total_bytes": checkpoint.nbytes,
        "files": len(checkpoint.files),
        "formats": _formats(weights),
        "roles": {
            role: {**_count(members), "formats": _formats(members)}
            for role, members in by_role.items()
            if members
        },
    }


def render(facts: Mapping[str, Any]) -> RenderableType:
    """What `inspect` found, for people."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("checkpoint", str(facts["path"]))
    table.add_row("model", _model_line(facts))
    table.add_row("parameters", _parameter_line(facts))
    context = facts["context_length"]
    table.add_row("context", "unknown" if context is None else f"{context} tokens")
    cache = facts["kv_cache_bytes_per_token"]
    table.add_row("KV cache", "unknown" if cache is None else f"{cache} bytes per token in BF16")
    method = facts["quantization"]
    declared = f"; config declares {method}" if method else "; config declares no quantization"
    table.add_row("stored", f"{size(facts['total_bytes'])} in {facts['files']} files{declared}")
    roles = Table("role", "format", box=None, pad_edge=False)
    roles.add_column("tensors", justify="right")
    roles.add_column("size", justify="right")
    rows = [
        (role, form, n) for role, r in facts["roles"].items() for form, n in r["formats"].items()
    ]
    for role, form, counts in rows:
        roles.add_row(role, form, str(counts["tensors"]), size(counts["bytes"]))
    return Group(table, "", roles)


def _model_line(facts: Mapping[str, Any]) -> str:
    layers = "unknown number of" if facts["layers"] is None else facts["layers"]
    experts = f", {facts['experts']} routed experts" if facts["experts"] else ""
    return f"{facts['model_type'] or 'unknown model_type'}, {layers} layers{experts}"


def _parameter_line(facts: Mapping[str, Any]) -> str:
    active = facts["active_parameters"]
    line = _amount(facts["parameters"])
    line += ", active unknown" if active is None else f", {_amount(active)} active per token"
    return (
        f"{line}, plus {_amount(facts['mtp_parameters'])} MTP" if facts["mtp_parameters"] else line
    )


def _amount(count: int) -> str:
    """A number of parameters for people."""
    for power, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= power:
            return f"{count / power:.2f} {unit}"
    return str(count)


def _first(config: Mapping[str, Any], keys: Iterable[str]) -> int | None:
    """The first of these keys that holds a number, of a size that something can have."""
    numbers = (config[k] for k in keys if isinstance(config.get(k), int))
    return next((n for n in numbers if 0 <= n < 1 << 40), None)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _elements(weight: StoredWeight) -> int:
    """Logical elements; lookup tables of integers are no parameters."""
    if weight.codec is None and weight.format.startswith(("I", "U", "BOOL")):
        return 0
    return math.prod(weight.shape)


def _experts_prefix(name: str) -> str | None:
    """`model.layers.3.mlp.experts` for a routed expert's tensor, per-expert or fused."""
    components = TensorName.parse(name).module.split(".")
    if "experts" not in components:
        return None
    return ".".join(components[: components.index("experts") + 1])


def _experts(weights: Iterable[StoredWeight]) -> dict[str, int]:
    """Number of routed experts of each layer that has some, from tensor names.

    Fused experts (one tensor of three dimensions a layer) are counted by its first dimension.
    """
    highest: dict[str, int] = {}
    for weight in weights:
        prefix = _experts_prefix(weight.name)
        if prefix is None:
            continue
        expert = TensorName.parse(weight.name).expert
        if expert is not None:
            highest[prefix] = max(highest.get(prefix, 0), expert + 1)
        elif len(weight.shape) == 3:
            highest[prefix] = max(highest.get(prefix, 0), weight.shape[0])
    return highest


def _active_parameters(
    weights: list[StoredWeight], experts: Mapping[str, int], top_k: int | None
) -> int | None:
    """Parameters that one token reads; None when there are experts and no top_k."""
    if experts and top_k is None:
        return None
    tied = all(weight.role != "lm_head" for weight in weights)
    routed = dict.fromkeys(experts, 0)
    active = 0
    for weight in weights:
        prefix = _experts_prefix(weight.name)
        if prefix is not None and prefix in routed:
            routed[prefix] += _elements(weight)
        elif weight.role == "embedding" and not tied:
            active += weight.shape[1]
        else:
            active += _elements(weight)
    shares = (n * min(top_k or 0, experts[p]) // max(experts[p], 1) for p, n in routed.items())
    return active + sum(shares)


def _kv_cache_bytes(config: Mapping[str, Any]) -> int | None:
    """Bytes of BF16 KV cache per token.

    MLA keeps one latent and one rope key a layer, and DeepSeek-V3.2's indexer a key of its own.
    """
    layers = _first(config, ["num_hidden_layers"])
    latent, rope = (_first(config, [k]) for k in ("kv_lora_rank", "qk_rope_head_dim"))
    if layers is None:
        return None
    if latent is not None and rope is not None:
        return (latent + rope + (_first(config, ["index_head_dim"]) or 0)) * layers * 2
    heads = _first(config, ["num_attention_heads"])
    kv_heads = _first(config, ["num_key_value_heads", "num_attention_heads"])
    hidden = _first(config, ["hidden_size"])
    head_dim = _first(config, ["head_dim"]) or (hidden // heads if hidden and heads else None)
    if kv_heads is None or head_dim is None:
        return None
    return 2 * kv_heads * head_dim * layers * 2


def _count(weights: list[StoredWeight]) -> dict[str, int]:
    return {"tensors": len(weights), "bytes": sum(weight.nbytes for weight in weights)}


def _formats(weights: Iterable[StoredWeight]) -> dict[str, dict[str, int]]:
    """Tensors and bytes by format; a tensor that is no matrix counts under its dtype's format."""
    by_codec: dict[Codec | str, list[StoredWeight]] = {}
    for weight in weights:
        by_codec.setdefault(weight.codec or weight.format, []).append(weight)
    groups: dict[str, list[StoredWeight]] = {}
    for key, members in by_codec.items():
        name = key if isinstance(key, str) else format_name(key)
        groups.setdefault(name, []).extend(members)
    counts = {name: _count(members) for name, members in groups.items()}
    return dict(sorted(counts.items(), key=lambda item: (-item[1]["bytes"], item[0])))
