"""Multi-head latent attention (MLA), in its expanded and its absorbed form.

DeepSeek-V2: https://arxiv.org/abs/2405.04434. Both forms compute the same numbers. Expanded makes
keys and values of every head from the cached latents: best for many new tokens. Absorbed folds the
key half of kv_b_proj into the query and its value half into the output, and attends to the latents
themselves: best for decoding, where expanding the whole cache for one token would cost far more.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch.nn import functional

from requant.runner.cache import LatentCache
from requant.runner.config import ModelConfig
from requant.runner.rope import rotate, rotation, yarn_mscale
from requant.runner.weights import Weights

AttentionForm = Literal["auto", "expanded", "absorbed"]

#: Epsilon of q_a_layernorm and kv_a_layernorm, whatever config.json's rms_norm_eps says: what
#: transformers and DeepSeek's own code use. vLLM and SGLang pass rms_norm_eps; in DeepSeek's
#: models that is 1e-6 too.
LATENT_EPS = 1e-6

#: Attention scores held at a time: 256 MiB in float32. Longer inputs go in runs of queries.
_SCORE_ELEMENTS = 64 << 20


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale [..., D] to a root mean square of 1, then by `weight` [D]."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def latent_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The norm of the low-rank latents of queries and of keys and values."""
    return rms_norm(x, weight, LATENT_EPS)


def softmax_scale(config: ModelConfig) -> float:
    """What q.k is multiplied by: qk_head_dim^-0.5, times mscale^2 under YaRN."""
    scale: float = config.qk_head_dim**-0.5
    if config.rope.rope_type != "default" and config.rope.mscale_all_dim:
        scale *= yarn_mscale(config.rope.factor, config.rope.mscale_all_dim) ** 2
    return scale


def use_absorbed(config: ModelConfig, new: int, total: int) -> bool:
    """Whether the absorbed form takes fewer multiplications for `new` of `total` tokens."""
    rank, heads_width = config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim
    expanded = total * rank * heads_width + new * total * (config.qk_head_dim + config.v_head_dim)
    absorbed = new * rank * heads_width + new * total * (2 * rank + config.qk_rope_head_dim)
    return absorbed < expanded


def attention(
    weights: Weights,
    config: ModelConfig,
    index: int,
    x: torch.Tensor,
    cache: LatentCache | None = None,
    form: AttentionForm = "auto",
) -> torch.Tensor:
    """Causal attention of the tokens x [B, T, D] to themselves and to the cache -> [B, T, D].

    H is the number of heads that this rank has: all, or those that its pieces are of.
    """
    prefix = f"model.layers.{index}.self_attn."
    new = x.shape[1]
    start = cache.length(index) if cache is not None else 0
    cos, sin = rotation(config.rope, config.qk_rope_head_dim, start, new, x.device)

    q_nope, q_rope = queries(weights, config, prefix, x)
    q_rope = rotate(q_rope, cos[:, None], sin[:, None])
    latent, k_rope = latents(weights, config, prefix, x)
    seen = torch.cat((latent, rotate(k_rope, cos, sin)), dim=-1)
    if cache is not None:
        seen = cache.append(index, seen)

    if form == "auto":
        # With an empty cache there is nothing to expand again.
        absorb = start > 0 and use_absorbed(config, new, start + new)
    else:
        absorb = form == "absorbed"
    attend = absorbed if absorb else expanded
    heads = attend(weights, config, prefix, q_nope, q_rope, seen)
    return weights.linear(prefix + "o_proj", heads.flatten(-2))


def queries(
    weights: Weights, config: ModelConfig, prefix: str, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries without positions [B, T, H, qk_nope] and those to rotate [B, T, H, qk_rope]."""
    if weights.has(prefix + "q_a_proj.weight"):
        low = weights.linear(prefix + "q_a_proj", x)
        low = latent_norm(low, weights.get(prefix + "q_a_layernorm.weight"))
        q = weights.linear(prefix + "q_b_proj", low)
    else:
        q = weights.linear(prefix + "q_proj", x)
    q = q.unflatten(-1, (-1, config.qk_head_dim))
    q_nope, q_rope = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
    return q_nope, q_rope


def latents(
    weights: Weights, config: ModelConfig, prefix: str, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised latents [B, T, kv_lora_rank] and the shared keys to rotate [B, T, qk_rope]."""
    both = weights.linear(prefix + "kv_a_proj_with_mqa", x)
    latent, k_rope = both.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
    return latent_norm(latent, weights.get(prefix + "kv_a_layernorm.weight")), k_rope


def expanded(
    weights: Weights,
    config: ModelConfig,
    prefix: str,
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    seen: torch.Tensor,
) -> torch.Tensor:
    """Heads' outputs [B, T, H, v_head_dim] from keys and values made of `seen` [B, S, rank + rope].

    Holds S * H * (qk_head_dim + v_head_dim) floats, twice while they are made.
    """
    latent, k_rope = seen.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
    kv = weights.linear(prefix + "kv_b_proj", latent)
    kv = kv.unflatten(-1, (-1, config.qk_nope_head_dim + config.v_head_dim)).transpose(1, 2)
    k_nope, v = kv.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
    shared = k_rope[:, None].expand(-1, k_nope.shape[1], -1, -1)
    k = torch.cat((k_nope, shared), dim=-1)
    q = torch.cat((q_nope, q_rope), dim=-1)
    return attend_causally(q, k, v, softmax_scale(config))


def absorbed(
    weights: Weights,
    config: ModelConfig,
    prefix: str,
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    seen: torch.Tensor,
) -> torch.Tensor:
    """The same as `expanded`, attending to the latents: one key head of rank + rope for all."""
    kv_b = weights.get(prefix + "kv_b_proj.weight")
    kv_b = kv_b.unflatten(0, (-1, config.qk_nope_head_dim + config.v_head_dim))
    to_key, to_value = kv_b.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
    q = torch.cat((torch.einsum("bthn,hnr->bthr", q_nope, to_key), q_rope), dim=-1)
    k = seen[:, None]
    mixed = attend_causally(q, k, k[..., : config.kv_lora_rank], softmax_scale(config))
    return torch.einsum("bthr,hvr->bthv", mixed, to_value)


def attend_causally(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax attention: q [B, T, H, K], k [B, H or 1, S, K], v [B, H or 1, S, V] -> [B, T, H, V].

    The T queries are the last T of the S positions.
    """
    batch, new, heads, width = q.shape
    shared, total = k.shape[1], k.shape[2]
    positions = torch.arange(total, device=q.device)
    outputs = []
    step = max(1, _SCORE_ELEMENTS // (batch * heads * total))
    for begin in range(0, new, step):
        run = q[:, begin : begin + step].transpose(1, 2)  # [B, H, t, K]
        first = total - new + begin
        future = positions > positions[first : first + run.shape[2], None]
        # Heads that share a key are rows of one product: broadcasting would copy the key per head.
        scores = run.reshape(batch, shared, -1, width) @ k.transpose(-1, -2)
        scores = scores.mul_(scale).view(batch, heads, -1, total).masked_fill_(future, -math.inf)
        shares = functional.softmax(scores, dim=-1).view(batch, shared, -1, total)
        outputs.append((shares @ v).view(batch, heads, -1, v.shape[-1]).transpose(1, 2))
    return torch.cat(outputs, dim=1)
