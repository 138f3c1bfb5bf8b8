"""AutoAWQ "gemm": INT4 codes packed along the rows, zero points, one F16 scale per group.

Source: AutoAWQ 0.2.9, awq/modules/linear/gemm.py, quantize/quantizer.py, utils/packing_utils.py.
For a weight [rows, cols]: `qweight` I32 [cols, rows/8]; `qzeros` I32 [cols/group_size, rows/8];
`scales` F16 [cols/group_size, rows]. Nibble i (bits 4i..4i+3) of word c belongs to row
8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]. value = (code - zero) * scale.

scale = max(max - min, 1e-5) / 15, zero = -round(min / scale). AutoAWQ takes min and max as they
are, and so clips groups of one sign; here the range always has 0 in it. No activations are looked
at: these are AWQ's bytes, not its search for scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from requant.buffers import empty
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
    LEAVE,
    Codec,
    Codes,
    TensorSpec,
    Tolerance,
    check_specs,
    require_choice,
    require_groups,
    scale_dtype,
)
from requant.quant.compiled import array, loops_for
from requant.quant.grid import Coded, Tile
from requant.quant.packing import pack_nibbles, row_major, turned, unpack_nibbles
from requant.quant.search import METHODS

GROUP_SIZES = (-1, 16, 32, 64, 128)
#: AutoAWQ packs four words at a time.
ROW_MULTIPLE = 32
#: AutoAWQ's smallest range of a group.
RANGE_FLOOR = 1e-5


@dataclass(frozen=True)
class Int4Awq(Codec):
    """INT4 with zero points in groups along the columns (-1: one group a row)."""

    group_size: int = 128
    scale: str = "fp16"
    method: str = field(default="rtn", compare=False)

    name = "int4-awq"
    summary = "AutoAWQ gemm INT4, packed along the rows, with zero points, one scale a group"
    loaded_by = "vLLM, SGLang, transformers"
    checked_against = "AutoAWQ, gptqmodel"
    quant_method = "awq"
    tolerance = Tolerance(max_kl=0.1, min_sqnr_db=10.0)
    lean = True
    alphabet = "int4"
    packs = frozenset({"int4"})

    def __post_init__(self) -> None:
        require_choice("group_size", self.group_size, GROUP_SIZES)
        require_choice("scale", self.scale, SCALES)
        require_choice("method", self.method, METHODS)

    def row_alignment(self, cols: int) -> int:
        """Eight rows share a word; AutoAWQ packs four words at a time."""
        return ROW_MULTIPLE

    def specs(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """Codes, zero points and scales, transposed. Raises when rows or groups do not divide."""
        size = self._size(cols)
        if rows % ROW_MULTIPLE:
            raise FormatError(
                f"AWQ packs {ROW_MULTIPLE} rows at a time and does not hold {rows} "
                f"({rows} % {ROW_MULTIPLE} = {rows % ROW_MULTIPLE}); use int4-gptq, or {LEAVE}"
            )
        require_groups(self.name, cols, size, GROUP_SIZES[1:])
        groups, step = cols // size, max(self.group_size, 0)
        return {
            "qweight": TensorSpec("I32", (cols, rows // 8), rows=8, axis=1),
            "qzeros": TensorSpec("I32", (groups, rows // 8), rows=8, axis=1, cols=step),
            "scales": TensorSpec(FLOAT_SCALES[self.scale], (groups, rows), axis=1, cols=step),
        }

    def shape(self, parts: Mapping[str, TensorSpec]) -> tuple[int, int]:
        """Columns of the scales, rows of the packed words."""
        return parts["scales"].shape[1], parts["qweight"].shape[0]

    def encode(
        self, tile: Tile, shape: tuple[int, int], summary: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """(max - min) / 15 per group, codes 0..15 around the zero point."""
        dtype = scale_dtype(self.scale)
        codes, scale, zero = quantize(tile, self._size(shape[1]), _scales, self.method, dtype)
        return {"qweight": pack_rows(codes, shape[1]), **_scale_parts(scale, zero)}

    def tile(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Tile:
        """(code - zero) * scale, exact in float32."""
        codes = unpack_rows(parts["qweight"])
        scale = turned(parts["scales"].to(torch.float32))
        zero = _zero_points(parts["qzeros"]).to(torch.float32)
        return Coded("int4", codes, scale, (1, self._size(shape[1])), shape[1], zero)

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Codes:
        """Codes and zero points in the order of the weight."""
        words, zero = parts.get("qweight"), _zero_points(parts["qzeros"])
        return Codes(
            alphabet="int4",
            codes=None if words is None else unpack_rows(words),
            scale=turned(parts["scales"]),
            block=(1, self._size(shape[1])),
            zero=zero if bool((zero != CENTRE).any()) else None,
        )

    def pack(self, codes: Codes, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """INT4 codes with any zero points, whose scales the stored dtype holds exactly."""
        if codes.alphabet != "int4":
            return super().pack(codes, shape)
        scale, zero = stored_grid(codes, self._size(shape[1]), shape, scale_dtype(self.scale))
        parts = {} if codes.codes is None else {"qweight": pack_rows(codes.codes, shape[1])}
        return {**parts, **_scale_parts(scale, zero)}

    def detect(
        self, parts: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> Int4Awq | None:
        """`qweight` with `qzeros` and `scales`, no `g_idx`, one row of words per column."""
        method = (config or {}).get("quant_method", self.quant_method)
        if set(parts) != {"qweight", "qzeros", "scales"} or method != self.quant_method:
            return None
        if any(len(spec.shape) != 2 for spec in parts.values()):
            return None
        version = (config or {}).get("version") or "gemm"
        if not isinstance(version, str) or version.lower() != "gemm":
            raise FormatError(f"is AWQ of version {version!r}, and only 'gemm' is read")
        rows, cols = self.shape(parts)
        size = stored_group_size(config, cols, parts["scales"].shape[0], GROUP_SIZES)
        codec = Int4Awq(size, scale_option(parts["scales"].dtype))
        check_specs(parts, codec.specs(rows, cols))
        return codec

    def config(self, kept: Sequence[str]) -> dict[str, Any]:
        """AutoAWQ's quantization_config, naming what stays in plain floats: gptqmodel looks at
        `dynamic` alone, all others at AutoAWQ's key."""
        config: dict[str, Any] = {
            "quant_method": "awq",
            "zero_point": True,
            "group_size": self.group_size,
            "bits": 4,
            "version": "gemm",
            "modules_to_not_convert": list(kept) or None,
        }
        if kept:
            config["dynamic"] = dynamic_rules(kept)
        return config

    def _size(self, cols: int) -> int:
        return cols if self.group_size == -1 else self.group_size


