"""compressed-tensors W4A16: INT4 codes packed in 32-bit words, one multiplier per group.

Source: compressed-tensors 0.20.0, `pack-quantized`, presets W4A16 and W4A16_ASYM.
`weight_packed` I32 [rows, ceil(cols/8)] (code + 8, low nibble first); `weight_scale` BF16, F16 or
F32 [rows, groups]; asymmetric: `weight_zero_point` I32 [ceil(rows/8), groups] (zero point + 8, rows
packed as columns are); act-order: `weight_g_idx` I32 [cols], each column's group; `weight_shape`
I64 [2] = (rows, cols). value = (code - zero point) * scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from requant.errors import FormatError
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
    require_groups,
    scale_dtype,
)
from requant.quant.compressed_tensors import QUANT_METHOD, scheme, stored_weights
from requant.quant.cutting import relocate_groups
from requant.quant.grid import Coded, Tile
from requant.quant.integer import (
    check_options,
    quantize_asymmetric,
    quantize_symmetric,
)
from requant.quant.packing import pack_nibbles, row_major, turned, unpack_nibbles

#: What engines have kernels for, and messages suggest; other multiples of 8 are legal.
GROUP_SIZES = (32, 64, 128)
#: One group a row, which compressed-tensors calls the strategy `channel`.
CHANNEL = -1
#: The stored code, and the stored zero point, of the value 0 in a symmetric weight.
MIDDLE = 8

_PARTS = {"weight_packed", "weight_scale", "weight_shape"}
_OPTIONAL = {"weight_zero_point", "weight_g_idx"}


@dataclass(frozen=True)
class Int4(Codec):
    """INT4 in groups along the columns; `group_size=-1` is one group a row.

    `act_order` weights, whose groups are not runs of columns, are read only.
    """

    group_size: int = 128
    symmetric: bool = True
    scale: str = "bf16"
    act_order: bool = False
    method: str = field(default="rtn", compare=False)
    arithmetic: str = field(default="fp32", compare=False)
    #: What `weight_shape` holds; the words of a channel-wise weight tell its width to 8 columns.
    stored_shape: tuple[int, ...] = field(
        default=(), compare=False, repr=False, metadata={"stored": True}
    )

    name = "int4"
    summary = "compressed-tensors W4A16 INT4, packed, one scale a group"
    loaded_by = "transformers, vLLM, SGLang"
    checked_against = "compressed-tensors"
    quant_method = QUANT_METHOD
    tolerance = Tolerance(max_kl=0.1, min_sqnr_db=10.0)
    alphabet = "int4"
    packs = frozenset({"int4"})

    def __post_init__(self) -> None:
        check_options(self.scale, self.method, self.arithmetic)
        if self.group_size != CHANNEL and (self.group_size < 8 or self.group_size % 8):
            raise FormatError(
                f"group_size={self.group_size}: expected {', '.join(map(str, GROUP_SIZES))} or "
                f"another multiple of 8, or {CHANNEL} for one group a row"
            )
        if self.act_order and self.group_size == CHANNEL:
            raise FormatError("act_order=true orders groups, and group_size=-1 has one a row")

    @property
    def needs_content(self) -> tuple[str, ...]:  # type: ignore[override]
        """`weight_shape`, where the scales' groups do not tell the width."""
        return ("weight_shape",) if self.group_size == CHANNEL else ()

    @property
    def relocated(self) -> tuple[str, ...]:  # type: ignore[override]
        """The shape, and groups that are counted from the first column's."""
        return ("weight_g_idx", "weight_shape") if self.act_order else ("weight_shape",)

    @property
    def read_only(self) -> bool:  # type: ignore[override]
        """Act-order needs the order, which data-free conversion does not have."""
        return self.act_order

    def row_alignment(self, cols: int) -> int:
        """Asymmetric tiles start on a whole word of zero points."""
        return 1 if self.symmetric else 8

    @property
    def lean(self) -> bool:  # type: ignore[override]
        """What compiled loops do."""
        return self.arithmetic == "fp32" and not self.act_order

    def specs(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """Packed codes, scales and the true shape. Raises when the group does not divide."""
        size = self._group(cols)
        require_groups(self.name, cols, size, GROUP_SIZES)
        groups, step = cols // size, 0 if self.group_size == CHANNEL else size
        specs = {
            "weight_packed": TensorSpec("I32", (rows, -(-cols // 8)), cols=8),
            "weight_scale": TensorSpec(FLOAT_SCALES[self.scale], (rows, groups), cols=step),
        }
        if not self.symmetric:
            words = -(-rows // 8)
            specs["weight_zero_point"] = TensorSpec("I32", (words, groups), rows=8, cols=step)
        if self.act_order:
            specs["weight_g_idx"] = TensorSpec("I32", (cols,), rows=0)
        return {**specs, "weight_shape": TensorSpec("I64", (2,), rows=0, cols=0)}

    def shape(self, parts: Mapping[str, TensorSpec]) -> tuple[int, int]:
        """Rows of the packed words, columns of the scales' groups."""
        (rows, groups), words = parts["weight_scale"].shape, parts["weight_packed"].shape[1]
        if self.group_size != CHANNEL:
            return rows, groups * self.group_size
        if not self.stored_shape:
            return rows, 8 * words
        if self.stored_shape[0] != rows or -(-self.stored_shape[1] // 8) != words:
            raise FormatError(
                f"weight_shape is {list(self.stored_shape)}, and weight_packed has {rows} rows of "
                f"{8 * words - 7} to {8 * words} columns"
            )
        return rows, self.stored_shape[1]

    def encode(
        self, tile: Tile, shape: tuple[int, int], summary: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """amax / 7.5 per group, codes -8..7; asymmetric: (max - min) / 15 and a zero point."""
        if self.act_order:
            raise FormatError("act_order=true is only read; write int4 without it")
        how = (self.arithmetic, scale_dtype(self.scale), self.method)
        if self.symmetric:
            packed, scale = quantize_symmetric(tile, self.group_size, 4, *how)
            return self._parts(packed.view(torch.int32), scale, None, shape)
        packed, scale, zero = quantize_asymmetric(tile, self.group_size, *how)
        return self._parts(packed.view(torch.int32), scale, zero, shape)

    def tile(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Tile:
        """(code - zero point) * scale: exact in float32 for BF16 and F16 scales."""
        rows, cols = shape
        codes, scale = parts["weight_packed"], parts["weight_scale"].to(torch.float32)
        packed, zero = row_major(codes).view(torch.uint8), self._zero(parts, rows)
        if zero is not None:
            zero = zero.to(torch.float32).contiguous()
        tile = Coded("int4", packed, scale, (1, self.group_size), cols, zero)
        return tile.grouped(self._group_index(parts, cols)) if self.act_order else tile

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Codes:
        """Stored codes, scales and zero points. Raises FormatError for true act-order."""
        cols, size = shape[1], self._group(shape[1])
        if self.act_order:
            in_order = torch.arange(cols, device=parts["weight_g_idx"].device) // size
            if not torch.equal(self._group_index(parts, cols), in_order):
                raise FormatError("act-order: the columns of a group are not adjacent")
        words, scale = parts.get("weight_packed"), parts["weight_scale"]
        codes = None if words is None else row_major(words).view(torch.uint8)
        return Codes("int4", codes, scale, (1, size), self._zero(parts, len(scale)))

    def pack(self, codes: Codes, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """INT4 codes in these groups or multiples of them, with scales that this dtype holds."""
        if codes.alphabet not in self.packs:
            return super().pack(codes, shape)
        if self.act_order:
            raise FormatError("act_order=true is only read; write int4 without it")
        self.specs(*shape)  # refuses a group that does not divide
        block, tile = (1, self.group_size), codes.tile_shape(shape)
        scale = exact_cast(refine_grid(codes, block, tile, self.name), scale_dtype(self.scale))
        zero = codes.zero
        if zero is not None and self.symmetric:
            other = zero[zero != MIDDLE]
            if other.numel():
                raise FormatError(
                    f"the source has a zero point of {int(other[0])}, symmetric int4 only "
                    f"{MIDDLE}; use int4[symmetric=false]"
                )
        if self.symmetric:
            zero = None
        elif zero is None:
            zero = torch.full_like(scale, MIDDLE, dtype=torch.uint8)
        else:
            zero = refine_grid(dataclasses.replace(codes, scale=zero), block, tile, self.name)
        words = None if codes.codes is None else codes.codes.view(torch.int32)
        return self._parts(words, scale, zero, shape)

    def detect(
        self, parts: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> Int4 | None:
        """`weight_packed` I32 with `weight_scale` and `weight_shape`, 8 codes a word."""
        if not _PARTS <= set(parts) <= _PARTS | _OPTIONAL:
            return None
        packed, scale = parts["weight_packed"], parts["weight_scale"]
        if packed.dtype != "I32" or len(packed.shape) != 2 or len(scale.shape) != 2:
            return None
        codec = _stored_codec(parts, config)
        if codec is None:
            return None
        if codec.symmetric and "weight_zero_point" in parts:
            raise FormatError("has a weight_zero_point, and a config whose scheme is symmetric")
        # The word count bounds the width to 8 columns; the scales' groups make it exact.
        check_specs(parts, codec.specs(packed.shape[0], codec.shape(parts)[1]))
        return codec

    def with_content(self, content: Mapping[str, bytes]) -> Int4:
        """A channel-wise weight's true shape."""
        numbers = torch.frombuffer(bytearray(content["weight_shape"]), dtype=torch.int64)
        return dataclasses.replace(self, stored_shape=tuple(numbers.tolist()))

    def relocate(
        self, part: str, stored: torch.Tensor, shape: tuple[int, int], shift: int
    ) -> torch.Tensor:
        """The new shape; the same groups, counted anew."""
        if part == "weight_shape":
            return torch.tensor(shape, dtype=torch.int64, device=stored.device)
        return relocate_groups(part, stored, shape[1], self.group_size, shift)

    def scheme(self) -> dict[str, Any]:
        """Preset W4A16 or W4A16_ASYM with this group size."""
        channel = self.group_size == CHANNEL
        order: dict[str, Any] = {"actorder": "group"} if self.act_order else {}
        return scheme(
            "pack-quantized",
            num_bits=4,
            type="int",
            strategy="channel" if channel else "group",
            symmetric=self.symmetric,
            group_size=None if channel else self.group_size,
            **order,
        )

    def _group(self, cols: int) -> int:
        return cols if self.group_size == CHANNEL else self.group_size

    def _parts(
        self,
        words: torch.Tensor | None,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        shape: tuple[int, int],
    ) -> dict[str, torch.Tensor]:
        """The parts of a tile, from packed codes and zero points 0..15."""
        parts = {} if words is None else {"weight_packed": words}
        parts["weight_scale"] = scale
        if zero is not None:
            parts["weight_zero_point"] = turned(pack_nibbles(zero.T))
        parts["weight_shape"] = torch.tensor(shape, dtype=torch.int64)
        return parts

    def _zero(self, parts: Mapping[str, torch.Tensor], rows: int) -> torch.Tensor | None:
        """The stored zero points, uint8 0..15 [rows, groups]; None when symmetric."""
        if self.symmetric:
            return None
        return unpack_nibbles(parts["weight_zero_point"].T, rows).T

    def _group_index(self, parts: Mapping[str, torch.Tensor], cols: int) -> torch.Tensor:
        """Each column's group [cols]. Raises FormatError for a group that does not exist."""
        index = parts["weight_g_idx"].to(torch.int64)
        groups = cols // self.group_size
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= groups:
            raise FormatError(
                f"weight_g_idx names the group {low if low < 0 else high} of {groups}"
            )
        return index


def _stored_codec(parts: Mapping[str, TensorSpec], config: Mapping[str, Any] | None) -> Int4 | None:
    """The codec of a 4-bit integer scheme; None when the config says otherwise."""
    weights = stored_weights(config)
    if (weights.get("num_bits"), weights.get("type")) != (4, "int"):
        return None
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy == "channel" and size in (None, CHANNEL):
        size = CHANNEL
    elif strategy != "group" or type(size) is not int or size < 8 or size % 8:
        return None
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool):
        return None
    ordered = weights.get("actorder") in (True, "group") or "weight_g_idx" in parts
    return Int4(size, symmetric, PLAIN_SCALES.get(parts["weight_scale"].dtype, "bf16"), ordered)
