"""Puts the pieces of weights where an output file's header says, as they come."""

from __future__ import annotations

import base64
from collections.abc import Mapping

import torch

from requant.convert.plan import PlannedFile, PlannedPiece
from requant.convert.steps import Tiles
from requant.convert.writer import OutputFile
from requant.quant.cutting import Patch, as_bytes


class Builder:
    """Fills one file: the codes of each weight as they come, what is small after them.

    Of a weight that the file holds a piece of, it takes the bytes that belong to the piece.
    """

    def __init__(
        self, planned: PlannedFile, file: OutputFile, late: Mapping[str, str] | None = None
    ) -> None:
        """`late`: what an earlier builder of the file had for its end; the file is continued."""
        self.planned = planned
        self._file = file
        self._pieces = {id(piece.weight): piece for piece in planned.pieces}
        self._slicer = Slicer(None)
        self._held: dict[str, list[torch.Tensor]] = {}
        self._late: dict[str, torch.Tensor] = {}
        if late is None:
            file.append(planned.header)
        for name, text in (late or {}).items():
            data = bytearray(base64.b64decode(text))
            self._late[name] = torch.frombuffer(data, dtype=torch.uint8)

    @property
    def late(self) -> dict[str, str]:
        """What is to come at the end of the file, by tensor, in base64."""
        return {
            name: base64.b64encode(bytes(data.numpy())).decode()
            for name, data in self._late.items()
        }

    def add(self, made: Tiles) -> None:
        """Append what the next step gave of the next weight, if the file holds any of it."""
        piece = self._pieces.get(id(made.weight))
        if piece is None:
            return
        for tile in made.tiles:
            for part, tensor in tile.items():
                if part != piece.streamed:
                    self._held.setdefault(part, []).append(tensor)
                    continue
                self._file.append(self._slicer_of(piece, part).take(as_bytes(tensor)))
        if made.last:
            self._finish(piece)

    def finish(self) -> None:
        """Append the odd-sized tensors, which `layout` put last."""
        for name in self.planned.ranges:
            if name in self._late:
                self._file.append(self._late.pop(name))

    def _slicer_of(self, piece: PlannedPiece, part: str) -> Slicer:
        """The slicer of the streamed part of the weight at hand."""
        if self._slicer.piece is not piece:
            cut = (piece.cuts or {}).get(part)
            self._slicer = Slicer(cut.patch if cut else None, piece)
        return self._slicer

    def _finish(self, piece: PlannedPiece) -> None:
        """Append all of a weight that is left, in the order of the header."""
        for part, spec in piece.specs.items():
            if part == piece.streamed:
                continue
            data = _part_of(piece, part, self._held.pop(part))
            if spec.nbytes % 8:
                self._late[piece.names[part]] = torch.cat([as_bytes(tensor) for tensor in data])
                continue
            for tensor in data:
                self._file.append(tensor)


def _part_of(piece: PlannedPiece, part: str, tiles: list[torch.Tensor]) -> list[torch.Tensor]:
    """What a piece has of a part, from all tiles of the weight; to be written one by one."""
    spec = piece.weight.specs[part]
    cut = (piece.cuts or {}).get(part)
    if spec.rows == 0:  # of the weight as a whole: every tile has it
        tiles = tiles[:1]
    elif spec.axis and len(tiles) > 1:
        tiles = [torch.cat(tiles, spec.axis)]
    if cut is None:
        return tiles
    slicer = Slicer(cut.patch)
    tiles = [slicer.take(as_bytes(tensor)) for tensor in tiles]
    return [piece.relocate(part, torch.cat(tiles))] if cut.rewritten else tiles


class Slicer:
    """Takes a patch out of the bytes of a part that come one after the other; None takes all."""

    def __init__(self, patch: Patch | None, piece: PlannedPiece | None = None) -> None:
        self.piece = piece
        self._patch = patch
        self._line = 0
        self._rest = torch.empty(0, dtype=torch.uint8)

    def take(self, data: torch.Tensor) -> torch.Tensor:
        """What the patch has of the next bytes, uint8 [n]."""
        if self._patch is None:
            return data
        if self._rest.numel():
            data = torch.cat([self._rest, data])
        pitch = self._patch.pitch
        count = data.numel() // pitch
        self._rest = data[count * pitch :].clone()
        first, last = (min(max(edge - self._line, 0), count) for edge in self._patch.lines)
        self._line += count
        lines = data[: count * pitch].view(count, pitch)
        return lines[first:last, slice(*self._patch.span)].flatten()
