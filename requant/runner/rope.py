"""Rotary positions: YaRN frequencies, mscale, and the rotation of interleaved pairs.

YaRN: https://arxiv.org/abs/2309.00071; mscale as in DeepSeek-V2's and V3's modeling code.
"""

from __future__ import annotations

import math

import torch

from requant.runner.config import RopeConfig


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature for a context stretched `factor` times."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by.

    It is 1 in DeepSeek's models: there mscale equals mscale_all_dim and the softmax scale carries
    the temperature instead. Exactly one of the two places does.
    """
    if rope.rope_type == "default":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor, 1.0)


def inverse_frequencies(rope: RopeConfig, dim: int) -> torch.Tensor:
    """Radians per position of each pair, [dim / 2] float32, for `dim` rotated dimensions.

    YaRN keeps the fast pairs, slows the slow ones down `factor` times and blends in between.
    """
    frequencies = 1.0 / rope.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.rope_type == "default":
        return frequencies
    low, high = _blend_range(rope, dim)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp)


def _blend_range(rope: RopeConfig, dim: int) -> tuple[float, float]:
    """The pairs between which YaRN blends: beta_fast and beta_slow turns in the old context."""

    def pair_of(turns: float) -> float:
        wavelength = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(rope.rope_theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if high == low else high  # the reference's guard against 0 / 0


def rotation(
    rope: RopeConfig, dim: int, start: int, length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin, each [length, dim / 2], of the positions from `start` on."""
    positions = torch.arange(start, start + length, dtype=torch.float32, device=device)
    angles = positions[:, None] * inverse_frequencies(rope, dim).to(device)
    scale = attention_factor(rope)
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (0, 1), (2, 3), ... of the last axis of [..., dim].

    The result stays interleaved, as in DeepSeek's own code; transformers' V3 splits it into halves,
    which the product of q and k does not see.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
