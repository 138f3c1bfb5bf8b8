"""MXFP4: E2M1 codes and one E8M0 exponent for every 32 columns, in three containers.

value = code * 2^(b - 127) for the exponent byte b. Two codes a byte, the even column low.

| container | codes | exponents |
|---|---|---|
| compressed-tensors | `weight_packed` U8 [rows, cols/2] | `weight_scale` U8 |
| deepseek-v4 | `weight` I8 or U8 [rows, cols/2], or F4 [rows, cols] | `scale` F8_E8M0 |
| gpt-oss, read only | `weight_blocks` U8 [rows, cols/32, 16] | `weight_scales` U8 |

Exponents are [rows, cols/32]. Sources: compressed-tensors 0.20.0, compressors/mxfp4; transformers
5.23.0, integrations/finegrained_fp8.py and integrations/mxfp4.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from requant.errors import FormatError
from requant.quant import grid
from requant.quant.codec import (
    Codec,
    Codes,
    TensorSpec,
    Tolerance,
    check_specs,
    exact_cast,
    refine_grid,
    require_choice,
    require_groups,
)
from requant.quant.compressed_tensors import QUANT_METHOD, scheme, stored_weights
from requant.quant.e2m1 import E2M1_MAX
from requant.quant.e4m3 import fine_grained_config
from requant.quant.e8m0 import (
    RULES,
    e8m0_to_float32,
    exponent_bytes,
    require_exponents,
)
from requant.quant.grid import Alphabet, Coded, Tile
from requant.quant.search import METHODS, search

GROUP = 32
#: container -> names of the codes and of the exponents, quant_method.
_CONTAINERS = {
    "compressed-tensors": ("weight_packed", "weight_scale", QUANT_METHOD),
    "deepseek-v4": ("weight", "scale", "fp8"),
    "gpt-oss": ("weight_blocks", "weight_scales", "mxfp4"),
}
#: Option `codes` -> dtype of DeepSeek-V4's codes; the bytes are the same.
_CODE_DTYPES = {"i8": "I8", "u8": "U8", "f4": "F4"}


@dataclass(frozen=True)
class Mxfp4(Codec):
    """E2M1 in groups of 32 columns with a power-of-two scale.

    `exponent` is the rule for the scale: "ceil" never saturates, "ct" is compressed-tensors'.
    `method=mse` tries both for every group. `codes` is the dtype that deepseek-v4 stores codes in.
    """

    container: str = "compressed-tensors"
    codes: str = "i8"
    exponent: str = field(default="ceil", compare=False)
    method: str = field(default="rtn", compare=False)

    name = "mxfp4"
    summary = "MXFP4: E2M1 codes, one power of two for 32 weights"
    loaded_by = "transformers, vLLM, SGLang"
    checked_against = "compressed-tensors, transformers"
    tolerance = Tolerance(max_kl=0.15, min_sqnr_db=10.0)
    lean = True
    alphabet = "e2m1"
    packs = frozenset[Alphabet](("e2m1",))

    def __post_init__(self) -> None:
        require_choice("container", self.container, tuple(_CONTAINERS))
        require_choice("codes", self.codes, tuple(_CODE_DTYPES))
        require_choice("exponent", self.exponent, RULES)
        require_choice("method", self.method, METHODS)
        if self.container != "deepseek-v4" and self.codes != "i8":
            raise FormatError(
                f"codes={self.codes} is for container=deepseek-v4; {self.container} has one dtype "
                "of codes, so leave it out"
            )
        if self.method == "mse" and self.exponent != "ceil":
            raise FormatError(
                f"exponent={self.exponent} says nothing with method=mse, which tries both rules; "
                "leave one of them out"
            )

    @property
    def quant_method(self) -> str:  # type: ignore[override]
        """The container's; DeepSeek-V4 puts FP4 experts into its fp8 config."""
        return _CONTAINERS[self.container][2]

    @property
    def read_only(self) -> bool:  # type: ignore[override]
        """gpt-oss fuses its experts, interleaved: requant takes them apart and does not put them
        together again."""
        return self.container == "gpt-oss"

    @property
    def fused_only(self) -> bool:  # type: ignore[override]
        """Whether only fused experts are stored so."""
        return self.container == "gpt-oss"

    def specs(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """Codes and exponents. Raises when 32 does not divide the columns."""
        require_groups(self.name, cols, GROUP)
        codes, exponents, _ = _CONTAINERS[self.container]
        grid = (rows, cols // GROUP)
        match self.container:
            case "gpt-oss":
                first, dtype = TensorSpec("U8", (*grid, GROUP // 2), cols=GROUP), "U8"
            case "deepseek-v4":
                packed = 1 if self.codes == "f4" else 2
                first = TensorSpec(_CODE_DTYPES[self.codes], (rows, cols // packed), cols=packed)
                dtype = "F8_E8M0"
            case _:
                first, dtype = TensorSpec("U8", (rows, cols // 2), cols=2), "U8"
        return {codes: first, exponents: TensorSpec(dtype, grid, cols=GROUP)}

    def shape(self, parts: Mapping[str, TensorSpec]) -> tuple[int, int]:
        """Rows and 32 columns an exponent."""
        rows, groups = parts[_CONTAINERS[self.container][1]].shape
        return rows, groups * GROUP

    def encode(
        self, tile: Tile, shape: tuple[int, int], summary: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Exponents by the rule, codes to the nearest; the division by the scale is exact."""
        self._require_writable()
        amax = grid.amax(tile, GROUP)
        exponents = exponent_bytes(amax, E2M1_MAX, self.exponent)
        if self.method == "mse":
            exponents = _search(tile, amax, exponents)
        codes = grid.encode("e2m1", tile, e8m0_to_float32(exponents), (1, GROUP))
        return self._parts(codes, exponents)

    def tile(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Tile:
        """code * 2^(b - 127), exact in float32 below 2^128. Raises FormatError for the byte 255."""
        codes, exponents, _ = _CONTAINERS[self.container]
        scale = e8m0_to_float32(parts[exponents])
        return Coded("e2m1", parts[codes].flatten(1), scale, (1, GROUP), shape[1])

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Codes:
        """Codes and exponents as they are. Raises FormatError for the byte 255."""
        codes, exponents, _ = _CONTAINERS[self.container]
        require_exponents(parts[exponents])
        packed = parts.get(codes)
        return Codes(
            "e2m1",
            None if packed is None else packed.flatten(1).view(torch.uint8),
            parts[exponents].contiguous().view(torch.float8_e8m0fnu),
            (1, GROUP),
        )

    def pack(self, codes: Codes, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """The same codes and exponents. Raises FormatError for scales that are no power of two for
        32 columns or more."""
        self._require_writable()
        if codes.alphabet not in self.packs:
            return super().pack(codes, shape)
        if codes.divisor is not None:
            raise FormatError(
                f"{self.name} has one power of two for {GROUP} weights; the source is nvfp4, with "
                "an E4M3 scale for 16 and a global one, and needs requantizing"
            )
        scale = refine_grid(codes, (1, GROUP), codes.tile_shape(shape), self.name)
        exponents = exact_cast(scale, torch.float8_e8m0fnu).view(torch.uint8)
        return self._parts(codes.codes, exponents)

    def detect(
        self, parts: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> Mxfp4 | None:
        """Packed codes beside exponents, by the names and dtypes of each container.

        compressed-tensors' MXFP6 has the same names: its config says 6 bits.
        """
        found = next((c for c, names in _CONTAINERS.items() if set(parts) == {*names[:2]}), None)
        if found is None or stored_weights(config).get("num_bits", 4) != 4:
            return None
        codes, exponents = (parts[name] for name in _CONTAINERS[found][:2])
        option = "i8"
        if found == "deepseek-v4":
            option = next((o for o, d in _CODE_DTYPES.items() if d == codes.dtype), "")
        codec = Mxfp4(found, option) if option else None
        if codec is None or len(exponents.shape) != 2:
            return None
        expected = codec.specs(*codec.shape(parts))
        if any(parts[name].dtype != spec.dtype for name, spec in expected.items()):
            return None
        check_specs(parts, expected)
        return codec

    def accepts(self, stored: Codec) -> bool:
        """The container decides; the dtype of the codes only when it is asked for."""
        if not isinstance(stored, Mxfp4) or stored.container != self.container:
            return False
        return self.codes in ("i8", stored.codes)

    def scheme(self) -> dict[str, Any] | None:
        """Preset MXFP4A16: weights only."""
        if self.quant_method != QUANT_METHOD:
            return None
        return scheme(
            "mxfp4-pack-quantized",
            num_bits=4,
            type="float",
            strategy="group",
            group_size=GROUP,
            scale_dtype="torch.uint8",
        )

    def config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """The container's quantization_config. DeepSeek-V4's is that of the FP8 layers around the
        experts; that the experts are FP4 stands beside it (`expert_dtype`)."""
        if self.container == "compressed-tensors":
            return super().config(kept)
        if self.container == "deepseek-v4":
            return fine_grained_config(
                self.quant_method, kept, scale_fmt="ue8m0", weight_block_size=[128, 128]
            )
        config: dict[str, Any] = {"quant_method": self.quant_method}
        return {**config, "modules_to_not_convert": list(kept)} if kept else config

    def _parts(
        self, packed: torch.Tensor | None, exponents: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The container's parts of uint8 codes, two a byte, and uint8 exponents."""
        codes_name, exponents_name, _ = _CONTAINERS[self.container]
        v4 = self.container == "deepseek-v4"
        parts = {}
        if packed is not None:
            parts[codes_name] = packed.view(torch.int8) if v4 and self.codes == "i8" else packed
        parts[exponents_name] = exponents.view(torch.float8_e8m0fnu) if v4 else exponents
        return parts

    def _require_writable(self) -> None:
        if self.read_only:
            raise FormatError(
                f"{self.name}[container={self.container}] is only read: its experts are fused and "
                f"interleaved; use {self.name}, compressed-tensors' container of the same codes"
            )


def _search(tile: Tile, amax: torch.Tensor, ceil: torch.Tensor) -> torch.Tensor:
    """Per group the exponent of "ceil", or one less if clipping costs less than the finer grid
    gains."""

    def store(exponents: torch.Tensor) -> Coded:
        return grid.coded("e2m1", tile, e8m0_to_float32(exponents), (1, GROUP))

    (exponents,) = search(tile, amax, ((ceil,), (ceil.clamp_min(1) - 1,)), store)
    return exponents
