"""Symmetric integer quantization, shared by the INT8 and INT4 formats.

Source: compressed-tensors 0.20.0, quantization/utils/helpers.py (calculate_qparams) and
quantization/lifecycle/forward_helpers.py. scale = amax / ((qmax - qmin) / 2), stored in BF16, a
zero scale replaced by BF16's epsilon; code = round_half_even(clamp(weight / scale, qmin, qmax)).
"""

from __future__ import annotations

import torch

from requant.errors import FormatError
from requant.quant.codec import require_finite

ARITHMETICS = ("fp32", "bf16")


def check_arithmetic(arithmetic: str) -> None:
    """Raise FormatError for an unknown arithmetic."""
    if arithmetic not in ARITHMETICS:
        raise FormatError(f"arithmetic={arithmetic}: expected {' or '.join(ARITHMETICS)}")


def quantize_symmetric(
    groups: torch.Tensor, bits: int, arithmetic: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize along the last dim: [..., n] float32 -> (float codes [..., n], BF16 scales [...]).

    `arithmetic` is the precision of the division: "fp32" divides the weight as it is by the stored
    scale; "bf16" rounds weight and quotient to BF16 first, as compressed-tensors does.
    """
    if arithmetic == "bf16":
        groups = groups.to(torch.bfloat16)
    amax = groups.abs().amax(-1)
    require_finite(amax)
    half_range = (2**bits - 1) / 2
    scale = (amax / half_range).to(torch.bfloat16)
    scale = torch.where(scale == 0, torch.finfo(torch.bfloat16).eps, scale)
    codes = groups / scale.to(groups.dtype)[..., None]
    return codes.clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).round_(), scale
