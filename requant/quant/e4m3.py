"""E4M3 codes and their scales, shared by the FP8 formats.

E4M3 has 4 exponent bits with bias 7 and 3 mantissa bits: largest value 448, smallest step 2^-9, no
infinity. A scale is a plain float, amax / 448, or a power of two, which E8M0 stores in one byte b
as 2^(b - 127) (e8m0.py). Source: compressed-tensors 0.20.0, quantization/utils/helpers.py
(calculate_qparams), and those named in the formats' own modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from requant.errors import FormatError
from requant.quant import grid
from requant.quant.codec import (
    FLOAT_SCALES,
    TORCH_DTYPES,
    Codes,
    TensorSpec,
    exact_cast,
    require_choice,
)
from requant.quant.e8m0 import e8m0_to_float32, exponent_bytes
from requant.quant.grid import Tile
from requant.quant.packing import unpack_nibbles

E4M3_MAX = 448.0
E8M0 = torch.float8_e8m0fnu
#: The option `scale` -> how safetensors calls the dtype. "ue8m0" is a power of two kept as F32.
FLOATS = ("fp32", "bf16", "fp16")
SCALE_DTYPES = {option: FLOAT_SCALES[option] for option in FLOATS}
SCALE_DTYPES |= {"ue8m0": "F32", "e8m0": "F8_E8M0"}

#: E2M1 values times 2^n are E4M3 values for these n: 0.5 * 2^-8 is the smallest, 6 * 2^6 = 384.
_LOWEST_SHIFT, _HIGHEST_SHIFT = -8, 6


def check_arithmetic(arithmetic: str, scale: str) -> None:
    """Raise FormatError for an unknown arithmetic, or one that the scale's dtype does not have."""
    require_choice("arithmetic", arithmetic, ("fp32", "bf16"))
    if arithmetic == "bf16" and scale != "bf16":
        raise FormatError(
            f"arithmetic=bf16 computes scales in bf16, which scale={scale} is not; use scale=bf16"
        )


def fine_grained_config(quant_method: str, kept: Sequence[str], **more: Any) -> dict[str, Any]:
    """The quantization_config that DeepSeek began and transformers, vLLM and SGLang share. `more`
    tells the block (`weight_block_size`, None for one scale a weight) and the scales."""
    config = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": quant_method, **more}
    return {**config, "modules_to_not_convert": list(kept)} if kept else config


def is_e4m3(spec: TensorSpec | None) -> bool:
    """Whether a stored `weight` is a matrix of E4M3 codes."""
    return spec is not None and spec.dtype == "F8_E4M3" and len(spec.shape) == 2


def quantize(
    tile: Tile, scale: torch.Tensor, block: tuple[int, int], arithmetic: str
) -> torch.Tensor:
    """The E4M3 codes nearest to a tile divided by its grid of scales; with arithmetic=bf16
    tile and quotient are rounded to BF16 before."""
    if arithmetic == "bf16":
        quotient = grid.decode(tile).to(torch.bfloat16) / scale.to(torch.bfloat16)
        return quotient.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return grid.encode("e4m3", tile, scale.to(torch.float32), block)


def plain_scale(amax: torch.Tensor, scale: str) -> torch.Tensor:
    """amax / 448 in the dtype of the option `scale`; where that is 0, the dtype's epsilon.

    Raises FormatError when it is beyond the dtype, which only FP16 has.
    """
    dtype = TORCH_DTYPES[SCALE_DTYPES[scale]]
    stored = (amax.to(torch.float32) / E4M3_MAX).to(dtype)
    if dtype == torch.float16 and bool(torch.isinf(stored).any()):
        raise FormatError(
            f"the scale of {float(amax.max()):.6g} / 448 is beyond fp16's largest value 65504; "
            "use scale=bf16 or scale=fp32"
        )
    return torch.where(stored == 0, torch.finfo(dtype).eps, stored)


def exponents(amax: torch.Tensor, rule: str = "ceil") -> torch.Tensor:
    """The E8M0 bytes of amax / 448 as a power of two; with the rule "ceil" nothing saturates."""
    return exponent_bytes(amax, E4M3_MAX, rule)


def scale_to_float32(scale: torch.Tensor) -> torch.Tensor:
    """A stored scale of any dtype in float32."""
    if scale.dtype in (E8M0, torch.uint8):
        return e8m0_to_float32(scale)
    return scale.to(torch.float32)


