"""compressed-tensors W8A8: INT8 codes and one BF16 multiplier per row.

Source: compressed-tensors 0.20.0, `int-quantized`, preset W8A8 (activations are quantized per
token by the engine). `weight` I8 [rows, cols]; `weight_scale` BF16 [rows, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from requant.quant.codec import Codec, TensorSpec, Tolerance, check_specs
from requant.quant.compressed_tensors import QUANT_METHOD, dynamic_activations, scheme
from requant.quant.integer import check_arithmetic, quantize_symmetric


@dataclass(frozen=True)
class Int8Channel(Codec):
    """Symmetric INT8 per output channel. `arithmetic` changes codes, not the format."""

    arithmetic: str = field(default="fp32", compare=False)

    name = "int8-channel"
    summary = "compressed-tensors W8A8 INT8, one scale a row"
    loaded_by = "vLLM, SGLang"
    checked_against = "compressed-tensors"
    quant_method = QUANT_METHOD
    tolerance = Tolerance(max_kl=0.02, min_sqnr_db=25.0)

    def __post_init__(self) -> None:
        check_arithmetic(self.arithmetic)

    def specs(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """Codes and one scale a row."""
        return {
            "weight": TensorSpec("I8", (rows, cols)),
            "weight_scale": TensorSpec("BF16", (rows, 1)),
        }

    def shape(self, parts: Mapping[str, TensorSpec]) -> tuple[int, int]:
        """The shape of `weight`."""
        rows, cols = parts["weight"].shape
        return rows, cols

    def encode(
        self, tile: torch.Tensor, shape: tuple[int, int], summary: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """amax / 127.5 per row, codes -128..127."""
        codes, scale = quantize_symmetric(tile, 8, self.arithmetic)
        return {"weight": codes.to(torch.int8), "weight_scale": scale[:, None]}

    def decode(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        """codes * scale, exact in float32 for BF16 scales."""
        return parts["weight"].to(torch.float32).mul_(parts["weight_scale"].to(torch.float32))

    def detect(
        self, parts: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> Int8Channel | None:
        """INT8 `weight` beside a `weight_scale` of one column."""
        if set(parts) != {"weight", "weight_scale"} or parts["weight"].dtype != "I8":
            return None
        if len(parts["weight"].shape) != 2:
            return None
        rows, cols = parts["weight"].shape
        check_specs(parts, self.specs(rows, cols))
        return self

    def scheme(self) -> dict[str, Any]:
        """Preset W8A8: static weights per channel, dynamic activations per token."""
        activations = dynamic_activations(8, "int")
        return scheme(
            "int-quantized", num_bits=8, type="int", strategy="channel", activations=activations
        )
