"""SGLang's blockwise INT8: codes and one float32 multiplier per block of the weight.

Source: SGLang 0.5.23, layers/quantization/blockwise_int8.py. `weight` I8 [rows, cols];
`weight_scale_inv` F32 [ceil(rows/128), ceil(cols/128)]; despite its name the scale multiplies.
Edge blocks may be partial. SGLang publishes no quantizer: amax / 127 is that of its activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from requant.quant import grid
from requant.quant.blocks import require_block, stored_block
from requant.quant.codec import (
    Codec,
    Codes,
    TensorSpec,
    Tolerance,
    check_specs,
    exact_cast,
    refine_grid,
)
from requant.quant.grid import Coded, Tile
from requant.quant.integer import cast_scale

QUANT_METHOD = "blockwise_int8"
INT8_MAX = 127.0


@dataclass(frozen=True)
class Int8Block(Codec):
    """Symmetric INT8 with amax / 127 per `block_rows` x `block_cols` block."""

    block_rows: int = 128
    block_cols: int = 128

    name = "int8-block"
    summary = "SGLang blockwise INT8 in 128x128 blocks, weight_scale_inv"
    loaded_by = "SGLang"
    checked_against = "the formula"
    quant_method = QUANT_METHOD
    tolerance = Tolerance(max_kl=0.02, min_sqnr_db=25.0)
    alphabet = "int8"
    lean = True
    packs = frozenset({"int8"})

    def __post_init__(self) -> None:
        require_block(self.block_rows, self.block_cols, "SGLang's")

    def row_alignment(self, cols: int) -> int:
        """Tiles start on a block boundary."""
        return self.block_rows

    def specs(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """Codes and the ceil grid of scales."""
        grid = (-(-rows // self.block_rows), -(-cols // self.block_cols))
        return {
            "weight": TensorSpec("I8", (rows, cols)),
            "weight_scale_inv": TensorSpec("F32", grid, rows=self.block_rows, cols=self.block_cols),
        }

    def encode(
        self, tile: Tile, shape: tuple[int, int], summary: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """amax / 127 per block, codes -127..127."""
        amax = grid.amax(grid.column_peaks(tile, self.block_rows), self.block_cols)
        scale = cast_scale(amax / INT8_MAX, torch.float32)
        block = (self.block_rows, self.block_cols)
        codes = grid.encode("int8", tile, scale, block).clamp_min_(-127)
        return {"weight": codes, "weight_scale_inv": scale}

    def tile(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Tile:
        """codes * scale."""
        block = (self.block_rows, self.block_cols)
        return Coded("int8", parts["weight"], parts["weight_scale_inv"], block, shape[1])

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Codes:
        """The codes as they are."""
        block = (self.block_rows, self.block_cols)
        return Codes("int8", parts.get("weight"), parts["weight_scale_inv"], block)

    def pack(self, codes: Codes, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """INT8 codes whose scales are shared by these blocks, or by multiples of them."""
        if codes.alphabet not in self.packs:
            return super().pack(codes, shape)
        block = (self.block_rows, self.block_cols)
        scale = refine_grid(codes, block, codes.tile_shape(shape), self.name)
        parts = {"weight_scale_inv": exact_cast(scale, torch.float32)}
        return parts if codes.codes is None else {"weight": codes.codes, **parts}

    def detect(
        self, parts: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> Int8Block | None:
        """INT8 `weight` beside a float32 `weight_scale_inv`, and a config that says so: FP4 codes
        with block scales look the same."""
        if (config or {}).get("quant_method") != QUANT_METHOD:
            return None
        if set(parts) != {"weight", "weight_scale_inv"} or parts["weight"].dtype != "I8":
            return None
        if len(parts["weight"].shape) != 2:
            return None
        told = (config or {}).get("weight_block_size")
        codec = Int8Block(*stored_block(told, "weight_block_size"))
        check_specs(parts, codec.specs(*codec.shape(parts)))
        return codec

    def config(self, kept: Sequence[str]) -> dict[str, Any]:
        """SGLang's quantization_config, naming what stays in plain floats."""
        config: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "activation_scheme": "dynamic",
            "weight_block_size": [self.block_rows, self.block_cols],
        }
        if kept:
            config["ignored_layers"] = list(kept)
        return config
