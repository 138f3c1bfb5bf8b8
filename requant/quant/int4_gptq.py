"""GPTQ: INT4 codes packed along the columns, zero points, one F16 scale per group.

Source: gptqmodel 7.7.0, nn_modules/qlinear/__init__.py, quantization/quantizer.py, utils/model.py.
For a weight [rows, cols]: `qweight` I32 [ceil(cols/8), rows], low nibble first; `qzeros` I32
[groups, ceil(rows/8)]; `scales` F16 [groups, rows]; `g_idx` I32 [cols], the group of each column.
value = (code - zero) * scale. Version 1 (`checkpoint_format: gptq`) stores zero points less one:
0x11111111 is subtracted from whole words, so a zero point of 0 would borrow from its neighbour,
and readers differ on what it then means. None is written; reading adds the words back.

Symmetric: scale = 2 amax / 15, zero = 8. Asymmetric: scale = (max - min) / 15, with 0 in the range,
zero = -round(min / scale). gptqmodel halves the scale of symmetric groups without negative values
and so clips them; here they are as all others. No activations are looked at: these are GPTQ's
bytes, not its error feedback.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from requant.errors import FormatError
from requant.quant.affine import (
    CENTRE,
    MAX_CODE,
    SCALES,
    dynamic_rules,
    quantize,
    scale_option,
    stored_grid,
    stored_group_size,
)
from requant.quant.codec import (
    FLOAT_SCALES,
    Codec,
    Codes,
    TensorSpec,
    Tolerance,
    check_specs,
    require_choice,
    scale_dtype,
)
from requant.quant.cutting import relocate_groups
from requant.quant.grid import Coded, Tile
from requant.quant.packing import pack_nibbles, turned, unpack_nibbles
from requant.quant.search import METHODS

GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
#: `checkpoint_format` of versions 1 and 2.
VERSIONS = {1: "gptq", 2: "gptq_v2"}
#: What version 1 stores less: one in every nibble.
ONES = 0x11111111

_PARTS = {"qweight", "qzeros", "scales", "g_idx"}


@dataclass(frozen=True)
class Int4Gptq(Codec):
    """INT4 in groups along the columns (-1: one group a row). `act_order` is read, not written."""

    group_size: int = 128
    symmetric: bool = True
    version: int = 1
    act_order: bool = False
    scale: str = "fp16"
    method: str = field(default="rtn", compare=False)

    name = "int4-gptq"
    summary = "GPTQ INT4, packed along the columns, one scale a group"
    loaded_by = "vLLM, SGLang (symmetric), transformers"
    checked_against = "gptqmodel"
    quant_method = "gptq"
    tolerance = Tolerance(max_kl=0.1, min_sqnr_db=10.0)
    alphabet = "int4"
    packs = frozenset({"int4"})
    relocated = ("g_idx",)

    def __post_init__(self) -> None:
        require_choice("group_size", self.group_size, GROUP_SIZES)
        require_choice("version", self.version, tuple(VERSIONS))
        require_choice("scale", self.scale, SCALES)
        require_choice("method", self.method, METHODS)

    @property
    def read_only(self) -> bool:  # type: ignore[override]
        """An order of columns takes calibration data."""
        return self.act_order

    @property
    def lean(self) -> bool:  # type: ignore[override]
        """What compiled loops do."""
        return not self.act_order

    def row_alignment(self, cols: int) -> int:
        """Eight rows share a word of zero points."""
        return 8

    def specs(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """Codes, zero points, scales, all transposed, and the group of each column."""
        groups, step = -(-cols // self._size(cols)), max(self.group_size, 0)
        return {
            "qweight": TensorSpec("I32", (-(-cols // 8), rows), axis=1, cols=8),
            "qzeros": TensorSpec("I32", (groups, -(-rows // 8)), rows=8, axis=1, cols=step),
            "scales": TensorSpec(FLOAT_SCALES[self.scale], (groups, rows), axis=1, cols=step),
            "g_idx": TensorSpec("I32", (cols,), rows=0),
        }

    def shape(self, parts: Mapping[str, TensorSpec]) -> tuple[int, int]:
        """Columns of the scales, length of `g_idx`."""
        return parts["scales"].shape[1], parts["g_idx"].shape[0]

    def encode(
        self, tile: Tile, shape: tuple[int, int], summary: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """2 amax / 15 or (max - min) / 15 per group, codes 0..15 around the zero point."""
        self._refuse_act_order()
        dtype = scale_dtype(self.scale)
        size = self._size(shape[1])
        packed, scale, zero = quantize(tile, size, self._scales, self.method, dtype)
        return {
            "qweight": turned(packed.view(torch.int32)),
            **self._scale_parts(scale, zero, shape[1]),
        }

    def tile(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Tile:
        """(code - zero) * scale of the column's group, exact in float32."""
        rows, cols = shape
        scale = turned(parts["scales"].to(torch.float32))
        zero = self._zero_points(parts["qzeros"], rows).to(torch.float32).contiguous()
        codes = turned(parts["qweight"]).view(torch.uint8)
        tile = Coded("int4", codes, scale, (1, self._size(cols)), cols, zero)
        index = self._groups(parts["g_idx"], len(parts["scales"]))
        return tile if self._is_regular(index) else tile.grouped(index)

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Codes:
        """Codes in the order of the weight. Raises FormatError for act-order groups."""
        rows, cols = shape
        if not self._is_regular(self._groups(parts["g_idx"], len(parts["scales"]))):
            raise FormatError(
                "has act-order groups, whose columns do not follow each other; other formats have "
                "no place for them, so this weight can only be quantized anew"
            )
        words, zero = parts.get("qweight"), self._zero_points(parts["qzeros"], rows)
        return Codes(
            alphabet="int4",
            codes=None if words is None else turned(words).view(torch.uint8),
            scale=turned(parts["scales"]),
            block=(1, self._size(cols)),
            zero=zero if bool((zero != CENTRE).any()) else None,
        )

    def pack(self, codes: Codes, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """INT4 codes whose scales the stored dtype holds exactly. Symmetric: zero points all 8."""
        if codes.alphabet != "int4":
            return super().pack(codes, shape)
        self._refuse_act_order()
        scale, zero = stored_grid(codes, self._size(shape[1]), shape, scale_dtype(self.scale))
        if self.symmetric and bool((zero != CENTRE).any()):
            other = int(zero[zero != CENTRE][0])
            raise FormatError(
                f"has zero points other than {CENTRE} (such as {other}); "
                f"use {self.name}[symmetric=false,version=2]"
            )
        if self.version == 1 and not bool(zero.all()):
            raise FormatError(
                "has zero points of 0, and version 1 stores zero points less one; "
                f"use {self.name}[symmetric=false,version=2]"
            )
        parts = {} if codes.codes is None else {"qweight": turned(codes.codes.view(torch.int32))}
        return {**parts, **self._scale_parts(scale, zero, shape[1])}

    def detect(
        self, parts: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> Int4Gptq | None:
        """`qweight`, `qzeros`, `scales` and `g_idx`; version, symmetry and order by the config."""
        told = config or {}
        if "g_idx" not in parts and told.get("quant_method") != self.quant_method:
            return None
        if not {"qweight", "qzeros", "scales"} <= set(parts) <= _PARTS:
            return None
        if "g_idx" not in parts:
            raise FormatError("g_idx is missing, which tells the group of each column")
        if [len(parts[part].shape) for part in sorted(_PARTS)] != [1, 2, 2, 2]:
            return None
        rows, cols = self.shape(parts)
        words = parts["qweight"].shape[0]
        if words != -(-cols // 8):
            raise FormatError(
                f"qweight has {words} words of 32 bits for {cols} columns, "
                f"{32 * words / max(cols, 1):.3g} bits each; only bits=4 is read"
            )
        label = told.get("checkpoint_format") or told.get("format") or VERSIONS[1]
        version = next((number for number, name in VERSIONS.items() if name == label), None)
        if version is None:
            raise FormatError(
                f"is GPTQ of checkpoint_format {label!r}, and only "
                f"{' and '.join(VERSIONS.values())} are read"
            )
        codec = Int4Gptq(
            group_size=stored_group_size(config, cols, parts["scales"].shape[0], GROUP_SIZES),
            symmetric=told.get("sym", True) is not False,
            version=version,
            act_order=told.get("desc_act") is True,
            scale=scale_option(parts["scales"].dtype),
        )
        check_specs(parts, codec.specs(rows, cols))
        return codec

    def relocate(
        self, part: str, stored: torch.Tensor, shape: tuple[int, int], shift: int
    ) -> torch.Tensor:
        """The same groups, counted from the first column's."""
        return relocate_groups(part, stored, shape[1], self.group_size, shift)

    def config(self, kept: Sequence[str]) -> dict[str, Any]:
        """gptqmodel's quantization_config; `dynamic` names what stays in plain floats."""
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": self.group_size,
            "desc_act": self.act_order,
            "sym": self.symmetric,
            "checkpoint_format": VERSIONS[self.version],
            "lm_head": False,
        }
        if kept:
            config["dynamic"] = dynamic_rules(kept)
        return config

    def _size(self, cols: int) -> int:
        return cols if self.group_size == -1 else self.group_size

    def _scales(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        empty = low == high
        low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
        scale = (high - low).div_(MAX_CODE)
        if self.symmetric:
            return scale, torch.full_like(scale, CENTRE)
        zero = (low / scale).round_().neg_()
        if self.version == 1:
            none_below = zero < 1
            scale = torch.where(none_below, high / (MAX_CODE - 1), scale)
            zero.clamp_min_(1)
        return scale, zero

    def _scale_parts(
        self, scale: torch.Tensor, zero: torch.Tensor, cols: int
    ) -> dict[str, torch.Tensor]:
        words = pack_nibbles(zero.T)
        index = torch.arange(cols, dtype=torch.int32, device=scale.device)
        return {
            "qzeros": words - ONES if self.version == 1 else words,
            "scales": turned(scale),
            "g_idx": index.div_(self._size(cols), rounding_mode="floor"),
        }

    def _zero_points(self, words: torch.Tensor, rows: int) -> torch.Tensor:
        """Stored words [groups, ceil(rows/8)] -> zero points uint8 [rows, groups]."""
        return unpack_nibbles(words + ONES if self.version == 1 else words, rows).T

    def _groups(self, stored: torch.Tensor, groups: int) -> torch.Tensor:
        """`g_idx` as int64. Raises FormatError when it points outside."""
        index = stored.to(torch.int64)
        if index.numel() and not 0 <= int(index.amin()) <= int(index.amax()) < groups:
            raise FormatError(f"g_idx points outside the {groups} groups of the scales")
        return index

    def _is_regular(self, index: torch.Tensor) -> bool:
        """Whether groups are runs of `group_size` columns."""
        columns = torch.arange(len(index), device=index.device)
        return torch.equal(index, columns // self._size(len(index)))

    def _refuse_act_order(self) -> None:
        if self.read_only:
            raise FormatError(
                "act_order=true is read, not written: requant has no calibration data to order "
                "columns by; use act_order=false"
            )
