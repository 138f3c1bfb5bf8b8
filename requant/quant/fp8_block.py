"""DeepSeek FP8: E4M3 codes and one float32 multiplier per block of the weight.

Source: deepseek-ai/DeepSeek-V3 @ 9b4e978, README_WEIGHTS.md and inference/kernel.py.
`weight` F8_E4M3 [rows, cols]; `weight_scale_inv` F32 [ceil(rows/128), ceil(cols/128)].
Despite its name the scale multiplies. Edge blocks may be partial (576 rows are 4.5 blocks).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from requant.errors import FormatError
from requant.quant.codec import Codec, TensorSpec, Tolerance, check_specs, require_finite
from requant.quant.packing import e4m3_to_float32

E4M3_MAX = 448.0
#: DeepSeek's floor of a block's amax: an all-zero block gets the scale 1e-4 / 448.
AMAX_FLOOR = 1e-4
#: A tile holds whole blocks, so a hostile config must not ask for enormous ones.
MAX_BLOCK_SIDE = 1 << 16


@dataclass(frozen=True)
class Fp8Block(Codec):
    """E4M3 with amax / 448 per `block_rows` x `block_cols` block."""

    block_rows: int = 128
    block_cols: int = 128

    name = "fp8-block"
    summary = "DeepSeek FP8 E4M3 in 128x128 blocks, weight_scale_inv"
    loaded_by = "DeepSeek, vLLM, SGLang, transformers"
    checked_against = "compressed-tensors, transformers"
    quant_method = "fp8"
    tolerance = Tolerance(max_kl=0.03, min_sqnr_db=25.0)

    def __post_init__(self) -> None:
        if self.block_rows < 1 or self.block_cols < 1:
            raise FormatError(
                f"block_rows={self.block_rows}, block_cols={self.block_cols}: "
                "a block has at least one row and one column; DeepSeek's have 128 and 128"
            )

    def row_alignment(self, cols: int) -> int:
        """Tiles start on a block boundary."""
        return self.block_rows

    def specs(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """Codes and the ceil grid of scales."""
        grid = (-(-rows // self.block_rows), -(-cols // self.block_cols))
        return {
            "weight": TensorSpec("F8_E4M3", (rows, cols)),
            "weight_scale_inv": TensorSpec("F32", grid, rows=self.block_rows),
        }

    def shape(self, parts: Mapping[str, TensorSpec]) -> tuple[int, int]:
        """The shape of `weight`."""
        rows, cols = parts["weight"].shape
        return rows, cols

    def encode(
        self, tile: torch.Tensor, shape: tuple[int, int], summary: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Quantize to nearest even with amax / 448 per block.

        A tile that was decoded from FP8 gets back the scale it had, bit for bit.
        """
        rows, cols = tile.shape
        # [grid_rows, cols]; a partial block row just has fewer rows to look at.
        peaks = torch.stack([strip.abs().amax(0) for strip in tile.split(self.block_rows)])
        amax = self._block_reduce(peaks, 0.0)
        require_finite(amax)
        scale = amax.clamp_min(AMAX_FLOOR) / E4M3_MAX
        codes = self._codes(tile, scale)
        # Only values with low bits set can come from an FP8 code times a float32 scale whose
        # product was rounded; BF16 sources skip the second look. Column peaks, not block ones:
        # the amax of a lone block may have no low bits by chance.
        if bool((peaks.view(torch.int32) & 0xFFFF).any()):
            original = self._original_scale(tile, codes, scale)
            if not torch.equal(original, scale):
                scale, codes = original, self._codes(tile, original)
        return {"weight": codes, "weight_scale_inv": scale}

    def decode(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        """codes * scale in float32."""
        tile = e4m3_to_float32(parts["weight"])
        for strip, row_scale in self._strips(tile, parts["weight_scale_inv"].to(torch.float32)):
            strip.mul_(row_scale)
        return tile

    def detect(
        self, parts: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> Fp8Block | None:
        """FP8 `weight` beside a 2-D float32 `weight_scale_inv`; the block comes from the config."""
        if set(parts) != {"weight", "weight_scale_inv"}:
            return None
        weight, scale = parts["weight"], parts["weight_scale_inv"]
        if weight.dtype != "F8_E4M3" or scale.dtype != "F32":
            return None
        if len(weight.shape) != 2 or len(scale.shape) != 2:
            return None
        block = (config or {}).get("weight_block_size") or [self.block_rows, self.block_cols]
        if not (
            isinstance(block, list)
            and len(block) == 2
            and all(type(side) is int and 0 < side <= MAX_BLOCK_SIDE for side in block)
        ):
            raise FormatError(
                f"weight_block_size is {block!r}, expected two integers from 1 to {MAX_BLOCK_SIDE}"
            )
        codec = Fp8Block(*block)
        rows, cols = weight.shape
        expected = codec.specs(rows, cols)
        if scale.shape != expected["weight_scale_inv"].shape:
            raise FormatError(
                f"weight_scale_inv is {list(scale.shape)}, expected "
                f"{list(expected['weight_scale_inv'].shape)} for a [{rows}, {cols}] weight in "
                f"{codec.block_rows}x{codec.block_cols} blocks"
            )
        check_specs(parts, expected)
        return codec

    def config(self, kept: Sequence[str]) -> dict[str, Any]:
        """DeepSeek-V3's quantization_config, naming what stays in plain floats."""
        config: dict[str, Any] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [self.block_rows, self.block_cols],
        }
        if kept:
            config["modules_to_not_convert"] = list(kept)
        return config

    def _strips(
        self, tile: torch.Tensor, scale: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of a block row of the tile [<= block_rows, cols] and its scales per column."""
        columns = scale.repeat_interleave(self.block_cols, dim=1)[:, : tile.shape[1]]
        return list(zip(tile.split(self.block_rows), columns, strict=True))

    def _block_reduce(self, columns: torch.Tensor, fill: float) -> torch.Tensor:
        """Maximum over each run of block_cols columns: [n, cols] -> [n, grid_cols]."""
        missing = -columns.shape[1] % self.block_cols
        padded = torch.nn.functional.pad(columns, (0, missing), value=fill)
        return padded.reshape(len(padded), -1, self.block_cols).amax(2)

    def _codes(self, tile: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        codes = torch.empty(tile.shape, dtype=torch.float8_e4m3fn, device=tile.device)
        strips = zip(codes.split(self.block_rows), self._strips(tile, scale), strict=True)
        for target, (strip, row_scale) in strips:
            target.copy_((strip / row_scale).clamp_(-E4M3_MAX, E4M3_MAX))
        return codes

    def _original_scale(
        self, tile: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """The scale the tile was decoded with, where it was; else `scale`.

        448 * s is rounded in float32, so amax / 448 can miss s by one ulp. A code that is a power
        of two times s is exact: where all of a block's such elements give the same quotient, and
        it lies within an ulp of amax / 448, that quotient is s.
        """
        infinity = torch.tensor(torch.inf, device=tile.device)
        lows, highs = [], []
        for strip, coded in zip(
            tile.split(self.block_rows), codes.split(self.block_rows), strict=True
        ):
            # Mantissa bits all zero, exponent bits not: a normal power of two.
            bits = coded.view(torch.uint8)
            exact = ((bits & 0x07) == 0) & ((bits & 0x78) != 0)
            quotient = strip / e4m3_to_float32(coded)
            lows.append(torch.where(exact, -quotient, -infinity).amax(0))
            highs.append(torch.where(exact, quotient, -infinity).amax(0))
        low = -self._block_reduce(torch.stack(lows), -torch.inf)
        high = self._block_reduce(torch.stack(highs), -torch.inf)
        near = (high.view(torch.int32) - scale.view(torch.int32)).abs() <= 1
        return torch.where((low == high) & near, high, scale)
