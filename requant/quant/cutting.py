"""Cutting a stored weight along its rows or columns, and joining the pieces, without decoding.

Engines split a weight over GPUs: by rows where each computes some of the outputs, by columns where
each takes some of the inputs (o_proj, down_proj). Codes are moved as they are, with the scales and
zero points that belong to them, so a piece decodes to exactly the values it had. What a piece has
of each stored part follows from `TensorSpec`, without data: byte ranges that can be streamed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from requant.errors import FormatError
from requant.quant.codec import TORCH_DTYPES, Codec, TensorSpec

#: What the two axes of a weight are called.
AXES = ("rows", "columns")


@dataclass(frozen=True)
class Patch:
    """Bytes `span` of each of the `lines` of a stored part, seen as lines of `pitch` bytes that
    follow each other. Both ranges are (first, behind the last)."""

    pitch: int
    lines: tuple[int, int]
    span: tuple[int, int]


@dataclass(frozen=True)
class PartCut:
    """One part of a piece: its `spec`, and where it lies in the part of the whole weight.

    `patch` is None for a part that every piece has as it is. `rewritten` parts then go through
    `Codec.relocate`.
    """

    spec: TensorSpec
    patch: Patch | None
    rewritten: bool


@dataclass(frozen=True)
class _Run:
    """How an axis of the weight runs through a part that is seen as lines of `pitch` bytes.

    A step, `step` rows or columns of the weight, is a line, or where `unit` is not 0 as many bytes
    of each of the `lines`.
    """

    step: int | Fraction
    lines: int
    pitch: int
    unit: Fraction


def cut_alignment(codec: Codec, shape: tuple[int, int], axis: int) -> int | None:
    """Cuts between multiples of this many rows (axis 0) or columns (axis 1) move codes only; the
    last piece ends where the weight does. None for an axis that cannot be cut; see `cut_reason`.

    Content may still forbid a cut along columns: GPTQ's act-order, which `Codec.relocate` refuses.
    """
    return _rule(codec, shape, axis)[0]


def cut_reason(codec: Codec, shape: tuple[int, int], axis: int) -> str:
    """Why `cut_alignment` is what it is, naming the part that decides."""
    return _rule(codec, shape, axis)[1]


def plan_cut(
    codec: Codec, shape: tuple[int, int], axis: int, start: int, stop: int
) -> dict[str, PartCut]:
    """What rows (axis 0) or columns (axis 1) start:stop of a weight of `shape` have of each part.

    Raises FormatError where cuts at `start` and `stop` would not move codes only.
    """
    _require_legal(codec, shape, axis, start, stop)
    side = stop - start
    new = codec.specs(*((side, shape[1]) if axis == 0 else (shape[0], side)))
    return {
        part: PartCut(new[part], _patch(spec, shape, axis, start, stop), part in codec.relocated)
        for part, spec in codec.specs(*shape).items()
    }


def cut_rows(spec: TensorSpec, start: int, stop: int) -> PartCut:
    """Entries start:stop of a tensor that is no matrix: a bias, attention sinks."""
    pitch = spec.nbytes // spec.shape[0]
    new = TensorSpec(spec.dtype, (stop - start, *spec.shape[1:]))
    return PartCut(new, Patch(pitch, (start, stop), (0, pitch)), False)


def cut(
    codec: Codec,
    parts: Mapping[str, torch.Tensor],
    shape: tuple[int, int],
    axis: int,
    start: int,
    stop: int,
) -> dict[str, torch.Tensor]:
    """The parts of a weight that is rows or columns start:stop of the one of `shape`, stored as
    `parts`; they may share its memory. The same codec reads them, but for what `with_content` told
    it of the whole weight.

    Raises FormatError for a cut that is not legal, and parts that are not those of `shape`.
    """
    planned = plan_cut(codec, shape, axis, start, stop)
    _require_parts(codec, parts, codec.specs(*shape))
    piece: dict[str, torch.Tensor] = {}
    for part, here in planned.items():
        tensor = parts[part]
        if here.patch is not None:
            taken = _window(as_bytes(tensor), here.patch).contiguous().flatten()
            tensor = taken.view(tensor.dtype).reshape(_torch_shape(here.spec))
        if here.rewritten:
            new = (stop - start, shape[1]) if axis == 0 else (shape[0], stop - start)
            tensor = codec.relocate(part, tensor, new, -start * axis)
        piece[part] = tensor
    return piece


def join(
    codec: Codec,
    pieces: Sequence[Mapping[str, torch.Tensor]],
    shape: tuple[int, int],
    axis: int,
) -> dict[str, torch.Tensor]:
    """The parts of a weight of `shape` from its pieces along an axis, in order: undoes `cut`.

    Raises FormatError for pieces that do not make it up, and when a part that all pieces should
    have alike differs.
    """
    specs = codec.specs(*shape)
    whole: dict[str, torch.Tensor] = {}
    start = 0
    for number, piece in enumerate(pieces):
        try:
            stop = _stop(codec, piece, shape, axis, start)
            planned = plan_cut(codec, shape, axis, start, stop)
            _require_parts(codec, piece, {part: here.spec for part, here in planned.items()})
            for part, here in planned.items():
                tensor = piece[part]
                if here.rewritten:
                    tensor = codec.relocate(part, tensor, shape, start * axis)
                if part not in whole:
                    whole[part] = tensor if here.patch is None else _empty(specs[part], tensor)
                if here.patch is not None:
                    target = _window(as_bytes(whole[part]), here.patch)
                    target.copy_(as_bytes(tensor).view(target.shape))
                elif not torch.equal(as_bytes(whole[part]), as_bytes(tensor)):
                    raise FormatError(f"{part} is not the one of piece 0; all have it alike")
        except FormatError as error:
            raise FormatError(f"piece {number} of {len(pieces)}: {error}") from error
        start = stop
    if start != shape[axis]:
        raise FormatError(f"pieces have {start} {AXES[axis]} of {shape[axis]}")
    return whole


def relocate_groups(
    part: str, index: torch.Tensor, cols: int, size: int, shift: int
) -> torch.Tensor:
    """`Codec.relocate` of the group of each column, `index`, for a weight that is `cols` wide in
    groups of `size` (-1: one a row). Raises FormatError for a group that the weight lacks."""
    groups, moved = 1, index
    if size > 0:
        groups, moved = -(-cols // size), index + shift // size
    low, high = int(moved.amin()), int(moved.amax())
    if low < 0 or high >= groups:
        raise FormatError(
            f"{part} puts a column into group {low if low < 0 else high} of {groups}, counted from "
            "the first one here; where act-order has scattered a group's columns, cut along rows"
        )
    return moved


def _rule(codec: Codec, shape: tuple[int, int], axis: int) -> tuple[int | None, str]:
    """The multiple that cuts fall on, and a sentence that says why."""
    coarsest: dict[int, str] = {1: ""}
    for part, spec in codec.specs(*shape).items():
        step = _step(spec, shape, axis)
        if spec.cols is not None:
            reason = f"one step of {part} is {step} {AXES[axis]}"
        else:
            values = Fraction(spec.rows * shape[1])
            reason = f"one step of {part} is {values} values of the flattened weight"
            if axis == 1 and shape[1] % values:
                return None, f"{reason}, and {values} do not divide {shape[1]} columns"
        coarsest.setdefault(Fraction(step).numerator, reason)
    if axis == 0:
        tile = codec.row_alignment(shape[1])
        coarsest.setdefault(tile, f"{codec.name} packs {tile} rows at a time")
    multiple = math.lcm(*filter(None, coarsest))
    reason = coarsest[max(coarsest)] or f"every part goes by single {AXES[axis]}"
    return multiple, reason


def _require_legal(codec: Codec, shape: tuple[int, int], axis: int, start: int, stop: int) -> None:
    side, name = shape[axis], AXES[axis]
    where = f"{name} {start}:{stop} of {side}"
    if not 0 <= start < stop <= side:
        raise FormatError(f"{where}: expected 0 <= first < last <= {side}")
    multiple, reason = _rule(codec, shape, axis)
    if multiple is None:
        raise FormatError(f"{where}: {codec.name} cannot be cut along {name} here: {reason}")
    for edge in (start, stop):
        if edge % multiple and edge != side:
            raise FormatError(
                f"{where}: cuts of {codec.name} fall on multiples of {multiple} {name}, since "
                f"{reason} ({edge} % {multiple} = {edge % multiple})"
            )


def _step(spec: TensorSpec, shape: tuple[int, int], axis: int) -> int | Fraction:
    """How many rows or columns of the weight a step of the part covers; 0 for all."""
    if axis == 0:
        return spec.rows
    return spec.rows * shape[1] if spec.cols is None else spec.cols


def _run(spec: TensorSpec, shape: tuple[int, int], axis: int) -> _Run | None:
    """How the axis runs through the part; None where every piece has all of it."""
    step = _step(spec, shape, axis)
    if step == 0:
        return None
    if axis == 1 and spec.cols is None:  # the flattened weight: see it as rows again
        lines, steps, along = shape[0], int(1 / Fraction(spec.rows)), 1
    else:
        along = spec.axis if axis == 0 or not spec.rows else 1 - spec.axis
        lines, steps = spec.shape[0], spec.shape[along]
    pitch = spec.nbytes // lines
    return _Run(step, lines, pitch, Fraction(pitch, steps) * along)


def _patch(
    spec: TensorSpec, shape: tuple[int, int], axis: int, start: int, stop: int
) -> Patch | None:
    run = _run(spec, shape, axis)
    if run is None:
        return None
    first, last = math.ceil(start / Fraction(run.step)), math.ceil(stop / Fraction(run.step))
    if run.unit:
        return Patch(run.pitch, (0, run.lines), (int(first * run.unit), int(last * run.unit)))
    return Patch(run.pitch, (first, last), (0, run.pitch))


def _stop(
    codec: Codec, piece: Mapping[str, torch.Tensor], shape: tuple[int, int], axis: int, start: int
) -> int:
    """Where a piece that begins at `start` ends, by the size of its codes: the first part."""
    part, spec = next(iter(codec.specs(*shape).items()))
    run = _run(spec, shape, axis)
    assert run is not None
    if part not in piece:
        raise FormatError(f"{part} is missing; has {', '.join(sorted(piece))}")
    nbytes = piece[part].numel() * piece[part].element_size()
    steps = nbytes // (run.lines * run.unit if run.unit else run.pitch)
    return min(start + int(steps * run.step), shape[axis])


def _require_parts(
    codec: Codec, parts: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec]
) -> None:
    """Raise FormatError unless the parts are as the specs say. What `relocate` makes anew may have
    another length: bitsandbytes' own JSON is shorter than ours."""
    for part, spec in specs.items():
        if part not in parts:
            raise FormatError(f"{part} is missing; has {', '.join(sorted(parts))}")
        tensor, shape = parts[part], _torch_shape(spec)
        if part in codec.relocated and not spec.rows and not spec.cols:
            continue
        if tensor.dtype != TORCH_DTYPES[spec.dtype] or tuple(tensor.shape) != shape:
            raise FormatError(
                f"{part} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, "
                f"expected {spec.dtype} {list(spec.shape)}"
            )


def _torch_shape(spec: TensorSpec) -> tuple[int, ...]:
    """The shape of the tensor that holds a part: F4 has two codes in a byte."""
    return (*spec.shape[:-1], spec.shape[-1] // 2) if spec.dtype == "F4" else spec.shape


def _empty(spec: TensorSpec, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(_torch_shape(spec), dtype=like.dtype, device=like.device)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, uint8 [n], without a copy where it is contiguous."""
    # A contiguous tensor may have any stride where its side is 1, and `view` insists on 1.
    return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _window(raw: torch.Tensor, patch: Patch) -> torch.Tensor:
    """A patch of the bytes of a part: a view."""
    lines = raw.view(-1, patch.pitch)
    return lines[slice(*patch.lines), slice(*patch.span)]
