"""FP8 per tensor: E4M3 codes and a single multiplier, in three containers.

Sources: compressed-tensors 0.20.0, `float-quantized` (`weight_scale` [1]); transformers 5.23.0,
integrations/finegrained_fp8.py, with `weight_block_size` null (`weight_scale_inv` []; vLLM and
AutoFP8 call it `weight_scale`); Mistral's own checkpoints (`qscale_weight` [], read only).
Whatever its name, the scale multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from requant.errors import FormatError
from requant.quant import grid
from requant.quant.codec import (
    PLAIN_SCALES,
    Codec,
    Codes,
    TensorSpec,
    Tolerance,
    check_specs,
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
    fine_grained_config,
    is_e4m3,
    plain_scale,
    quantize,
)
from requant.quant.grid import Alphabet, Coded, Tile, require_finite

#: Container -> the part that holds the scale, and its shape, as they are written.
_CONTAINERS: dict[str, tuple[str, tuple[int, ...]]] = {
    QUANT_METHOD: ("weight_scale", (1,)),
    "fp8": ("weight_scale_inv", ()),
    "mistral": ("qscale_weight", ()),
}

#: One block for all.
_WHOLE = (-1, -1)


@dataclass(frozen=True)
class Fp8Tensor(Codec):
    """E4M3 with amax / 448 of the whole weight. `arithmetic` changes codes, not the format."""

    scale: str = "fp32"
    container: str = QUANT_METHOD
    arithmetic: str = field(default="fp32", compare=False)
    #: What others call the scale, and whether it is [1] or []: as found in the file.
    stored_part: str = field(default="", compare=False, repr=False, metadata={"stored": True})
    stored_dims: int = field(default=-1, compare=False, repr=False, metadata={"stored": True})

    name = "fp8-tensor"
    summary = "FP8 E4M3, one scale a weight"
    loaded_by = "vLLM, SGLang, transformers"
    checked_against = "compressed-tensors, transformers"
    tolerance = Tolerance(max_kl=0.03, min_sqnr_db=25.0)
    alphabet = "e4m3"
    packs = frozenset[Alphabet](("e4m3",))
    two_pass = True
    #: vLLM re-quantizes fused weights to the largest of their scales: one scale spares them that.
    shares_summary = True

    def __post_init__(self) -> None:
        require_choice("container", self.container, tuple(_CONTAINERS))
        require_choice("scale", self.scale, FLOATS)
        check_arithmetic(self.arithmetic, self.scale)

    @property
    def quant_method(self) -> str:  # type: ignore[override]
        """What `quantization_config` calls the container; Mistral's is read as "fp8"."""
        return QUANT_METHOD if self.container == QUANT_METHOD else "fp8"

    @property
    def read_only(self) -> bool:  # type: ignore[override]
        """Mistral's container is only read."""
        return self.container == "mistral"

    @property
    def _scale_part(self) -> str:
        return self.stored_part or _CONTAINERS[self.container][0]

    @property
    def _scale_shape(self) -> tuple[int, ...]:
        shape = _CONTAINERS[self.container][1]
        return shape if self.stored_dims < 0 else (1,) * self.stored_dims

    @property
    def lean(self) -> bool:  # type: ignore[override]
        """What compiled loops do."""
        return self.arithmetic == "fp32"

    def specs(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """Codes and the one scale."""
        return {
            "weight": TensorSpec("F8_E4M3", (rows, cols)),
            self._scale_part: TensorSpec(
                SCALE_DTYPES[self.scale], self._scale_shape, rows=0, cols=0
            ),
        }

    def measure(self, tile: Tile) -> torch.Tensor:
        """amax of the tile, [1]."""
        return grid.largest(tile)

    def summarize(self, measured: Sequence[torch.Tensor]) -> torch.Tensor:
        """amax of the weight, [1]."""
        return torch.cat(list(measured)).amax(0, keepdim=True)

    def encode(
        self, tile: Tile, shape: tuple[int, int], summary: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """amax / 448 of the weight, rounded to the scale's dtype; codes to nearest even."""
        self._require_written()
        amax = grid.largest(tile) if summary is None else summary
        if self.arithmetic == "bf16":
            amax = amax.to(torch.bfloat16)
        require_finite(amax)
        scale = plain_scale(amax, self.scale)
        codes = quantize(tile, scale.reshape(1, 1), _WHOLE, self.arithmetic)
        return {"weight": codes, self._scale_part: scale.reshape(self._scale_shape)}

    def tile(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Tile:
        """codes * scale."""
        scale = parts[self._scale_part].to(torch.float32).reshape(1, 1)
        return Coded("e4m3", parts["weight"], scale, _WHOLE, shape[1])

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Codes:
        """The parts as they are: one block for all."""
        scale = parts[self._scale_part].reshape(1, 1)
        return Codes("e4m3", parts.get("weight"), scale, _WHOLE)

    def pack(self, codes: Codes, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """FP8 codes with one scale for the whole weight."""
        self._require_written()
        if codes.alphabet not in self.packs:
            return super().pack(codes, shape)
        # The whole weight's shape: every tile may well have one scale, and each its own.
        rows, cols = codes.block
        if 0 < rows < shape[0] or 0 < cols < shape[1]:
            raise FormatError(
                f"{self.name} has one scale for the whole {shape[0]}x{shape[1]} weight, the source "
                f"one for {rows if rows > 0 else shape[0]}x{cols if cols > 0 else shape[1]}"
            )
        scale = exact_scale(codes.scale, self.scale, self.name).reshape(self._scale_shape)
        parts = {self._scale_part: scale}
        return parts if codes.codes is None else {"weight": codes.codes, **parts}

    def detect(
        self, parts: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> Fp8Tensor | None:
        """FP8 `weight` beside a scale of one element, [1] or []."""
        if not is_e4m3(parts.get("weight")) or len(parts) != 2:
            return None
        part = next((part for part, _ in _CONTAINERS.values() if part in parts), None)
        if part is None or parts[part].shape not in ((), (1,)):
            return None
        scale = PLAIN_SCALES.get(parts[part].dtype)
        strategy = stored_weights(config).get("strategy")
        if scale is None or strategy not in (None, "tensor"):
            return None
        container = next(c for c, (written, _) in _CONTAINERS.items() if written == part)
        if part == "weight_scale" and (config or {}).get("quant_method") == "fp8":
            container = "fp8"
        dims = len(parts[part].shape)
        codec = Fp8Tensor(scale, container, stored_part=part, stored_dims=dims)
        rows, cols = parts["weight"].shape
        check_specs(parts, codec.specs(rows, cols))
        return codec

    def scheme(self) -> dict[str, Any] | None:
        """One static scale for the weights, dynamic activations per token: needs no data."""
        if self.container != QUANT_METHOD:
            return None
        activations = dynamic_activations(8, "float")
        return scheme(
            "float-quantized", num_bits=8, type="float", strategy="tensor", activations=activations
        )

    def config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """transformers' quantization_config without blocks; or the scheme's."""
        if self.container == QUANT_METHOD:
            return super().config(kept)
        return fine_grained_config(self.quant_method, kept, weight_block_size=None)

    def _require_written(self) -> None:
        if self.read_only:
            raise FormatError(
                f"{self.name}[container=mistral] is only read; "
                "write container=compressed-tensors or container=fp8"
            )