def exact_scale(scale: torch.Tensor, option: str, name: str) -> torch.Tensor:
    """Scales that are handed over, in the dtype of the option `scale`. Raises FormatError when one
    would change: `name` is the format's."""
    what = f"{name}[scale={option}]: the source's scale"
    if option == "ue8m0":
        return exact_cast(scale, E8M0, what).to(torch.float32)
    return exact_cast(scale, TORCH_DTYPES[SCALE_DTYPES[option]], what)


def upcast_e2m1(
    codes: Codes, block: tuple[int, int], tile: tuple[int, int], headroom: int = _HIGHEST_SHIFT
) -> Codes:
    """FP4 codes with E8M0 scales as E4M3 codes with one E8M0 scale per (larger) `block`.

    The new scale is the block's largest / 2^headroom, and the codes take the difference: exact as
    long as the exponents in a block span at most 14 (8 + headroom). Source: DeepSeek-V4's
    inference/convert.py. Raises FormatError when they span more. A group with the byte 0 counts as
    one of zeros, whose exponent means nothing; other codes in it are refused.
    """
    if codes.divisor is not None:
        raise FormatError("FP4 codes with a global scale have no power-of-two scales to share")
    exponent = exact_cast(codes.scale, E8M0, "FP4 scale").view(torch.uint8)
    group = _sides(codes.block, tile)
    block = _sides(block, tile)
    for axis in (0, 1):
        if block[axis] % group[axis] and block[axis] != tile[axis]:
            raise FormatError(
                f"FP4 groups of {group[0]}x{group[1]} do not fill blocks of {block[0]}x{block[1]}"
            )
    counts = -(-block[0] // group[0]), -(-block[1] // group[1])
    top = _reduce(exponent, counts, 0).amax((1, 3))
    least = _reduce(exponent.masked_fill(exponent == 0, 255), counts, 255).amin((1, 3))
    span = top.to(torch.int32) - least
    widest = int(span.max())
    if widest > headroom - _LOWEST_SHIFT:
        row, col = divmod(int(span.flatten().argmax()), span.shape[1])
        raise FormatError(
            f"the FP4 scales in block ({row}, {col}) of {block[0]}x{block[1]} span {widest} powers "
            f"of two, and FP8 holds {headroom - _LOWEST_SHIFT}; convert by re-quantizing instead"
        )
    base = top.to(torch.int32).sub_(headroom).clamp_min_(0)
    scale = base.to(torch.uint8).view(E8M0)
    if codes.codes is None:
        return Codes("e4m3", None, scale, block)
    each = base.repeat_interleave(counts[0], 0)[: exponent.shape[0]]
    each = each.repeat_interleave(counts[1], 1)[:, : exponent.shape[1]]
    shift = exponent - each
    if bool((shift < _LOWEST_SHIFT).any()):
        lost = (shift < _LOWEST_SHIFT).repeat_interleave(group[0], 0)[: tile[0]]
        lost = lost.repeat_interleave(group[1], 1)[:, : tile[1]]
        if bool((lost & ((unpack_nibbles(codes.codes, tile[1]) & 7) != 0)).any()):
            raise FormatError("holds FP4 values near 2^-127 beside far larger ones; re-quantize it")
    factor = shift.clamp_min_(_LOWEST_SHIFT).to(torch.float32).exp2_()
    raised = grid.Coded("e2m1", codes.codes, factor, group, tile[1])
    return Codes("e4m3", grid.encode("e4m3", raised, factor.new_ones(1, 1), (-1, -1)), scale, block)


def _sides(block: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
    """A block's sides where it does not reach beyond the tile; -1 means all of it."""
    rows, cols = (min(b, t) if b > 0 else t for b, t in zip(block, tile, strict=True))
    return rows, cols


def _reduce(grid: torch.Tensor, counts: tuple[int, int], fill: int) -> torch.Tensor:
    """[r, c] -> [r / counts[0], counts[0], c / counts[1], counts[1]], padded with `fill`."""
    padding = (0, -grid.shape[1] % counts[1], 0, -grid.shape[0] % counts[0])
    grid = torch.nn.functional.pad(grid, padding, value=fill)
    rows, cols = grid.shape
    return grid.view(rows // counts[0], counts[0], cols // counts[1], counts[1])
