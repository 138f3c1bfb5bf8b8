"""compressed-tensors FP8 per channel: E4M3 codes and one multiplier per row.

Source: compressed-tensors 0.20.0, `float-quantized`, preset FP8_DYNAMIC (activations are quantized
per token by the engine). `weight` F8_E4M3 [rows, cols]; `weight_scale` BF16, F16 or F32 [rows, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from requant.quant import grid
from requant.quant.codec import (
    PLAIN_SCALES,
    Codec,
    Codes,
    TensorSpec,
    Tolerance,
    check_specs,
    refine_grid,
    require_choice,
)
from requant.quant.compressed_tensors import (
    QUANT_METHOD,
    dynamic_activations,
    scheme,
    stored_weights,
)
from requant.quant.e4m3 import (
    FLOATS,
    SCALE_DTYPES,
    check_arithmetic,
    exact_scale,
    is_e4m3,
    plain_scale,
    quantize,
    upcast_e2m1,
)
from requant.quant.grid import Alphabet, Coded, Tile

_ROW = (1, -1)


@dataclass(frozen=True)
class Fp8Channel(Codec):
    """E4M3 with amax / 448 per row. `arithmetic` changes codes, not the format."""

    scale: str = "bf16"
    arithmetic: str = field(default="fp32", compare=False)

    name = "fp8-channel"
    summary = "compressed-tensors FP8 E4M3, one scale a row (FP8_DYNAMIC)"
    loaded_by = "vLLM, SGLang, transformers"
    checked_against = "compressed-tensors"
    quant_method = QUANT_METHOD
    tolerance = Tolerance(max_kl=0.03, min_sqnr_db=25.0)
    alphabet = "e4m3"
    packs = frozenset[Alphabet](("e4m3", "e2m1"))

    def __post_init__(self) -> None:
        require_choice("scale", self.scale, FLOATS)
        check_arithmetic(self.arithmetic, self.scale)

    @property
    def lean(self) -> bool:  # type: ignore[override]
        """What compiled loops do."""
        return self.arithmetic == "fp32"

    def specs(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """Codes and one scale a row."""
        return {
            "weight": TensorSpec("F8_E4M3", (rows, cols)),
            "weight_scale": TensorSpec(SCALE_DTYPES[self.scale], (rows, 1), cols=0),
        }

    def encode(
        self, tile: Tile, shape: tuple[int, int], summary: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """amax / 448 per row, rounded to the scale's dtype; codes to nearest even."""
        if self.arithmetic == "bf16":
            tile = grid.decode(tile).to(torch.bfloat16)
        scale = plain_scale(grid.amax(tile), self.scale)
        return {"weight": quantize(tile, scale, _ROW, self.arithmetic), "weight_scale": scale}

    def tile(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Tile:
        """codes * scale: exact in float32 for BF16 and FP16 scales."""
        scale = parts["weight_scale"].to(torch.float32)
        return Coded("e4m3", parts["weight"], scale, _ROW, shape[1])

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Codes:
        """The parts as they are."""
        return Codes("e4m3", parts.get("weight"), parts["weight_scale"], _ROW)

    def pack(self, codes: Codes, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """FP8 codes with one scale for whole rows; FP4 codes with E8M0 scales, raised to FP8."""
        if codes.alphabet not in self.packs:
            return super().pack(codes, shape)
        tile = codes.tile_shape(shape)
        if codes.alphabet == "e2m1":
            codes = upcast_e2m1(codes, _ROW, tile)
        scale = refine_grid(codes, _ROW, tile, self.name)
        parts = {"weight_scale": exact_scale(scale, self.scale, self.name)}
        return parts if codes.codes is None else {"weight": codes.codes, **parts}

    def detect(
        self, parts: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> Fp8Channel | None:
        """FP8 `weight` beside a `weight_scale` of one column, unless the config says blocks."""
        if set(parts) != {"weight", "weight_scale"} or not is_e4m3(parts["weight"]):
            return None
        scale = PLAIN_SCALES.get(parts["weight_scale"].dtype)
        strategy = stored_weights(config).get("strategy")
        rows, cols = parts["weight"].shape
        by_row = parts["weight_scale"].shape == (rows, 1)
        if scale is None or strategy not in (None, "channel") or not (strategy or by_row):
            return None
        codec = Fp8Channel(scale)
        check_specs(parts, codec.specs(rows, cols))
        return codec

    def scheme(self) -> dict[str, Any]:
        """Preset FP8_DYNAMIC: static weights per channel, dynamic activations per token."""
        activations = dynamic_activations(8, "float")
        return scheme(
            "float-quantized", num_bits=8, type="float", strategy="channel", activations=activations
        )
