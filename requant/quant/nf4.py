"""bitsandbytes 4-bit: NF4 or FP4 codes, one float32 absmax per block of the flattened weight.

Source: bitsandbytes 0.50.2, functional.py (quantize_4bit, QuantState.as_dict),
backends/default/ops.py (quantize_4bit) and csrc/cpu_ops.cpp (quantize_cpu_impl). FP4's sixteen
values are not E2M1's. With n = rows * cols and b = ceil(n / blocksize):

- `weight` U8 [ceil(n/2), 1], two codes a byte, the HIGH nibble first; `weight.quant_map` F32 [16].
- `weight.absmax` F32 [b]. With double quantization U8 [b], indices into
  `weight.nested_quant_map` F32 [256], beside `weight.nested_absmax` F32 [ceil(b/256)].
- `weight.quant_state.bitsandbytes__nf4` U8: JSON with the weight's shape, dtype and blocksize, and
  the mean that double quantization takes off absmax. Written with spaces behind it where that
  mean could have more digits, so that its size is known before its content.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

import torch

from requant.buffers import empty
from requant.errors import FormatError
from requant.quant import grid
from requant.quant.bnb_maps import (
    MAPS,
    NESTED_BLOCK,
    dynamic_map,
    nearest,
    pack_high_first,
    quantize_absmax,
)
from requant.quant.codec import (
    Codec,
    TensorSpec,
    Tolerance,
    check_specs,
    require_choice,
)
from requant.quant.grid import Coded, Tile

BLOCK_SIZES = (64, 32, 128, 256, 512, 1024, 2048, 4096)
#: What the quant_state calls the dtype that the weight had.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

#: A short last block's absmax is at least this; a whole one's is for the division only.
_AMAX_FLOOR = 1e-38
#: No float32 has a longer repr.
_LONGEST_OFFSET = 1.1754943508222875e-38
#: Bytes of a quant_state that are still read.
_STATE_LIMIT = 1024


@dataclass(frozen=True)
class BitsAndBytes(Codec):
    """NF4 or FP4 in blocks of `blocksize` values. `dtype` is what loaders decode to."""

    name: str
    tolerance: Tolerance
    double_quant: bool = False
    blocksize: int = 64
    dtype: str = "bf16"
    stored_shape: tuple[int, int] | None = field(
        default=None, compare=False, repr=False, metadata={"stored": True}
    )

    loaded_by = "transformers, vLLM, SGLang"
    checked_against = "bitsandbytes, transformers"
    quant_method = "bitsandbytes"
    lean = True

    def __post_init__(self) -> None:
        require_choice("blocksize", self.blocksize, sorted(BLOCK_SIZES))
        require_choice("dtype", self.dtype, list(DTYPES))

    @property
    def kind(self) -> Literal["nf4", "fp4"]:
        """The map."""
        return "nf4" if self.name == "nf4" else "fp4"

    @property
    def summary(self) -> str:  # type: ignore[override]
        """One sentence for `requant formats`."""
        return f"bitsandbytes {self.kind.upper()}, one absmax for {self.blocksize} weights"

    @property
    def two_pass(self) -> bool:  # type: ignore[override]
        """Double quantization takes the mean of the whole weight's absmax off first."""
        return self.double_quant

    @property
    def state_part(self) -> str:
        """The part that holds the JSON."""
        return f"weight.quant_state.bitsandbytes__{self.kind}"

    @property
    def needs_content(self) -> tuple[str, ...]:  # type: ignore[override]
        """The JSON has the shape; the map must be the one that the kernels have built in."""
        return (self.state_part, "weight.quant_map")

    @property
    def relocated(self) -> tuple[str, ...]:  # type: ignore[override]
        """The JSON has the shape."""
        return (self.state_part,)

    def row_alignment(self, cols: int) -> int:
        """Blocks run across rows: the fewest rows that hold whole (nested) blocks."""
        block = self.blocksize * (NESTED_BLOCK if self.double_quant else 1)
        return block // math.gcd(block, cols)

    def specs(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """Codes, absmax and the parts that belong to the whole weight."""
        count = rows * cols
        blocks = -(-count // self.blocksize)
        absmax_dtype = "U8" if self.double_quant else "F32"
        specs = {
            "weight": TensorSpec("U8", (-(-count // 2), 1), rows=Fraction(2, cols), cols=None),
            "weight.absmax": TensorSpec(
                absmax_dtype, (blocks,), rows=Fraction(self.blocksize, cols), cols=None
            ),
            "weight.quant_map": TensorSpec("F32", (16,), rows=0, cols=0),
        }
        if self.double_quant:
            specs["weight.nested_absmax"] = TensorSpec(
                "F32",
                (-(-blocks // NESTED_BLOCK),),
                rows=Fraction(self.blocksize * NESTED_BLOCK, cols),
                cols=None,
            )
            specs["weight.nested_quant_map"] = TensorSpec("F32", (256,), rows=0, cols=0)
        size = len(self._state((rows, cols), _LONGEST_OFFSET))
        specs[self.state_part] = TensorSpec("U8", (size,), rows=0, cols=0)
        return specs

    def shape(self, parts: Mapping[str, TensorSpec]) -> tuple[int, int]:
        """What the quant_state said, checked against the sizes of the parts."""
        if self.stored_shape is None:
            raise FormatError(f"{self.state_part}, which has the weight's shape, was not read")
        rows, cols = self.stored_shape
        expected = self.specs(rows, cols) | {self.state_part: parts[self.state_part]}
        try:
            check_specs(parts, expected)
        except FormatError as error:
            raise FormatError(
                f"{self.state_part} says [{rows}, {cols}], blocks of {self.blocksize}, but {error}"
            ) from None
        return rows, cols

    def measure(self, tile: Tile) -> torch.Tensor:
        """The absmax of the tile's blocks."""
        return self._absmax(*self._blocks(tile)).cpu()

    def summarize(self, measured: Sequence[torch.Tensor]) -> torch.Tensor:
        """The mean of absmax: one float32 sum over all of it, in torch's order on a CPU."""
        # Not in malloc's memory, which would be in ever more pieces with each weight.
        whole = empty((sum(map(len, measured)),))
        mean = torch.cat(list(measured), out=whole).mean()
        if not bool(torch.isfinite(mean)):
            raise FormatError(
                "the sum of its blocks' absmax is beyond float32; use double_quant=false"
            )
        return mean

    def encode(
        self, tile: Tile, shape: tuple[int, int], summary: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The nearest value of the map to weight / absmax, ties to the lower one."""
        blocks, rest = self._blocks(tile)
        absmax = self._absmax(blocks, rest)
        parts = {
            "weight": self._codes(blocks, rest, absmax)[:, None],
            "weight.absmax": absmax,
            "weight.quant_map": torch.tensor(MAPS[self.kind]),
        }
        offset = 0.0
        if self.double_quant:
            mean = self.summarize([absmax.cpu()]) if summary is None else summary
            offset = float(mean)
            parts["weight.absmax"], parts["weight.nested_absmax"] = quantize_absmax(absmax - offset)
            parts["weight.nested_quant_map"] = dynamic_map()
        state = self._state(shape, offset)
        parts[self.state_part] = torch.frombuffer(bytearray(state), dtype=torch.uint8)
        return parts

    def tile(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Tile:
        """map[code] * absmax, rounded to float32."""
        absmax = parts["weight.absmax"]
        if self.double_quant:
            values = parts["weight.nested_quant_map"].index_select(0, absmax.to(torch.int32))
            scales = parts["weight.nested_absmax"].repeat_interleave(NESTED_BLOCK)[: len(absmax)]
            content = bytes(parts[self.state_part].cpu().numpy())
            absmax = values.mul_(scales).add_(_read_state(content)["nested_offset"])
        rows, cols = shape
        codes, block = parts["weight"], (1, self.blocksize)
        if cols % self.blocksize == 0:
            scale = absmax.view(rows, cols // self.blocksize)
            return Coded(self.kind, codes.view(rows, cols // 2), scale, block, cols)
        missing = len(absmax) * self.blocksize // 2 - len(codes)
        codes = torch.nn.functional.pad(codes.flatten(), (0, missing)).view(len(absmax), -1)
        decoded = grid.decode(Coded(self.kind, codes, absmax[:, None], block, self.blocksize))
        return decoded.flatten()[: rows * cols].view(rows, cols)

    def detect(
        self, parts: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> BitsAndBytes | None:
        """Parts beside a quant_state of this kind. The blocksize follows from their sizes and the
        dtype from the config, until `with_content` has read both.
        """
        if self.state_part not in parts or not {"weight", "weight.absmax"} <= set(parts):
            return None
        weight, absmax, state = (parts[p] for p in ("weight", "weight.absmax", self.state_part))
        if weight.dtype != "U8":
            raise FormatError(
                f"weight is {weight.dtype} {list(weight.shape)}: bitsandbytes codes are read as U8 "
                "only; quantize with bnb_4bit_quant_storage=uint8"
            )
        if len(weight.shape) != 2 or len(absmax.shape) != 1 or len(state.shape) != 1:
            return None
        if state.shape[0] > _STATE_LIMIT:
            raise FormatError(
                f"{self.state_part} has {state.shape[0]} bytes, more than {_STATE_LIMIT}: "
                "bitsandbytes' own have under 200"
            )
        count = 2 * weight.shape[0]
        fitting = [size for size in BLOCK_SIZES if -(-count // size) == absmax.shape[0]]
        if not fitting:
            raise FormatError(
                f"weight.absmax is {list(absmax.shape)}, which no blocksize gives for a weight "
                f"of {list(weight.shape)} bytes; blocks of 64 have {-(-count // 64)}"
            )
        compute = str((config or {}).get("bnb_4bit_compute_dtype"))
        codec = replace(
            self,
            double_quant="weight.nested_absmax" in parts,
            blocksize=fitting[0],
            dtype={v: k for k, v in DTYPES.items()}.get(compute, "bf16"),
        )
        expected = codec.specs(count, 1) | {
            self.state_part: TensorSpec("U8", state.shape, rows=0),
        }
        check_specs(parts, expected)
        return codec if set(parts) == set(expected) else None

    def with_content(self, content: Mapping[str, bytes]) -> BitsAndBytes:
        """The shape, dtype and blocksize that the quant_state tells."""
        state = _read_state(content[self.state_part])
        expected: dict[str, object] = {"quant_type": self.kind}
        if self.double_quant:
            expected |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        for key, value in expected.items():
            if state.get(key) != value:
                raise FormatError(f"{self.state_part} has {key} {state.get(key)!r}, not {value!r}")
        if ("nested_offset" in state) != self.double_quant:
            raise FormatError(
                f"{self.state_part} and weight.nested_absmax: only one of them speaks of "
                "double quantization"
            )
        if content["weight.quant_map"] != torch.tensor(MAPS[self.kind]).numpy().tobytes():
            raise FormatError(f"weight.quant_map is not bitsandbytes' map of {self.kind}")
        return replace(
            self,
            blocksize=state["blocksize"],
            dtype={v: k for k, v in DTYPES.items()}[state["dtype"]],
            stored_shape=tuple(state["shape"]),
        )

    def relocate(
        self, part: str, stored: torch.Tensor, shape: tuple[int, int], shift: int
    ) -> torch.Tensor:
        """The quant_state with the new shape and the mean of absmax that it had."""
        offset = _read_state(bytes(stored.cpu().numpy())).get("nested_offset", 0.0)
        state = bytearray(self._state(shape, offset))
        return torch.frombuffer(state, dtype=torch.uint8).to(stored.device)

    def accepts(self, stored: Codec) -> bool:
        """The same codes and absmax; unless asked for, the dtype to decode to may differ."""
        if isinstance(stored, BitsAndBytes) and self.dtype == "bf16":
            stored = replace(stored, dtype="bf16")
        return stored == self

    def config(self, kept: Sequence[str]) -> dict[str, Any]:
        """transformers' BitsAndBytesConfig, as it saves it."""
        return {
            "quant_method": self.quant_method,
            "_load_in_8bit": False,
            "_load_in_4bit": True,
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": list(kept),
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "bnb_4bit_quant_type": self.kind,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": DTYPES[self.dtype],
            "bnb_4bit_quant_storage": "uint8",
            "load_in_4bit": True,
            "load_in_8bit": False,
        }

    def _state(self, shape: tuple[int, int], offset: float) -> bytes:
        """The quant_state; with an offset, as long as it is with the longest one."""
        state = {
            "quant_type": self.kind,
            "blocksize": self.blocksize,
            "dtype": DTYPES[self.dtype],
            "shape": list(shape),
        }
        if not self.double_quant:
            return json.dumps(state).encode()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        longest = json.dumps(state | {"nested_offset": _LONGEST_OFFSET})
        text = json.dumps(state | {"nested_offset": offset})
        return text.ljust(len(longest)).encode()

    def _blocks(self, tile: Tile) -> tuple[Tile, torch.Tensor]:
        """The same numbers in rows of whole blocks, and float32 [n] of the short last one."""
        if tile.shape[1] % self.blocksize == 0:
            return tile, torch.empty(0, device=tile.device)
        flat = grid.decode(tile).reshape(-1)
        whole = flat[: len(flat) // self.blocksize * self.blocksize]
        return whole.view(-1, self.blocksize), flat[len(whole) :]

    def _absmax(self, blocks: Tile, rest: torch.Tensor) -> torch.Tensor:
        """That of each block, [n], all of them finite."""
        absmax = grid.amax(blocks, self.blocksize).flatten()
        if not rest.numel():
            return absmax
        short = grid.amax(rest[None]).flatten().clamp_min_(_AMAX_FLOOR)
        return torch.cat((absmax, short))

    def _codes(self, blocks: Tile, rest: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        """The codes nearest to numbers over their block's absmax, two a byte [n].

        As bitsandbytes rounds: a product with the reciprocal, but a quotient in a short last block.
        """
        size = self.blocksize
        rows, groups = blocks.shape[0], blocks.shape[1] // size
        factors = absmax[: rows * groups].view(rows, groups).clamp_min(_AMAX_FLOOR).reciprocal_()
        codes = grid.encode(self.kind, blocks, factors, (1, size)).flatten()
        if not rest.numel():
            return codes
        quotient = torch.nn.functional.pad(rest / absmax[-1], (0, len(rest) % 2))
        return torch.cat((codes, pack_high_first(nearest(quotient, self.kind))))


def _read_state(content: bytes) -> dict[str, Any]:
    """A quant_state; raises FormatError unless blocksize, dtype, shape and offset make sense."""
    try:
        state = json.loads(content)
    except (ValueError, RecursionError):  # bad UTF-8, bad JSON, too deep
        state = None
    if not isinstance(state, dict):
        raise FormatError(f"quant_state is no JSON object: {content[:80]!r}")
    shape, offset = state.get("shape"), state.get("nested_offset", 0.0)
    sensible = {
        "blocksize": type(state.get("blocksize")) is int and state["blocksize"] in BLOCK_SIZES,
        "dtype": state.get("dtype") in DTYPES.values(),
        "shape": isinstance(shape, list)
        and len(shape) == 2
        and all(type(side) is int and side > 0 for side in shape),
        "nested_offset": isinstance(offset, float) and math.isfinite(offset),
    }
    for key, holds in sensible.items():
        if not holds:
            raise FormatError(f"quant_state has {key} {state.get(key)!r}, which makes no sense")
    return state
