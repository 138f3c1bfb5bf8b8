"""What attention keeps of a sequence, from config.json alone: bytes of the KV cache, and the FLOPs
of attending to it.

Sources: transformers 5.23.0, models/{deepseek_v3,deepseek_v32,deepseek_v4,gpt_oss,qwen2,gemma3};
the sizes of MLA for a model that has none: arXiv 2405.04434, section 2.1.4.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from requant.convert.names import language_config

#: Keys of models whose layers keep a state, not keys: what they hold is not told here.
_STATEFUL = frozenset(
    "linear_attn_config full_attention_interval attn_layer_period mamba_d_state "
    "ssm_state_size".split()
)
#: Families that alternate, the first layer with a window, without saying so.
_ALTERNATING = frozenset({"gpt_oss", "gemma2"})
_TOP_K_KEYS = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k",
)  # fmt: skip
#: DeepSeek-V4's kinds of layers -> tokens that one compressed entry stands for, if not told.
_V4_RATIOS = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}


@dataclass(frozen=True)
class Keys:
    """What `layers` layers keep: an entry of `elements` numbers for every `stride` tokens.

    `window`: of so many last tokens only. `flops`: of one query, all heads, with one entry: scores,
    and the weighted sum of values. A query attends to `top` entries at most.
    """

    layers: int
    elements: int
    flops: int | None
    stride: int = 1
    window: int | None = None
    top: int | None = None

    def entries(self, tokens: int) -> int:
        """Entries a layer holds after so many tokens."""
        return (tokens if self.window is None else min(tokens, self.window)) // self.stride


def cache_bytes(config: Mapping[str, Any], tokens: int, element_bytes: float = 2.0) -> int | None:
    """Bytes that one sequence of `tokens` tokens takes in the cache of all layers of the main
    model; None where the config does not tell.

    Counts keys and values, or MLA's latent and rope key, the keys of an indexer, and what a sliding
    window still holds. Not the few unfinished entries of DeepSeek-V4's compressors, nor padding.
    """
    keys = cached_keys(config)
    if keys is None:
        return None
    elements = sum(k.layers * k.elements * k.entries(tokens) for k in keys)
    return math.ceil(Fraction(element_bytes) * elements)


def cache_bytes_per_token(config: Mapping[str, Any]) -> int | None:
    """Bytes in BF16 that each further token takes, once all windows are full."""
    keys = cached_keys(config)
    if keys is None:
        return None
    growth = (Fraction(k.layers * k.elements, k.stride) for k in keys if k.window is None)
    return math.ceil(2 * sum(growth))


def attention_flops(config: Mapping[str, Any], tokens: int) -> int | None:
    """FLOPs of one token's attention to `tokens` tokens, in all layers: scores, weighted sums, and
    an indexer's scores. MLA counts as it is computed in prefill, with keys and values of each head;
    a decoder that attends to the latent itself needs more."""
    keys = cached_keys(config)
    if keys is None or any(k.flops is None for k in keys):
        return None
    return sum(k.layers * (k.flops or 0) * min(k.entries(tokens), k.top or tokens) for k in keys)


def alternatives(config: Mapping[str, Any]) -> dict[str, int] | None:
    """Bytes of BF16 cache per token if all layers of the same model kept `mla`: one latent and rope
    key (its own, or of 4.5 heads' size as DeepSeek-V2 has them); `gqa-8`: keys and values of 8
    heads; `mha`: of every head. None where the config does not tell."""
    config = language_config(config)
    layers, heads = count(config, "num_hidden_layers"), count(config, "num_attention_heads")
    sizes = head_sizes(config)
    if layers is None or heads is None or sizes is None:
        return None
    pair = sum(sizes)
    own = _latent(config)
    latent = own if own is not None else sizes[0] * 9 // 2
    elements = {"mla": latent, "gqa-8": min(8, heads) * pair, "mha": heads * pair}
    return {name: layers * number * 2 for name, number in elements.items()}


def cached_keys(config: Mapping[str, Any]) -> tuple[Keys, ...] | None:
    """What each group of layers of the main model keeps; None where the config does not tell."""
    config = language_config(config)
    layers = count(config, "num_hidden_layers")
    if layers is None or _STATEFUL & {key for key in config if config[key] is not None}:
        return None
    if config.get("model_type") == "deepseek_v4":
        return _of_compressed(config, layers)
    if _latent(config) is not None:
        return _of_latent(config, layers)
    return _of_heads(config, layers)


def count(config: Mapping[str, Any], *keys: str) -> int | None:
    """The first of these keys that holds a number, of a size that something can have."""
    numbers = (config.get(key) for key in keys)
    return next((n for n in numbers if type(n) is int and 0 <= n < 1 << 40), None)


def top_k(config: Mapping[str, Any]) -> int | None:
    """Routed experts that a token visits in a layer; None where the config does not tell."""
    return count(language_config(config), *_TOP_K_KEYS)


def _latent(config: Mapping[str, Any]) -> int | None:
    """Numbers that MLA keeps of a token; None where there is no MLA."""
    latent, rope = count(config, "kv_lora_rank"), count(config, "qk_rope_head_dim")
    return None if not latent or rope is None else latent + rope


def head_sizes(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width of one head's key and of its value; None where the config does not tell."""
    config = language_config(config)
    nope, rope = count(config, "qk_nope_head_dim"), count(config, "qk_rope_head_dim")
    value = count(config, "v_head_dim")
    if _latent(config) is not None:
        if nope is None or rope is None or value is None:
            return None
        return nope + rope, value
    heads, hidden = count(config, "num_attention_heads"), count(config, "hidden_size")
    size = count(config, "head_dim") or (hidden // heads if hidden and heads else None)
    return None if size is None else (size, value or size)


def _of_latent(config: Mapping[str, Any], layers: int) -> tuple[Keys, ...]:
    """MLA, and DeepSeek-V3.2's or GLM-5's indexer, which some of GLM's layers share."""
    heads, sizes = count(config, "num_attention_heads"), head_sizes(config)
    flops = 2 * heads * sum(sizes) if heads is not None and sizes is not None else None
    top, width = count(config, "index_topk"), count(config, "index_head_dim")
    keys = Keys(layers, _latent(config) or 0, flops, top=top)
    if not width:
        return (keys,)
    kinds = config.get("indexer_types")
    indexed = kinds[:layers].count("full") if isinstance(kinds, list) else layers
    index_heads = count(config, "index_n_heads")
    scores = 2 * index_heads * width if index_heads is not None else None
    return keys, Keys(indexed, width, scores)


def _of_heads(config: Mapping[str, Any], layers: int) -> tuple[Keys, ...] | None:
    """Keys and values of every KV head, in some layers of the last tokens only."""
    heads, sizes = count(config, "num_attention_heads"), head_sizes(config)
    kv_heads = count(config, "num_key_value_heads", "num_attention_heads")
    windows = _windows(config, layers)
    if kv_heads is None or sizes is None or windows is None:
        return None
    flops = 2 * heads * sum(sizes) if heads is not None else None
    return tuple(
        Keys(number, kv_heads * sum(sizes), flops, window=window)
        for window, number in windows.items()
    )


def _windows(config: Mapping[str, Any], layers: int) -> dict[int | None, int] | None:
    """Number of layers by their window, None for all tokens; None for kinds not known here."""
    sizes = {
        "full_attention": None,
        "sliding_attention": count(config, "sliding_window"),
        "chunked_attention": count(config, "attention_chunk_size"),
    }
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        found = Counter(kind for kind in kinds[:layers] if isinstance(kind, str))
        windowless = [kind for kind in found if sizes.get(kind) is None]
        if sum(found.values()) != layers or windowless not in ([], ["full_attention"]):
            return None
        return {sizes[kind]: number for kind, number in found.items()}
    window = sizes["sliding_attention"]
    family = str(config.get("model_type"))
    if not window or not config.get("use_sliding_window", not family.startswith("qwen")):
        return {None: layers}
    pattern = 2 if family in _ALTERNATING else count(config, "sliding_window_pattern")
    full = layers // pattern if pattern else 0
    if family.startswith("qwen"):  # the first max_window_layers have none
        full = min(layers, count(config, "max_window_layers") or 0)
    return {size: n for size, n in ((None, full), (window, layers - full)) if n}


def _of_compressed(config: Mapping[str, Any], layers: int) -> tuple[Keys, ...] | None:
    """DeepSeek-V4: one head of keys that are values too, of the last tokens, and an entry for every
    4 or 128 tokens; where it is 4, an indexer of its own chooses among them."""
    ratios = _ratios(config)
    names = "num_attention_heads head_dim sliding_window index_topk index_n_heads index_head_dim"
    sizes = [n for n in (count(config, name) for name in names.split()) if n is not None]
    if ratios is None or len(ratios) < layers or len(sizes) < len(names.split()):
        return None
    heads, width, window, top, index_heads, index_width = sizes
    flops = 4 * heads * width
    keys = [Keys(layers, width, flops, window=window)]
    for ratio, number in sorted(Counter(ratios[:layers]).items()):
        chosen = top if ratio == _V4_RATIOS["compressed_sparse_attention"] else None
        if ratio:
            keys.append(Keys(number, width, flops, ratio, top=chosen))
        if chosen is not None:
            keys.append(Keys(number, index_width, 2 * index_heads * index_width, ratio))
    return tuple(keys)


def _ratios(config: Mapping[str, Any]) -> list[int] | None:
    """Tokens of a compressed entry by layer, 0 for none: DeepSeek's list, or transformers' kinds of
    layers."""
    given = config.get("compress_ratios")
    if given is None and isinstance(kinds := config.get("layer_types"), list):
        rates = config.get("compress_rates")
        rates = _V4_RATIOS | (rates if isinstance(rates, dict) else {})
        given = [rates.get(kind) for kind in kinds if isinstance(kind, str)]
    if not isinstance(given, list) or any(type(r) is not int or r < 0 for r in given):
        return None
    return given
