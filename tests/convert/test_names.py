"""Names of published checkpoints -> layer, module, expert, part, role."""

from __future__ import annotations

from typing import Any

import pytest

from requant.convert.names import TensorName, is_mtp, kind_of, role_of

V3: dict[str, Any] = {"num_hidden_layers": 61, "num_nextn_predict_layers": 1}
KIMI: dict[str, Any] = {"model_type": "kimi_k25", "text_config": V3}
MATRIX, VECTOR = (256, 128), (256,)

ROLES = [
    ("model.embed_tokens.weight", MATRIX, "embedding"),
    ("embed.weight", MATRIX, "embedding"),
    ("lm_head.weight", MATRIX, "lm_head"),
    ("head.weight", MATRIX, "lm_head"),
    ("model.norm.weight", VECTOR, "norm"),
    ("model.layers.0.input_layernorm.weight", VECTOR, "norm"),
    ("model.layers.0.self_attn.kv_a_layernorm.weight", VECTOR, "norm"),
    # V2-Lite has no q_a/q_b, Qwen has biases.
    ("model.layers.0.self_attn.q_proj.weight", MATRIX, "attention"),
    ("model.layers.0.self_attn.q_proj.bias", VECTOR, "bias"),
    ("model.layers.0.self_attn.q_a_proj.weight", MATRIX, "attention"),
    ("model.layers.0.self_attn.q_b_proj.weight", MATRIX, "attention"),
    ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", MATRIX, "attention"),
    ("model.layers.0.self_attn.kv_b_proj.weight", MATRIX, "attention"),
    ("model.layers.0.self_attn.o_proj.weight", MATRIX, "attention"),
    # V3.2's indexer is no attention projection, whatever its leaves are called.
    ("model.layers.0.self_attn.indexer.wk.weight", MATRIX, "other"),
    ("vision_tower.encoder.layers.0.self_attn.q_proj.weight", MATRIX, "other"),
    ("model.visual.blocks.0.mlp.up_proj.weight", MATRIX, "other"),
    ("model.layers.0.self_attn.indexer.wq_b.weight", MATRIX, "other"),
    ("model.layers.0.self_attn.indexer.weights_proj.weight", MATRIX, "other"),
    ("model.layers.0.self_attn.indexer.q_proj.weight", MATRIX, "other"),
    ("model.layers.0.self_attn.indexer.k_norm.bias", VECTOR, "bias"),
    # gate is the router, gate_proj a linear layer.
    ("model.layers.3.mlp.gate.weight", MATRIX, "router"),
    ("model.layers.3.mlp.gate.e_score_correction_bias", VECTOR, "router_bias"),
    ("model.layers.3.block_sparse_moe.gate.weight", MATRIX, "router"),
    ("model.layers.0.mlp.gate_proj.weight", MATRIX, "dense_mlp"),
    ("model.layers.0.mlp.down_proj.weight", MATRIX, "dense_mlp"),
    ("model.layers.0.feed_forward.w2.weight", MATRIX, "dense_mlp"),
    ("model.layers.3.mlp.shared_experts.up_proj.weight", MATRIX, "shared_expert"),
    ("model.layers.3.mlp.shared_expert.up_proj.weight", MATRIX, "shared_expert"),
    ("model.layers.3.mlp.shared_expert_gate.weight", (1, 128), "router"),
    ("model.layers.3.mlp.experts.7.gate_proj.weight", MATRIX, "routed_expert"),
    ("model.layers.3.block_sparse_moe.experts.3.w1.weight", MATRIX, "routed_expert"),
    # Fused experts are three-dimensional, and no format's.
    ("model.layers.3.mlp.experts.gate_up_proj", (4, 256, 128), "other"),
    ("model.layers.3.mlp.experts.7.up_proj.weight", (2, 256, 128), "other"),
    # The MTP layer comes after the last one; 60 is the last.
    ("model.layers.60.mlp.experts.0.up_proj.weight", MATRIX, "routed_expert"),
    ("model.layers.61.mlp.experts.0.up_proj.weight", MATRIX, "mtp"),
    ("model.layers.61.eh_proj.weight", MATRIX, "mtp"),
    ("model.layers.61.enorm.weight", VECTOR, "mtp"),
    ("model.layers.62.self_attn.q_proj.weight", MATRIX, "attention"),
    ("mtp.0.e_proj.weight", MATRIX, "mtp"),
    ("mtp.layers.0.mlp.gate.weight", MATRIX, "mtp"),
    # Names that only contain a known word.
    ("model.layers.0.mtp_like.q_proj_extra.weight", MATRIX, "other"),
    ("model.layers.0.self_attn.rotary_emb.inv_freq", VECTOR, "norm"),
    ("model.scale_table", MATRIX, "other"),
    ("weight", MATRIX, "other"),
    ("", (), "norm"),
]


