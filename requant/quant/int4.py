"""compressed-tensors W4A16: INT4 codes packed in 32-bit words, one BF16 multiplier per group.

Source: compressed-tensors 0.20.0, `pack-quantized`, preset W4A16.
`weight_packed` I32 [rows, cols/8] (code + 8, low nibble first); `weight_scale` BF16
[rows, cols/group_size]; `weight_shape` I64 [2] = (rows, cols).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from requant.errors import FormatError
from requant.quant.codec import Codec, TensorSpec, Tolerance, check_specs
from requant.quant.compressed_tensors import QUANT_METHOD, scheme, stored_weights
from requant.quant.integer import check_arithmetic, quantize_symmetric
from requant.quant.packing import nibbles_to_float32, pack_nibbles

GROUP_SIZES = (32, 64, 128)

#: What the stored codes 0..15 stand for, before the scale.
_VALUES = tuple(float(code) for code in range(-8, 8))


@dataclass(frozen=True)
class Int4(Codec):
    """Symmetric INT4 in groups along the columns. `arithmetic` changes codes, not the format."""

    group_size: int = 128
    arithmetic: str = field(default="fp32", compare=False)

    name = "int4"
    summary = "compressed-tensors W4A16 INT4, packed, one scale a group"
    loaded_by = "transformers, vLLM, SGLang"
    checked_against = "compressed-tensors"
    quant_method = QUANT_METHOD
    tolerance = Tolerance(max_kl=0.1, min_sqnr_db=10.0)

    def __post_init__(self) -> None:
        check_arithmetic(self.arithmetic)
        if self.group_size not in GROUP_SIZES:
            raise FormatError(
                f"group_size={self.group_size}: expected {', '.join(map(str, GROUP_SIZES))}"
            )

    def specs(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """Packed codes, scales and the true shape. Raises when the group does not divide."""
        if cols % self.group_size:
            fitting = [f"{self.name}[group_size={g}]" for g in GROUP_SIZES if cols % g == 0]
            way_out = f"use {' or '.join(fitting)}, or " if fitting else ""
            raise FormatError(
                f"group size {self.group_size} does not divide {cols} columns "
                f"({cols} % {self.group_size} = {cols % self.group_size}); "
                f"{way_out}leave this weight in bf16 with a [modules] entry in a recipe"
            )
        return {
            "weight_packed": TensorSpec("I32", (rows, cols // 8)),
            "weight_scale": TensorSpec("BF16", (rows, cols // self.group_size)),
            "weight_shape": TensorSpec("I64", (2,), rows=0),
        }

    def shape(self, parts: Mapping[str, TensorSpec]) -> tuple[int, int]:
        """Rows of the packed words, columns of the scales' groups."""
        rows, groups = parts["weight_scale"].shape
        return rows, groups * self.group_size

    def encode(
        self, tile: torch.Tensor, shape: tuple[int, int], summary: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """amax / 7.5 per group, codes -8..7."""
        groups = tile.reshape(len(tile), -1, self.group_size)
        codes, scale = quantize_symmetric(groups, 4, self.arithmetic)
        return {
            "weight_packed": pack_nibbles(
                codes.add_(8).flatten(1).to(torch.int8).view(torch.uint8)
            ),
            "weight_scale": scale,
            "weight_shape": torch.tensor(shape, dtype=torch.int64),
        }

    def decode(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        """(code - 8) * scale, exact in float32 for BF16 scales."""
        codes = nibbles_to_float32(parts["weight_packed"], _VALUES)
        groups = codes.view(len(codes), -1, self.group_size)
        groups.mul_(parts["weight_scale"].to(torch.float32)[..., None])
        return codes

    def detect(
        self, parts: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> Int4 | None:
        """`weight_packed` I32 with `weight_scale` and `weight_shape`, 8 codes a word."""
        if set(parts) != {"weight_packed", "weight_scale", "weight_shape"}:
            return None
        packed, scale = parts["weight_packed"], parts["weight_scale"]
        if packed.dtype != "I32" or len(packed.shape) != 2 or len(scale.shape) != 2:
            return None
        group_size = _stored_group_size(config)
        if group_size is None:
            return None
        codec = Int4(group_size)
        # The word count bounds the width to 8 columns; the scales' groups make it exact.
        check_specs(parts, codec.specs(packed.shape[0], scale.shape[1] * group_size))
        return codec

    def scheme(self) -> dict[str, Any]:
        """Preset W4A16 with this group size."""
        return scheme(
            "pack-quantized", num_bits=4, type="int", strategy="group", group_size=self.group_size
        )


def _stored_group_size(config: Mapping[str, Any] | None) -> int | None:
    """The group size of a symmetric 4-bit group scheme; None when the config says otherwise."""
    weights = stored_weights(config)
    described = (weights.get("num_bits"), weights.get("type"), weights.get("symmetric"))
    if described != (4, "int", True) or weights.get("strategy") != "group":
        return None
    size = weights.get("group_size")
    return size if size in GROUP_SIZES else None
