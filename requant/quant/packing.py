"""Four-bit codes in 32-bit words, least significant nibble first.

Source: compressed-tensors 0.20.0, compressors/pack_quantized: element k of a row lies in word
k // 8, bits 4 * (k % 8) .. + 3. On a little-endian machine that is two codes a byte, low first.
"""

from __future__ import annotations

import torch


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes 0..15 [rows, cols] -> int32 words [rows, ceil(cols/8)], zero-padded."""
    missing = -codes.shape[1] % 8
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing))
    pairs = codes.reshape(codes.shape[0], -1, 2)
    return (pairs[..., 0] | (pairs[..., 1] << 4)).contiguous().view(torch.int32)


def unpack_nibbles(words: torch.Tensor, cols: int) -> torch.Tensor:
    """int32 words [rows, ceil(cols/8)] -> uint8 codes 0..15 [rows, cols]."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 0xF, pairs >> 4), dim=2).flatten(1)[:, :cols]
