"""Codes in bytes and words, and how they become floats.

Four-bit codes are packed least significant nibble first. Source: compressed-tensors 0.20.0,
compressors/pack_quantized: element k of a row lies in word k // 8, bits 4 * (k % 8) .. + 3. On a
little-endian machine that is two codes a byte, low first.

All decoders are several times faster than the obvious torch code (bench/codecs.py): they move bits
in integers as narrow as the codes, where a pass costs the least.
"""

from __future__ import annotations

import torch

from requant.buffers import empty
from requant.quant.compiled import flat, loops_for


def row_major(matrix: torch.Tensor) -> torch.Tensor:
    """The same matrix, row after row in memory, with the strides that `view(dtype)` insists on
    where a side of one leaves them open."""
    return matrix.contiguous().as_strided(matrix.shape, (matrix.shape[1], 1))


def turned(matrix: torch.Tensor) -> torch.Tensor:
    """The transpose [cols, rows], row after row in memory."""
    if matrix.device.type != "cpu":
        return row_major(matrix.T)
    rows, cols = matrix.shape
    return empty((cols, rows), matrix.dtype).copy_(matrix.T)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes 0..15 [rows, cols] -> int32 words [rows, ceil(cols/8)], zero-padded."""
    missing = -codes.shape[1] % 8
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing))
    loops = loops_for(codes)
    if loops is not None:
        words = empty((codes.shape[0], codes.shape[1] // 8), torch.int32)
        loops.pack(flat(codes), flat(words).view("u1"))
        return words
    pairs = row_major(codes).view(torch.int16)
    return pairs.bitwise_right_shift(4).bitwise_or_(pairs).to(torch.uint8).view(torch.int32)


def unpack_nibbles(words: torch.Tensor, cols: int) -> torch.Tensor:
    """int32 words [rows, ceil(cols/8)], or their bytes, -> uint8 codes 0..15 [rows, cols]: undoes
    `pack_nibbles`."""
    pairs = row_major(words).view(torch.uint8)
    loops = loops_for(words)
    if loops is not None:
        codes = empty((pairs.shape[0], 2 * pairs.shape[1]), torch.uint8)
        loops.unpack(flat(pairs), flat(codes))
        return codes[:, :cols]
    return torch.stack((pairs & 0xF, pairs >> 4), dim=2).flatten(1)[:, :cols]


def centred_nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 words [rows, words] -> float32 [rows, 8 * words]: codes 0..15 less 8."""
    pairs = row_major(words).view(torch.uint8).to(torch.int16)
    # Each nibble at the top of a byte of its own, 0xF0F0; its first bit flipped takes 8 off.
    high = pairs.bitwise_left_shift(8)
    pairs.bitwise_left_shift_(4).bitwise_or_(high).bitwise_and_(-0x0F10).bitwise_xor_(-0x7F80)
    return pairs.view(torch.int8).bitwise_right_shift_(4).to(torch.float32)


def e2m1_and_scale(packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E2M1 codes, two a byte, [rows, cols / 2] and float32 scales, powers of two moved from one to
    the other: float32 [rows, cols] and scales, their products the exact ones rounded once.

    A nibble is a sign, two bits of exponent and one of mantissa: as the first and the last bits of
    a float16 that come before nine zeros, 2^-14 of its value, subnormals included.
    """
    wide = row_major(packed).view(torch.uint8).to(torch.int32)
    wide.mul_(0x1001000)  # the low nibble at bits 12..15, the high one at 28..31
    half = wide.view(torch.int16).bitwise_right_shift_(3).bitwise_and_(-0x7200)  # 0x8E00
    return _moved(half.view(torch.float16).to(torch.float32), 2.0**14, scale)


def e4m3_to_float32(codes: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn -> float32 of the same shape, exact; NaN codes become NaN."""
    values, factor = _e4m3_values(codes)
    return values.mul_(factor)


def e4m3_and_scale(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn codes and float32 scales, powers of two moved from one to the other where that
    saves work: float32 tensors whose products are those of codes and scales, to the last bit."""
    return _moved(*_e4m3_values(codes), scale)


def _e4m3_values(codes: torch.Tensor) -> tuple[torch.Tensor, float]:
    """float8_e4m3fn -> new float32 of the same shape, and the power of two that they lack.

    Shifted left by 7 bits, sign aside, a code is a float16 of 1/256 of its value, subnormals
    included: the exponents' biases are 7 and 15. Processors convert float16 quickly.
    """
    signed, unsigned = codes.view(torch.int8), codes.view(torch.uint8)
    if codes.numel() and (int(signed.amax()) == 0x7F or int(unsigned.amax()) == 0xFF):
        return codes.to(torch.float32), 1.0  # NaN, which the shift would make 480
    half = signed.to(torch.int16)  # the sign fills the upper byte
    half.bitwise_left_shift_(7).bitwise_and_(-0x4080)  # 0xBF80: sign, 4 exponent bits, 3 mantissa
    return half.view(torch.float16).to(torch.float32), 256.0


def _moved(
    values: torch.Tensor, factor: float, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factor that `values` lack, a power of two, given to the scales; to the values, where a
    scale would overflow."""
    scaled = scale * factor
    if bool(torch.isinf(scaled.abs().sum())):
        return values.mul_(factor), scale
    return values, scaled
