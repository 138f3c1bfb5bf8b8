"""The work of a conversion in pieces: read, decode, encode a few tiles of one weight at a time.

Memory is a few tiles per worker whatever the model's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypeVar

import torch

from requant.buffers import release
from requant.convert.forms import PlannedWeight
from requant.convert.source import Checkpoint, iter_tiles
from requant.convert.weights import StoredWeight
from requant.errors import FormatError
from requant.quant import Codec
from requant.quant.compiled import available

#: Elements that are one step of work, and how many of them are decoded at a time where a tile is
#: decoded as a whole; otherwise a tile is as many as are stored in a few megabytes, and written in
#: twice as many: of 4-bit weights up to twice the usual step, and a step of its own.
CHUNK_ELEMENTS = 1 << 22
TILE_ELEMENTS = 1 << 20
TILE_BYTES = 1 << 22
#: Steps of formats that are not lean, many temporaries each, after which free memory is given back.
RELEASE_STEPS = 4
#: Bytes a worker copies at a time.
COPY_BYTES = 1 << 22

#: Rows of a tile, at least, where they lie along the columns of a stored part.
TALL_ROWS = 1024

T = TypeVar("T")


@dataclass(frozen=True)
class Tiles:
    """What one step gave of one weight: consecutive tiles of its parts. `last`: there is no more.

    `read_bytes` of the source it took.
    """

    weight: PlannedWeight
    tiles: Sequence[Mapping[str, torch.Tensor]]
    last: bool
    read_bytes: int


class Summaries:
    """The first pass of two-pass formats: what `encode` must know of the whole weight.

    Weights that engines fuse share one; it is computed once, wherever their files lie.
    """

    def __init__(self, source: Checkpoint, device: torch.device, pool: ThreadPoolExecutor) -> None:
        self._source, self._device, self._pool = source, device, pool
        self._begun: dict[tuple[str, ...], list[Future[list[torch.Tensor]]]] = {}
        self._known: dict[tuple[str, ...], torch.Tensor] = {}

    def begin(self, weight: PlannedWeight) -> None:
        """Let the workers compute what `of` will be asked for."""
        key = self._key(weight)
        if key and key not in self._known and key not in self._begun:
            assert weight.codec is not None
            self._begun[key] = list(self._measure(weight.codec, weight.companions))

    def of(self, weight: PlannedWeight) -> torch.Tensor | None:
        """The summary for `weight`; None when its format needs none."""
        key = self._key(weight)
        if not key:
            return None
        self.begin(weight)
        if key not in self._known:
            assert weight.codec is not None
            measured = [one for future in self._begun.pop(key) for one in future.result()]
            self._known[key] = weight.codec.summarize(measured)
        return self._known[key]

    def _key(self, weight: PlannedWeight) -> tuple[str, ...]:
        return tuple(companion.name for companion in weight.companions)

    def _measure(
        self, codec: Codec, companions: Sequence[StoredWeight]
    ) -> Iterator[Future[list[torch.Tensor]]]:
        """What waits in the pool holds no memory, what is done only its measures."""

        def measure(stored: StoredWeight, start: int, stop: int) -> list[torch.Tensor]:
            def of_tile(a: int, b: int) -> torch.Tensor:
                tile = self._source.tile_rows(stored, a, b, self._device)
                return _of_rows(stored, a, b, lambda: codec.measure(tile))

            elements = tile_elements(stored, codec)
            return [of_tile(*rows) for rows in _ranges(stored, codec, elements, start, stop)]

        for stored in companions:
            for start, stop in _ranges(stored, codec, step_elements(stored, codec)):
                yield self._pool.submit(measure, stored, start, stop)


class Steps:
    """The work on weights, in their order: functions that any thread may run."""

    def __init__(self, source: Checkpoint, device: torch.device, pool: ThreadPoolExecutor) -> None:
        self.pool = pool
        self._source, self._device = source, device
        self._summaries = Summaries(source, device, pool)
        self._heavy = 0

    def of(self, weights: Sequence[PlannedWeight]) -> Iterator[Callable[[], Tiles]]:
        """One step a few tiles. The next weight is measured while workers encode this one."""
        for number, weight in enumerate(weights):
            for following in weights[number : number + 2]:
                self._summaries.begin(following)
            if weight.codec is None:
                yield from self._copies(weight)
                continue
            if weight.repack:
                convert = partial(_repack, self._source, weight)
            else:
                summary = self._summaries.of(weight)
                convert = partial(_encode, self._source, weight, self._device, summary)
            rows, _ = weight.source.shape
            elements = step_elements(weight.source, weight.codec)
            for start, stop in _ranges(weight.source, weight.codec, elements):
                last = stop == rows
                yield partial(_convert, convert, weight, start, stop, last)
                self._heavy += not weight.codec.lean
                if self._heavy == RELEASE_STEPS:
                    self._heavy = 0
                    release()

    def _copies(self, weight: PlannedWeight) -> Iterator[Callable[[], Tiles]]:
        """The stored bytes in pieces; of a view that lies scattered, in whole rows."""
        stored = weight.source.tensors
        for part, tensor in stored.items():
            final = part == next(reversed(stored))
            whole = tensor.strides is None
            total = tensor.spec.nbytes if whole else tensor.spec.shape[0]
            most = COPY_BYTES // 4 if tensor.pieces else COPY_BYTES  # read from smaller windows
            step = most if whole else max(1, most * total // (tensor.spec.nbytes or 1))
            # Of a tensor in one piece, what lies in one window of the file, which is not copied.
            begin = -(tensor.location.begin % step) if whole and not tensor.pieces else 0
            for start in range(begin, max(total, 1), step):
                start, stop = max(start, 0), min(start + step, total)
                last = final and stop == total
                yield partial(_copy, self._source, weight, part, start, stop, last)


def _ranges(
    stored: StoredWeight, codec: Codec, elements: int, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, int]]:
    """Runs of rows start:stop of about `elements` elements that both formats can take. Where rows
    lie along the columns of a stored part, tiles are tall, so that each piece of it is long."""
    rows, cols = stored.shape
    alignment = math.lcm(codec.row_alignment(cols), stored.row_alignment)
    assert stored.codec is not None
    turned = any(p.strides is not None and p.strides[1] for p in stored.parts.values())
    if turned or any(spec.axis == 1 for spec in stored.codec.specs(rows, cols).values()):
        elements = max(elements, TALL_ROWS * cols)
    for first, last in iter_tiles((stop or rows) - start, cols, alignment, elements):
        yield start + first, start + last


def _copy(
    source: Checkpoint, weight: PlannedWeight, part: str, start: int, stop: int, last: bool
) -> Tiles:
    """Bytes start:stop of a part, or its rows where it does not lie in one piece."""
    stored = weight.source.tensors[part]
    if stored.strides is None:
        data = source.read_bytes(stored, start, stop)
    else:
        data = source.read_rows(stored, start, stop)
    return Tiles(weight, [{part: data}], last, data.nbytes)


def _convert(
    convert: Callable[[int, int], Mapping[str, torch.Tensor]],
    weight: PlannedWeight,
    start: int,
    stop: int,
    last: bool,
) -> Tiles:
    """Convert rows start:stop, a tile at a time."""
    stored = weight.source
    tiles = []
    assert weight.codec is not None
    for a, b in _ranges(stored, weight.codec, tile_elements(stored, weight.codec), start, stop):
        parts = _of_rows(stored, a, b, partial(convert, a, b))
        tiles.append({part: parts[part].cpu() for part in weight.specs})
    return Tiles(weight, tiles, last, (stop - start) * stored.nbytes // stored.shape[0])


def _encode(
    source: Checkpoint,
    weight: PlannedWeight,
    device: torch.device,
    summary: torch.Tensor | None,
    start: int,
    stop: int,
) -> Mapping[str, torch.Tensor]:
    """Encode a tile in the format to be written."""
    assert weight.codec is not None
    rows, cols = weight.source.shape
    tile = source.tile_rows(weight.source, start, stop, device)
    return weight.codec.encode(tile, (rows, cols), summary)


def _repack(
    source: Checkpoint, weight: PlannedWeight, start: int, stop: int
) -> Mapping[str, torch.Tensor]:
    """Hand a tile's codes over to the format to be written."""
    stored = weight.source
    assert weight.codec is not None and stored.codec is not None
    rows, cols = stored.shape
    codes = stored.codec.unpack(source.read_tile(stored, start, stop), (stop - start, cols))
    return weight.codec.pack(codes, (rows, cols))


