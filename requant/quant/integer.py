"""Integer quantization, shared by the INT8 and INT4 formats.

Source: compressed-tensors 0.20.0, quantization/utils/helpers.py (calculate_qparams) and
quantization/lifecycle/forward_helpers.py. Symmetric: scale = amax / ((qmax - qmin) / 2), code =
round_half_even(clamp(weight / scale, qmin, qmax)). Asymmetric: scale = (max - min) / (qmax - qmin)
with zero between them, and a zero point of round(qmin - min / scale) added before the clamp. The
scale is rounded to the dtype it is stored in; a zero scale becomes that dtype's epsilon.

`arithmetic` is the precision of the division: "fp32" divides the weight as it is by the stored
scale; "bf16" rounds weight, quotient and sum to BF16, as compressed-tensors does.
"""

from __future__ import annotations

import torch

from requant.errors import FormatError
from requant.quant import grid
from requant.quant.codec import FLOAT_SCALES, require_choice, scale_dtype
from requant.quant.grid import Alphabet, Coded, Tile
from requant.quant.search import CLIPS, METHODS, search

ARITHMETICS = ("fp32", "bf16")

#: The ends of an asymmetric group are clipped alone as well as together.
_CLIP_PAIRS = (
    *((clip, clip) for clip in CLIPS),
    *((clip, 1.0) for clip in CLIPS[1:]),
    *((1.0, clip) for clip in CLIPS[1:]),
)


def check_options(scale: str, method: str, arithmetic: str) -> None:
    """Raise FormatError for an unknown value, or values that do not go together."""
    require_choice("scale", scale, tuple(FLOAT_SCALES))
    require_choice("method", method, METHODS)
    require_choice("arithmetic", arithmetic, ARITHMETICS)
    if arithmetic == "bf16" and (scale, method) != ("bf16", "rtn"):
        raise FormatError(
            f"arithmetic=bf16 repeats compressed-tensors, which knows scale=bf16 and method=rtn, "
            f"not scale={scale} and method={method}; leave it out"
        )


def quantize_symmetric(
    tile: Tile,
    group_size: int,
    bits: int,
    arithmetic: str = "fp32",
    dtype: torch.dtype = torch.bfloat16,
    method: str = "rtn",
    half_range: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a tile [rows, cols] in groups of columns, -1 for whole rows: codes of 4 or 8 bits
    as `grid.encode` gives them, and scales [rows, groups].

    `half_range` is what amax is divided by, (qmax - qmin) / 2 unless given.
    """
    if arithmetic == "bf16":
        tile = grid.decode(tile).to(torch.bfloat16)
    amax = grid.amax(tile, group_size)
    half_range = half_range or (2**bits - 1) / 2
    alphabet: Alphabet = "int4" if bits == 4 else "int8"
    block = (1, group_size)

    def store(scale: torch.Tensor) -> Coded:
        return grid.coded(alphabet, tile, scale.to(torch.float32), block)

    if arithmetic == "bf16":
        amax = amax.to(torch.bfloat16)
    scale = cast_scale(amax / half_range, dtype)
    if method == "mse":
        candidates = ((cast_scale(amax * clip / half_range, dtype),) for clip in CLIPS)
        (scale,) = search(tile, amax, candidates, store)
    step = scale.to(torch.float32)
    if arithmetic == "bf16":  # the quotient, rounded before it becomes an integer
        groups = grid.decode(tile).unflatten(1, (amax.shape[1], -1))
        tile = (groups / step[..., None]).to(torch.bfloat16).flatten(1)
        step = torch.ones_like(step)
    return grid.encode(alphabet, tile, step, block), scale


def quantize_asymmetric(
    tile: Tile,
    group_size: int,
    arithmetic: str = "fp32",
    dtype: torch.dtype = torch.bfloat16,
    method: str = "rtn",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize a tile [rows, cols] in groups of columns, -1 for whole rows: codes of 4 bits as
    `grid.encode` gives them, scales and uint8 zero points 0..15 [rows, groups]."""
    if arithmetic == "bf16":
        tile = grid.decode(tile).to(torch.bfloat16)
    low, high = grid.ranges(tile, group_size)
    precision = torch.bfloat16 if arithmetic == "bf16" else torch.float32
    low, high = low.to(precision), high.to(precision)

    def parameters(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        step = (high - low) / 15
        zero = (-8 - low / step.to(dtype).to(precision)).clamp_(-8, 7).round_()
        return cast_scale(step, dtype), zero.nan_to_num_(0.0)  # a group of zeros: 0 / 0

    def store(scale: torch.Tensor, zero: torch.Tensor) -> Coded:
        step, stored = scale.to(torch.float32), zero.to(torch.float32) + 8
        codes = grid.encode_with_zeros(tile, step, stored, group_size, first=True)
        return Coded("int4", codes, step, (1, group_size), tile.shape[1], stored)

    scale, zero = parameters(low, high)
    if method == "mse":
        candidates = (parameters(low * below, high * above) for below, above in _CLIP_PAIRS)
        scale, zero = search(tile, torch.maximum(high, -low), candidates, store)
    if arithmetic == "bf16":  # the sum, rounded before it becomes an integer
        groups = grid.decode(tile).to(precision).unflatten(1, (low.shape[1], -1))
        sums = (groups / scale[..., None]).add_(zero[..., None]).to(torch.float32).flatten(1)
        one = torch.ones(1, 1, device=tile.device)
        codes = grid.encode("int4", sums, one, (-1, -1))
    else:
        codes = store(scale, zero).codes
    return codes, scale, zero.add(8).to(torch.uint8)


def cast_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales as they are stored: a zero becomes the dtype's epsilon. Raises FormatError for one
    beyond the dtype's range."""
    cast = scale.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        name = next(name for name in FLOAT_SCALES if scale_dtype(name) == dtype)
        raise FormatError(
            f"needs the scale {float(scale.max()):.6g}, beyond {name}'s largest value "
            f"{torch.finfo(dtype).max:.6g}; use scale=bf16 for this weight"
        )
    return torch.where(cast == 0, torch.finfo(dtype).eps, cast)
