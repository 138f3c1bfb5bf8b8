"""What `inspect` counts, on hand-computed checkpoints and on DeepSeek-V3's real shapes."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from requant.convert.folder import INDEX_NAME, SINGLE_NAME
from requant.convert.header import layout
from requant.convert.inspect import inspect, render
from requant.convert.names import TensorName
from requant.convert.source import Checkpoint
from requant.quant import parse_format
from requant.quant.codec import TensorSpec

V3_CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_experts_per_tok": 8,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "hidden_size": 7168,
    "max_position_embeddings": 163840,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def write_headers(
    folder: Path, config: dict[str, Any], files: dict[str, dict[str, TensorSpec]]
) -> Checkpoint:
    """Write a checkpoint whose files are headers and holes: no data, the true sizes."""
    folder.mkdir(exist_ok=True)
    for name, specs in files.items():
        header, ranges = layout(specs)
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(max(end for _, end in ranges.values()))
    (folder / "config.json").write_text(json.dumps(config))
    if list(files) != [SINGLE_NAME]:
        places = {tensor: name for name, specs in files.items() for tensor in specs}
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": places}))
    return Checkpoint.open(folder)


def parts(format_text: str, name: str, rows: int, cols: int) -> dict[str, TensorSpec]:
    module = TensorName.parse(name).module
    return {f"{module}.{part}": spec for part, spec in encoded(format_text, rows, cols).items()}


@functools.cache
def encoded(format_text: str, rows: int, cols: int) -> dict[str, TensorSpec]:
    return parse_format(format_text).specs(rows, cols)


def plain(*shape: int, dtype: str = "BF16") -> TensorSpec:
    return TensorSpec(dtype, shape)


def mlp(prefix: str, inner: int) -> dict[str, TensorSpec]:
    return {
        **parts("fp8-block", f"{prefix}.gate_proj.weight", inner, 7168),
        **parts("fp8-block", f"{prefix}.up_proj.weight", inner, 7168),
        **parts("fp8-block", f"{prefix}.down_proj.weight", 7168, inner),
    }


def v3_layer(layer: int) -> dict[str, TensorSpec]:
    """One layer of DeepSeek-V3 as published: 0-2 dense, 3-60 MoE, 61 MTP."""
    base = f"model.layers.{layer}"
    attention = f"{base}.self_attn"
    specs = {
        f"{base}.input_layernorm.weight": plain(7168),
        f"{base}.post_attention_layernorm.weight": plain(7168),
        f"{attention}.q_a_layernorm.weight": plain(1536),
        f"{attention}.kv_a_layernorm.weight": plain(512),
        **parts("fp8-block", f"{attention}.q_a_proj.weight", 1536, 7168),
        **parts("fp8-block", f"{attention}.q_b_proj.weight", 24576, 1536),
        **parts("fp8-block", f"{attention}.kv_a_proj_with_mqa.weight", 576, 7168),
        **parts("fp8-block", f"{attention}.kv_b_proj.weight", 32768, 512),
        **parts("fp8-block", f"{attention}.o_proj.weight", 7168, 16384),
    }
    if layer < 3:
        return {**specs, **mlp(f"{base}.mlp", 18432)}
    specs[f"{base}.mlp.gate.weight"] = plain(256, 7168)
    specs[f"{base}.mlp.gate.e_score_correction_bias"] = plain(256, dtype="F32")
    specs |= mlp(f"{base}.mlp.shared_experts", 2048)
    for expert in range(256):
        specs |= mlp(f"{base}.mlp.experts.{expert}", 2048)
    if layer == 61:
        specs[f"{base}.embed_tokens.weight"] = plain(129280, 7168)
        specs[f"{base}.shared_head.head.weight"] = plain(129280, 7168)
        specs[f"{base}.eh_proj.weight"] = plain(7168, 14336)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            specs[f"{base}.{norm}.weight"] = plain(7168)
    return specs


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    files = {f"model-{layer:05}.safetensors": v3_layer(layer) for layer in range(62)}
    files["model-00062.safetensors"] = {
        "model.embed_tokens.weight": plain(129280, 7168),
        "model.norm.weight": plain(7168),
        "lm_head.weight": plain(129280, 7168),
    }
    return write_headers(tmp_path_factory.mktemp("v3"), V3_CONFIG, files)


@pytest.fixture(scope="module")
def v3_facts(v3: Checkpoint) -> dict[str, Any]:
    return inspect(v3)


def test_deepseek_v3_has_the_published_numbers(v3_facts: dict[str, Any]) -> None:
    facts = v3_facts
    # README_WEIGHTS.md of deepseek-ai/DeepSeek-V3: 671B, 36.7B active; Hugging Face counts 685B
    # with the MTP layer (11.5B of its own and copies of the embedding and the head).
    assert facts["parameters"] == pytest.approx(671e9, rel=0.001)
    assert facts["active_parameters"] == pytest.approx(36.7e9, rel=0.01)
    embedding = 129280 * 7168
    assert facts["mtp_parameters"] - 2 * embedding == pytest.approx(11.5e9, rel=0.01)
    assert facts["kv_cache_bytes_per_token"] == 70_272
    assert facts["total_bytes"] == pytest.approx(688.6e9, rel=0.001)
    assert (facts["layers"], facts["experts"], facts["context_length"]) == (61, 256, 163840)
    assert facts["quantization"] == "fp8"
    assert facts["files"] == 63
    assert facts["roles"]["routed_expert"]["tensors"] == 58 * 256 * 3
    assert list(facts["roles"]["routed_expert"]["formats"]) == ["fp8-block"]
    assert facts["roles"]["router_bias"]["formats"] == {
        "fp32": {"tensors": 58, "bytes": 58 * 256 * 4}
    }


def test_counts_agree_with_each_other(v3: Checkpoint, v3_facts: dict[str, Any]) -> None:
    facts = v3_facts
    for table in (facts["formats"], facts["roles"]):
        assert sum(row["bytes"] for row in table.values()) == facts["total_bytes"]
        assert sum(row["tensors"] for row in table.values()) == len(v3.weights)
    for role in facts["roles"].values():
        assert sum(row["bytes"] for row in role["formats"].values()) == role["bytes"]


def test_a_dense_model_with_tied_embeddings_is_all_active(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
    }
    specs = {
        "model.embed_tokens.weight": plain(100, 64),
        "model.norm.weight": plain(64),
        "model.layers.0.self_attn.q_proj.weight": plain(64, 64),
    }
    facts = inspect(write_headers(tmp_path, config, {SINGLE_NAME: specs}))
    assert facts["parameters"] == 100 * 64 + 64 + 64 * 64
    assert facts["active_parameters"] == facts["parameters"]
    assert facts["kv_cache_bytes_per_token"] == 2 * 2 * 16 * 1 * 2
    assert facts["formats"] == {"bf16": {"tensors": 3, "bytes": 2 * facts["parameters"]}}
    assert (facts["experts"], facts["mtp_parameters"]) == (0, 0)
    assert facts["quantization"] is None


def test_int4_counts_logical_elements_and_all_bytes(tmp_path: Path) -> None:
    config = {
        "model_type": "deepseek_v3",
        "num_experts_per_tok": 1,
        "quantization_config": parse_format("int4[group_size=32]").config([]),
    }
    specs: dict[str, TensorSpec] = {"lm_head.weight": plain(10, 64)}
    for expert in range(4):
        name = f"model.layers.0.mlp.experts.{expert}.up_proj.weight"
        specs |= parts("int4[group_size=32]", name, 96, 64)
    facts = inspect(write_headers(tmp_path, config, {SINGLE_NAME: specs}))
    assert facts["parameters"] == 640 + 4 * 96 * 64
    assert facts["active_parameters"] == 640 + 96 * 64
    one = 96 * 64 // 2 + 96 * 2 * 2 + 16
    assert facts["formats"]["int4[group_size=32]"] == {"tensors": 4, "bytes": 4 * one}
    assert facts["kv_cache_bytes_per_token"] is None


def test_experts_without_a_top_k_leave_active_unknown(tmp_path: Path) -> None:
    specs = {"model.layers.0.mlp.experts.0.up_proj.weight": plain(8, 8)}
    facts = inspect(write_headers(tmp_path, {"model_type": "other"}, {SINGLE_NAME: specs}))
    assert facts["active_parameters"] is None
    assert "active unknown" in rendered(facts)


def test_integer_tables_are_no_parameters(tmp_path: Path) -> None:
    specs = {"model.tid2eid": plain(9, 2, dtype="I64"), "model.norm.weight": plain(5)}
    assert inspect(write_headers(tmp_path, {}, {SINGLE_NAME: specs}))["parameters"] == 5


def test_rendering_shows_every_role_and_the_totals(v3_facts: dict[str, Any]) -> None:
    facts = v3_facts
    text = rendered(facts)
    assert "671.03 B, 36.63 B active per token, plus 13.46 B MTP" in text
    assert "70272 bytes per token" in text
    for role in facts["roles"]:
        assert role in text
    assert json.dumps(facts, allow_nan=False)


def rendered(facts: dict[str, Any]) -> str:
    stream = io.StringIO()
    Console(file=stream, width=120).print(render(facts))
    return stream.getvalue()
