"""Plain floats: one stored tensor, `weight`, in BF16, FP16 or FP32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from requant.errors import FormatError
from requant.quant.codec import TORCH_DTYPES, Codec, TensorSpec, Tolerance, require_finite


@dataclass(frozen=True)
class Plain(Codec):
    """A weight stored as it is, rounded to nearest even."""

    name: str
    dtype: str
    tolerance: Tolerance

    loaded_by = "every engine"
    checked_against = "torch"
    quant_method = None

    @property
    def summary(self) -> str:  # type: ignore[override]
        """One sentence for `requant formats`."""
        return f"plain {self.dtype}, rounded to nearest even"

    def specs(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """`weight` [rows, cols]."""
        return {"weight": TensorSpec(self.dtype, (rows, cols))}

    def shape(self, parts: Mapping[str, TensorSpec]) -> tuple[int, int]:
        """The shape of `weight`."""
        rows, cols = parts["weight"].shape
        return rows, cols

    def encode(
        self, tile: torch.Tensor, shape: tuple[int, int], summary: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Round to the dtype; a finite value beyond its range is refused, not made infinite."""
        encoded = tile.to(TORCH_DTYPES[self.dtype])
        low, high = torch.aminmax(tile)
        require_finite(torch.stack((low, high)))
        limit = torch.finfo(encoded.dtype).max
        amax = max(-float(low), float(high))
        if amax > limit and not bool(torch.isfinite(encoded).all()):
            raise FormatError(
                f"holds {amax:.6g}, beyond {self.name}'s largest value {limit:.6g}; "
                "use bf16 or fp32 for this weight"
            )
        return {"weight": encoded}

    def decode(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        """Widen to float32 (exact)."""
        return parts["weight"].to(torch.float32)

    def detect(
        self, parts: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> Plain | None:
        """A lone `weight` in this dtype."""
        if set(parts) == {"weight"} and parts["weight"].dtype == self.dtype:
            return self
        return None
