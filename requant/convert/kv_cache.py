"""Bytes of KV cache, from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from requant.convert.names import language_config


def cache_bytes(config: Mapping[str, Any], tokens: int, element_bytes: float = 2.0) -> int | None:
    """Bytes of one sequence of `tokens` in all layers; None where the config does not tell.

    MLA keeps one latent and one rope key a layer, and DeepSeek-V3.2's indexer a key of its own.
    """
    config = language_config(config)

    def number(*keys: str) -> int:
        return next((config[k] for k in keys if isinstance(config.get(k), int)), 0)

    layers, latent = number("num_hidden_layers"), number("kv_lora_rank")
    heads = number("num_attention_heads")
    if latent:
        width = latent + number("qk_rope_head_dim") + number("index_head_dim")
    else:
        head_dim = number("head_dim") or (number("hidden_size") // heads if heads else 0)
        width = 2 * number("num_key_value_heads", "num_attention_heads") * head_dim
    return int(tokens * layers * width * element_bytes) if layers and width else None