@pytest.mark.parametrize(("name", "shape", "role"), ROLES)
def test_role(name: str, shape: tuple[int, ...], role: str) -> None:
    assert role_of(name, shape, V3) == role


def test_kimi_nests_both_its_names_and_its_config() -> None:
    prefix = "language_model.model.layers"
    assert role_of(f"{prefix}.3.mlp.experts.5.up_proj.weight", MATRIX, KIMI) == "routed_expert"
    assert role_of(f"{prefix}.60.self_attn.q_a_proj.weight", MATRIX, KIMI) == "attention"
    assert role_of(f"{prefix}.61.self_attn.q_a_proj.weight", MATRIX, KIMI) == "mtp"


def test_an_mtp_layer_has_every_kind() -> None:
    layer = "model.layers.61"
    assert kind_of(f"{layer}.self_attn.q_b_proj.weight", MATRIX) == "attention"
    assert kind_of(f"{layer}.mlp.experts.0.w3.weight", MATRIX) == "routed_expert"
    assert kind_of(f"{layer}.shared_head.head.weight", MATRIX) == "lm_head"
    assert kind_of(f"{layer}.embed_tokens.weight", MATRIX) == "embedding"
    assert kind_of(f"{layer}.eh_proj.weight", MATRIX) == "other"


@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": 61}, {"num_nextn_predict_layers": 1},
                                    {"num_hidden_layers": "61", "num_nextn_predict_layers": 1},
                                    {**V3, "num_nextn_predict_layers": None},
                                    {**V3, "text_config": "none"}])  # fmt: skip
def test_mtp_needs_both_numbers(config: dict[str, Any]) -> None:
    expected = "text_config" in config
    assert is_mtp("model.layers.61.eh_proj.weight", config) is expected
    assert is_mtp("model.mtp.0.eh_proj.weight", config)


def test_parts_of_a_name() -> None:
    name = TensorName.parse("model.layers.3.mlp.experts.7.up_proj.weight_scale_inv")
    assert name == TensorName("model.layers.3.mlp.experts.7.up_proj", "weight_scale_inv", 3, 7)
    assert name.weight == "model.layers.3.mlp.experts.7.up_proj.weight"


@pytest.mark.parametrize("part", ["weight", "weight_scale", "weight_scale_inv", "weight_packed",
                                  "weight_shape", "qweight", "scales", "g_idx"])  # fmt: skip
def test_parts_belong_to_their_weight(part: str) -> None:
    assert TensorName.parse(f"a.b.{part}").weight == "a.b.weight"
    assert TensorName.parse(part).weight == "weight"


@pytest.mark.parametrize("name", ["a.b.bias", "a.gate.e_score_correction_bias", "a.weights", "a"])
def test_other_tensors_stand_alone(name: str) -> None:
    assert TensorName.parse(name).weight == name


@pytest.mark.parametrize("number", ["x", "", "-1", "1.5", "9" * 5000, "\u0663", "\u00b2"])
def test_what_is_no_layer_number(number: str) -> None:
    assert TensorName.parse(f"model.layers.{number}.mlp.up_proj.weight").layer in (None, 1)
    if number != "1.5":
        assert TensorName.parse(f"model.layers.{number}.weight").layer is None
