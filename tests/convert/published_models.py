"""Header-only copies of ten published models: their tensors' names, shapes and dtypes, made from
their config.json, in as many files as their repositories have.

Sources of names and shapes: transformers 5.23.0, models/*; for DeepSeek-V4-Flash a listing of its
headers (69,187 tensors, 159,609,485,896 bytes in 46 files). Where one file ends and the next begins
is ours: after an equal share of the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from requant.convert.source import Checkpoint
from requant.quant import Codec, parse_format
from tests.convert.published import published_config
from tests.convert.sparse import (
    BF16,
    FP8,
    Specs,
    deepseek,
    linear,
    mlp,
    mlps,
    plain,
    prediction_layer,
    write_sparse,
)

#: Model -> how its files are called, the number of the first and of the last.
FILES = {
    "DeepSeek-V2-Lite": ("model-{:05}-of-000004.safetensors", 1, 4),
    "DeepSeek-V3": ("model-{:05}-of-000163.safetensors", 1, 163),
    "DeepSeek-V3.2": ("model-{:05}-of-000163.safetensors", 1, 163),
    "DeepSeek-V4-Flash": ("model-{:05}-of-00046.safetensors", 1, 46),
    "Kimi-K2-Instruct": ("model-{}-of-61.safetensors", 1, 61),
    "GLM-4.6": ("model-{:05}-of-00092.safetensors", 1, 92),
    "Qwen3-235B-A22B": ("model-{:05}-of-00118.safetensors", 1, 118),
    "gpt-oss-120b": ("model-{:05}-of-00014.safetensors", 0, 14),
    "DeepSeek-R1-Distill-Llama-70B": ("model-{:05}-of-000017.safetensors", 1, 17),
    "DeepSeek-R1-Distill-Qwen-32B": ("model-{:05}-of-000008.safetensors", 1, 8),
}


def write_published(folder: Path, name: str) -> Checkpoint:
    """Write the headers of a published model, and open the folder."""
    config = published_config(name)
    pattern, first, last = FILES[name]
    files = [pattern.format(number) for number in range(first, last + 1)]
    return write_sparse(folder, config, published_tensors(config), files)


def published_tensors(config: Mapping[str, Any]) -> Specs:
    """Every stored tensor of a model of one of these families."""
    match config["model_type"]:
        case "deepseek_v2" | "deepseek_v3" | "deepseek_v32" | "kimi_k2":
            codec = FP8 if "quantization_config" in config else BF16
            return deepseek(config, codec, indexer="index_topk" in config)
        case "deepseek_v4":
            return _deepseek_v4(config)
        case "gpt_oss":
            return _gpt_oss(config)
        case "glm4_moe":
            return _grouped_query(config | {"scoring_func": "sigmoid"}, bias=True, qk_norm=True)
        case "qwen3_moe":
            moe = {"n_routed_experts": config["num_experts"], "n_shared_experts": 0,
                   "first_k_dense_replace": 0, "scoring_func": "softmax"}  # fmt: skip
            return _grouped_query(config | moe, bias=False, qk_norm=True)
        case family:  # llama, qwen2
            dense = {"first_k_dense_replace": config["num_hidden_layers"]}
            return _grouped_query(config | dense, bias=family == "qwen2", qk_norm=False)


def _grouped_query(config: Mapping[str, Any], bias: bool, qk_norm: bool) -> Specs:
    """Grouped-query attention, dense MLPs or DeepSeek's names of experts, all BF16."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    specs = _ends("model.embed_tokens", "lm_head", "model.norm", hidden, vocabulary)
    main = config["num_hidden_layers"]
    predicting = config.get("num_nextn_predict_layers", 0)
    for layer in range(main + predicting):
        prefix = f"model.layers.{layer}"
        specs |= _attention(config, f"{prefix}.self_attn", bias)
        if qk_norm:
            width = plain(config["head_dim"])
            specs |= {f"{prefix}.self_attn.{n}_norm.weight": width for n in "qk"}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            specs[f"{prefix}.{norm}.weight"] = plain(hidden)
        specs |= mlps(config, prefix, layer, BF16)
        if layer >= main:
            specs |= prediction_layer(prefix, hidden, None)
    return specs


def _ends(embedding: str, head: str, norm: str, hidden: int, vocabulary: int) -> Specs:
    table = plain(vocabulary, hidden)
    return {
        f"{embedding}.weight": table,
        f"{head}.weight": table,
        f"{norm}.weight": plain(hidden),
    }


def _attention(config: Mapping[str, Any], module: str, bias: bool) -> Specs:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    rows = {"q_proj": heads * size, **dict.fromkeys(("k_proj", "v_proj"), 0)}
    rows |= {leaf: config["num_key_value_heads"] * size for leaf in ("k_proj", "v_proj")}
    specs = linear(f"{module}.o_proj", hidden, heads * size, BF16)
    for leaf, width in rows.items():
        specs |= linear(f"{module}.{leaf}", width, hidden, BF16)
        if bias:
            specs[f"{module}.{leaf}.bias"] = plain(width)
    return specs


