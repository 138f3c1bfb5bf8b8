"""INT8 codes and one multiplier per row: compressed-tensors W8A8 and SGLang's w8a8_int8.

Source: compressed-tensors 0.20.0, `int-quantized`, preset W8A8: `weight` I8 [rows, cols],
`weight_scale` BF16 [rows, 1] (F16 or F32 when the model was), amax / 127.5. SGLang 0.5.23,
layers/quantization/w8a8_int8.py: the same parts, scales in F32, amax / 127. Both engines quantize
activations per token as they run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from requant.quant.codec import (
    FLOAT_SCALES,
    PLAIN_SCALES,
    Codec,
    Codes,
    TensorSpec,
    Tolerance,
    check_specs,
    exact_cast,
    refine_grid,
    require_choice,
    scale_dtype,
)
from requant.quant.compressed_tensors import (
    QUANT_METHOD,
    dynamic_activations,
    scheme,
    stored_weights,
)
from requant.quant.grid import Coded, Tile
from requant.quant.integer import (
    check_options,
    quantize_symmetric,
)

#: Container -> the dtype of its scales unless the option `scale` says otherwise.
CONTAINERS = {"compressed-tensors": "bf16", "sglang": "fp32"}
SGLANG_METHOD = "w8a8_int8"


@dataclass(frozen=True)
class Int8Channel(Codec):
    """Symmetric INT8 per output channel. scale=auto is the container's own."""

    container: str = "compressed-tensors"
    scale: str = "auto"
    method: str = field(default="rtn", compare=False)
    arithmetic: str = field(default="fp32", compare=False)

    name = "int8-channel"
    summary = "W8A8 INT8, one scale a row: compressed-tensors or SGLang's w8a8_int8"
    checked_against = "compressed-tensors"
    tolerance = Tolerance(max_kl=0.02, min_sqnr_db=25.0)
    alphabet = "int8"
    packs = frozenset({"int8"})

    def __post_init__(self) -> None:
        require_choice("container", self.container, tuple(CONTAINERS))
        own = CONTAINERS[self.container]
        if self.container == "sglang":
            require_choice("scale", self.scale, ("auto", own))
        if self.scale == own:
            object.__setattr__(self, "scale", "auto")  # one name for one format
        check_options(self._scale, self.method, self.arithmetic)

    @property
    def quant_method(self) -> str:  # type: ignore[override]
        """The container's name in quantization_config."""
        return SGLANG_METHOD if self.container == "sglang" else QUANT_METHOD

    @property
    def loaded_by(self) -> str:  # type: ignore[override]
        """Engines that load the container."""
        return "SGLang" if self.container == "sglang" else "vLLM, SGLang, transformers"

    @property
    def _scale(self) -> str:
        return CONTAINERS[self.container] if self.scale == "auto" else self.scale

    @property
    def lean(self) -> bool:  # type: ignore[override]
        """What compiled loops do."""
        return self.arithmetic == "fp32"

    def specs(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """Codes and one scale a row."""
        return {
            "weight": TensorSpec("I8", (rows, cols)),
            "weight_scale": TensorSpec(FLOAT_SCALES[self._scale], (rows, 1), cols=0),
        }

    def encode(
        self, tile: Tile, shape: tuple[int, int], summary: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """amax / 127.5 per row (SGLang: 127), codes -128..127."""
        half_range = 127.0 if self.container == "sglang" else 127.5
        codes, scale = quantize_symmetric(
            tile, -1, 8, self.arithmetic, scale_dtype(self._scale), self.method, half_range
        )
        return {"weight": codes, "weight_scale": scale}

    def tile(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Tile:
        """codes * scale, exact in float32 for BF16 and F16 scales."""
        scale = parts["weight_scale"].to(torch.float32)
        return Coded("int8", parts["weight"], scale, (1, -1), shape[1])

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Codes:
        """The codes as they are; a row is a block."""
        return Codes("int8", parts.get("weight"), parts["weight_scale"], (1, shape[1]))

    def pack(self, codes: Codes, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """INT8 codes with one scale a row that this scale dtype holds."""
        if codes.alphabet not in self.packs:
            return super().pack(codes, shape)
        scale = refine_grid(codes, (1, -1), codes.tile_shape(shape), self.name)
        parts = {"weight_scale": exact_cast(scale, scale_dtype(self._scale))}
        return parts if codes.codes is None else {"weight": codes.codes, **parts}

    def detect(
        self, parts: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> Int8Channel | None:
        """INT8 `weight` beside a `weight_scale` of one column; the config names the container."""
        if set(parts) != {"weight", "weight_scale"} or parts["weight"].dtype != "I8":
            return None
        if len(parts["weight"].shape) != 2 or stored_weights(config).get("num_bits", 8) != 8:
            return None
        rows, cols = parts["weight"].shape
        if (config or {}).get("quant_method") == SGLANG_METHOD:
            codec = Int8Channel("sglang")
        else:
            codec = Int8Channel(scale=PLAIN_SCALES.get(parts["weight_scale"].dtype, "bf16"))
        check_specs(parts, codec.specs(rows, cols))
        return codec

    def scheme(self) -> dict[str, Any] | None:
        """Preset W8A8: static weights per channel, dynamic activations per token."""
        if self.container == "sglang":
            return None
        activations = dynamic_activations(8, "int")
        return scheme(
            "int-quantized", num_bits=8, type="int", strategy="channel", activations=activations
        )

    def config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """SGLang's has no scheme, only what stays in plain floats."""
        if self.container == "sglang":
            return {"quant_method": SGLANG_METHOD, "ignore": list(kept)}
        return super().config(kept)
