"""config.json in its old and new forms, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from requant.errors import CheckpointError
from requant.runner.attention import softmax_scale
from requant.runner.config import ModelConfig, RopeConfig
from requant.runner.rope import attention_factor, inverse_frequencies, rotate, rotation
from tests.convert.published import published_config

#: https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/config.json
V3 = published_config("DeepSeek-V3")
YARN = V3["rope_scaling"]


def test_old_and_new_form_read_the_same() -> None:
    old = ModelConfig.from_config(V3)
    new = {k: v for k, v in V3.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype")}
    del new["scoring_func"], new["topk_method"]  # transformers 5 does not write them
    new["rope_parameters"] = {**YARN, "rope_type": "yarn", "rope_theta": 10000.0}
    del new["rope_parameters"]["type"]
    assert ModelConfig.from_config(new) == old
    assert old.rope == RopeConfig(10000.0, "yarn", 40.0, 4096, 32.0, 1.0, 1.0, 1.0)


def test_model_type_decides_what_the_config_leaves_out() -> None:
    bare = {k: v for k, v in V3.items() if k not in ("scoring_func", "topk_method")}
    kimi = ModelConfig.from_config({**bare, "model_type": "kimi_k2", "rope_scaling": None})
    assert (kimi.scoring_func, kimi.topk_method) == ("sigmoid", "noaux_tc")
    assert kimi.rope == RopeConfig(10000.0)
    v2 = {**bare, "model_type": "deepseek_v2", "norm_topk_prob": False, "n_group": None}
    lite = ModelConfig.from_config({**v2, "q_lora_rank": None})
    assert (lite.scoring_func, lite.topk_method, lite.n_group) == ("softmax", "greedy", 1)


@pytest.mark.parametrize("none", [None, 0])
def test_no_query_rank(none: int | None) -> None:
    assert ModelConfig.from_config({**V3, "q_lora_rank": none}).q_lora_rank is None


@pytest.mark.parametrize(
    "key",
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers "
    "num_attention_heads kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
    "n_routed_experts num_experts_per_tok n_group topk_group norm_topk_prob "
    "routed_scaling_factor rms_norm_eps max_position_embeddings rope_theta".split(),
)
def test_required_key_is_named(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: has no {key}"):
        ModelConfig.from_config({k: v for k, v in V3.items() if k != key})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "'llama'; the runner runs deepseek_v2, deepseek_v3, kimi_k2"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ["deepseek_v3"]}, "model_type is"),
        ({"routed_scaling_factor": 10**400}, "routed_scaling_factor is 10000"),
        ({"hidden_size": "7168"}, "hidden_size is '7168', expected a positive integer"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor is nan"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1, expected true or false"),
        ({"topk_method": "random"}, "topk_method is 'random'; the runner knows greedy"),
        ({"scoring_func": "relu"}, "scoring_func is 'relu'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; the runner has silu"),
        ({"rope_interleave": False}, "rope_interleave is false"),
        ({"model_type": "deepseek_v2"}, "norm_topk_prob is true in a deepseek_v2 model"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63, expected an even number"),
        ({"n_group": 7}, "256 n_routed_experts cannot be cut into 7 n_group"),
        ({"topk_group": 9}, "of which 9 topk_group"),
        ({"num_experts_per_tok": 129}, "129, but only 128 experts are within a token's reach"),
        ({"rope_scaling": {**YARN, "type": "linear"}}, "rope type 'linear'; the runner knows"),
        ({"rope_scaling": {"type": "yarn"}}, "has no factor"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object"),
        ({"rope_theta": 1}, "rope_theta is 1.0, expected more than 1"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_config({**V3, **changes})


@pytest.mark.parametrize(
    ("mscale", "factor"),
    [(1.0, 1.8739), (0.707, 1.5896), (0, 1.0)],  # V3, V2, no mscale
)
def test_softmax_scale(mscale: float, factor: float) -> None:
    scaling = {**YARN, "mscale": mscale, "mscale_all_dim": mscale}
    config = ModelConfig.from_config({**V3, "rope_scaling": scaling})
    assert softmax_scale(config) == pytest.approx(factor * 192**-0.5, rel=1e-4)
    # Exactly one of the two places carries the temperature.
    assert attention_factor(config.rope) == pytest.approx(1.0 if mscale else 1.36889, rel=1e-5)


def test_softmax_scale_without_yarn_is_plain() -> None:
    config = ModelConfig.from_config({**V3, "rope_scaling": None})
    assert softmax_scale(config) == 192**-0.5
    assert attention_factor(config.rope) == 1.0


def test_given_attention_factor_wins() -> None:
    rope = RopeConfig.from_config({**V3, "rope_scaling": {**YARN, "attention_factor": 1.5}})
    assert attention_factor(rope) == 1.5


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    """V3: pair i turns 10000^(-i/32) radians per position; the blend runs from 10 to 23."""
    yarn = inverse_frequencies(RopeConfig.from_config(V3), 64)
    plain = inverse_frequencies(RopeConfig(10000.0), 64)
    assert plain[16].item() == pytest.approx(0.01)
    assert torch.equal(yarn[:11], plain[:11])
    torch.testing.assert_close(yarn[23:], plain[23:] / 40)
    middle = 6 / 13
    expected = plain[16].item() * (1 - middle + middle / 40)
    assert yarn[16].item() == pytest.approx(expected, rel=1e-5)


def test_rotation_turns_neighbouring_pairs() -> None:
    cos, sin = rotation(RopeConfig(10000.0), 4, 3, 1, torch.device("cpu"))
    turned = rotate(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), cos, sin)
    expected = [math.cos(3), math.sin(3), -math.sin(0.03), math.cos(0.03)]
    assert turned[0].tolist() == pytest.approx(expected, rel=1e-5)
