"""Bytes of the KV cache, by hand and against what transformers holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from requant.convert.kv_cache import (
    alternatives,
    attention_flops,
    cache_bytes,
    cache_bytes_per_token,
    top_k,
)
from tests.convert.published import published_config

V3 = published_config("DeepSeek-V3")
V32 = published_config("DeepSeek-V3.2")
V4 = published_config("DeepSeek-V4-Flash")
GPT_OSS = published_config("gpt-oss-120b")
LLAMA = published_config("DeepSeek-R1-Distill-Llama-70B")
#: Eight layers, two KV heads of 16: 64 numbers a token and layer.
SMALL: dict[str, Any] = {
    "model_type": "mistral",
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
}


def test_latent_attention_by_hand() -> None:
    assert cache_bytes(V3, 1000) == 1000 * 61 * (512 + 64) * 2
    assert cache_bytes(V3, 1000, 1.0) == 1000 * 61 * 576
    assert cache_bytes(V3, 3, 656 / 576) == 3 * 61 * 656  # FlashMLA's FP8 entry of 656 bytes
    assert cache_bytes(V3, 0) == 0
    assert cache_bytes(V32, 1000) == 1000 * 61 * (576 + 128) * 2
    shared = {**V32, "indexer_types": ["full", "shared"] * 30 + ["full"]}
    assert cache_bytes(shared, 1) == (61 * 576 + 31 * 128) * 2


def test_a_window_stops_growing() -> None:
    one = 8 * (64 + 64) * 2  # 8 KV heads, a key and a value of 64
    assert cache_bytes(GPT_OSS, 100) == 36 * 100 * one
    assert cache_bytes(GPT_OSS, 5000) == 18 * 5000 * one + 18 * 128 * one
    assert cache_bytes_per_token(GPT_OSS) == 18 * one


def test_compressed_attention_by_hand() -> None:
    """V4: 128 tokens in 43 layers, every 4th in 21 with an indexer's key, every 128th in 20."""
    entries = 43 * 128 * 512 + 21 * (1000 // 4) * (512 + 128) + 20 * (1000 // 128) * 512
    assert cache_bytes(V4, 1000) == 2 * entries
    assert cache_bytes_per_token(V4) == 21 * 640 * 2 // 4 + 20 * 512 * 2 // 128
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention",
             128: "heavily_compressed_attention"}  # fmt: skip
    saved = {k: v for k, v in V4.items() if k != "compress_ratios"}
    saved["layer_types"] = [kinds[ratio] for ratio in V4["compress_ratios"][:43]]
    assert cache_bytes(saved, 1000) == 2 * entries
    assert cache_bytes({**V4, "compress_ratios": [4]}, 1) is None
    assert cache_bytes({k: v for k, v in V4.items() if k != "index_topk"}, 1) is None


@pytest.mark.parametrize(
    ("changes", "windowed"),
    [
        ({}, 0),
        ({"sliding_window": 10}, 8),
        ({"sliding_window": 10, "use_sliding_window": False}, 0),
        ({"sliding_window": 10, "model_type": "qwen2"}, 0),
        ({"sliding_window": 10, "model_type": "qwen2", "use_sliding_window": True,
          "max_window_layers": 5}, 3),
        ({"sliding_window": 10, "model_type": "gpt_oss"}, 4),
        ({"sliding_window": 10, "sliding_window_pattern": 6}, 7),
        ({"layer_types": ["full_attention"] * 6 + ["sliding_attention"] * 2,
          "sliding_window": 10}, 2),
        ({"layer_types": ["chunked_attention", "full_attention"] * 4,
          "attention_chunk_size": 10}, 4),
    ],
)  # fmt: skip
def test_which_layers_have_a_window(changes: dict[str, Any], windowed: int) -> None:
    config = SMALL | changes
    assert cache_bytes(config, 100) == 2 * 64 * ((8 - windowed) * 100 + windowed * 10)
    assert cache_bytes_per_token(config) == 2 * 64 * (8 - windowed)
    assert cache_bytes({"text_config": config}, 100) == cache_bytes(config, 100)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": None},
        {"num_hidden_layers": True},
        {"num_hidden_layers": -1},
        {"hidden_size": None},
        {"layer_types": ["full_attention"] * 7},
        {"layer_types": ["full_attention"] * 7 + ["linear_attention"]},
        {"layer_types": ["sliding_attention"] * 8},
        {"layer_types": [["sliding_attention"]] * 8, "sliding_window": 10},
        {"full_attention_interval": 4},
        {"model_type": "deepseek_v4"},
    ],
)
def test_what_the_config_does_not_tell_is_none(changes: dict[str, Any]) -> None:
    config = {k: v for k, v in (SMALL | changes).items() if v is not None}
    assert cache_bytes(config, 100) is None
    assert cache_bytes_per_token(config) is None
    assert attention_flops(config, 100) is None