def pack_rows(codes: torch.Tensor, cols: int) -> torch.Tensor:
    """Codes as `grid.encode` packs them, of a multiple of 8 rows -> AWQ's int32 words [cols,
    rows/8]."""
    loops = loops_for(codes)
    if loops is not None:
        words = empty((cols, len(codes) // 8), torch.int32)
        loops.awq_words(array(codes), array(words).view("u4"))
        return words
    # Of eight rows, row 4h + 2p + q is in byte 2q + h, low nibble for p = 0.
    eight = unpack_nibbles(codes, cols).reshape(-1, 2, 2, 2, cols)
    pairs = eight[:, :, 0] | eight[:, :, 1] << 4
    word = torch.stack((pairs[:, 0, 0], pairs[:, 1, 0], pairs[:, 0, 1], pairs[:, 1, 1]), dim=2)
    return word.view(torch.int32)[..., 0].T.contiguous()


def unpack_rows(words: torch.Tensor) -> torch.Tensor:
    """Undoes `pack_rows`: uint8 [rows, 4 * ceil(cols/8)]."""
    cols, count = words.shape
    loops = loops_for(words)
    if loops is not None:
        codes = empty((8 * count, 4 * -(-cols // 8)), torch.uint8)
        loops.awq_codes(array(words).view("u4"), array(codes))
        return codes
    pairs = row_major(words.T).view(torch.uint8).view(count, cols, 2, 2).permute(0, 3, 2, 1)
    eight = torch.empty((count, 2, 2, 2, cols), dtype=torch.uint8, device=words.device)
    torch.bitwise_and(pairs, 0xF, out=eight[:, :, 0])
    torch.bitwise_right_shift(pairs, 4, out=eight[:, :, 1])
    return pack_nibbles(eight.view(8 * count, cols)).view(torch.uint8)


def _scale_parts(scale: torch.Tensor, zero: torch.Tensor) -> dict[str, torch.Tensor]:
    zeros = pack_nibbles(zero).view(torch.uint8)
    return {"qzeros": pack_rows(zeros, zero.shape[1]), "scales": turned(scale)}


def _zero_points(words: torch.Tensor) -> torch.Tensor:
    """Stored words [groups, rows/8] -> zero points uint8 [rows, groups]."""
    return unpack_nibbles(unpack_rows(words), len(words))


def _scales(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (high - low).clamp_min_(RANGE_FLOOR).div_(MAX_CODE)
    return scale, (low / scale).round_().neg_().clamp_(0, MAX_CODE)
