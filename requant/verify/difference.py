"""How much two stored weights differ: bit for bit, else decoded, tile by tile. The output may be a
piece of a weight, which is compared with these rows or columns of the source's.

SQNR is 10 log10(sum of squares of the source / sum of squares of the difference), in dB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from requant.convert.fused import StoredPart
from requant.convert.rank_folders import WHOLE, Span
from requant.convert.source import Checkpoint, iter_tiles
from requant.convert.weights import StoredWeight
from requant.quant.cutting import cut_rows, plan_cut

#: Elements of each side decoded at a time: 8 MiB in float32.
TILE_ELEMENTS = 1 << 21
#: Bytes of each side compared at a time.
CHUNK_BYTES = 1 << 23


@dataclass(frozen=True)
class Difference:
    """Sums of squares of source (`signal`), output (`energy`) and their difference (`noise`).

    Over weights decoded into float32; NaN or infinite where a value is.
    """

    signal: float = 0.0
    energy: float = 0.0
    noise: float = 0.0

    @property
    def sqnr_db(self) -> float | None:
        """None where it is no finite number: equal, all zero, or not finite."""
        ratio = self.signal / self.noise if self.noise > 0 else math.nan
        return 10 * math.log10(ratio) if 0 < ratio < math.inf else None


@dataclass(frozen=True)
class Counts:
    """Elements that differ, and those that are NaN or infinite on each side."""

    different: int = 0
    source_not_finite: int = 0
    output_not_finite: int = 0


def measure(
    source: Checkpoint,
    ours: StoredWeight,
    output: Checkpoint,
    theirs: StoredWeight,
    device: torch.device | str = "cpu",
    span: Span = WHOLE,
    first_rows: int | None = None,
) -> Difference:
    """Compare `span` of one weight with another of its shape, or only about the `first_rows`."""
    total = Difference()
    for a, b in _pairs(source, ours, output, theirs, device, span, first_rows):
        total = Difference(
            total.signal + squares(a), total.energy + squares(b), total.noise + squares(a - b)
        )
    return total


def count(
    source: Checkpoint,
    ours: StoredWeight,
    output: Checkpoint,
    theirs: StoredWeight,
    device: torch.device | str = "cpu",
    span: Span = WHOLE,
) -> Counts:
    """Count what is wrong, for the message; `measure` is faster and comes first."""
    total = Counts()
    for a, b in _pairs(source, ours, output, theirs, device, span):
        total = Counts(
            total.different + int((a != b).sum()),
            total.source_not_finite + int((~torch.isfinite(a)).sum()),
            total.output_not_finite + int((~torch.isfinite(b)).sum()),
        )
    return total


def same_bytes(
    source: Checkpoint,
    ours: StoredWeight,
    output: Checkpoint,
    theirs: StoredWeight,
    span: Span = WHOLE,
) -> bool:
    """Whether both store the same parts in the same bytes, to be read by the same codec."""
    if ours.codec != theirs.codec or ours.parts.keys() != theirs.parts.keys():
        return False
    if span.axis is not None:
        return _same_piece(source, ours, output, theirs, span)
    pairs = [(part, theirs.parts[key]) for key, part in ours.parts.items()]
    if any((a.spec.dtype, a.spec.shape) != (b.spec.dtype, b.spec.shape) for a, b in pairs):
        return False
    return all(
        torch.equal(left, right)
        for a, b in pairs
        for left, right in zip(_chunks(source, a), _chunks(output, b), strict=True)
    )


def _same_piece(
    source: Checkpoint, ours: StoredWeight, output: Checkpoint, theirs: StoredWeight, span: Span
) -> bool:
    """The same for a piece, all of whose parts were copied; False where one was rewritten."""
    assert span.axis is not None
    if any(part.strides or part.pieces for part in ours.parts.values()):
        return False
    cuts = None
    if ours.codec is not None:
        rows, cols = ours.shape
        cuts = plan_cut(ours.codec, (rows, cols), span.axis, span.start, span.stop)
    for name, part in ours.parts.items():
        piece = theirs.parts[name]
        cut = cuts[name] if cuts else cut_rows(part.spec, span.start, span.stop)
        expected, found = cut.spec, piece.spec
        alike = (expected.dtype, expected.shape) == (found.dtype, found.shape)
        if cut.rewritten or not alike:
            return False
        pitch, lines, (left, right) = 1, (0, part.spec.nbytes), (0, 1)
        if cut.patch is not None:
            pitch, lines, (left, right) = cut.patch.pitch, cut.patch.lines, cut.patch.span
        step = max(1, CHUNK_BYTES // pitch)
        for first in range(*lines, step):
            last = min(first + step, lines[1])
            a = source.read_bytes(part, first * pitch, last * pitch).view(-1, pitch)
            at = (first - lines[0]) * (right - left)
            b = output.read_bytes(piece, at, at + (last - first) * (right - left))
            if not torch.equal(a[:, left:right], b.view(-1, right - left)):
                return False
    return True


def _chunks(checkpoint: Checkpoint, part: StoredPart) -> Iterator[torch.Tensor]:
    """A part's bytes in pieces of whole rows, of about CHUNK_BYTES."""
    rows = part.spec.shape[0] if part.spec.shape else 1
    step = max(1, CHUNK_BYTES * rows // max(part.spec.nbytes, 1))
    for start in range(0, rows, step):
        piece = checkpoint.read_rows(part, start, min(start + step, rows))
        yield piece.contiguous().reshape(-1).view(torch.uint8)


def _pairs(
    source: Checkpoint,
    ours: StoredWeight,
    output: Checkpoint,
    theirs: StoredWeight,
    device: torch.device | str,
    span: Span = WHOLE,
    first_rows: int | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same tiles of both, in float32 [rows, cols], of all rows or of about the first ones."""
    alignment = math.lcm(ours.row_alignment, theirs.row_alignment)
    rows = theirs.shape[0] if theirs.shape else 1
    if first_rows is not None:
        rows = min(rows, -(-first_rows // alignment) * alignment)
    cols = math.prod(ours.shape[1:])
    shift = span.start if span.axis == 0 else 0
    columns = slice(span.start, span.stop) if span.axis == 1 else slice(None)
    for start, stop in iter_tiles(rows, cols, alignment, TILE_ELEMENTS):
        # A piece may begin where the source, in another format, has no tile's first row.
        first = (start + shift) // ours.row_alignment * ours.row_alignment
        a = source.decode_rows(ours, first, stop + shift, device)[start + shift - first :]
        b = output.decode_rows(theirs, start, stop, device)
        yield a.reshape(stop - start, -1)[:, columns], b.view(stop - start, -1)


def squares(values: torch.Tensor) -> float:
    """Sum of squares: float32 within a row, float64 across rows.

    Twenty times as fast as float64 throughout, which remains for what float32 cannot square.
    """
    total = float(torch.linalg.vector_norm(values, dim=1).to(torch.float64).square().sum())
    if 0 < total < math.inf:
        return total
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