def test_the_same_model_with_other_attention() -> None:
    assert alternatives(V3) == {"mla": 70_272, "gqa-8": 61 * 8 * 320 * 2, "mha": 61 * 128 * 640}
    assert alternatives(V32) == alternatives(V3)
    mla = 80 * (4 * 128 + 64) * 2  # a latent of four heads, a rope key of half a one
    assert alternatives(LLAMA) == {"mla": mla, "gqa-8": 327_680, "mha": 8 * 327_680}
    assert alternatives(SMALL) == {"mla": 8 * 72 * 2, "gqa-8": 8 * 4 * 64, "mha": 8 * 4 * 64}
    assert alternatives({**V3, "v_head_dim": None}) is None


def test_attention_by_hand() -> None:
    """Two FLOPs for each number of a key, and of a value, of each head and each token before."""
    assert attention_flops(V3, 1000) == 61 * 1000 * 128 * (192 + 128) * 2
    sparse = 2048 * 128 * (192 + 128) * 2 + 5000 * 64 * 128 * 2
    assert attention_flops(V32, 5000) == 61 * sparse
    both = 18 * 64 * (64 + 64) * 2
    assert attention_flops(GPT_OSS, 5000) == both * (5000 + 128)
    head = 64 * 512 * 4
    expected = 43 * 128 * head + 20 * (10_000 // 128) * head
    expected += 21 * (512 * head + 2500 * 64 * 128 * 2)
    assert attention_flops(V4, 10_000) == expected
    assert attention_flops({**V3, "v_head_dim": None}, 1) is None


def test_numbers_of_any_size() -> None:
    huge = SMALL | {"num_hidden_layers": (1 << 40) - 1, "num_key_value_heads": (1 << 40) - 1}
    found = cache_bytes(huge, 1 << 40)
    assert found == 2 * 2 * ((1 << 40) - 1) ** 2 * 16 << 40


#: Four layers of a few numbers each.
_TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_MLA = {**_EXPERTS, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}  # fmt: skip
_INDEXER = {"index_topk": 8, "index_head_dim": 8, "index_n_heads": 4}
_FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA | _INDEXER,
    "deepseek_v4": {**_EXPERTS, **_INDEXER, "num_key_value_heads": 1, "head_dim": 16,
                    "q_lora_rank": 8, "qk_rope_head_dim": 4, "compress_ratios": [0, 0, 4, 128],
                    "o_groups": 2, "o_lora_rank": 8, "num_hash_layers": 1, "hc_mult": 2,
                    "sliding_window": 16},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
                "sliding_window": 16},
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 16},
}  # fmt: skip


@pytest.mark.parametrize("family", _FAMILIES)
def test_transformers_holds_as_much(family: str) -> None:
    """But for the last token of a window, which transformers lets go one token earlier."""
    transformers = pytest.importorskip("transformers")
    config = {**_TINY, **_FAMILIES[family], "model_type": family}
    made = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(made).eval()
    with torch.no_grad():
        cache = model(torch.arange(160)[None] % 32, use_cache=True).past_key_values
    held = sum(numbers_held(layer) for layer in cache.layers)
    shorter = config | ({"sliding_window": 15} if "sliding_window" in config else {})
    assert cache_bytes(shorter, 160, 1.0) == held
    assert cache_bytes(made.to_dict(), 160) == cache_bytes(config, 160)


def numbers_held(layer: Any) -> int:
    """What a layer of transformers' cache holds: keys, values that are not the keys, those of an
    indexer, compressed ones."""
    kept = [layer.keys, getattr(layer, "indexer_keys", None)]
    kept += [] if torch.equal(layer.keys, layer.values) else [layer.values]
    kept += getattr(layer, "compressed_kv", {}).values()
    return sum(tensor.numel() for tensor in kept if tensor is not None)


@pytest.mark.parametrize("key", ["num_experts_per_tok", "experts_per_token", "moe_topk"])
def test_inspect_and_the_planner_read_the_same_top_k(key: str) -> None:
    assert top_k({key: 4}) == 4 == top_k({"text_config": {key: 4}, "hidden_size": 8})
    assert top_k({"hidden_size": 8}) is None
