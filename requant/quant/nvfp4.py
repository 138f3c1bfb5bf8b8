"""NVFP4: E2M1 codes, an E4M3 scale for every 16 columns and a float32 one for the weight.

| container | codes U8 [rows, cols/2] | local F8_E4M3 [rows, cols/16] | global F32 |
|---|---|---|---|
| compressed-tensors | `weight_packed` | `weight_scale` | `weight_global_scale` [1] |
| modelopt | `weight` | `weight_scale` | `weight_scale_2` [] |

compressed-tensors' global scale, 448 * 6 / amax, divides; ModelOpt's, amax / (448 * 6), multiplies.
Layers that engines fuse (q/k/v, gate/up) must share it, so it comes from the largest amax of the
set. Sources: compressed-tensors 0.20.0, quantization/utils/helpers.py and compressors/nvfp4; NVIDIA
ModelOpt 0.47.0, quantization/qtensor/nvfp4_tensor.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import requant
from requant.buffers import empty
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
from requant.quant.compiled import flat, loops_for
from requant.quant.compressed_tensors import QUANT_METHOD, scheme
from requant.quant.e2m1 import E2M1_MAX
from requant.quant.e4m3 import E4M3_MAX
from requant.quant.grid import Alphabet, Coded, Tile, require_finite
from requant.quant.packing import e4m3_to_float32
from requant.quant.search import METHODS, search

GROUP = 16
#: The largest global scale: it and its reciprocal are normal float32. Reached by amax < 3.2e-35.
_MOST = 2.0**126
#: container -> names of codes, local and global scale; the local scale of a group of zeros.
_CONTAINERS = {
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_global_scale", 0.125),
    "modelopt": ("weight", "weight_scale", "weight_scale_2", 1.0),
}
#: What `method=mse` tries: this many E4M3 codes off plain rounding's. Below it clips the largest
#: weights; 4 and 5 above, the largest becomes the code of 4 rather than the one of 6.
_STEPS = (0, -1, -2, 1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Nvfp4(Codec):
    """E2M1 in groups of 16 columns with two scales. `arithmetic=bf16` rounds amax / 6 to BF16, as
    compressed-tensors does for BF16 weights; it changes local scales, not the format."""

    container: str = "compressed-tensors"
    method: str = field(default="rtn", compare=False)
    arithmetic: str = field(default="fp32", compare=False)

    name = "nvfp4"
    summary = "NVFP4: E2M1 codes, an E4M3 scale for 16 weights and a global one"
    loaded_by = "transformers, vLLM, SGLang"
    checked_against = "compressed-tensors, ModelOpt's bytes"
    tolerance = Tolerance(max_kl=0.1, min_sqnr_db=12.0)
    alphabet = "e2m1"
    packs = frozenset[Alphabet](("e2m1",))
    two_pass = True
    shares_summary = True

    def __post_init__(self) -> None:
        require_choice("container", self.container, tuple(_CONTAINERS))
        require_choice("method", self.method, METHODS)
        require_choice("arithmetic", self.arithmetic, ("fp32", "bf16"))
        if self.arithmetic == "bf16" and (self.container, self.method) != (QUANT_METHOD, "rtn"):
            raise FormatError(
                "arithmetic=bf16 repeats compressed-tensors, which knows its own container and "
                f"method=rtn, not container={self.container} and method={self.method}; leave it out"
            )

    @property
    def quant_method(self) -> str:  # type: ignore[override]
        """The container's name."""
        return self.container

    @property
    def lean(self) -> bool:  # type: ignore[override]
        """What compiled loops do."""
        return self.arithmetic == "fp32"

    def specs(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """Codes, local scales, global scale. Raises when 16 does not divide the columns."""
        require_groups(self.name, cols, GROUP)
        codes, local, whole, _ = _CONTAINERS[self.container]
        return {
            codes: TensorSpec("U8", (rows, cols // 2), cols=2),
            local: TensorSpec("F8_E4M3", (rows, cols // GROUP), cols=GROUP),
            whole: TensorSpec("F32", () if self.container == "modelopt" else (1,), rows=0, cols=0),
        }

    def shape(self, parts: Mapping[str, TensorSpec]) -> tuple[int, int]:
        """Rows and 16 columns a local scale."""
        rows, groups = parts["weight_scale"].shape
        return rows, groups * GROUP

    def measure(self, tile: Tile) -> torch.Tensor:
        """The tile's amax, float32 [1]. Raises FormatError for NaN or infinity."""
        amax = grid.largest(tile)
        require_finite(amax)
        return self._round(amax)

    def summarize(self, measured: Sequence[torch.Tensor]) -> torch.Tensor:
        """The global scale, of the largest amax of all tiles of all weights that share it: [1]."""
        return self._global(torch.cat(list(measured)).amax().reshape(1))

    def encode(
        self, tile: Tile, shape: tuple[int, int], summary: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Local scales are global * amax / 6 in E4M3, codes the nearest of weight / (local /
        global); in ModelOpt's container with its own order of operations."""
        if self.arithmetic == "bf16":
            tile = self._round(grid.decode(tile))
        whole = self.summarize([self.measure(tile)]) if summary is None else summary
        amax = grid.amax(tile, GROUP)
        local, scale = self._scales(amax, whole)
        if self.method == "mse":
            local = self._search(tile, amax, local, whole)
            scale = self._scale(local, whole)
        codes = grid.encode("e2m1", tile, scale, (1, GROUP))
        return self._parts(codes, local, whole)

    def tile(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Tile:
        """code * (local / global), or code * (local * scale_2): two roundings in float32."""
        codes, local, whole, _ = _CONTAINERS[self.container]
        scale = self._scale(parts[local], self._checked(parts[whole]))
        return Coded("e2m1", parts[codes], scale, (1, GROUP), shape[1])

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Codes:
        """The codes and the local scales as they are; the divisor is compressed-tensors'
        global scale, or the reciprocal of ModelOpt's, rounded to float32.

        Raises FormatError for a scale that is no number.
        """
        codes, local, whole, _ = _CONTAINERS[self.container]
        scale = parts[local]
        if scale.numel() and int((scale.view(torch.uint8) & 0x7F).amax()) == 0x7F:
            raise FormatError(f"{local} holds NaN; the weight is damaged")
        return Codes(
            "e2m1",
            parts.get(codes),
            scale,
            (1, GROUP),
            divisor=self._divisor(self._checked(parts[whole])),
        )

    def pack(self, codes: Codes, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """The same codes and local scales, and the global scale as this container has it.

        A global scale that moves between containers becomes its reciprocal, rounded to float32:
        decoded values then change by at most an ulp or two of float32, far below BF16's. Raises
        FormatError for scales that are not NVFP4's.
        """
        if codes.alphabet not in self.packs:
            return super().pack(codes, shape)
        if codes.divisor is None:
            raise FormatError(
                f"{self.name} has E4M3 scales for {GROUP} weights and a global one; the source is "
                "mxfp4, with powers of two from 2^-127 to 2^127 that E4M3 may not reach, and needs "
                "requantizing"
            )
        scale = refine_grid(codes, (1, GROUP), codes.tile_shape(shape), self.name)
        local = exact_cast(scale, torch.float8_e4m3fn)
        return self._parts(codes.codes, local, self._divisor(codes.divisor))

    def detect(
        self, parts: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> Nvfp4 | None:
        """U8 codes beside E4M3 scales and a global scale, whose name tells the container."""
        found = next((c for c, names in _CONTAINERS.items() if set(parts) == {*names[:3]}), None)
        if found is None or len(parts["weight_scale"].shape) != 2:
            return None
        codec = Nvfp4(found)
        expected = codec.specs(*codec.shape(parts))
        if any(parts[name].dtype != spec.dtype for name, spec in expected.items()):
            return None
        check_specs(parts, expected)
        return codec

    def scheme(self) -> dict[str, Any] | None:
        """Preset NVFP4A16: weights only, since input scales would need calibration data."""
        if self.container != QUANT_METHOD:
            return None
        return scheme(
            "nvfp4-pack-quantized",
            num_bits=4,
            type="float",
            strategy="tensor_group",
            group_size=GROUP,
            scale_dtype="torch.float8_e4m3fn",
        )

    def config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """The container's quantization_config. ModelOpt's says W4A16_NVFP4: plain NVFP4 means
        quantized activations, whose `input_scale` a conversion without data cannot know."""
        if self.container == QUANT_METHOD:
            return super().config(kept)
        weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": GROUP}
        return {
            "quant_method": self.quant_method,
            "quant_algo": "W4A16_NVFP4",
            "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
            "ignore": list(kept),
            "producer": {"name": "requant", "version": requant.__version__},
        }

    def _round(self, values: torch.Tensor) -> torch.Tensor:
        """The weight as `arithmetic` sees it."""
        if self.arithmetic == "bf16":
            return values.to(torch.bfloat16).to(torch.float32)
        return values

    def _global(self, amax: torch.Tensor) -> torch.Tensor:
        """The global scale [1] of an amax [1], as the container stores it; 1 for zeros."""
        most = E4M3_MAX * E2M1_MAX
        if self.container == "modelopt":
            whole = (amax / most).clamp_min_(1 / _MOST)
        else:
            whole = (most / amax).clamp_max_(_MOST)
        return torch.where(amax == 0, 1.0, whole)

    def _scales(self, amax: torch.Tensor, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The E4M3 scales of groups with these maxima, and what their codes are multiplied by."""
        loops = loops_for(amax)
        if loops is None or self.arithmetic == "bf16":
            local = self._local(amax, whole)
            return local, self._scale(local, whole)
        divides, least = self.container == QUANT_METHOD, _CONTAINERS[self.container][3]
        local, scale = empty(tuple(amax.shape), torch.uint8), empty(tuple(amax.shape))
        loops.nvfp4_scales(flat(amax), float(whole), divides, least, flat(local), flat(scale))
        return local.view(torch.float8_e4m3fn), scale

    def _local(self, amax: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """The E4M3 scales of groups with these maxima; what rounds to 0 gets the container's own
        scale for it."""
        if self.container == "modelopt":
            local = amax / (whole * E2M1_MAX)
        else:
            local = self._round(amax / E2M1_MAX) * whole
        codes = local.clamp_max_(E4M3_MAX).to(torch.float8_e4m3fn)
        if codes.numel() and int(codes.view(torch.uint8).amin()) == 0:
            empty = torch.tensor(_CONTAINERS[self.container][3], device=codes.device)
            codes = torch.where(codes.view(torch.uint8) == 0, empty.to(codes.dtype), codes)
        return codes

    def _scale(self, local: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """What codes are multiplied by: float32 [rows, groups]."""
        scale = e4m3_to_float32(local)
        return scale.mul_(whole) if self.container == "modelopt" else scale.div_(whole)

    def _divisor(self, whole: torch.Tensor) -> torch.Tensor:
        """Between this container's global scale and a divisor, either way: float32 []."""
        return (whole if self.container == QUANT_METHOD else whole.reciprocal()).reshape(())

    def _checked(self, whole: torch.Tensor) -> torch.Tensor:
        """A stored global scale. Raises FormatError unless it is a positive number."""
        if not 0 < float(whole) < float("inf"):
            name = _CONTAINERS[self.container][2]
            raise FormatError(f"{name} is {float(whole)}, expected a positive number")
        return whole

    def _search(
        self, tile: Tile, amax: torch.Tensor, local: torch.Tensor, whole: torch.Tensor
    ) -> torch.Tensor:
        """Per group the E4M3 scale near plain rounding's with the least squared error."""
        codes = local.view(torch.uint8)

        def candidates() -> Iterator[tuple[torch.Tensor]]:
            for step in _STEPS:
                near = (codes.to(torch.int16) + step).clamp_(1, 0x7E)  # 2^-9 to 448
                yield (near.to(torch.uint8),)

        def store(codes: torch.Tensor) -> Coded:
            scale = self._scale(codes.view(torch.float8_e4m3fn), whole)
            return grid.coded("e2m1", tile, scale, (1, GROUP))

        (best,) = search(tile, amax, candidates(), store)
        return best.view(torch.float8_e4m3fn)

    def _parts(
        self, packed: torch.Tensor | None, local: torch.Tensor, whole: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        codes_name, local_name, whole_name, _ = _CONTAINERS[self.container]
        shape = () if self.container == "modelopt" else (1,)
        parts = {} if packed is None else {codes_name: packed}
        return {**parts, local_name: local, whole_name: whole.reshape(shape)}