def _gpt_oss(config: Mapping[str, Any]) -> Specs:
    """Biases everywhere, attention sinks, and MXFP4 experts, fused and interleaved."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    experts = config["num_local_experts"]
    specs = _ends("model.embed_tokens", "lm_head", "model.norm", hidden, config["vocab_size"])
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        specs |= _attention(config, f"{prefix}.self_attn", bias=True)
        specs[f"{prefix}.self_attn.o_proj.bias"] = plain(hidden)
        specs[f"{prefix}.self_attn.sinks"] = plain(config["num_attention_heads"])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            specs[f"{prefix}.{norm}.weight"] = plain(hidden)
        specs |= linear(f"{prefix}.mlp.router", experts, hidden, BF16)
        specs[f"{prefix}.mlp.router.bias"] = plain(experts)
        for leaf, rows, cols in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            fused = f"{prefix}.mlp.experts.{leaf}"
            specs[f"{fused}_blocks"] = plain(experts, rows, cols // 32, 16, dtype="U8")
            specs[f"{fused}_scales"] = plain(experts, rows, cols // 32, dtype="U8")
            specs[f"{fused}_bias"] = plain(experts, rows)
    return specs


#: DeepSeek-V4's containers: FP8 with exponents for scales, and FP4 experts.
_V4_FP8 = parse_format("fp8-block[scale=e8m0,container=deepseek-v4]")
_V4_FP4 = parse_format("mxfp4[container=deepseek-v4]")


def _deepseek_v4(config: Mapping[str, Any]) -> Specs:
    """DeepSeek's own names: compressed attention, four residual streams, one MTP layer."""
    hidden, streams = config["hidden_size"], config["hc_mult"]
    specs = _ends("embed", "head", "norm", hidden, config["vocab_size"])
    specs |= _hyper_connections("hc_head", 1, streams, streams * hidden)
    for layer in range(config["num_hidden_layers"]):
        specs |= _v4_block(config, f"layers.{layer}", layer, config["compress_ratios"][layer])
    mtp = "mtp.0"
    specs |= _v4_block(config, mtp, config["num_hidden_layers"], 0)
    specs |= _hyper_connections(f"{mtp}.hc_head", 1, streams, streams * hidden)
    for leaf in ("e_proj", "h_proj"):
        specs |= linear(f"{mtp}.{leaf}", hidden, hidden, _V4_FP8)
    return specs | {f"{mtp}.{norm}.weight": plain(hidden) for norm in ("enorm", "hnorm", "norm")}


def _hyper_connections(name: str, scales: int, rows: int, cols: int) -> Specs:
    shapes = {"base": (rows,), "fn": (rows, cols), "scale": (scales,)}
    return {f"{name}_{part}": plain(*shape, dtype="F32") for part, shape in shapes.items()}


def _v4_block(config: Mapping[str, Any], prefix: str, layer: int, ratio: int) -> Specs:
    hidden, streams = config["hidden_size"], config["hc_mult"]
    heads, size = config["num_attention_heads"], config["head_dim"]
    rank, groups = config["q_lora_rank"], config["o_groups"]
    low = groups * config["o_lora_rank"]
    specs = {f"{prefix}.{norm}.weight": plain(hidden) for norm in ("attn_norm", "ffn_norm")}
    for part in ("hc_attn", "hc_ffn"):
        rows = streams * streams + 2 * streams
        specs |= _hyper_connections(f"{prefix}.{part}", 3, rows, streams * hidden)
    attention = f"{prefix}.attn"
    specs[f"{attention}.attn_sink"] = plain(heads, dtype="F32")
    specs |= {f"{attention}.{n}.weight": plain(w) for n, w in (("q_norm", rank), ("kv_norm", size))}
    for leaf, shape in {
        "wq_a": (rank, hidden),
        "wq_b": (heads * size, rank),
        "wkv": (size, hidden),
        "wo_a": (low, heads * size // groups),
        "wo_b": (hidden, low),
    }.items():
        specs |= linear(f"{attention}.{leaf}", *shape, _V4_FP8)
    if ratio:
        specs |= _compressor(f"{attention}.compressor", ratio, size, hidden)
    if ratio == 4:  # the layers that choose what they attend to
        indexer, width = f"{attention}.indexer", config["index_head_dim"]
        specs |= _compressor(f"{indexer}.compressor", ratio, width, hidden)
        specs |= linear(f"{indexer}.wq_b", config["index_n_heads"] * width, rank, _V4_FP8)
        specs |= linear(f"{indexer}.weights_proj", config["index_n_heads"], hidden, BF16)
    return specs | _v4_experts(config, f"{prefix}.ffn", layer < config["num_hash_layers"])


def _compressor(module: str, ratio: int, width: int, hidden: int) -> Specs:
    """Overlapping windows, of ratio 4, have keys and gates of both halves."""
    rows = 2 * width if ratio == 4 else width
    return {
        f"{module}.ape": plain(ratio, rows, dtype="F32"),
        f"{module}.norm.weight": plain(width),
        f"{module}.wgate.weight": plain(rows, hidden),
        f"{module}.wkv.weight": plain(rows, hidden),
    }


def _v4_experts(config: Mapping[str, Any], module: str, by_token: bool) -> Specs:
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    experts, top = config["n_routed_experts"], config["num_experts_per_tok"]
    specs = {f"{module}.gate.weight": plain(experts, hidden)}
    if by_token:
        specs[f"{module}.gate.tid2eid"] = plain(config["vocab_size"], top, dtype="I64")
    else:
        specs[f"{module}.gate.bias"] = plain(experts, dtype="F32")
    codecs = {f"{module}.shared_experts": _V4_FP8}
    codecs |= {f"{module}.experts.{expert}": _V4_FP4 for expert in range(experts)}
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for owner, codec in codecs.items():
        for name, spec in _own_mlp(hidden, inner, codec).items():
            leaf, _, part = name.partition(".")
            specs[f"{owner}.{names[leaf]}.{part}"] = spec
    return specs


def _own_mlp(hidden: int, inner: int, codec: Codec) -> Specs:
    return {name.removeprefix("."): spec for name, spec in mlp("", hidden, inner, codec).items()}
