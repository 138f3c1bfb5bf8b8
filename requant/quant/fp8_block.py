"""FP8 in blocks: E4M3 codes and one multiplier per block of the weight, in three containers.

Sources: deepseek-ai/DeepSeek-V3 @ 9b4e978, README_WEIGHTS.md and inference/kernel.py;
DeepSeek-V3.2-Exp @ 3b99a53 (power-of-two scales); transformers 5.23.0,
integrations/finegrained_fp8.py (scales in E8M0); compressed-tensors 0.20.0, preset FP8_BLOCK.
`weight` F8_E4M3 [rows, cols] and `weight_scale_inv` (DeepSeek-V4: `scale`; compressed-tensors:
`weight_scale`) [ceil(rows/128), ceil(cols/128)]. Whatever its name, the scale multiplies. Edge
blocks may be partial (576 rows are 4.5 blocks).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from requant.errors import FormatError
from requant.quant import grid
from requant.quant.blocks import (
    block_range,
    require_block,
    stored_block,
)
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
    E4M3_MAX,
    E8M0,
    SCALE_DTYPES,
    exact_scale,
    exponents,
    fine_grained_config,
    is_e4m3,
    plain_scale,
    scale_to_float32,
    upcast_e2m1,
)
from requant.quant.e8m0 import e8m0_to_float32
from requant.quant.grid import Alphabet, Coded, Tile

#: DeepSeek's floor of a block's amax: an all-zero block gets the scale 1e-4 / 448.
AMAX_FLOOR = 1e-4

#: Container -> the part that holds the scales, and the scales it knows.
_CONTAINERS = {
    "deepseek": ("weight_scale_inv", ("fp32", "ue8m0", "e8m0")),
    "deepseek-v4": ("scale", ("fp32", "ue8m0", "e8m0")),
    QUANT_METHOD: ("weight_scale", ("fp32", "bf16", "fp16")),
}


@dataclass(frozen=True)
class Fp8Block(Codec):
    """E4M3 with amax / 448 per `block_rows` x `block_cols` block."""

    block_rows: int = 128
    block_cols: int = 128
    scale: str = "fp32"
    container: str = "deepseek"

    name = "fp8-block"
    summary = "DeepSeek FP8 E4M3 in 128x128 blocks, weight_scale_inv"
    loaded_by = "DeepSeek, vLLM, SGLang, transformers"
    checked_against = "compressed-tensors, transformers"
    tolerance = Tolerance(max_kl=0.03, min_sqnr_db=25.0)
    alphabet = "e4m3"
    lean = True
    packs = frozenset[Alphabet](("e4m3", "e2m1"))

    def __post_init__(self) -> None:
        require_block(self.block_rows, self.block_cols, "DeepSeek's")
        require_choice("container", self.container, tuple(_CONTAINERS))
        require_choice("scale", self.scale, tuple(SCALE_DTYPES))
        scales = _CONTAINERS[self.container][1]
        if self.scale not in scales:
            raise FormatError(
                f"scale={self.scale}: container={self.container} has {', '.join(scales)}"
            )

    @property
    def quant_method(self) -> str:  # type: ignore[override]
        """What `quantization_config` calls the container."""
        return QUANT_METHOD if self.container == QUANT_METHOD else "fp8"

    @property
    def _scale_part(self) -> str:
        return _CONTAINERS[self.container][0]

    @property
    def _block(self) -> tuple[int, int]:
        return self.block_rows, self.block_cols

    def row_alignment(self, cols: int) -> int:
        """Tiles start on a block boundary."""
        return self.block_rows

    def specs(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """Codes and the ceil grid of scales."""
        grid = (-(-rows // self.block_rows), -(-cols // self.block_cols))
        return {
            "weight": TensorSpec("F8_E4M3", (rows, cols)),
            self._scale_part: TensorSpec(
                SCALE_DTYPES[self.scale], grid, rows=self.block_rows, cols=self.block_cols
            ),
        }

    def encode(
        self, tile: Tile, shape: tuple[int, int], summary: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Quantize to nearest even with amax / 448 per block, or a power of two above it.

        With float32 scales, a tile that was decoded from FP8 gets back the scale it had, bit for
        bit.
        """
        # [grid_rows, cols]; a partial block row just has fewer rows to look at.
        peaks = grid.column_peaks(tile, self.block_rows)
        stored = self._scale(grid.amax(peaks, self.block_cols))
        codes = grid.encode("e4m3", tile, scale_to_float32(stored), self._block)
        # Only values with low bits set can come from an FP8 code times a float32 scale whose
        # product was rounded; BF16 sources skip the second look. Column peaks, not block ones:
        # the amax of a lone block may have no low bits by chance.
        if self.scale == "fp32" and bool((peaks.view(torch.int32) & 0xFFFF).any()):
            stored = self._original_scale(tile, codes, stored)
        return {"weight": codes, self._scale_part: stored}

    def tile(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Tile:
        """codes * scale."""
        scale = scale_to_float32(parts[self._scale_part])
        return self._coded(parts["weight"], scale)

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Codes:
        """The parts as they are."""
        return Codes("e4m3", parts.get("weight"), parts[self._scale_part], self._block)

    def pack(self, codes: Codes, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """FP8 codes whose grid this one refines; FP4 codes with E8M0 scales, raised to FP8."""
        if codes.alphabet not in self.packs:
            return super().pack(codes, shape)
        tile = codes.tile_shape(shape)
        if codes.alphabet == "e2m1":
            codes = upcast_e2m1(codes, self._block, tile)
        scale = refine_grid(codes, self._block, tile, self.name)
        parts = {self._scale_part: exact_scale(scale, self.scale, self.name)}
        return parts if codes.codes is None else {"weight": codes.codes, **parts}

    def detect(
        self, parts: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> Fp8Block | None:
        """FP8 `weight` beside a 2-D grid of scales; the block comes from the config, or is 128.

        `weight_scale` may also be one scale a row: the config's strategy tells, else the shape.
        """
        if not is_e4m3(parts.get("weight")) or len(parts) != 2:
            return None
        container = next((c for c, (part, _) in _CONTAINERS.items() if part in parts), None)
        if container is None:
            return None
        part, scales = _CONTAINERS[container]
        stored = parts[part]
        scale = "e8m0" if stored.dtype == "F8_E8M0" else PLAIN_SCALES.get(stored.dtype)
        if scale not in scales or len(stored.shape) != 2:
            return None
        rows, cols = parts["weight"].shape
        config = config or {}
        if container == QUANT_METHOD:
            strategy = stored_weights(config).get("strategy")
            by_row = strategy is None and stored.shape == (rows, 1)
            if by_row or strategy not in (None, "block"):
                return None
            where, block = "block_structure", stored_weights(config).get("block_structure")
        else:
            where, block = "weight_block_size", config.get("weight_block_size")
            if scale == "fp32" and config.get("scale_fmt") == "ue8m0":
                scale = "ue8m0"
        codec = Fp8Block(*stored_block(block, where), scale, container)
        table = dataclasses.replace(codec, block_rows=1, block_cols=32)
        if (container, scale) == ("deepseek-v4", "e8m0") and (
            stored.shape == table.specs(rows, cols)[part].shape
        ):
            codec = table  # DeepSeek-V4.1's engram tables, whatever the config says
        expected = codec.specs(rows, cols)
        if stored.shape != expected[part].shape:
            raise FormatError(
                f"{part} is {list(stored.shape)}, expected "
                f"{list(expected[part].shape)} for a [{rows}, {cols}] weight in "
                f"{codec.block_rows}x{codec.block_cols} blocks"
            )
        check_specs(parts, expected)
        return codec

    def accepts(self, stored: Codec) -> bool:
        """The default keeps all other scales that are F32 already, or that compressed-tensors
        stores in BF16 or F16."""
        if not isinstance(stored, Fp8Block) or self.scale != "fp32" or stored.scale == "e8m0":
            return stored == self
        return dataclasses.replace(stored, scale="fp32") == self

    def scheme(self) -> dict[str, Any] | None:
        """Preset FP8_BLOCK with these blocks, in the compressed-tensors container."""
        if self.container != QUANT_METHOD:
            return None
        activations = dynamic_activations(8, "float", strategy="group", group_size=self.block_cols)
        return scheme(
            "float-quantized",
            num_bits=8,
            type="float",
            strategy="block",
            block_structure=list(self._block),
            activations=activations,
        )

    def config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """DeepSeek's quantization_config, naming what stays in plain floats; or a scheme's."""
        if self.container == QUANT_METHOD:
            return super().config(kept)
        more: dict[str, Any] = {"weight_block_size": list(self._block)}
        if self.scale != "fp32":
            more["scale_fmt"] = "ue8m0"
        return fine_grained_config(self.quant_method, kept, **more)

    def _scale(self, amax: torch.Tensor) -> torch.Tensor:
        """The scales of blocks, as stored; each container's own rule at the bottom."""
        if self.container == QUANT_METHOD:
            return plain_scale(amax, self.scale)
        if self.scale == "e8m0":  # transformers: no floor, an all-zero block has 2^0
            return exponents(amax).masked_fill_(amax == 0, 127).view(E8M0)
        amax = amax.clamp_min(AMAX_FLOOR)
        return amax / E4M3_MAX if self.scale == "fp32" else e8m0_to_float32(exponents(amax))

    def _original_scale(self, tile: Tile, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The scale the tile was decoded with, where it was; else `scale`, amax / 448.

        448 * s is rounded in float32, so amax / 448 can miss s by one ulp, and the codes are the
        same: none lies near a tie. Products of codes and a larger scale are nowhere smaller, so a
        block tells on which side s is; the products with s are the block, bit for bit.
        """
        low, high = grid.differences(tile, self._coded(codes, scale))
        ulps = ((high > 0) & (low == 0)).int() - ((low < 0) & (high == 0)).int()
        if not bool(ulps.any()):
            return scale
        low, high = grid.differences(tile, self._coded(codes, _next(scale, ulps)))
        # Only a power of two times a scale is exact and tells the scale: without one, s is unknown.
        powers, _ = block_range(_powers_of_two(codes), *self._block)
        found = (low == 0) & (high == 0) & (powers < 0)
        return torch.where(found, _next(scale, ulps), scale)

    def _coded(self, codes: torch.Tensor, scale: torch.Tensor) -> Coded:
        return Coded("e4m3", codes, scale, self._block, codes.shape[1])


def _next(scale: torch.Tensor, ulps: torch.Tensor) -> torch.Tensor:
    """Positive float32 `ulps` further."""
    return (scale.view(torch.int32) + ulps).view(torch.float32)


def _powers_of_two(codes: torch.Tensor) -> torch.Tensor:
    """int8, -1 for the E4M3 codes with exponent bits and no mantissa bits, 0 or more for others."""
    sizes = codes.view(torch.int8) & 0x7F
    return (sizes & 7).sub_((sizes >> 3).clamp_max_(1))
