"""DeepSeek's own layout: names, shapes and config as its inference code has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from requant.convert.deepseek import (
    conversions,
    engine_config,
    engine_notes,
    file_name,
    original,
    rename,
    split_deepseek,
)
from requant.convert.ranks import Piece
from requant.convert.source import Checkpoint
from requant.demo import demo_path
from requant.errors import CheckpointError, FormatError
from requant.quant import TensorSpec, format_name, parse_format
from requant.quant.cutting import plan_cut
from tests.convert.layouts import deepseek_v4
from tests.convert.sparse import BF16, V2_LITE, V3, Specs, deepseek, linear, plain, write_sparse

VECTOR = Path(__file__).parents[1] / "vectors" / "deepseek_mp2_layout.json"
Listing = dict[str, tuple[tuple[int, ...], str]]

#: DeepSeek-V3's convert.py: second-to-last component -> its name there, and the axis that is cut.
MAPPING: dict[str, tuple[str, int | None]] = {
    "embed_tokens": ("embed", 0), "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", None), "q_proj": ("wq", 0), "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None), "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None), "kv_a_layernorm": ("kv_norm", None),
    "kv_b_proj": ("wkv_b", 0), "o_proj": ("wo", 1), "gate": ("gate", None), "gate_proj": ("w1", 0),
    "down_proj": ("w2", 1), "up_proj": ("w3", 0), "norm": ("norm", None), "lm_head": ("head", 0),
    "wq_b": ("wq_b", None), "wk": ("wk", None), "k_norm": ("k_norm", None),
    "weights_proj": ("weights_proj", None),
}  # fmt: skip
#: V4's: what it does not name is on every rank.
MAPPING_V4 = {"embed": 0, "wq_b": 0, "wo_a": 0, "wo_b": 1, "head": 0, "attn_sink": 0,
              "weights_proj": 0}  # fmt: skip


def their_ranks(specs: Specs, experts: int, ranks: int, mtp: int) -> list[Listing]:
    """What convert.py makes of these tensors, but for the layer of MTP, which it knows as 61."""
    made: list[Listing] = [{} for _ in range(ranks)]
    for name, spec in specs.items():
        if f"model.layers.{mtp}." in name:
            continue
        new = name.removeprefix("model.").replace("self_attn", "attn").replace("mlp", "ffn")
        new = new.replace("weight_scale_inv", "scale").replace("e_score_correction_bias", "bias")
        key = new.split(".")[-2]
        leaf, axis = MAPPING[key]
        new = new.replace(key, leaf)
        for rank in range(ranks):
            shape = list(spec.shape)
            if "experts" in new and "shared_experts" not in new:
                if int(new.split(".")[-3]) // (experts // ranks) != rank:
                    continue
            elif axis is not None:
                assert shape[axis] % ranks == 0
                shape[axis] //= ranks
            made[rank][new] = tuple(shape), spec.dtype
    return made


def specs_of(piece: Piece) -> dict[str, TensorSpec]:
    """The stored tensors of a piece, by their names in the source."""
    weight = piece.weight
    if piece.axis is None:
        return {part.name: part.spec for part in weight.parts.values()}
    if weight.codec is None:
        (part,) = weight.parts.values()
        return {part.name: TensorSpec(part.spec.dtype, (piece.stop - piece.start,))}
    cuts = plan_cut(weight.codec, (weight.shape[0], weight.shape[1]), piece.axis, piece.start,
                    piece.stop)  # fmt: skip
    return {weight.parts[part].name: cut.spec for part, cut in cuts.items()}


def our_ranks(checkpoint: Checkpoint, ranks: int) -> dict[str, Listing]:
    """Every file of our plan."""
    made: dict[str, Listing] = {}
    split = split_deepseek(checkpoint, ranks)
    for rank in range(ranks):
        for piece in split.pieces(rank):
            for name, spec in specs_of(piece).items():
                file = file_name(name, rank, ranks, checkpoint.config)
                made.setdefault(file, {})[rename(name)] = tuple(spec.shape), spec.dtype
    return made


def small_v3(**changes: Any) -> dict[str, Any]:
    """V3 in its true widths, one layer of each kind and 16 experts."""
    layers = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 16}
    return V3 | layers | changes


def test_the_ranks_of_a_tiny_checkpoint_are_those_of_convert_py(tmp_path: Path) -> None:
    vector = json.loads(VECTOR.read_bytes())
    specs = {
        name: TensorSpec(dtype, tuple(shape)) for name, (shape, dtype) in vector["source"].items()
    }
    config = {"model_type": "deepseek_v3", "num_attention_heads": 4, "num_hidden_layers": 2}
    ours = our_ranks(write_sparse(tmp_path / "model", config, specs), 2)
    for rank in range(2):
        theirs = {name: (tuple(s), d) for name, (s, d) in vector[f"rank{rank}"].items()}
        assert ours.pop(f"model{rank}-mp2.safetensors") == theirs
    assert not ours


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("indexer", [False, True])
def test_v3_is_cut_as_convert_py_cuts_it(ranks: int, indexer: bool, tmp_path: Path) -> None:
    """The MTP layer, which it leaves out, lies in files of its own, and nothing is lost."""
    config = small_v3()
    specs = deepseek(config, indexer=indexer)
    ours = our_ranks(write_sparse(tmp_path / "model", config, specs), ranks)
    theirs = their_ranks(specs, 16, ranks, mtp=2)
    assert [ours[f"model{rank}-mp{ranks}.safetensors"] for rank in range(ranks)] == theirs
    names = {original(name) for listing in ours.values() for name in listing}
    assert names == set(specs)
    beside = ours[f"mtp0-mp{ranks}.safetensors"]
    assert {name.split(".")[1] for name in beside} == {"2"}
    head = beside["layers.2.shared_head.head.weight"]
    assert head == ((129280 // ranks, 7168), "BF16")


def test_every_name_of_v3_and_v32_comes_back() -> None:
    specs = deepseek(V3 | {"n_routed_experts": 3}, indexer=True)
    renamed = {rename(name) for name in specs}
    assert len(renamed) == len(specs)
    assert {original(name) for name in renamed} == set(specs)
    assert rename("model.layers.3.mlp.experts.7.up_proj.weight_scale_inv") == (
        "layers.3.ffn.experts.7.w3.scale"
    )
    assert original("head.weight") == "lm_head.weight"
    assert original("layers.61.shared_head.head.weight") == (
        "model.layers.61.shared_head.head.weight"
    )
    assert original("layers.0.attn.indexer.wq_b.weight") == (
        "model.layers.0.self_attn.indexer.wq_b.weight"
    )


@pytest.mark.parametrize(
    "name",
    ["layers.0.attn.q_proj.weight", "embed.weight_packed", "weight", "layers.0.attn.wq.bias",
     "model.norm.weight", "layers.0.mlp.gate.weight", "layers.0.attn.indexer.q_b_proj.weight"],
)  # fmt: skip
def test_a_name_that_is_not_deepseeks_is_refused(name: str) -> None:
    with pytest.raises(FormatError, match=f"^{name}: not a name of DeepSeek's layout"):
        original(name)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.k_proj.weight", "language_model.model.embed_tokens.weight",
     "model.x", "vision_tower.patch_embed.proj.weight", "model.layers.0.mlp.gate_proj.bias",
     "model.layers.0.self_attn.o_proj.weight_packed", "lm_head.bias",
     "embed_tokens.weight", "model.lm_head.weight", "model.model.norm.weight"],
)  # fmt: skip
def test_a_tensor_that_deepseeks_model_lacks_is_refused(name: str) -> None:
    with pytest.raises(FormatError, match=f"^{name}: DeepSeek's model has no such tensor, and"):
        rename(name)


def test_v2_lite_has_one_query_projection(tmp_path: Path) -> None:
    config = V2_LITE | {"num_hidden_layers": 2, "n_routed_experts": 8}
    specs = deepseek(config, BF16)
    ours = our_ranks(write_sparse(tmp_path / "model", config, specs), 4)
    theirs = their_ranks(specs, 8, 4, mtp=61)
    assert [ours[f"model{rank}-mp4.safetensors"] for rank in range(4)] == theirs
    assert theirs[0]["layers.0.attn.wq.weight"] == ((16 * 192 // 4, 2048), "BF16")


PUBLISHED_671B: dict[str, Any] = {
    "vocab_size": 129280, "dim": 7168, "inter_dim": 18432, "moe_inter_dim": 2048, "n_layers": 61,
    "n_dense_layers": 3, "n_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1,
    "n_activated_experts": 8, "n_expert_groups": 8, "n_limited_groups": 4, "route_scale": 2.5,
    "score_func": "sigmoid", "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "dtype": "fp8",
}  # fmt: skip
PUBLISHED_16B: dict[str, Any] = {
    "vocab_size": 102400, "dim": 2048, "inter_dim": 10944, "moe_inter_dim": 1408, "n_layers": 27,
    "n_dense_layers": 1, "n_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2,
    "n_activated_experts": 6, "route_scale": 1.0, "q_lora_rank": 0, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "mscale": 0.707,
}  # fmt: skip
#: What ModelArgs has where the published files say nothing.
DEFAULTS: dict[str, Any] = {
    "dtype": "bf16", "score_func": "softmax", "original_seq_len": 4096, "rope_theta": 10000.0,
    "rope_factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
}  # fmt: skip
INDEXER = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}


def one_layer(config: Mapping[str, Any], **kind: Any) -> Specs:
    return deepseek({**config, "num_hidden_layers": 4, "n_routed_experts": 2}, **kind)


def test_the_config_is_the_published_one(tmp_path: Path) -> None:
    v31 = V3 | {"quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0",
                                        "weight_block_size": [128, 128]}}  # fmt: skip
    lite = V2_LITE | {"scoring_func": None}
    cases: dict[str, tuple[dict[str, Any], Specs, dict[str, Any]]] = {
        "v3": ({**V3, "scoring_func": None}, one_layer(V3), PUBLISHED_671B),
        "v3.1": (v31, one_layer(V3), PUBLISHED_671B | {"scale_fmt": "ue8m0"}),
        "v3.2": (v31 | INDEXER, one_layer(V3, indexer=True),
                 PUBLISHED_671B | {"scale_fmt": "ue8m0"} | INDEXER),
        "v2-lite": (lite, one_layer(V2_LITE, codec=BF16), PUBLISHED_16B),
    }  # fmt: skip
    for name, (config, specs, published) in cases.items():
        checkpoint = write_sparse(tmp_path / name, config, specs)
        assert engine_config(checkpoint) == DEFAULTS | published, name
        notes = engine_notes(checkpoint)
        assert notes == [], name


def test_rotary_embeddings_without_yarn_are_never_rescaled() -> None:
    made = engine_config(Checkpoint.open(demo_path()))
    assert made["original_seq_len"] == made["max_seq_len"] == 512
    assert "rope_factor" not in made and made["rope_theta"] == 10000.0


def test_the_config_says_what_deepseeks_code_lacks(tmp_path: Path) -> None:
    config = V3 | {"hidden_size": 256, "rms_norm_eps": 1e-5}
    checkpoint = write_sparse(tmp_path / "a", config, one_layer(config))
    bias, epsilon = engine_notes(checkpoint)
    assert "bias at width 7168 only; this model has one at 256" in bias
    assert epsilon == "model.py norms with 1e-06, config.json says 1e-05"
    scaling = V3["rope_scaling"]
    for number, (change, message) in enumerate((
        ({"rope_scaling": scaling | {"mscale": 0.5}}, "mscale 0.5 and mscale_all_dim 1.0: Deep"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "type 'linear': DeepSeek's model has"),
        ({"vocab_size": None}, "config.json: has no vocab_size; DeepSeek's code needs it"),
    )):  # fmt: skip
        checkpoint = write_sparse(tmp_path / f"b{number}", V3 | change, one_layer(V3))
        with pytest.raises((CheckpointError, FormatError), match=message):
            engine_config(checkpoint)


V4_CONFIG = {
    "vocab_size": 64, "moe_intermediate_size": 128, "num_hash_layers": 1, "num_attention_heads": 4,
    "n_shared_experts": 1, "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0, "q_lora_rank": 128, "head_dim": 64, "qk_rope_head_dim": 32,
    "rms_norm_eps": 1e-6, "o_groups": 2, "o_lora_rank": 64, "sliding_window": 128,
    "compress_ratios": [0, 4], "compress_rope_theta": 160000, "rope_theta": 10000,
    "index_n_heads": 8, "index_head_dim": 16, "index_topk": 4, "hc_mult": 4,
    "hc_sinkhorn_iters": 20, "hc_eps": 1e-6,
}  # fmt: skip


def v4_as_converted() -> Specs:
    """A V4 as its convert.py takes it apart: wo_a in BF16, FP4 codes in F4."""
    v4, v4_fp4 = parse_format("fp8-block[scale=e8m0,container=deepseek-v4]"), parse_format(
        "mxfp4[container=deepseek-v4,codes=f4]")  # fmt: skip
    specs = {"embed.weight": plain(64, 256), "head.weight": plain(64, 256)}
    specs |= {"norm.weight": plain(256), "hc_head_fn": plain(4, 1024, dtype="F32")}
    for prefix in ("layers.0", "layers.1", "mtp.0"):
        specs[f"{prefix}.hc_attn_fn"] = plain(24, 1024, dtype="F32")
        specs[f"{prefix}.attn.attn_sink"] = plain(4, dtype="F32")
        specs[f"{prefix}.attn.compressor.ape"] = plain(4, 128, dtype="F32")
        specs[f"{prefix}.attn.compressor.wkv.weight"] = plain(128, 256)
        specs[f"{prefix}.attn.indexer.weights_proj.weight"] = plain(8, 256)
        specs[f"{prefix}.attn.wo_a.weight"] = plain(256, 256)
        for leaf, rows, cols in (("wq_a", 128, 256), ("wq_b", 256, 128), ("wkv", 128, 256),
                                 ("wo_b", 256, 256), ("indexer.wq_b", 256, 128)):  # fmt: skip
            specs |= linear(f"{prefix}.attn.{leaf}", rows, cols, v4)
        specs[f"{prefix}.ffn.gate.weight"] = plain(2, 256)
        for mlp, codec in (("shared_experts", v4), ("experts.0", v4_fp4), ("experts.1", v4_fp4)):
            for leaf, rows, cols in (("w1", 128, 256), ("w2", 256, 128), ("w3", 128, 256)):
                specs |= linear(f"{prefix}.ffn.{mlp}.{leaf}", rows, cols, codec)
    specs["mtp.0.emb.tok_emb.weight"] = plain(64, 256)
    specs["mtp.0.head.weight"] = plain(64, 256)
    return specs


def test_v4_keeps_its_names_and_is_cut_as_its_convert_py_cuts_it(tmp_path: Path) -> None:
    specs = v4_as_converted()
    config = deepseek_v4().config | V4_CONFIG
    checkpoint = write_sparse(tmp_path / "model", config, specs)
    assert conversions(checkpoint) == {}
    theirs: list[Listing] = [{}, {}]
    beside: set[str] = set()
    for name, spec in specs.items():
        if name.startswith("mtp.") and ("emb" in name or name.endswith("head.weight")):
            beside.add(name)
            continue
        last = any(word in name for word in ("hc", "attn_sink", "tie2eid", "ape"))
        axis = MAPPING_V4.get(name.split(".")[-1 if last else -2])
        for rank in range(2):
            shape = list(spec.shape)
            if "experts" in name and "shared_experts" not in name:
                if int(name.split(".")[-3]) != rank:
                    continue
            elif axis is not None:
                shape[axis] //= 2
            theirs[rank][name] = tuple(shape), spec.dtype
    ours = our_ranks(checkpoint, 2)
    for rank in range(2):
        assert ours[f"model{rank}-mp2.safetensors"] == theirs[rank]
        assert set(ours[f"mtp{rank}-mp2.safetensors"]) == beside
    made = engine_config(checkpoint)
    assert (made["dtype"], made["scale_dtype"]) == ("fp8", "fp8")
    assert made["expert_dtype"] == "fp4" and made["original_seq_len"] == 0
    assert made["n_heads"] == 4 and made["scale_fmt"] == "ue8m0" and made["n_mtp_layers"] == 1
    assert engine_notes(checkpoint) == []
    yarn = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536}
    checkpoint = write_sparse(tmp_path / "yarn", config | {"rope_scaling": yarn}, specs)
    made = engine_config(checkpoint)
    assert (made["original_seq_len"], made["rope_factor"]) == (65536, 16) and "mscale" not in made


def test_v4_as_published_must_be_converted_first(tmp_path: Path) -> None:
    layout = deepseek_v4()
    layout.config |= V4_CONFIG
    checkpoint = Checkpoint.open(layout.write(tmp_path / "model"))
    needed = {name: format_name(codec) for name, codec in conversions(checkpoint).items()}
    assert needed["layers.1.attn.wo_a.weight"] == "bf16"
    assert needed["layers.1.ffn.experts.0.w2.weight"] == "mxfp4[container=deepseek-v4,codes=f4]"
    assert len(needed) == 3 * (1 + 2 * 3)
    with pytest.raises(
        FormatError, match=r"wo_a.weight: is fp8-block.* loads bf16; so it is with 20"
    ):
        split_deepseek(checkpoint, 2)


def test_what_deepseeks_model_does_not_load_is_refused(tmp_path: Path) -> None:
    config = small_v3(num_nextn_predict_layers=0)
    fp8, int4 = deepseek(config), parse_format("int4")
    q_a = "model.layers.0.self_attn.q_a_proj"
    without = {name: spec for name, spec in fp8.items() if not name.startswith(q_a)}
    cases: list[tuple[Specs, dict[str, Any], str]] = [
        (deepseek(config, int4), {"quantization_config": int4.config([])},
         "kv_a_proj_with_mqa.weight: is int4, which DeepSeek's model does not load; conv"),
        (without | linear(q_a, 1536, 7168, BF16), {},
         r"is fp8-block and .*q_a_proj.weight bf16: DeepSeek's model has one format for all"),
        (fp8 | {"model.layers.0.self_attn.q_norm.weight": plain(128)}, {},
         "q_norm.weight: DeepSeek's model has no such tensor, and its loader takes no other"),
        (fp8 | {f"{q_a}.bias": plain(1536)}, {}, "q_a_proj.bias: DeepSeek's model has no such"),
        (fp8 | {f"{q_a}.input_scale": plain(dtype="F32")}, {}, "q_a_proj.input_scale: DeepSeek's"),
        (fp8 | {"lm_head.weight": plain(129280, 7168, dtype="F32")}, {},
         "lm_head.weight: is fp32, which DeepSeek's model does not load"),
        (fp8, {"num_attention_heads": 96},
         r"is not legal.*layout deepseek has tp = ep and one stage"),
    ]  # fmt: skip
    for number, (specs, change, message) in enumerate(cases):
        checkpoint = write_sparse(tmp_path / str(number), config | change, specs)
        with pytest.raises(FormatError, match=message):
            split_deepseek(checkpoint, 2 if "legal" not in message else 64)
