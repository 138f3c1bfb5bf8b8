"""4-bit codes with a zero point and a 16-bit scale per group of columns: what AWQ and GPTQ share.

value = (code - zero) * scale, codes and zero points 0..15: exact in float32, since the difference
has 4 bits and the scale 11. code = round_half_even(value / scale) + zero, clamped. As AutoAWQ 0.2.9
(`pseudo_quantize_tensor`) and gptqmodel 7.7.0 (`Quantizer`) do, codes are chosen with the float32
scale, before it is rounded for storage; with the stored one where rounding moves it by more than
F16's half unit (subnormals, BF16).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from requant.errors import FormatError
from requant.quant import grid
from requant.quant.codec import LEAVE, PLAIN_SCALES, Codes, exact_cast, refine_grid
from requant.quant.grid import Coded, Tile
from requant.quant.search import CLIPS, search

#: The largest code; the code that stands for 0 in symmetric data.
MAX_CODE = 15
CENTRE = 8
#: The values of their option `scale`.
SCALES = ("fp16", "bf16")

#: (low <= 0, high >= 0), the range of each group -> its float32 scale and zero point.
Scales = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def quantize(
    tile: Tile, size: int, scales: Scales, method: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Groups of `size` columns -> codes 0..15 as `grid.encode` packs them, scales in `dtype` and
    zero points uint8 [rows, ceil(cols / size)].

    A last group that is short is filled up with zeros, which the range has anyway. Raises
    FormatError for values that are not finite, and scales that `dtype` does not reach.
    """
    low, high = grid.ranges(tile, size)
    scale, zero = scales(low, high)
    _require_reach(scale, dtype)

    def store(scale: torch.Tensor, zero: torch.Tensor) -> Coded:
        stored = _store(scale, dtype)
        codes = grid.encode_with_zeros(tile, _divisor(scale, stored), zero, size)
        return Coded("int4", codes, stored.to(torch.float32), (1, size), tile.shape[1], zero)

    if method == "mse":
        candidates = (scales(low * clip, high * clip) for clip in CLIPS)
        scale, zero = search(tile, torch.maximum(high, -low), candidates, store)
    held = store(scale, zero)
    return held.codes, held.scale.to(dtype), zero.to(torch.uint8)


def stored_grid(
    codes: Codes, size: int, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Another format's scales in `dtype` and zero points uint8, both [rows, ceil(cols / size)].

    `shape` is the whole weight's. Raises FormatError when `dtype` or the groups cannot keep them.
    """
    tile = codes.tile_shape(shape)
    scale = refine_grid(codes, (1, size), tile, "the format")
    if codes.zero is None:
        zero = torch.full_like(scale, CENTRE, dtype=torch.uint8)
    else:
        zero = refine_grid(replace(codes, scale=codes.zero), (1, size), tile, "the format")
    return exact_cast(scale, dtype), zero


def dynamic_rules(kept: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`dynamic` of a quantization_config: a rule for each module that stays in plain floats.

    gptqmodel reads it for GPTQ and AWQ, vLLM and SGLang for GPTQ: regular expressions matched from
    the start of the name, `-:` before those that are not quantized.
    """
    return {f"-:^{re.escape(module)}$": {} for module in kept}


def scale_option(dtype: str) -> str:
    """The `scale` option of a stored dtype; F16's for one that is none of them."""
    option = PLAIN_SCALES.get(dtype)
    return option if option in SCALES else "fp16"


def stored_group_size(
    config: Mapping[str, Any] | None, cols: int, groups: int, choices: Sequence[int]
) -> int:
    """The group size that a quantization_config tells; without one, what the scales' rows mean."""
    size = (config or {}).get("group_size")
    if type(size) is int:
        return size
    if groups and cols % groups == 0 and cols // groups in choices:
        return cols // groups
    if groups == 1:
        return -1
    raise FormatError(f"{groups} groups over {cols} columns: quantization_config has no group_size")


def _require_reach(scale: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise FormatError for a scale that `dtype` rounds to infinity."""
    if bool(scale.to(dtype).isinf().any()):
        raise FormatError(
            f"needs the scale {float(scale.max()):.6g}, over {torch.finfo(dtype).max:.6g}, the "
            f"largest {str(dtype).removeprefix('torch.')}; use scale=bf16, or {LEAVE}"
        )


def _store(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale as stored: what would vanish becomes the smallest positive number."""
    info = torch.finfo(dtype)
    return scale.clamp(info.tiny * info.eps, info.max).to(dtype)


def _divisor(scale: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """What codes are chosen with."""
    kept = stored.to(torch.float32)
    return torch.where((kept - scale).abs() <= scale * 2**-11, scale, kept)
