"""The layout of DeepSeek's own inference code: names, files, and its config.

Sources: deepseek-ai/DeepSeek-V3 and DeepSeek-V3.2-Exp, inference/{convert,model,generate}.py and
the configs beside them; of DeepSeek-V4's, which is not published apart, the copy in supermy/ds4rs.
Every rank is one file `model{rank}-mp{ranks}.safetensors` without an index, loaded strictly: what
the model has no place for, the MTP layers, goes into `mtp{rank}-mp{ranks}.safetensors` beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from requant.convert.names import LINEAR_ROLES, is_mtp, setting
from requant.convert.parallel import Parallel
from requant.convert.ranks import Split, split
from requant.convert.source import Checkpoint
from requant.errors import CheckpointError, FormatError
from requant.quant import Codec, format_name, parse_format
from requant.quant.fp8_block import Fp8Block
from requant.quant.mxfp4 import Mxfp4
from requant.quant.plain import Plain

#: Module's leaf: Hugging Face -> DeepSeek. The second line is V3.2's, the third MTP's, which
#: convert.py leaves out.
_LEAVES: dict[str, str] = {
    "embed_tokens": "embed",
    "lm_head": "head",
    "norm": "norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "wq",
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
    "gate": "gate",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    **{name: name for name in ("wq_b", "wk", "k_norm", "weights_proj")},
    **{name: name for name in ("eh_proj", "enorm", "hnorm", "head")},
}
_BLOCKS = {"self_attn": "attn", "mlp": "ffn"}
_PARTS = {"weight": "weight", "weight_scale_inv": "scale"}
#: The only layers with a bias, and what Hugging Face calls it.
_BIASES = frozenset({("gate", "e_score_correction_bias"), ("k_norm", "bias")})

#: What DeepSeek's own names begin with.
_NATIVE_ROOTS = frozenset(
    "embed head norm layers mtp hc_head_fn hc_head_base hc_head_scale".split()
)

#: Modules whose leaves are the same in both: the indexer has a wq_b, the MTP layer a head.
_SAME_BELOW = frozenset({"indexer", "shared_head"})
_LEAVES_BACK = {new: old for old, new in reversed(_LEAVES.items())}
_BLOCKS_BACK = {new: old for old, new in _BLOCKS.items()}
_PARTS_BACK = {new: old for old, new in _PARTS.items()}

#: The width at which DeepSeek-V3's model.py gives the router a bias.
_WIDTH_WITH_BIAS = 7168

#: Key of model.py's ModelArgs -> key of config.json.
_V3_KEYS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "route_scale": "routed_scaling_factor",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
_V4_KEYS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_hash_layers": "num_hash_layers",
    "n_mtp_layers": "num_nextn_predict_layers",
    "n_heads": "num_attention_heads",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "score_func": "scoring_func",
    "route_scale": "routed_scaling_factor",
    "swiglu_limit": "swiglu_limit",
    "q_lora_rank": "q_lora_rank",
    "head_dim": "head_dim",
    "rope_head_dim": "qk_rope_head_dim",
    "norm_eps": "rms_norm_eps",
    "o_groups": "o_groups",
    "o_lora_rank": "o_lora_rank",
    "window_size": "sliding_window",
    "compress_ratios": "compress_ratios",
    "compress_rope_theta": "compress_rope_theta",
    "index_n_heads": "index_n_heads",
    "index_head_dim": "index_head_dim",
    "index_topk": "index_topk",
    "hc_mult": "hc_mult",
    "hc_sinkhorn_iters": "hc_sinkhorn_iters",
    "hc_eps": "hc_eps",
}
_INDEX_KEYS = ("index_n_heads", "index_head_dim", "index_topk")


def rename(name: str) -> str:
    """DeepSeek's name of a stored tensor; names that are DeepSeek's own already, as V4's are, stay.

    Raises FormatError for a tensor that its model has no name for.
    """
    if name.split(".")[0] in _NATIVE_ROOTS:
        return name
    blocks, leaf, part = _take_apart(name.removeprefix("model."))
    known = leaf in _LEAVES and (part in _PARTS or (leaf, part) in _BIASES)
    placed = name.startswith("model.") != (leaf == "lm_head")
    blocks = [_BLOCKS.get(block, block) for block in blocks]
    new = ".".join((*blocks, _LEAVES.get(leaf, leaf), _PARTS.get(part, "bias")))
    if not known or not placed or new.split(".")[0] not in _NATIVE_ROOTS:
        raise FormatError(
            f"{name}: DeepSeek's model has no such tensor, and its loader takes no other; use the "
            "layout hf"
        )
    return new


def original(name: str) -> str:
    """The inverse of `rename`, for a checkpoint that was not in DeepSeek's own names.

    Raises FormatError for a name that is not DeepSeek's.
    """
    blocks, leaf, part = _take_apart(name)
    if not _SAME_BELOW & set(blocks[-1:]):
        leaf = _LEAVES_BACK.get(leaf, leaf)
    part = dict(_BIASES).get(leaf, part) if part == "bias" else _PARTS_BACK.get(part, part)
    full = ".".join((*(_BLOCKS_BACK.get(block, block) for block in blocks), leaf, part))
    full = full if leaf == "lm_head" else f"model.{full}"
    try:
        same = rename(full) == name
    except FormatError:
        same = False
    if not same:
        raise FormatError(f"{name}: not a name of DeepSeek's layout")
    return full


def _take_apart(name: str) -> tuple[list[str], str, str]:
    """`layers.0.attn`, `wq`, `weight`."""
    *blocks, part = name.split(".")
    return blocks[:-1], blocks[-1] if blocks else "", part


def is_native(checkpoint: Checkpoint) -> bool:
    """Whether the names are DeepSeek's own already: V4."""
    return "embed.weight" in checkpoint.weights


