"""Checkpoints that are headers only: files of the right size with nothing written in them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from requant.convert.folder import CONFIG_NAME, INDEX_NAME
from requant.convert.header import layout
from requant.convert.source import Checkpoint
from requant.quant import Codec, TensorSpec, parse_format
from tests.convert.published import published_config

Specs = dict[str, TensorSpec]

#: DeepSeek-V3 and V2-Lite as published, without what says that V3 is FP8: tests give their own.
V3 = {k: v for k, v in published_config("DeepSeek-V3").items() if k != "quantization_config"}
V2_LITE = published_config("DeepSeek-V2-Lite")
FP8, BF16 = parse_format("fp8-block"), parse_format("bf16")


def plain(*shape: int, dtype: str = "BF16") -> TensorSpec:
    return TensorSpec(dtype, shape)


def write_sparse(
    folder: Path,
    config: Mapping[str, Any],
    specs: Specs,
    files: Sequence[str] = ("model.safetensors",),
) -> Checkpoint:
    """Write these tensors, in this order, to files of about the same size, and open the folder."""
    folder.mkdir(parents=True)
    share = sum(spec.nbytes for spec in specs.values()) / len(files)
    groups: dict[str, Specs] = {file: {} for file in files}
    done = 0
    for name, spec in specs.items():
        groups[files[min(int(done / share), len(files) - 1)]][name] = spec
        done += spec.nbytes
    for file, group in groups.items():
        header, ranges = layout(group)
        with (folder / file).open("wb") as stream:
            stream.write(header)
            stream.truncate(max(end for _, end in ranges.values()))
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    if len(files) > 1:
        places = {tensor: file for file, group in groups.items() for tensor in group}
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": places}))
    return Checkpoint.open(folder)


def linear(module: str, rows: int, cols: int, codec: Codec) -> Specs:
    return {f"{module}.{part}": spec for part, spec in _parts(codec, rows, cols).items()}


@functools.cache
def _parts(codec: Codec, rows: int, cols: int) -> Specs:
    return codec.specs(rows, cols)


def deepseek(config: Mapping[str, Any], codec: Codec = FP8, indexer: bool = False) -> Specs:
    """All tensors of a DeepSeek-V2, V3 or V3.2."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    specs = {"model.embed_tokens.weight": plain(config["vocab_size"], hidden)}
    specs |= {"lm_head.weight": plain(config["vocab_size"], hidden)}
    specs |= {"model.norm.weight": plain(hidden)}
    main = config["num_hidden_layers"]
    layers = main + config.get("num_nextn_predict_layers", 0)
    for layer in range(layers):
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
        specs |= mlps(config, prefix, layer, codec)
    for layer in range(main, layers):
        specs |= prediction_layer(f"model.layers.{layer}", hidden, config["vocab_size"])
    return specs


def prediction_layer(prefix: str, hidden: int, vocabulary: int | None) -> Specs:
    """What an MTP layer has beside an ordinary one; DeepSeek's have copies of embedding and head,
    of `vocabulary` rows."""
    norms = ("enorm", "hnorm", "shared_head.norm")
    specs = {f"{prefix}.{norm}.weight": plain(hidden) for norm in norms}
    specs[f"{prefix}.eh_proj.weight"] = plain(hidden, 2 * hidden)
    if vocabulary is not None:
        copies = ("shared_head.head", "embed_tokens")
        specs |= {f"{prefix}.{leaf}.weight": plain(vocabulary, hidden) for leaf in copies}
    return specs


def mlps(config: Mapping[str, Any], prefix: str, layer: int, codec: Codec) -> Specs:
    """The dense MLP, or router and experts, under DeepSeek's names, which others share."""
    hidden, specs = config["hidden_size"], dict[str, TensorSpec]()
    if layer < config["first_k_dense_replace"]:
        return mlp(f"{prefix}.mlp", hidden, config["intermediate_size"], codec)
    experts, inner = config["n_routed_experts"], config["moe_intermediate_size"]
    specs[f"{prefix}.mlp.gate.weight"] = plain(experts, hidden)
    if config["scoring_func"] == "sigmoid":
        specs[f"{prefix}.mlp.gate.e_score_correction_bias"] = plain(experts, dtype="F32")
    if shared := config["n_shared_experts"]:
        specs |= mlp(f"{prefix}.mlp.shared_experts", hidden, inner * shared, codec)
    for expert in range(experts):
        specs |= mlp(f"{prefix}.mlp.experts.{expert}", hidden, inner, codec)
    return specs


def mlp(module: str, hidden: int, width: int, codec: Codec) -> Specs:
    """Gate, up and down of one MLP."""
    return {
        **linear(f"{module}.gate_proj", width, hidden, codec),
        **linear(f"{module}.up_proj", width, hidden, codec),
        **linear(f"{module}.down_proj", hidden, width, codec),
    }
