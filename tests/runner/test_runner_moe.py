"""Routing and experts, on cases that can be solved by eye."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from runner_references import Reference, sizes

from requant.runner import moe
from requant.runner.ranks import Rank
from requant.runner.weights import Weights


class Table(Weights):
    """Weights from a dictionary, counting what is asked for."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.asked: list[str] = []
        self.rank = Rank.alone(tensors)

    def has(self, name: str) -> bool:
        return name in self.tensors

    def get(self, name: str) -> torch.Tensor:
        self.asked.append(name)
        return self.tensors[name]

    def partial(self, module: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.get(f"{module}.weight").T


def sigmoid_logit(score: float) -> float:
    return math.log(score / (1 - score))


def config(experts: int, per_token: int, **changes: Any) -> Any:
    return sizes(
        n_routed_experts=experts,
        num_experts_per_tok=per_token,
        **changes,
    )


def test_mixture_by_eye() -> None:
    """Width 1; expert e computes silu(x) * e * x. Scores 1/2 and 1/4 win: shares 2/3 and 1/3."""
    prefix = "model.layers.0.mlp."
    one = torch.ones(1, 1)
    scores = [0.5, 0.1, 0.25, 0.2]
    tensors = {prefix + "gate.weight": torch.tensor([[sigmoid_logit(s)] for s in scores])}
    for expert in range(4):
        tensors[f"{prefix}experts.{expert}.gate_proj.weight"] = one
        tensors[f"{prefix}experts.{expert}.up_proj.weight"] = expert * one
        tensors[f"{prefix}experts.{expert}.down_proj.weight"] = one
    for part in ("gate_proj", "up_proj", "down_proj"):
        tensors[f"{prefix}shared_experts.{part}.weight"] = one
    weights = Table(tensors)
    y = moe.feed_forward(weights, config(4, 2, routed_scaling_factor=3), 0, torch.ones(1, 1, 1))
    silu = 1 / (1 + math.exp(-1))
    routed = 3 * (2 / 3 * 0 + 1 / 3 * 2) * silu
    assert y.item() == pytest.approx(routed + silu, rel=1e-6)
    # Experts 1 and 3 were chosen by no token, and not read.
    assert not [n for n in weights.asked if ".experts.1." in n or ".experts.3." in n]


def test_bias_moves_the_choice_and_not_the_share() -> None:
    logits = torch.tensor([[sigmoid_logit(s) for s in (0.5, 0.4, 0.3)]])
    chosen, shares = moe.route(config(3, 2), logits, torch.tensor([-0.3, 0.0, 0.0]))
    order = chosen[0].argsort()
    assert chosen[0][order].tolist() == [1, 2]
    assert shares[0][order].tolist() == pytest.approx([4 / 7, 3 / 7])


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("noaux_tc", [2, 3]),  # pairs: 0.9 + 0.1 < 0.6 + 0.5
        ("group_limited_greedy", [0, 1]),  # best: 0.9 > 0.6
        ("greedy", [0, 2]),  # groups do not matter
    ],
)
def test_group_limit_by_eye(method: str, expected: list[int]) -> None:
    values = torch.tensor([[0.9, 0.1, 0.6, 0.5]])
    limited = config(4, 2, n_group=2, topk_group=1, topk_method=method)
    assert sorted(moe.choose(limited, values)[0].tolist()) == expected


def test_experts_out_of_reach_stay_out_when_values_are_negative() -> None:
    values = torch.tensor([[-0.1, -3.0, -0.5, -0.6]])
    limited = config(4, 2, n_group=2, topk_group=1)
    assert sorted(moe.choose(limited, values)[0].tolist()) == [2, 3]


def test_only_reached_experts_are_decoded(reference: Callable[[str], Reference]) -> None:
    model = reference("v3").model()
    decoded: list[str] = []
    decode = model.weights.get
    model.weights.get = lambda name: decoded.append(name) or decode(name)  # type: ignore
    model.layer(1, torch.ones(1, 1, model.config.hidden_size))
    experts = {name.split(".")[5] for name in decoded if ".mlp.experts." in name}
    assert len(experts) == model.config.num_experts_per_tok