def file_name(name: str, rank: int, ranks: int, config: Mapping[str, Any]) -> str:
    """The file that a rank's piece of a tensor goes into, by the name it has in the source.

    DeepSeek's V4 runs its MTP layers, with the main model's embedding and head.
    """
    beside = is_mtp(name, config)
    if beside and name.startswith("mtp."):
        beside = "emb" in name or name.endswith("head.weight")
    return f"{'mtp' if beside else 'model'}{rank}-mp{ranks}.safetensors"


def split_deepseek(checkpoint: Checkpoint, ranks: int) -> Split:
    """Spread a checkpoint as DeepSeek's convert.py does. Raises FormatError for one that its model
    cannot load, naming the conversion that would help, and for a number of ranks that is illegal.
    """
    _require_loadable(checkpoint)
    for weight in checkpoint.weights.values():
        for part in weight.parts.values():
            rename(part.name)
        if weight.activations:
            part = next(iter(weight.activations.values()))
            raise FormatError(f"{part.name}: DeepSeek's model has no such tensor; use layout hf")
    moe = any(weight.kind == "routed_expert" for weight in checkpoint.weights.values())
    try:
        return split(checkpoint, Parallel(ranks, ranks if moe else 1))
    except FormatError as error:
        raise FormatError(
            f"{error}. (The layout deepseek has tp = ep and one stage and replicates nothing more; "
            "all else needs the layout hf)"
        ) from error


def conversions(checkpoint: Checkpoint) -> dict[str, Codec]:
    """What must be converted before DeepSeek-V4's model can load it, as its convert.py does: wo_a
    decoded to BF16, and FP4 codes stored in the dtype F4."""
    needed: dict[str, Codec] = {}
    for name, weight in checkpoint.weights.items() if is_native(checkpoint) else ():
        leaf = weight.module.rpartition(".")[2]
        if leaf == "wo_a" and not isinstance(weight.codec, Plain):
            needed[name] = parse_format("bf16")
        elif isinstance(weight.codec, Mxfp4) and weight.codec.codes != "f4":
            needed[name] = replace(weight.codec, codes="f4")
    return needed


def _require_loadable(checkpoint: Checkpoint) -> None:
    """Raise FormatError for weights in a format that DeepSeek's model does not read: it has one for
    all linear layers, and V4 FP4 for the experts."""
    needed = conversions(checkpoint)
    for name, codec in needed.items():
        raise FormatError(
            f"{name}: is {checkpoint.weights[name].format}, and DeepSeek's model loads "
            f"{format_name(codec)}; so it is with {len(needed) - 1} more; convert these first, or "
            "use the layout hf"
        )
    native = is_native(checkpoint)
    formats: dict[type[Codec], str] = {}
    for name, weight in checkpoint.weights.items():
        if weight.codec is None or (weight.role == "mtp" and not native):
            continue
        reads = isinstance(weight.codec, Plain) and weight.codec.dtype == "BF16"
        linear = weight.kind in LINEAR_ROLES and not name.endswith(".wo_a.weight")
        if linear and not reads:
            reads = _reads(weight.codec)
        if not reads and weight.kind != "other":
            raise FormatError(
                f"{name}: is {weight.format}, which DeepSeek's model does not load; convert to "
                "fp8-block or bf16 first, or use the layout hf"
            )
        if linear and not isinstance(weight.codec, Mxfp4):
            formats.setdefault(type(weight.codec), name)
    if len(formats) > 1:
        first, second = list(formats.values())[:2]
        raise FormatError(
            f"{first} is {checkpoint.weights[first].format} and {second} "
            f"{checkpoint.weights[second].format}: DeepSeek's model has one format for all linear "
            "layers; convert to one of them first, or use the layout hf"
        )


