"""What a format is: the `Codec` protocol, and the words its methods share.

A codec knows tensors, not files. `specs` needs no data, so a file's header can be written before
its data and a plan is exact; `encode` and `decode` work on tiles, runs of whole rows that start on
a multiple of `row_alignment`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from requant.errors import FormatError

#: safetensors dtype name -> torch dtype, for every dtype that torch can hold.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}

#: safetensors dtype name -> bits per element.
DTYPE_BITS: dict[str, int] = {
    **{name: dtype.itemsize * 8 for name, dtype in TORCH_DTYPES.items()},
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
}


@dataclass(frozen=True)
class TensorSpec:
    """Dtype (safetensors name) and shape of one stored tensor.

    `rows` tells how many rows of the weight one row of this part covers: 1 for codes, 128 for the
    scales of 128-row blocks, 0 for a part that belongs to the weight as a whole.
    """

    dtype: str
    shape: tuple[int, ...]
    rows: int = 1

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    def row_range(self, start: int, stop: int) -> tuple[int, int]:
        """The rows of this part that hold rows `start:stop` of the weight."""
        if self.rows == 0:
            return 0, self.shape[0] if self.shape else 1
        return start // self.rows, -(-stop // self.rows)


@dataclass(frozen=True)
class Tolerance:
    """What a faithful conversion into a format may cost; beyond it `verify` says no.

    `max_kl`: mean KL(source || output) in nats per token. `min_sqnr_db`: of any single weight.
    """

    max_kl: float
    min_sqnr_db: float


class Codec(Protocol):
    """A weight format: how a float matrix `[rows, cols]` becomes named stored parts and back."""

    @property
    def name(self) -> str:
        """The format's name on the command line, without options."""

    @property
    def summary(self) -> str:
        """One sentence: container, arithmetic, who loads it."""

    @property
    def row_alignment(self) -> int:
        """Tiles start on a multiple of this many rows."""

    @property
    def tolerance(self) -> Tolerance:
        """What `verify` accepts by default."""

    def specs(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """The parts of a `[rows, cols]` weight, keyed by what replaces `weight` in its name.

        Raises FormatError when the format cannot hold that shape.
        """

    def shape(self, parts: Mapping[str, TensorSpec]) -> tuple[int, int]:
        """The weight's (rows, cols), from parts that `detect` accepted: the inverse of `specs`."""

    def encode(self, tile: torch.Tensor, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Encode a float32 tile (contiguous rows) of a weight of the given whole `shape`.

        Raises FormatError for a value that is not finite or does not fit.
        """

    def decode(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        """Decode the parts of one tile of `shape` into float32."""

    def detect(
        self, parts: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> Codec | None:
        """The codec (with its options) that reads `parts`, or None when they are not this format.

        `config` is the checkpoint's quantization_config. Raises FormatError when the parts are
        this format's but contradict each other or the config.
        """

    def config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """The quantization_config of a checkpoint in this format.

        `kept` names the linear modules that stay in plain floats. None for plain formats.
        """


def bits_per_weight(codec: Codec) -> float:
    """Stored bits per element, scales included, of a [7168, 7168] weight."""
    side = 7168
    return 8 * sum(s.nbytes for s in codec.specs(side, side).values()) / side**2


def require_finite(extreme: torch.Tensor) -> None:
    """Raise FormatError unless `extreme` (amax values; NaN propagates through them) is finite."""
    if not bool(torch.isfinite(extreme).all()):
        raise FormatError("holds NaN or infinity, which no format can keep")


def check_specs(found: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec]) -> None:
    """Raise FormatError when a stored part differs from what the codec expects."""
    for part, spec in expected.items():
        if part not in found:
            raise FormatError(f"{part} is missing; has {', '.join(sorted(found))}")
        if tuple(found[part].shape) != spec.shape or found[part].dtype != spec.dtype:
            raise FormatError(
                f"{part} is {found[part].dtype} {list(found[part].shape)}, "
                f"expected {spec.dtype} {list(spec.shape)}"
            )
