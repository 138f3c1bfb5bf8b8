"""Plain floats: one stored tensor, `weight`, in BF16, FP16 or FP32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from requant.errors import FormatError
from requant.quant import grid
from requant.quant.codec import (
    TORCH_DTYPES,
    Codec,
    Codes,
    TensorSpec,
    Tolerance,
)
from requant.quant.grid import Alphabet, Tile, require_finite

#: Of each alphabet: significant bits of a code, its smallest step and its largest value.
_EXACT: dict[Alphabet, tuple[int, float, float]] = {
    "e2m1": (2, 0.5, 6.0),
    "e4m3": (4, 2.0**-9, 448.0),
    "int4": (4, 1.0, 15.0),
    "int8": (7, 1.0, 128.0),
}
#: Significant bits of a dtype, and its smallest number.
_PRECISION = {"BF16": (8, 2.0**-133), "F16": (11, 2.0**-24), "F32": (24, 2.0**-149)}


@dataclass(frozen=True)
class Plain(Codec):
    """A weight stored as it is, rounded to nearest even."""

    name: str
    dtype: str
    tolerance: Tolerance

    loaded_by = "every engine"
    checked_against = "torch"
    quant_method = None
    packs = frozenset(_EXACT)

    @property
    def lean(self) -> bool:  # type: ignore[override]
        """What compiled loops do."""
        return self.dtype != "F16"

    @property
    def summary(self) -> str:  # type: ignore[override]
        """One sentence for `requant formats`."""
        return f"plain {self.dtype}, rounded to nearest even"

    def specs(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """`weight` [rows, cols]."""
        return {"weight": TensorSpec(self.dtype, (rows, cols))}

    def encode(
        self, tile: Tile, shape: tuple[int, int], summary: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Round to the dtype; a finite value beyond its range is refused, not made infinite."""
        if self.dtype == "BF16":
            encoded, finite = grid.round_to_bf16(tile)
        else:
            encoded = grid.decode(tile).to(TORCH_DTYPES[self.dtype])
            finite = bool(torch.isfinite(encoded.sum()))  # so are the terms
        if finite:
            return {"weight": encoded}
        largest = grid.largest(tile)
        require_finite(largest)
        amax, limit = float(largest), torch.finfo(encoded.dtype).max
        if amax > limit and not bool(torch.isfinite(encoded).all()):
            raise FormatError(
                f"holds {amax:.6g}, beyond {self.name}'s largest value {limit:.6g}; "
                "use bf16 or fp32 for this weight"
            )
        return {"weight": encoded}

    def tile(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Tile:
        """The weight; FP16 widened to float32 (exact)."""
        weight = parts["weight"]
        return weight.to(torch.float32) if self.dtype == "F16" else weight

    def pack(self, codes: Codes, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """No codes to keep; raises FormatError unless every code times its scale is exact here."""
        bits, step, largest = _EXACT[codes.alphabet]
        precision, lowest = _PRECISION[self.dtype]
        scale = codes.scale.to(torch.float32)
        scale = scale[scale != 0].abs()
        spare = precision - bits  # significant bits that a scale may have
        if codes.divisor is not None or spare < 1:
            raise FormatError(f"{self.name} rounds the products of codes and scales")
        if bool((scale.view(torch.int32) & ((1 << (24 - spare)) - 1)).any()):
            raise FormatError(f"{self.name} rounds: a scale has over {spare} significant bits")
        if scale.numel():
            low = float(_lowest_bits(scale).amin()) * step
            high = float(scale.amax()) * largest
            if low < lowest or high > torch.finfo(TORCH_DTYPES[self.dtype]).max:
                raise FormatError(f"{self.name} cannot reach values from {low:.3g} to {high:.3g}")
        return {}

    def detect(
        self, parts: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> Plain | None:
        """A lone `weight` in this dtype."""
        if set(parts) == {"weight"} and parts["weight"].dtype == self.dtype:
            return self
        return None


def _lowest_bits(values: torch.Tensor) -> torch.Tensor:
    """The worth of each positive float32's lowest bit that is set, in float64."""
    mantissa, exponent = torch.frexp(values.to(torch.float64))
    digits = (mantissa * 2.0**53).to(torch.int64)  # all significant bits, as an integer
    return torch.ldexp((digits & -digits).to(torch.float64), exponent - 53)