def _reads(codec: Codec) -> bool:
    """Whether DeepSeek's model has a kernel for what is not BF16."""
    if isinstance(codec, Mxfp4):
        return codec.container == "deepseek-v4"
    if not isinstance(codec, Fp8Block) or codec.container not in ("deepseek", "deepseek-v4"):
        return False
    return (codec.block_rows, codec.block_cols) == (128, 128)


def engine_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The JSON that DeepSeek's generate.py takes with --config.

    Raises CheckpointError for a key that config.json lacks, FormatError for rotary settings that
    its model cannot express.
    """
    config = checkpoint.config
    linear = (w for w in checkpoint.weights.values() if w.kind in LINEAR_ROLES and w.role != "mtp")
    fp8 = [w.codec for w in linear if isinstance(w.codec, Fp8Block)]
    stored = checkpoint.quantization_config or {}
    made: dict[str, Any] = {}
    if is_native(checkpoint):
        made |= {key: _required(config, ours) for key, ours in _V4_KEYS.items()}
        fp4 = any(isinstance(w.codec, Mxfp4) for w in checkpoint.weights.values())
        scales = {"e8m0": "fp8"}.get(fp8[0].scale, "fp32") if fp8 else "fp32"
        made |= {"expert_dtype": "fp4" if fp4 else None, "scale_dtype": scales}
    else:
        made |= {key: _required(config, ours) for key, ours in _V3_KEYS.items()}
        made["q_lora_rank"] = setting(config, "q_lora_rank") or 0
        made["score_func"] = setting(config, "scoring_func") or (
            "softmax" if setting(config, "model_type") == "deepseek_v2" else "sigmoid"
        )
        if setting(config, "topk_method") != "greedy":
            made["n_expert_groups"] = setting(config, "n_group") or 1
            made["n_limited_groups"] = setting(config, "topk_group") or 1
        indexer = any(".indexer." in name for name in checkpoint.weights)
        made |= {key: _required(config, key) for key in _INDEX_KEYS if indexer}
    made |= {"dtype": "fp8" if fp8 else "bf16", **_rope(config, is_native(checkpoint))}
    if stored.get("scale_fmt") is not None:
        made["scale_fmt"] = stored["scale_fmt"]
    return made


def engine_notes(checkpoint: Checkpoint) -> list[str]:
    """Where DeepSeek's V3 code would compute something else than config.json says."""
    if is_native(checkpoint):
        return []
    notes = []
    config = checkpoint.config
    width = setting(config, "hidden_size")
    bias = any(weight.kind == "router_bias" for weight in checkpoint.weights.values())
    if bias != (width == _WIDTH_WITH_BIAS):
        notes.append(
            f"model.py gives the router a bias at width {_WIDTH_WITH_BIAS} only; this model has "
            f"{'one' if bias else 'none'} at {width}: change Gate there"
        )
    if setting(config, "rms_norm_eps") not in (None, 1e-6):
        notes.append(
            f"model.py norms with 1e-06, config.json says {setting(config, 'rms_norm_eps')}"
        )
    return notes


def _rope(config: Mapping[str, Any], native: bool) -> dict[str, Any]:
    """The rotary settings. The model rescales beyond original_seq_len, so that one without YaRN has
    all its length there (V4: 0), and it has one mscale."""
    nested = setting(config, "rope_parameters") or setting(config, "rope_scaling") or {}
    theta = nested if "rope_theta" in nested else config
    found = {"rope_theta": _required(theta, "rope_theta")}
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind == "default":
        if native:
            return {**found, "original_seq_len": 0}
        longest = _required(config, "max_position_embeddings")
        return {**found, "max_seq_len": longest, "original_seq_len": longest}
    if kind != "yarn":
        raise FormatError(f"rope_scaling of type {kind!r}: DeepSeek's model has YaRN only")
    found["original_seq_len"] = _required(nested, "original_max_position_embeddings")
    found["rope_factor"] = _required(nested, "factor")
    found |= {key: nested[key] for key in ("beta_fast", "beta_slow") if nested.get(key)}
    if native:
        return found
    all_dim = nested.get("mscale_all_dim") or 0
    if (nested.get("mscale") or 1) != (all_dim or 1):
        raise FormatError(
            f"rope_scaling has mscale {nested.get('mscale')} and mscale_all_dim {all_dim}: "
            "DeepSeek's model has one for both"
        )
    return {**found, "mscale": all_dim}


def _required(config: Mapping[str, Any], key: str) -> Any:
    value = setting(config, key)
    if value is None:
        raise CheckpointError(f"config.json: has no {key}; DeepSeek's code needs it")
    return value
