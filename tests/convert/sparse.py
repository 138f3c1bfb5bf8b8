"""Checkpoints that are headers only: files of the right size with nothing written in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from requant.convert.header import layout
from requant.convert.source import Checkpoint
from requant.quant import Codec, TensorSpec, parse_format

Specs = dict[str, TensorSpec]

#: DeepSeek-V3's config.json, as far as shapes and DeepSeek's own config go.
V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
#: DeepSeek-V2-Lite: queries are not compressed.
V2_LITE = V3 | {
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "routed_scaling_factor": 1.0,
    "q_lora_rank": None,
    "rope_scaling": V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
FP8, BF16 = parse_format("fp8-block"), parse_format("bf16")


def plain(*shape: int, dtype: str = "BF16") -> TensorSpec:
    return TensorSpec(dtype, shape)


def write_sparse(folder: Path, config: Mapping[str, Any], specs: Specs) -> Checkpoint:
    """Write one file of these tensors and open it."""
    folder.mkdir(parents=True)
    header, ranges = layout(specs)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(max(end for _, end in ranges.values()))
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(folder)


def linear(module: str, rows: int, cols: int, codec: Codec) -> Specs:
    return {f"{module}.{part}": spec for part, spec in codec.specs(rows, cols).items()}


def deepseek(config: Mapping[str, Any], codec: Codec = FP8, indexer: bool = False) -> Specs:
    """All tensors of a DeepSeek-V2, V3 or V3.2."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    specs = {"model.embed_tokens.weight": plain(config["vocab_size"], hidden)}
    specs |= {"lm_head.weight": plain(config["vocab_size"], hidden)}
    specs |= {"model.norm.weight": plain(hidden)}
    main = config["num_hidden_layers"]
    for layer in range(main + config["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}"
        attention = {
            "kv_a_proj_with_mqa": (latent + rope, hidden),
            "kv_b_proj": (heads * (nope + value), latent),
            "o_proj": (hidden, heads * value),
        }
        if (rank := config["q_lora_rank"]) is None:
            attention["q_proj"] = heads * (nope + rope), hidden
        else:
            attention |= {"q_a_proj": (rank, hidden), "q_b_proj": (heads * (nope + rope), rank)}
            specs[f"{prefix}.self_attn.q_a_layernorm.weight"] = plain(rank)
        if indexer:
            attention |= {"indexer.wq_b": (64 * 128, rank), "indexer.wk": (128, hidden)}
            own = f"{prefix}.self_attn.indexer"
            specs[f"{own}.weights_proj.weight"] = plain(64, hidden)
            specs |= {f"{own}.k_norm.{part}": plain(128) for part in ("weight", "bias")}
        for leaf, shape in attention.items():
            specs |= linear(f"{prefix}.self_attn.{leaf}", *shape, codec)
        specs[f"{prefix}.self_attn.kv_a_layernorm.weight"] = plain(latent)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            specs[f"{prefix}.{norm}.weight"] = plain(hidden)
        specs |= dict(_mlps(config, prefix, layer, codec))
    for layer in range(main, main + config["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}"
        specs |= {f"{prefix}.{norm}.weight": plain(hidden) for norm in ("enorm", "hnorm")}
        specs[f"{prefix}.eh_proj.weight"] = plain(hidden, 2 * hidden)
        specs[f"{prefix}.shared_head.norm.weight"] = plain(hidden)
        for leaf in ("shared_head.head", "embed_tokens"):
            specs[f"{prefix}.{leaf}.weight"] = plain(config["vocab_size"], hidden)
    return specs


def _mlps(
    config: Mapping[str, Any], prefix: str, layer: int, codec: Codec
) -> Iterator[tuple[str, TensorSpec]]:
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    experts = config["n_routed_experts"]
    mlps = {f"{prefix}.mlp": config["intermediate_size"]}
    if layer >= config["first_k_dense_replace"]:
        yield f"{prefix}.mlp.gate.weight", plain(experts, hidden)
        if config["scoring_func"] == "sigmoid":
            yield f"{prefix}.mlp.gate.e_score_correction_bias", plain(experts, dtype="F32")
        mlps = {f"{prefix}.mlp.shared_experts": inner * config["n_shared_experts"]}
        mlps |= {f"{prefix}.mlp.experts.{expert}": inner for expert in range(experts)}
    for mlp, width in mlps.items():
        for leaf, rows, cols in (
            ("gate_proj", width, hidden),
            ("up_proj", width, hidden),
            ("down_proj", hidden, width),
        ):
            yield from linear(f"{mlp}.{leaf}", rows, cols, codec).items()
