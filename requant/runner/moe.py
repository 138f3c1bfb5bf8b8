"""The feed-forward half of a layer: a plain MLP, or a router and its experts.

Routing as in DeepSeek-V2 (https://arxiv.org/abs/2405.04434) and V3
(https://arxiv.org/abs/2412.19437): `greedy` takes the best experts, `group_limited_greedy` looks
only into the groups with the best single expert, `noaux_tc` into those with the best pair, after
a correction bias that decides the choice but not the weights.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from requant.runner.config import ModelConfig
from requant.runner.weights import Weights


def feed_forward(
    weights: Weights, config: ModelConfig, index: int, x: torch.Tensor
) -> torch.Tensor:
    """The MLP or the mixture of experts of a layer, [B, T, D] -> [B, T, D]."""
    prefix = f"model.layers.{index}.mlp."
    if not weights.has(prefix + "gate.weight"):
        return mlp(weights, prefix, x)
    tokens = x.flatten(0, -2)
    logits = functional.linear(tokens, weights.get(prefix + "gate.weight"))
    chosen, shares = route(config, logits, selection_bias(weights, prefix))
    y = experts(weights, prefix, tokens, chosen, shares)
    return y.view_as(x) + shared_experts(weights, prefix, x)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The gated activation: silu of the gate, times the other projection."""
    return functional.silu(gate) * up


def mlp(weights: Weights, prefix: str, x: torch.Tensor, whole: bool = True) -> torch.Tensor:
    """down(swiglu(gate(x), up(x))) with the three projections under `prefix`.

    Unless `whole`, only this rank's part of the sum over the inner columns.
    """
    gate, up = weights.linear(prefix + "gate_proj", x), weights.linear(prefix + "up_proj", x)
    down = weights.linear if whole else weights.partial
    return down(prefix + "down_proj", swiglu(gate, up))


def shared_experts(weights: Weights, prefix: str, x: torch.Tensor) -> torch.Tensor:
    """The experts that see every token: stored as one MLP, added unscaled; zeros if none."""
    if not weights.has(prefix + "shared_experts.gate_proj.weight"):
        return torch.zeros_like(x)
    return mlp(weights, prefix + "shared_experts.", x)


def experts(
    weights: Weights, prefix: str, x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor
) -> torch.Tensor:
    """Sum of each token's chosen experts: x [N, D], chosen and shares [N, k] -> [N, D].

    One expert at a time, in ascending order; an expert that no token chose is never decoded. A rank
    runs those it has; where several have the same one, its tokens take turns.
    """
    y = torch.zeros_like(x)
    for expert in torch.unique(chosen).tolist():
        turn = weights.rank.turn(f"{prefix}experts.{expert}.down_proj.weight")
        if turn is None:
            continue
        number, copies = turn
        token, slot = torch.where(chosen == expert)
        ours = token % copies == number
        token, slot = token[ours], slot[ours]
        out = mlp(weights, f"{prefix}experts.{expert}.", x[token], whole=False)
        y.index_add_(0, token, out * shares[token, slot, None])
    return weights.rank.stage.sum(y)


def selection_bias(weights: Weights, prefix: str) -> torch.Tensor | None:
    """V3's correction bias [E], which balances the load of the experts; None in V2."""
    name = prefix + "gate.e_score_correction_bias"
    return weights.get(name) if weights.has(name) else None


def route(
    config: ModelConfig, logits: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [N, E] -> chosen experts and their shares, both [N, k]."""
    scores = score(config, logits)
    chosen = choose(config, scores if bias is None else scores + bias)
    return chosen, share(config, scores, chosen)


def score(config: ModelConfig, logits: torch.Tensor) -> torch.Tensor:
    """How much each token wants each expert, [N, E] -> [N, E]."""
    return logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(dim=-1)


def choose(config: ModelConfig, values: torch.Tensor) -> torch.Tensor:
    """The experts with the largest values within the groups a token may use, [N, E] -> [N, k]."""
    if config.topk_method != "greedy" and config.n_group > 1:
        values = limit_groups(config, values)
    return values.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices


def group_scores(config: ModelConfig, grouped: torch.Tensor) -> torch.Tensor:
    """The worth of each group, [N, G, E / G] -> [N, G]: its best pair in V3, its best in V2."""
    best = min(2 if config.topk_method == "noaux_tc" else 1, grouped.shape[-1])
    return grouped.topk(best, dim=-1).values.sum(dim=-1)


def limit_groups(config: ModelConfig, values: torch.Tensor) -> torch.Tensor:
    """Put the experts outside each token's best topk_group groups at -inf, [N, E] -> [N, E].

    Not at 0, as some code does: with the correction bias a value within reach can be negative.
    """
    grouped = values.unflatten(-1, (config.n_group, -1))
    kept = group_scores(config, grouped).topk(config.topk_group, dim=-1, sorted=False).indices
    outside = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=values.device)
    outside.scatter_(-1, kept, False)
    limited: torch.Tensor = grouped.masked_fill(outside[..., None], -math.inf).flatten(-2)
    return limited


def share(config: ModelConfig, scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The weight of each chosen expert's output, from the unbiased scores, [N, k]."""
    shares = scores.gather(-1, chosen)
    if config.norm_topk_prob:
        shares = shares / (shares.sum(dim=-1, keepdim=True) + 1e-20)
    return shares * config.routed_scaling_factor
