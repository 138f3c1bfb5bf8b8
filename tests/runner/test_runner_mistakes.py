"""Each wrong line that ports of this model have had is seen by the comparison with transformers.

A mistake is made on purpose, in the smallest function that holds it; the logits must then leave the
tolerance by far.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from runner_references import TOLERANCE, Reference, distance
from torch.nn import functional

from requant.runner import attention, model, moe, rope
from requant.runner.config import ModelConfig, RopeConfig
from requant.runner.model import Model

Mistake = Callable[[pytest.MonkeyPatch, Model], None]


def patched(module: Any, name: str, wrong: Any) -> Mistake:
    """Put `wrong` in the place of a function or constant."""
    return lambda monkeypatch, _: monkeypatch.setattr(module, name, wrong)


def configured(**changes: Any) -> Mistake:
    """Misread keys of the config."""
    return lambda _, runner: setattr(
        runner, "config", dataclasses.replace(runner.config, **changes)
    )


def half_split(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def plain_frequencies(config: RopeConfig, dim: int) -> torch.Tensor:
    return 1.0 / config.rope_theta ** (torch.arange(0, dim, 2) / dim)


def unweighted_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return attention.rms_norm(x, torch.ones_like(weight), attention.LATENT_EPS)


def norm_over_rotated_key(
    weights: Any, config: ModelConfig, prefix: str, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    both = weights.linear(prefix + "kv_a_proj_with_mqa", x)
    both = attention.rms_norm(both, torch.ones(both.shape[-1]), attention.LATENT_EPS)
    latent, k_rope = both.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
    return latent * weights.get(prefix + "kv_a_layernorm.weight"), k_rope


def rope_first_heads(
    weights: Any, config: ModelConfig, prefix: str, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    nope, rotated = queries(weights, config, prefix, x)
    both = torch.cat((nope, rotated), dim=-1)
    rotated, nope = both.split([config.qk_rope_head_dim, config.qk_nope_head_dim], dim=-1)
    return nope, rotated


queries = attention.queries
softmax_scale = attention.softmax_scale
route = moe.route


def base_scale(config: ModelConfig) -> float:
    return float(config.qk_head_dim**-0.5)


def mscale_twice(config: ModelConfig) -> float:
    return softmax_scale(config) ** 2 / base_scale(config)


def nope_scale(config: ModelConfig) -> float:
    return softmax_scale(config) / base_scale(config) * config.qk_nope_head_dim**-0.5


def bias_in_shares(
    config: ModelConfig, logits: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    values = moe.score(config, logits) + bias
    chosen = moe.choose(config, values)
    return chosen, moe.share(config, values, chosen)


def scale_before_norm(
    config: ModelConfig, scores: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    shares = scores.gather(-1, chosen) * config.routed_scaling_factor
    return shares / shares.sum(dim=-1, keepdim=True)


def one_expert_fewer(config: ModelConfig, values: torch.Tensor) -> torch.Tensor:
    values = moe.limit_groups(config, values)
    return values.topk(config.num_experts_per_tok - 1, dim=-1).indices


def bf16_router(
    config: ModelConfig, logits: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return route(config, logits.bfloat16().float(), bias)


def see_the_future(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    shares = functional.softmax(q.transpose(1, 2) @ k.transpose(-1, -2) * scale, dim=-1)
    return (shares @ v).transpose(1, 2)


MISTAKES: dict[str, tuple[str, Mistake]] = {
    "rope half-split": ("v3", patched(attention, "rotate", half_split)),
    "rope left out": ("v3", patched(attention, "rotate", lambda x, cos, sin: x)),
    "yarn frequencies left out": ("v3", patched(rope, "inverse_frequencies", plain_frequencies)),
    "cos and sin not scaled": ("v3", patched(rope, "attention_factor", lambda rope: 1.0)),
    "cos and sin not scaled, no mscale": (
        "v3-no-mscale",
        patched(rope, "attention_factor", lambda rope: 1.0),
    ),
    "rope first in a head": ("v3", patched(attention, "queries", rope_first_heads)),
    "future seen": ("v3", patched(attention, "attend_causally", see_the_future)),
    "gate and up swapped": (
        "v3",
        patched(moe, "swiglu", lambda gate, up: functional.silu(up) * gate),
    ),
    "latent norm weights ignored": ("v3", patched(attention, "latent_norm", unweighted_norm)),
    "latent norm over the rotated key": (
        "v3",
        patched(attention, "latents", norm_over_rotated_key),
    ),
    "latent eps 1e-5": ("v3", patched(attention, "LATENT_EPS", 1e-5)),
    "block eps 1e-5": ("v3", configured(rms_norm_eps=1e-5)),
    "final norm left out": ("v3", patched(model.Model, "final_norm", lambda self, x: x)),
    "mscale^2 missed": ("v3", patched(attention, "softmax_scale", base_scale)),
    "mscale^2 missed, V2": ("v2-lite", patched(attention, "softmax_scale", base_scale)),
    "mscale^2 applied twice": ("v3", patched(attention, "softmax_scale", mscale_twice)),
    "scale from the unrotated part": ("v3", patched(attention, "softmax_scale", nope_scale)),
    "shared expert dropped": (
        "v3",
        patched(moe, "shared_experts", lambda weights, prefix, x: torch.zeros_like(x)),
    ),
    "routed_scaling_factor omitted": ("v3", configured(routed_scaling_factor=1.0)),
    "routed_scaling_factor omitted, V2": ("v2-grouped", configured(routed_scaling_factor=1.0)),
    "routed_scaling_factor before the norm": ("v3", patched(moe, "share", scale_before_norm)),
    "no top-k normalisation": ("v3", configured(norm_topk_prob=False)),
    "top-k normalisation, V2": ("v2-lite", configured(norm_topk_prob=True)),
    "softmax for sigmoid": ("v3", configured(scoring_func="softmax")),
    "sigmoid for softmax": ("v2-lite", configured(scoring_func="sigmoid")),
    "correction bias ignored": (
        "v3",
        patched(moe, "selection_bias", lambda weights, prefix: None),
    ),
    "correction bias in the shares": ("v3", patched(moe, "route", bias_in_shares)),
    "group score max for the top two": ("v3", configured(topk_method="group_limited_greedy")),
    "group score top two for max": ("v2-grouped", configured(topk_method="noaux_tc")),
    "group limit ignored": ("v3", configured(topk_method="greedy")),
    "group limit ignored, V2": ("v2-grouped", configured(topk_method="greedy")),
    "one expert fewer": ("v3", patched(moe, "choose", one_expert_fewer)),
    "router in bf16": ("v3", patched(moe, "route", bf16_router)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_seen(
    reference: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    name, make = MISTAKES[mistake]
    case = reference(name)
    runner = case.model()
    make(monkeypatch, runner)
    assert distance(runner.forward(case.ids), case.logits) > 10 * TOLERANCE


MTP_MISTAKES: dict[str, Callable[[Model, Reference], torch.Tensor]] = {
    "hidden state before the final norm": lambda runner, case: runner.mtp_input(
        3, case.next_ids, runner.hidden(case.ids)
    ),
    "current token for the next": lambda runner, case: runner.mtp_input(
        3, case.ids, runner.final_norm(runner.hidden(case.ids))
    ),
}


@pytest.mark.parametrize("mistake", MTP_MISTAKES)
def test_mistake_in_the_prediction_layer_is_seen(
    reference: Callable[[str], Reference], mistake: str
) -> None:
    case = reference("mtp")
    runner = case.model()
    y = runner.layer(3, MTP_MISTAKES[mistake](runner, case))
    assert distance(runner.mtp_logits(3, y), case.mtp_logits) > 10 * TOLERANCE
