"""Whether a conversion keeps every value, found out before it starts.

Codes of the same alphabet can be handed from one format to another without arithmetic, where the
target can hold the scales. Mostly the two formats alone decide; where the scales themselves do
(a BF16 scale beyond FP16, FP4 scales too far apart for one FP8 block, act-order), they are read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from requant.convert.source import Checkpoint, iter_tiles
from requant.convert.weights import StoredWeight, codes_part
from requant.errors import FormatError
from requant.quant import Codec, TensorSpec
from requant.quant.codec import TORCH_DTYPES
from requant.quant.plain import Plain

#: Of fewer scales, random ones say too little: they are read instead, which costs nothing.
_FEW_SCALES = 4096
#: Rows that are tried before all, and elements whose scales are tried at a time: some 30 MB.
_FEW_ROWS = 128
_PROBE_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Kept:
    """`lossless`: no value changes. `repack`: by handing over codes. `reason`: why a target that
    takes such codes cannot take these."""

    lossless: bool
    repack: bool = False
    reason: str | None = None


def kept_by_formats(stored: Codec, target: Codec, shape: tuple[int, int]) -> Kept | None:
    """How faithful it is to write a weight of `shape`; None where its scales decide."""
    if isinstance(stored, Plain) and isinstance(target, Plain):
        return Kept(target.dtype == "F32")  # BF16 and FP16 fit in
    if stored.alphabet is None or stored.alphabet not in target.packs:
        return Kept(False)
    repack = not isinstance(target, Plain)
    if _always(stored, target, shape):
        return Kept(True, repack)
    powers_of_two = getattr(stored, "scale", None) == "ue8m0"  # in a dtype of many digits
    if not repack and not powers_of_two and not _ever(stored, target, shape):
        return Kept(False)  # products of too many digits
    return None


def keeps_values(source: Checkpoint, weight: StoredWeight, target: Codec) -> Kept:
    """How faithful it is to write `weight` in `target`; reads its scales where they decide."""
    stored = weight.codec
    assert stored is not None
    rows, cols = weight.shape
    known = kept_by_formats(stored, target, (rows, cols))
    if known is not None:
        return known
    repack = not isinstance(target, Plain)
    # What does not fit mostly shows in the first rows already, which are read much faster.
    few = math.lcm(_FEW_ROWS, stored.row_alignment(cols), target.row_alignment(cols))
    alone = target.two_pass or few >= rows  # a scale of the whole tensor may need all of it
    pieces = [(0, rows)] if alone else [(0, few), *iter_tiles(rows, cols, few, _PROBE_ELEMENTS)]
    for start, stop in pieces:
        shape = stop - start, cols
        scales = {
            part: source.read_part(weight.parts[part], spec, start, stop)
            for part, spec in _without_codes(stored, (rows, cols)).items()
        }
        try:
            target.pack(stored.unpack(scales, shape), shape)
        except FormatError as error:
            return Kept(False, reason=str(error) if repack else None)
    return Kept(True, repack)


@lru_cache(maxsize=1024)
def _always(stored: Codec, target: Codec, shape: tuple[int, int]) -> bool:
    """Whether `target` takes codes of `stored` whatever the scales are: tried with wild ones."""
    scales = _without_codes(stored, shape)
    if max(math.prod(spec.shape) for spec in scales.values()) < _FEW_SCALES:
        return False
    return _takes(stored, target, shape, tame=False)


@lru_cache(maxsize=1024)
def _ever(stored: Codec, target: Codec, shape: tuple[int, int]) -> bool:
    """Whether `target` takes codes of `stored` with scales of any digits, but of usual size."""
    return _takes(stored, target, shape, tame=True)


def _takes(stored: Codec, target: Codec, shape: tuple[int, int], tame: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    alignment = math.lcm(stored.row_alignment(shape[1]), target.row_alignment(shape[1]))
    if not target.two_pass:  # some rows tell what all would
        shape = next(iter_tiles(*shape, alignment, _PROBE_ELEMENTS))[1], shape[1]
    specs = _without_codes(stored, shape)
    made_up = {part: _random(spec, shape, generator, tame) for part, spec in specs.items()}
    try:
        target.pack(stored.unpack(made_up, shape), shape)
    except FormatError:
        return False
    return True


def _without_codes(stored: Codec, shape: tuple[int, int]) -> dict[str, TensorSpec]:
    """All parts but the one with the codes."""
    codes = codes_part(stored, shape)
    return {part: spec for part, spec in stored.specs(*shape).items() if part != codes}


#: Bits of a small and of a large positive number of each dtype; of a tame pair, near 1. A power of
#: two with which a code overflows float32 (from 0xFD on) is refused when it is met, so it does not
#: count.
_WILD = {"U8": (1, 0xFD), "F8_E8M0": (1, 0xFD), "F8_E4M3": (1, 0x7F)}
_WILD |= {"F16": (1, 0x7C00), "BF16": (1, 0x7F80), "F32": (1, 0x7F800000), "I32": (1, 1 << 30)}
_TAME = _WILD | {"U8": (120, 134), "F8_E8M0": (120, 134), "F8_E4M3": (0x20, 0x50)}
_TAME |= {"F16": (0x3000, 0x4400), "BF16": (0x3C00, 0x4200), "F32": (0x3C000000, 0x42000000)}


def _random(
    spec: TensorSpec, shape: tuple[int, int], generator: torch.Generator, tame: bool
) -> torch.Tensor:
    """Positive values of the dtype, of any bits; the true shape where a part tells it."""
    if spec.dtype == "I64":
        return torch.tensor(shape)
    dtype = TORCH_DTYPES[spec.dtype]
    low, high = (_TAME if tame else _WILD)[spec.dtype]
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    bits = torch.randint(low, high, (math.prod(spec.shape),), generator=generator).to(width)
    return bits.view(dtype).reshape(spec.shape)
