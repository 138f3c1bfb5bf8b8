"""What a format is: the `Codec` base class, and the words its methods share.

A codec knows tensors, not files. `specs` needs no data, so a file's header can be written before
its data and a plan is exact; `encode` and `decode` work on tiles, runs of whole rows that start on
a multiple of `row_alignment`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch

from requant.errors import FormatError
from requant.quant import grid
from requant.quant.compressed_tensors import one_scheme_config
from requant.quant.grid import Alphabet, Tile

#: safetensors dtype name -> torch dtype, for every dtype that torch can hold. F4 is two codes a
#: byte: a tensor [rows, cols] of the header is [rows, cols / 2] bytes here.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "F4": torch.uint8,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
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

#: The values of the option `scale` that are float dtypes -> what a header calls them, and back.
FLOAT_SCALES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
PLAIN_SCALES = {dtype: option for option, dtype in FLOAT_SCALES.items()}

#: The way out of a shape that a format does not hold.
LEAVE = "leave this weight in bf16 with a [modules] entry in a recipe"


@dataclass(frozen=True)
class TensorSpec:
    """Dtype (safetensors name) and shape of one stored tensor.

    `rows` tells how many rows of the weight one step along `axis` of this part covers: 1 for codes,
    128 for the scales of 128-row blocks, 2 / cols for two codes a byte of the flattened weight, 0
    for a part that belongs to the weight as a whole. `axis` is 1 where the rows of the weight run
    along the columns of the part (GPTQ, AWQ).

    `cols` tells the same of columns of the weight and the other one of the part's first two axes
    (of a part with rows 0: along `axis`): 1 for codes, 2 for two codes a byte, 8 for eight a word,
    128 for the scales of 128-column blocks, the group size for those of groups, 0 for a part that
    all columns share. None for a part of the flattened weight, where columns run along `axis` as
    well: a step covers `rows` times the weight's width of values.
    """

    dtype: str
    shape: tuple[int, ...]
    rows: int | Fraction = 1
    axis: int = 0
    cols: int | None = 1

    @cached_property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    def row_range(self, start: int, stop: int) -> tuple[int, int]:
        """The steps along `axis` that hold rows `start:stop` of the weight."""
        length = self.shape[self.axis] if self.shape else 1
        if self.rows == 0:
            return 0, length
        return int(start // self.rows), min(int(-(-stop // self.rows)), length)

    def take(self, whole: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """What a tile of rows `start:stop` of the weight has of this part, stored `whole`."""
        first, last = self.row_range(start, stop)
        return whole.narrow(self.axis, first, last - first) if self.shape else whole


@dataclass(frozen=True)
class Tolerance:
    """What a faithful conversion into a format may cost; beyond it `verify` says no.

    `max_kl`: mean KL(source || output) in nats per token. `min_sqnr_db`: of any single weight.
    """

    max_kl: float
    min_sqnr_db: float


@dataclass(frozen=True)
class Codes:
    """A tile taken apart, before any arithmetic: what a lossless repack moves.

    `codes` are as `grid.encode` gives them: int8 or float8_e4m3fn [rows, cols], or uint8 [rows,
    bytes] that hold two each, low nibble first, of "int4" (value + 8, or + zero point) in whole
    words of eight, and of "e2m1" (bit 3 is the sign); None where only scales were read, to find out
    whether they can be kept.
    `scale` [ceil(rows / block[0]), ceil(cols / block[1])], multipliers in the dtype as stored
    (uint8 exponents are float8_e8m0fnu here). `zero` uint8 0..15 of the same shape: the stored code
    that stands for 0, None for 8. `divisor` float32 []: value = code * scale / divisor (NVFP4).
    """

    alphabet: Alphabet
    codes: torch.Tensor | None
    scale: torch.Tensor
    block: tuple[int, int]
    zero: torch.Tensor | None = None
    divisor: torch.Tensor | None = None

    def tile_shape(self, whole: tuple[int, int]) -> tuple[int, int]:
        """The shape of the tile, of a weight of shape `whole`; where there are only scales, as many
        rows as they cover."""
        if self.codes is not None:
            return self.codes.shape[0], whole[1]
        rows = self.block[0]
        covered = self.scale.shape[0] * rows if rows > 0 else whole[0]
        return min(covered, whole[0]), whole[1]


class Codec(ABC):
    """A weight format: how a float matrix `[rows, cols]` becomes named stored parts and back.

    Subclasses are frozen dataclasses; their fields are the format's options. A field with
    compare=False changes which codes are chosen, not what is stored.
    """

    #: The format's name on the command line, without options.
    name: str
    #: One sentence: container, arithmetic.
    summary: str
    #: What `quantization_config` calls the container; None for plain formats.
    quant_method: str | None
    #: Engines that load it, and what its bytes were checked against.
    loaded_by: str
    checked_against: str
    #: What `verify` accepts by default.
    tolerance: Tolerance
    #: The kind of codes, for formats that can hand theirs over; the kinds that `pack` takes.
    alphabet: Alphabet | None = None
    packs: frozenset[Alphabet] = frozenset()
    #: Whether `encode` refuses: a variant that is only read.
    read_only: bool = False
    #: Whether the container holds fused experts only; taken apart, they move to another one.
    fused_only: bool = False
    #: Small parts whose bytes tell what headers do not; see `with_content`.
    needs_content: tuple[str, ...] = ()
    #: Parts whose content depends on the weight's shape, or on which of its columns is the first;
    #: see `relocate`.
    relocated: tuple[str, ...] = ()
    #: Whether `encode` needs a `summary` of the whole weight first.
    two_pass: bool = False
    #: Whether `encode` leaves tiles as `tile` gives them, and takes little memory beside them and
    #: what is stored.
    lean: bool = False
    #: Whether weights that engines fuse (names.fused_set) must share one summary.
    shares_summary: bool = False

    def row_alignment(self, cols: int) -> int:
        """Tiles start on a multiple of this many rows."""
        return 1

    @abstractmethod
    def specs(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """The parts of a `[rows, cols]` weight, keyed by what replaces `weight` in its name.

        Raises FormatError when the format cannot hold that shape.
        """

    def shape(self, parts: Mapping[str, TensorSpec]) -> tuple[int, int]:
        """The weight's (rows, cols), from parts that `detect` accepted: the inverse of `specs`."""
        rows, cols = parts["weight"].shape
        return rows, cols

    def measure(self, tile: Tile) -> torch.Tensor:
        """What one tile adds to the summary of its weight (two_pass formats)."""
        raise NotImplementedError

    def summarize(self, measured: Sequence[torch.Tensor]) -> torch.Tensor:
        """The summary, from what `measure` gave for every tile of the weight, in order."""
        raise NotImplementedError

    @abstractmethod
    def encode(
        self, tile: Tile, shape: tuple[int, int], summary: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Encode a tile (contiguous rows) of a weight of the given whole `shape`.

        A two_pass format may be given None when the tile is the whole weight. Raises FormatError
        for a value that is not finite or does not fit.
        """

    @abstractmethod
    def tile(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Tile:
        """The parts of one tile of `shape` as `encode` takes them: codes and scales where the
        product of the two is all there is to a value, else floats."""

    def decode(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        """Decode the parts of one tile of `shape` into float32; a float32 weight is itself."""
        return grid.decode(self.tile(parts, shape))

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Codes:
        """The codes and scales of one tile of `shape`; `codes` None when their part is absent.

        Raises FormatError when the tile's codes cannot be told apart from its arithmetic.
        """
        raise FormatError(f"{self.name} has no codes to hand over")

    def pack(self, codes: Codes, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """The parts of one tile that hold exactly these codes and scales; `shape` is the whole
        weight's. Without the parts of the codes when `codes.codes` is None.

        Raises FormatError, saying why, when that is not possible without loss.
        """
        raise FormatError(f"{self.name} takes no codes of {codes.alphabet}")

    @abstractmethod
    def detect(
        self, parts: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> Codec | None:
        """The codec (with its options) that reads `parts`, or None when they are not this format.

        `config` is the checkpoint's quantization_config; of a compressed-tensors one, with the
        scheme of this very weight as its only group. Raises FormatError when the parts are this
        format's but contradict each other or the config.
        """

    def with_content(self, content: Mapping[str, bytes]) -> Codec:
        """The detected codec, completed by the bytes of its `needs_content` parts.

        What they tell is kept in fields marked metadata={"stored": True}, compare=False: they are
        no options. Raises FormatError for bytes that make no sense.
        """
        return self

    def relocate(
        self, part: str, stored: torch.Tensor, shape: tuple[int, int], shift: int
    ) -> torch.Tensor:
        """A `relocated` part of a weight that is cut or joined, for the new weight of `shape`.

        `shift` is added to the number of each column: less than 0 in a cut. Raises FormatError when
        the columns at hand cannot make a weight of their own.
        """
        raise NotImplementedError

    def accepts(self, stored: Codec) -> bool:
        """Whether a weight that is stored as `stored` is in this format already.

        A format that asks for no dtype of its scales, which is to say for the default, keeps those
        of any float dtype.
        """
        default = getattr(type(self), "scale", None)
        if type(stored) is type(self) and default in ("auto", *FLOAT_SCALES):
            if getattr(self, "scale", None) == default:
                stored = replace(stored, scale=default)  # type: ignore[type-var]
        return stored == self

    def scheme(self) -> dict[str, Any] | None:
        """The compressed-tensors scheme (`weights`, `input_activations`, `format`); None for
        formats of other containers."""
        return None

    def config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """The quantization_config of a checkpoint whose linear layers all are in this format.

        `kept` names the linear modules that stay in plain floats. None for plain formats.
        """
        scheme = self.scheme()
        return None if scheme is None else one_scheme_config(scheme, kept)


def bits_per_weight(codec: Codec) -> float:
    """Stored bits per element, scales included, of a [7168, 7168] weight."""
    side = 7168
    return 8 * sum(s.nbytes for s in codec.specs(side, side).values()) / side**2


def require_choice(option: str, value: object, choices: Sequence[object]) -> None:
    """Raise FormatError when an option's value is none of its choices."""
    if value not in choices:
        raise FormatError(f"{option}={value}: expected {', '.join(map(str, choices))}")


def scale_dtype(option: str) -> torch.dtype:
    """The torch dtype of a value of the option `scale`."""
    return TORCH_DTYPES[FLOAT_SCALES[option]]


def require_groups(
    name: str,
    cols: int,
    size: int,
    offered: Sequence[int] | None = None,
    instead: Sequence[str] = (),
) -> None:
    """Raise FormatError when groups of `size` do not divide the columns, saying what to use: those
    of the sizes `offered` that do, or other formats `instead`; no size is offered by a format that
    has but one."""
    if cols % size == 0:
        return
    what = f"{name} has groups of {size}, which do not divide {cols} columns"
    if offered is not None:
        what = f"group size {size} does not divide {cols} columns"
        instead = [f"{name}[group_size={g}]" for g in offered if cols % g == 0]
    use = f"use {' or '.join(instead)}, or " if instead else ""
    raise FormatError(f"{what} ({cols} % {size} = {cols % size}); {use}{LEAVE}")


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


def exact_cast(scale: torch.Tensor, dtype: torch.dtype, what: str = "scale") -> torch.Tensor:
    """`scale` in another float dtype without any change of value. Raises FormatError else."""
    cast = scale.to(dtype)
    changed = cast.to(torch.float32) != scale.to(torch.float32)
    if bool(changed.any()):
        example = float(scale[changed].flatten()[0])
        name = str(dtype).removeprefix("torch.")
        raise FormatError(f"{what} {example:.8g} has no exact {name}")
    return cast


def refine_grid(
    codes: Codes, block: tuple[int, int], shape: tuple[int, int], what: str
) -> torch.Tensor:
    """The scales repeated for a finer grid of `block`; `shape` is the tile's.

    Raises FormatError when a block of the new grid would need more than one scale.
    """
    rows, cols = shape
    old = tuple(min(b, side) if b > 0 else side for b, side in zip(codes.block, shape, strict=True))
    new = tuple(min(b, side) if b > 0 else side for b, side in zip(block, shape, strict=True))
    scale = codes.scale
    for axis, side in ((0, rows), (1, cols)):
        if old[axis] == new[axis]:
            continue
        if old[axis] % new[axis] and old[axis] < side or old[axis] < new[axis]:
            raise FormatError(
                f"{what} has one scale for {new[0]}x{new[1]} weights, the source one for "
                f"{old[0]}x{old[1]}"
            )
        count = -(-side // new[axis])
        index = torch.arange(count, device=scale.device) * new[axis] // old[axis]
        scale = scale.index_select(axis, index)
    return scale