def _of_rows(stored: StoredWeight, start: int, stop: int, compute: Callable[[], T]) -> T:
    """Compute; a refusal names the weight and its rows."""
    try:
        return compute()
    except FormatError as error:
        if str(error).startswith(stored.name):
            raise
        raise FormatError(f"{stored.name}, rows {start}:{stop}: {error}") from error


def step_elements(stored: StoredWeight, codec: Codec) -> int:
    """About how many elements are one step of work."""
    return max(CHUNK_ELEMENTS, tile_elements(stored, codec))


def tile_elements(stored: StoredWeight, codec: Codec) -> int:
    """About how many elements are computed at a time."""
    if not is_lean(stored, codec):
        return TILE_ELEMENTS
    rows, cols = stored.shape
    nbytes = max(stored.nbytes, _written_bytes(codec, rows, cols) // 2, 1)
    return min(2 * CHUNK_ELEMENTS, TILE_BYTES * rows * cols // nbytes)


@lru_cache(maxsize=1024)
def _written_bytes(codec: Codec, rows: int, cols: int) -> int:
    """Bytes of all parts of a weight in a format."""
    return sum(spec.nbytes for spec in codec.specs(rows, cols).values())


def is_lean(stored: StoredWeight, codec: Codec) -> bool:
    """Whether a weight is encoded without ever being decoded as a whole tile."""
    assert stored.codec is not None
    return codec.lean and stored.codec.lean and available()


def largest(weight: PlannedWeight, elements: int) -> int:
    """Elements of the largest run of rows that is computed at a time when asked for `elements`."""
    assert weight.codec is not None
    start, stop = next(_ranges(weight.source, weight.codec, elements))
    return (stop - start) * weight.source.shape[1]
