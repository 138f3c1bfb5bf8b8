"""The part of config.json that the runner computes with, under the file's own key names.

What tensor names tell (dense or MoE, biases, tied head) is not asked of the config: older and newer
writers disagree about it, the tensors do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from requant.errors import CheckpointError
from requant.runner.keys import choice, flag, integer, number, optional_count

#: model_type -> what the configs of that family leave out (transformers 5 drops both keys).
_ROUTING: dict[str, dict[str, str]] = {
    "deepseek_v2": {"scoring_func": "softmax", "topk_method": "greedy"},
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "kimi_k2": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}
MODEL_TYPES: tuple[str, ...] = tuple(_ROUTING)

SCORING_FUNCS: tuple[str, ...] = ("sigmoid", "softmax")
TOPK_METHODS: tuple[str, ...] = ("greedy", "group_limited_greedy", "noaux_tc")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `rope_type` is `default` or `yarn`; the other keys are YaRN's."""

    rope_theta: float
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> RopeConfig:
        """Read `rope_parameters` (transformers 5), or `rope_scaling` and `rope_theta`."""
        key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        nested = config.get(key) or {}
        if not isinstance(nested, Mapping):
            raise CheckpointError(f"config.json: {key} is {nested!r}, expected an object")
        theta = number(nested if "rope_theta" in nested else config, "rope_theta")
        if theta <= 1:
            raise CheckpointError(f"config.json: rope_theta is {theta}, expected more than 1")
        kind = nested.get("rope_type", nested.get("type", "default"))
        if kind == "default":
            return cls(theta)
        if kind != "yarn":
            raise CheckpointError(
                f"config.json: {key} has rope type {kind!r}; the runner knows default and yarn"
            )
        attention_factor = nested.get("attention_factor")
        return cls(
            rope_theta=theta,
            rope_type="yarn",
            factor=number(nested, "factor"),
            original_max_position_embeddings=integer(nested, "original_max_position_embeddings"),
            # A null counts as absent, as in transformers.
            beta_fast=number(nested, "beta_fast") if nested.get("beta_fast") else 32.0,
            beta_slow=number(nested, "beta_slow") if nested.get("beta_slow") else 1.0,
            mscale=number(nested, "mscale", zero=True) if nested.get("mscale") else 0.0,
            mscale_all_dim=number(nested, "mscale_all_dim") if nested.get("mscale_all_dim") else 0,
            attention_factor=number(nested, "attention_factor") if attention_factor else None,
            truncate=bool(nested.get("truncate", True)),
        )


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of a DeepSeek-family model; every field is a key of config.json, `rope` aside."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    scoring_func: str
    topk_method: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: the part without positions, then the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read config.json. Raises CheckpointError naming the key that is missing or wrong."""
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in _ROUTING:
            raise CheckpointError(
                f"config.json: model_type is {model_type!r}; "
                f"the runner runs {', '.join(MODEL_TYPES)}"
            )
        topk_method = choice(config, "topk_method", _ROUTING[model_type], TOPK_METHODS)
        grouped = topk_method != "greedy"
        read = cls(
            model_type=model_type,
            vocab_size=integer(config, "vocab_size"),
            hidden_size=integer(config, "hidden_size"),
            intermediate_size=integer(config, "intermediate_size"),
            moe_intermediate_size=integer(config, "moe_intermediate_size"),
            num_hidden_layers=integer(config, "num_hidden_layers"),
            num_nextn_predict_layers=optional_count(config, "num_nextn_predict_layers"),
            num_attention_heads=integer(config, "num_attention_heads"),
            q_lora_rank=optional_count(config, "q_lora_rank") or None,
            kv_lora_rank=integer(config, "kv_lora_rank"),
            qk_nope_head_dim=integer(config, "qk_nope_head_dim"),
            qk_rope_head_dim=integer(config, "qk_rope_head_dim"),
            v_head_dim=integer(config, "v_head_dim"),
            n_routed_experts=integer(config, "n_routed_experts"),
            n_shared_experts=optional_count(config, "n_shared_experts"),
            num_experts_per_tok=integer(config, "num_experts_per_tok"),
            n_group=integer(config, "n_group") if grouped else 1,
            topk_group=integer(config, "topk_group") if grouped else 1,
            scoring_func=choice(config, "scoring_func", _ROUTING[model_type], SCORING_FUNCS),
            topk_method=topk_method,
            norm_topk_prob=flag(config, "norm_topk_prob"),
            routed_scaling_factor=number(config, "routed_scaling_factor"),
            rms_norm_eps=number(config, "rms_norm_eps", zero=True),
            max_position_embeddings=integer(config, "max_position_embeddings"),
            rope=RopeConfig.from_config(config),
        )
        _check(read, config)
        return read


def _check(read: ModelConfig, config: Mapping[str, Any]) -> None:
    """Refuse numbers that contradict each other and switches that the runner does not have."""
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(
            f"config.json: hidden_act is {config['hidden_act']!r}; the runner has silu"
        )
    if not config.get("rope_interleave", True):
        raise CheckpointError("config.json: rope_interleave is false; the runner rotates pairs")
    if read.model_type == "deepseek_v2" and read.norm_topk_prob:
        raise CheckpointError(
            "config.json: norm_topk_prob is true in a deepseek_v2 model; transformers ignores it "
            "and DeepSeek's own code does not, so there is no one right answer"
        )
    if read.qk_rope_head_dim % 2:
        raise CheckpointError(
            f"config.json: qk_rope_head_dim is {read.qk_rope_head_dim}, expected an even number"
        )
    if read.n_routed_experts % read.n_group or read.topk_group > read.n_group:
        raise CheckpointError(
            f"config.json: {read.n_routed_experts} n_routed_experts cannot be cut into "
            f"{read.n_group} n_group of which {read.topk_group} topk_group are kept"
        )
    within_reach = read.n_routed_experts // read.n_group * read.topk_group
    if read.num_experts_per_tok > within_reach:
        raise CheckpointError(
            f"config.json: num_experts_per_tok is {read.num_experts_per_tok}, "
            f"but only {within_reach} experts are within a token's reach"
        )
