"""MXFP8: E4M3 codes and one power of two per 32 columns, in two containers.

Sources: compressed-tensors 0.20.0, `mxfp8-quantized`, preset MXFP8A16 (`weight_scale` U8);
transformers 5.23.0 and SGLang 0.5.23, quant_method "mxfp8" as MiniMax-M3 has it
(`weight_scale_inv` U8). `weight` F8_E4M3 [rows, cols]; scales [rows, cols / 32], a byte b for
2^(b - 127).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from requant.quant import grid
from requant.quant.codec import (
    Codec,
    Codes,
    TensorSpec,
    Tolerance,
    check_specs,
    refine_grid,
    require_choice,
    require_groups,
)
from requant.quant.compressed_tensors import QUANT_METHOD, scheme
from requant.quant.e4m3 import (
    E8M0,
    exact_scale,
    exponents,
    fine_grained_config,
    is_e4m3,
    upcast_e2m1,
)
from requant.quant.e8m0 import RULES, e8m0_to_float32
from requant.quant.grid import Alphabet, Coded, Tile

GROUP_SIZE = 32
_GROUP = (1, GROUP_SIZE)

#: Container -> the part that holds the scales.
_CONTAINERS = {QUANT_METHOD: "weight_scale", "minimax": "weight_scale_inv"}


@dataclass(frozen=True)
class Mxfp8(Codec):
    """E4M3 in groups of 32 with E8M0 scales. `exponent` changes codes, not the format."""

    container: str = QUANT_METHOD
    exponent: str = field(default="ceil", compare=False)

    name = "mxfp8"
    summary = "MXFP8: E4M3 with a power-of-two scale per 32 columns"
    loaded_by = "SGLang, transformers"
    checked_against = "compressed-tensors, transformers"
    tolerance = Tolerance(max_kl=0.03, min_sqnr_db=25.0)
    alphabet = "e4m3"
    lean = True
    packs = frozenset[Alphabet](("e4m3", "e2m1"))

    def __post_init__(self) -> None:
        require_choice("container", self.container, tuple(_CONTAINERS))
        require_choice("exponent", self.exponent, RULES)

    @property
    def quant_method(self) -> str:  # type: ignore[override]
        """What `quantization_config` calls the container."""
        return QUANT_METHOD if self.container == QUANT_METHOD else "mxfp8"

    @property
    def _scale_part(self) -> str:
        return _CONTAINERS[self.container]

    def specs(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """Codes and exponents. Raises when groups of 32 do not fill the rows."""
        require_groups(self.name, cols, GROUP_SIZE, instead=("fp8-channel", "fp8-block"))
        return {
            "weight": TensorSpec("F8_E4M3", (rows, cols)),
            self._scale_part: TensorSpec("U8", (rows, cols // GROUP_SIZE), cols=GROUP_SIZE),
        }

    def encode(
        self, tile: Tile, shape: tuple[int, int], summary: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """A power of two at least amax / 448 per group: no code saturates."""
        exponent = exponents(grid.amax(tile, GROUP_SIZE), self.exponent)
        codes = grid.encode("e4m3", tile, e8m0_to_float32(exponent), _GROUP)
        return {"weight": codes, self._scale_part: exponent}

    def tile(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Tile:
        """codes * 2^(b - 127), exact in float32 (down to its subnormals)."""
        scale = e8m0_to_float32(parts[self._scale_part])
        return Coded("e4m3", parts["weight"], scale, _GROUP, shape[1])

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Codes:
        """The parts as they are, exponents as E8M0."""
        scale = parts[self._scale_part].view(E8M0)
        return Codes("e4m3", parts.get("weight"), scale, _GROUP)

    def pack(self, codes: Codes, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """FP8 codes whose scales are powers of two, FP4 codes with the same exponents."""
        if codes.alphabet not in self.packs:
            return super().pack(codes, shape)
        self.specs(*shape)
        tile = codes.tile_shape(shape)
        if codes.alphabet == "e2m1":
            codes = upcast_e2m1(codes, _GROUP, tile, headroom=0)
        scale = exact_scale(refine_grid(codes, _GROUP, tile, self.name), "e8m0", self.name)
        parts = {self._scale_part: scale.view(torch.uint8)}
        return parts if codes.codes is None else {"weight": codes.codes, **parts}

    def detect(
        self, parts: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> Mxfp8 | None:
        """FP8 `weight` beside a grid of U8 exponents."""
        if not is_e4m3(parts.get("weight")) or len(parts) != 2:
            return None
        container = next((c for c, part in _CONTAINERS.items() if part in parts), None)
        if container is None or parts[_CONTAINERS[container]].dtype != "U8":
            return None
        codec = Mxfp8(container)
        rows, cols = parts["weight"].shape
        check_specs(parts, codec.specs(rows, cols))
        return codec

    def scheme(self) -> dict[str, Any] | None:
        """Preset MXFP8A16, in the compressed-tensors container."""
        if self.container != QUANT_METHOD:
            return None
        return scheme(
            "mxfp8-quantized",
            num_bits=8,
            type="float",
            strategy="group",
            group_size=GROUP_SIZE,
            scale_dtype="torch.uint8",
        )

    def config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """MiniMax's quantization_config, naming what stays in plain floats; or the scheme's."""
        if self.container == QUANT_METHOD:
            return super().config(kept)
        return fine_grained_config(
            self.quant_method, kept, scale_fmt="ue8m0", weight_block_size=list(_GROUP)
        )
