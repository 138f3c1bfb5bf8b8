"""E2M1, the 4-bit floats of MXFP4 and NVFP4: rounding to them, and two of them in a byte.

Codes 0..7 are 0, 0.5, 1, 1.5, 2, 3, 4 and 6; bit 3 is the sign, so 8 is -0. Two codes lie in a
byte, the even column in the low nibble. Rounding is to the nearest value, a tie to the even code,
as in compressed-tensors 0.20.0, quantization/utils/fp4_utils.py.
"""

from __future__ import annotations

import functools
from itertools import pairwise

import torch

E2M1_MAX = 6.0
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: What the codes 0..15 stand for.
E2M1_VALUES = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))


def e2m1_bytes(values: torch.Tensor) -> torch.Tensor:
    """Round float32 [rows, cols], cols even, to E2M1: uint8 [rows, cols / 2]. Overwrites `values`.

    Values beyond 6 saturate; -0.0 becomes 0, and what is negative and rounds to zero becomes -0.

    All points halfway between two codes are multiples of 1/4. So floor(4x) + ceil(4x), a whole
    number from -48 to 48, tells everything that rounding asks: even on a multiple, odd between two,
    and -1 for the smallest negative value. A table turns two of them into a byte.
    """
    values.mul_(4).clamp_(-4 * E2M1_MAX, 4 * E2M1_MAX)
    floor = values.floor()
    pairs = values.ceil_().add_(floor).to(torch.int8).view(torch.uint16)
    index = pairs.to(torch.int32).flatten()
    return _pair_table(values.device).index_select(0, index).view(pairs.shape)


@functools.cache
def _pair_table(device: torch.device) -> torch.Tensor:
    """The byte of two codes at the uint16 whose bytes are floor(4x) + ceil(4x) of each, as int8."""
    sums = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.int8)
    size, code = sums.to(torch.int16).abs(), (sums < 0).to(torch.uint8) * 8
    for upper, (low, high) in enumerate(pairwise(_MAGNITUDES), start=1):
        halfway = 4 * (low + high)  # a tie moves up where that is the even code
        code += (size >= halfway if upper % 2 == 0 else size > halfway).to(torch.uint8)
    return (code[::2] | code[1::2] << 4).to(device)
