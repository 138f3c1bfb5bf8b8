"""E8M0, the exponent bytes of MX formats: byte b is the multiplier 2^(b - 127), 255 is NaN.

Sources of the rules: compressed-tensors 0.20.0, quantization/utils/mxfp_utils.py ("ct"); NVIDIA
ModelOpt 0.47.0, quantization/qtensor/mxfp4_tensor.py ("ceil", there by logarithms, here by bits).
"""

from __future__ import annotations

import math

import torch

from requant.buffers import empty
from requant.errors import FormatError
from requant.quant.compiled import flat, loops_for

RULES = ("ceil", "ct")
_MANTISSA = 0x7FFFFF  # of a float32, below its 8 bits of exponent


def e8m0_to_float32(exponents: torch.Tensor) -> torch.Tensor:
    """uint8 bytes or float8_e8m0fnu -> float32 of the same shape, exact. Raises FormatError for
    255, NaN."""
    loops = loops_for(exponents)
    if loops is None:
        require_exponents(exponents)
        return exponents.view(torch.float8_e8m0fnu).to(torch.float32)
    values = empty(tuple(exponents.shape))
    _require(loops.e8m0_values(flat(exponents, torch.uint8), flat(values)))
    return values


def exponent_bytes(amax: torch.Tensor, largest: float, rule: str) -> torch.Tensor:
    """The uint8 exponents of groups with these finite float32 maxima, 0..254.

    `largest` is the largest code (6 for E2M1, 448 for E4M3). "ceil" gives the smallest power of two
    with amax <= largest * 2^e, so nothing saturates. "ct" rounds amax to a power of two, up from
    1.75 on, and divides by the one in `largest`: amax / 2^e may be above `largest` (up to 7 for
    E2M1, 448 for E4M3), where the code saturates. A group of zeros has the byte 0.
    """
    fraction, exponent = math.frexp(largest)  # 6 = 0.75 * 2^3
    round_up = _MANTISSA - int((2 * fraction - 1) * 2**23) if rule == "ceil" else 1 << 21
    loops = loops_for(amax)
    if loops is None:
        biased = (amax.view(torch.int32) + round_up) >> 23
        return (biased - (exponent - 1)).clamp_(0, 254).to(torch.uint8)
    exponents = empty(tuple(amax.shape), torch.uint8)
    loops.e8m0_exponents(flat(amax), round_up, exponent - 1, flat(exponents))
    return exponents


def require_exponents(exponents: torch.Tensor) -> None:
    """Raise FormatError for the byte 255, which is NaN (uint8 or float8_e8m0fnu)."""
    if exponents.numel():
        _require(int(exponents.view(torch.uint8).amax()))


def _require(largest: int) -> None:
    if largest == 255:
        raise FormatError("a scale is the E8M0 byte 255, which is NaN; the weight is damaged")
