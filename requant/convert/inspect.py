"""What a checkpoint is, from its headers and config alone: formats by role, sizes, parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from requant.convert.documents import license_of, tokenizer_of
from requant.convert.kv_cache import (
    alternatives,
    attention_flops,
    cache_bytes,
    cache_bytes_per_token,
    count,
    top_k,
)
from requant.convert.names import ROLES, TensorName, is_index, language_config
from requant.convert.parameters import count_parameters, elements
from requant.convert.source import Checkpoint
from requant.convert.weights import StoredWeight


def inspect(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe a checkpoint under the stable JSON keys of `requant inspect`.

    `tensors` counts weights, `bytes` all their stored parts, `parameters` logical elements without
    scales. What the config does not tell is None.

    | key | |
    |---|---|
    | parameters, active_parameters | of the main model; of one token: top_k of each layer's \
routed experts, one row of the embedding (all of it where it is the output head too) |
    | mtp_layers, mtp_parameters | multi-token prediction, with its copies of embedding and head |
    | context_length, vocabulary_size, layers, experts | as config.json and names tell |
    | kv_cache_bytes_per_token | BF16 cache that a further token takes once all windows are full |
    | kv_cache_bytes_full_context | of one sequence of context_length tokens |
    | kv_cache_alternatives | {mla, gqa-8, mha}: bytes per token if the model had that attention |
    | flops_per_token | 2 for every parameter that is multiplied: no attention scores yet |
    | flops_per_token_full_context | with those of attending to context_length tokens |
    | tokenizer, license | {kind, file}; from README.md's front matter, or LICENSE's first line |
    """
    config = language_config(checkpoint.config)
    weights = list(checkpoint.weights.values())
    by_role = {role: [w for w in weights if w.role == role] for role in ROLES}
    main = (weight for weight in weights if weight.role != "mtp")
    parameters = count_parameters(main, top_k(config))
    quantization = checkpoint.quantization_config or {}
    context = count(config, "max_position_embeddings")
    flops = None if parameters.multiplied is None else 2 * parameters.multiplied
    attention = None if context is None else attention_flops(config, context)
    return {
        "path": checkpoint.folder.label,
        "model_type": _text(config.get("model_type")),
        "quantization": _text(quantization.get("quant_method")),
        "layers": count(config, "num_hidden_layers"),
        "experts": parameters.experts,
        "context_length": context,
        "vocabulary_size": count(config, "vocab_size"),
        "parameters": parameters.total,
        "active_parameters": parameters.active,
        "mtp_layers": _mtp_layers(by_role["mtp"]),
        "mtp_parameters": sum(map(elements, by_role["mtp"])),
        "flops_per_token": flops,
        "flops_per_token_full_context": (
            None if flops is None or attention is None else flops + attention
        ),
        "kv_cache_bytes_per_token": cache_bytes_per_token(config),
        "kv_cache_bytes_full_context": None if context is None else cache_bytes(config, context),
        "kv_cache_alternatives": alternatives(config),
        "total_bytes": checkpoint.nbytes,
        "files": len(checkpoint.files),
        "tokenizer": tokenizer_of(checkpoint.path),
        "license": license_of(checkpoint.path),
        "formats": _formats(weights),
        "roles": {
            role: {
                **_count(members),
                "parameters": sum(map(elements, members)),
                "formats": _formats(members),
            }
            for role, members in by_role.items()
            if members
        },
    }


def _mtp_layers(weights: list[StoredWeight]) -> int:
    """Layers of multi-token prediction, by number: `model.layers.61`, `mtp.0` or `mtp.layers.0`."""
    numbers = set[int]()
    for weight in weights:
        layer = TensorName.parse(weight.name).layer
        after = weight.module.partition("mtp.")[2].partition(".")[0]
        if layer is None and is_index(after):
            layer = int(after)
        numbers |= set() if layer is None else {layer}
    return len(numbers) or min(len(weights), 1)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _count(weights: list[StoredWeight]) -> dict[str, int]:
    return {"tensors": len(weights), "bytes": sum(weight.nbytes for weight in weights)}


def _formats(weights: Iterable[StoredWeight]) -> dict[str, dict[str, int]]:
    """Tensors and bytes by format; a tensor that is no matrix counts under its dtype's format."""
    groups: dict[str, list[StoredWeight]] = {}
    for weight in weights:
        groups.setdefault(weight.format, []).append(weight)
    counts = {name: _count(members) for name, members in groups.items()}
    return dict(sorted(counts.items(), key=lambda item: (-item[1]["bytes"], item[0])))
