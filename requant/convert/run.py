"""Execute a plan: tile by tile, pread -> decode -> encode -> pwrite.

Memory is a few tiles per worker whatever the model's size. Every tile is written at an offset that
the plan fixed, so the result does not depend on the number of workers or their order.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

import requant
from requant.convert.journal import (
    JOURNAL_NAME,
    MANIFEST_NAME,
    Finished,
    Journal,
    clear,
    read_manifest,
)
from requant.convert.plan import Plan, PlannedFile, PlannedWeight
from requant.convert.source import INDEX_NAME, Checkpoint, StoredWeight, iter_tiles
from requant.convert.writer import (
    PARTIAL_SUFFIX,
    OutputFile,
    copy_side_files,
    side_files,
    write_json,
    writing,
)
from requant.errors import CheckpointError, FormatError, RequantError
from requant.quant import Codec, TensorSpec

#: Elements that are decoded and encoded at a time, about 10 bytes each at the peak of encoding,
#: and how many are one step of work.
TILE_ELEMENTS = 1 << 20
CHUNK_ELEMENTS = 1 << 22
#: Bytes a worker copies at a time.
COPY_BYTES = 1 << 23

#: Rows of a tile, at least, where they lie along the columns of a stored part.
TALL_ROWS = 1024
#: Tiles that are measured at a time.
IN_FLIGHT = 8

Progress = Callable[[int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Runtime:
    """Where and how widely tiles are computed."""

    device: torch.device
    workers: int


def convert(
    plan: Plan,
    out: Path,
    runtime: Runtime,
    progress: Progress = lambda nbytes: None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the planned checkpoint and return convert's stable JSON keys.

    `progress` is told of source bytes as they are done. Raises CheckpointError or FormatError; what
    was finished by then is kept and continued by the same call. A finished `out` is left as it is.
    `overwrite` removes an earlier conversion, finished or not, and starts over.
    """
    started = time.monotonic()
    if overwrite:
        _require_apart(plan, out)
        with writing(out):
            clear(out)
    manifest = read_manifest(out)
    if manifest is not None and manifest.get("key") == plan.key:
        _check_finished(plan, out)
        resumed = len(plan.files)
    else:
        created = not os.path.lexists(out)
        journal = _claim(plan, out)
        try:
            _require_room(plan, out, journal)
            resumed = len(journal.finished)
            _write_files(plan, out, journal, runtime, progress)
            _complete(plan, out, journal)
        except BaseException:
            _leave(out, journal, created)
            raise
        finally:
            journal.close()
    return {
        **plan.summary(),
        "output": str(out),
        "seconds": round(time.monotonic() - started, 3),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "resumed_files": resumed,
    }


def _claim(plan: Plan, out: Path) -> Journal:
    """Make OUT ours, or refuse before the first byte."""
    side_files(plan.source.path)  # raises for what could not be copied at the end
    _require_apart(plan, out)
    with writing(out):
        if out.exists() and not out.is_dir():
            raise CheckpointError(f"{out}: is a file; choose a folder")
        out.mkdir(parents=True, exist_ok=True)
    with writing(out / MANIFEST_NAME):
        journal = Journal(out, plan.key)
    sizes = {file.name: file.nbytes for file in plan.files}
    for name, facts in list(journal.finished.items()):
        path, nbytes = out / name, facts.nbytes
        if sizes.get(name) != nbytes or not path.is_file() or path.stat().st_size != nbytes:
            del journal.finished[name]
    return journal


def _require_apart(plan: Plan, out: Path) -> None:
    """Raise CheckpointError when OUT lies in the source folder, or the source in OUT."""
    # Not Path.resolve: it raises RuntimeError for a link to itself.
    target, source = Path(os.path.realpath(out)), Path(os.path.realpath(plan.source.path))
    if target.is_relative_to(source):
        raise CheckpointError(f"{out}: lies in the source folder; choose another one")
    if source.is_relative_to(target):
        raise CheckpointError(f"{out}: holds the source folder; choose another one")


def _require_room(plan: Plan, out: Path, journal: Journal) -> None:
    """Raise CheckpointError when the disk cannot hold what is still to be written."""
    for file in plan.files:  # what a killed run left half-written is room
        with writing(out):
            (out / (file.name + PARTIAL_SUFFIX)).unlink(missing_ok=True)
    needed = plan.written_bytes - sum(facts.nbytes for facts in journal.finished.values())
    free = shutil.disk_usage(out).free
    if needed > free:
        raise CheckpointError(
            f"{out}: {needed} bytes are to be written, {free} are free; "
            "make room or choose another disk, then repeat the command"
        )


def _leave(out: Path, journal: Journal, created: bool) -> None:
    """After a failure: keep what can be resumed, remove what is nothing yet."""
    with contextlib.suppress(OSError):  # never instead of the error that led here
        if os.listdir(out) == [JOURNAL_NAME]:
            journal.remove()
            if created:
                out.rmdir()


def _write_files(
    plan: Plan, out: Path, journal: Journal, runtime: Runtime, progress: Progress
) -> None:
    """Write every file that is not finished, one after the other, with all workers on each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a sum over several threads depends on their number
    try:
        with ThreadPoolExecutor(runtime.workers) as pool, plan.source.past_the_cache():
            steps = Steps(plan.source, runtime, pool)
            for planned in plan.files:
                if planned.name in journal.finished:
                    progress(sum(weight.source.nbytes for weight in planned.weights))
                    continue
                file = OutputFile(out / planned.name, planned.nbytes)
                try:
                    _fill(Builder(planned, file), steps, progress)
                    digest = file.commit()
                except BaseException:
                    file.abandon()
                    raise
                with writing(journal.path):
                    journal.finish(planned.name, Finished(planned.nbytes, digest))
    finally:
        torch.set_num_threads(threads)


def _fill(builder: Builder, steps: Steps, progress: Progress) -> None:
    """Compute pieces with all workers, a few ahead, and append them in order."""
    pending: deque[Future[Piece]] = deque()

    def take() -> None:
        piece = pending.popleft().result()
        builder.add(piece)
        progress(piece.read_bytes)

    try:
        for work in steps.of(builder.planned):
            pending.append(steps.pool.submit(work))
            if len(pending) > steps.workers + 1:
                take()
        while pending:
            take()
        builder.finish()
    finally:
        for future in pending:
            future.cancel()
        wait(pending)


@dataclass(frozen=True)
class Piece:
    """What one step gave of one weight: consecutive tiles of its parts. `last`: there is no more.

    `read_bytes` of the source it took.
    """

    weight: PlannedWeight
    tiles: Sequence[Mapping[str, torch.Tensor]]
    last: bool
    read_bytes: int


class Builder:
    """Puts pieces where the header says: the codes as they come, what is small after them."""

    def __init__(self, planned: PlannedFile, file: OutputFile) -> None:
        self.planned = planned
        self._file = file
        self._held: dict[str, list[torch.Tensor]] = {}
        file.append(planned.header)

    def add(self, piece: Piece) -> None:
        """Append the next piece of the next weight."""
        weight = piece.weight
        for tile in piece.tiles:
            for part, tensor in tile.items():
                if part == weight.streamed:
                    self._file.append(tensor)
                else:
                    self._held.setdefault(weight.stored_name(part), []).append(tensor)
        if not piece.last:
            return
        for part, spec in weight.specs.items():
            name = weight.stored_name(part)
            if part != weight.streamed and spec.nbytes % 8 == 0:
                self._append_held(name, spec)

    def finish(self) -> None:
        """Append the odd-sized tensors, which `layout` put last."""
        specs = {w.stored_name(p): s for w in self.planned.weights for p, s in w.specs.items()}
        for name in self.planned.ranges:
            if name in self._held:
                self._append_held(name, specs[name])

    def _append_held(self, name: str, spec: TensorSpec) -> None:
        tiles = self._held.pop(name)
        if spec.rows == 0 or len(tiles) == 1:  # of the whole weight: every tile has it
            self._file.append(tiles[0])
        elif spec.axis == 0:
            for tile in tiles:
                self._file.append(tile)
        else:
            self._file.append(torch.cat(tiles, spec.axis))


class Summaries:
    """The first pass of two-pass formats: what `encode` must know of the whole weight.

    Weights that engines fuse share one; it is computed once, wherever their files lie.
    """

    def __init__(self, source: Checkpoint, device: torch.device, pool: ThreadPoolExecutor) -> None:
        self._source, self._device, self._pool = source, device, pool
        self._known: dict[tuple[str, ...], torch.Tensor] = {}

    def of(self, weight: PlannedWeight) -> torch.Tensor | None:
        """The summary for `weight`; None when its format needs none."""
        if not weight.companions:
            return None
        key = tuple(companion.name for companion in weight.companions)
        if key not in self._known:
            assert weight.codec is not None
            self._known[key] = self._compute(weight.codec, weight.companions)
        return self._known[key]

    def _compute(self, codec: Codec, companions: Sequence[StoredWeight]) -> torch.Tensor:
        def measure(stored: StoredWeight, start: int, stop: int) -> list[torch.Tensor]:
            def of_tile(a: int, b: int) -> torch.Tensor:
                tile = self._source.decode_rows(stored, a, b, self._device)
                return _of_rows(stored, a, b, lambda: codec.measure(tile))

            return [of_tile(*rows) for rows in _ranges(stored, codec, TILE_ELEMENTS, start, stop)]

        # A window of steps at a time: what waits holds no memory, what is done only its measures.
        measured: list[torch.Tensor] = []
        pending: deque[Future[list[torch.Tensor]]] = deque()
        for stored in companions:
            for start, stop in _ranges(stored, codec, CHUNK_ELEMENTS):
                pending.append(self._pool.submit(measure, stored, start, stop))
                if len(pending) >= IN_FLIGHT:
                    measured += pending.popleft().result()
        for future in pending:
            measured += future.result()
        return codec.summarize(measured)


class Steps:
    """The work on a file, in the order of its bytes: functions that any thread may run."""

    def __init__(self, source: Checkpoint, runtime: Runtime, pool: ThreadPoolExecutor) -> None:
        self.pool, self.workers = pool, runtime.workers
        self._source, self._device = source, runtime.device
        self._summaries = Summaries(source, runtime.device, pool)

    def of(self, planned: PlannedFile) -> Iterator[Callable[[], Piece]]:
        """One step a few tiles."""
        for weight in planned.weights:
            if weight.codec is None:
                yield from self._copies(weight)
                continue
            if weight.repack:
                convert = partial(_repack, self._source, weight)
            else:
                summary = self._summaries.of(weight)
                convert = partial(_encode, self._source, weight, self._device, summary)
            rows, _ = weight.source.shape
            for start, stop in _ranges(weight.source, weight.codec, CHUNK_ELEMENTS):
                last = stop == rows
                yield partial(_convert, convert, weight, start, stop, last)

    def _copies(self, weight: PlannedWeight) -> Iterator[Callable[[], Piece]]:
        """The stored bytes in pieces; of a view that lies scattered, in whole rows."""
        stored = {**weight.source.parts, **weight.source.activations}
        for part, tensor in stored.items():
            final = part == next(reversed(stored))
            whole = tensor.strides is None
            total = tensor.spec.nbytes if whole else tensor.spec.shape[0]
            step = COPY_BYTES if whole else max(1, COPY_BYTES * total // (tensor.spec.nbytes or 1))
            for start in range(0, max(total, 1), step):
                stop = min(start + step, total)
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
) -> Piece:
    """Bytes start:stop of a part, or its rows where it does not lie in one piece."""
    stored = {**weight.source.parts, **weight.source.activations}[part]
    if stored.strides is None:
        begin = stored.location.begin
        data = source.read_bytes(stored.location.file, begin + start, begin + stop)
    else:
        data = source.read_rows(stored, start, stop)
    return Piece(weight, [{part: data}], last, data.nbytes)


def _convert(
    convert: Callable[[int, int], Mapping[str, torch.Tensor]],
    weight: PlannedWeight,
    start: int,
    stop: int,
    last: bool,
) -> Piece:
    """Convert rows start:stop, a tile at a time."""
    stored = weight.source
    tiles = []
    assert weight.codec is not None
    for a, b in _ranges(stored, weight.codec, TILE_ELEMENTS, start, stop):
        parts = _of_rows(stored, a, b, partial(convert, a, b))
        tiles.append({part: parts[part].cpu() for part in weight.specs})
    return Piece(weight, tiles, last, (stop - start) * stored.nbytes // stored.shape[0])


def _encode(
    source: Checkpoint,
    weight: PlannedWeight,
    device: torch.device,
    summary: torch.Tensor | None,
    start: int,
    stop: int,
) -> Mapping[str, torch.Tensor]:
    """Decode a tile and encode it in the format to be written."""
    assert weight.codec is not None
    rows, cols = weight.source.shape
    tile = source.decode_rows(weight.source, start, stop, device)
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


def _complete(plan: Plan, out: Path, journal: Journal) -> None:
    """Side files, index, check, config, manifest: the folder becomes loadable only here."""
    copy_side_files(plan.source.path, out)
    if plan.index is not None:
        write_json(out / INDEX_NAME, plan.index)
    write_json(out / "config.json", plan.config)
    try:
        check_output(plan, out)
    except BaseException:
        (out / "config.json").unlink(missing_ok=True)
        raise
    written = {name: asdict(facts) for name, facts in sorted(journal.finished.items())}
    manifest = {
        "requant": requant.__version__,
        "torch": torch.__version__,
        "key": plan.key,
        **plan.summary(),
        "written": written,
    }
    write_json(out / MANIFEST_NAME, manifest)
    journal.remove()


def _check_finished(plan: Plan, out: Path) -> None:
    """Raise when a finished OUT is no longer what was written, as far as its headers show."""
    try:
        check_output(plan, out)
        missing = [name for name in side_files(plan.source.path) if not (out / name).is_file()]
        if missing:
            raise CheckpointError(f"{out / missing[0]}: is missing")
    except RequantError as error:
        raise CheckpointError(
            f"{out}: was finished, and is damaged now; remove it and repeat the command: {error}"
        ) from error
    (out / JOURNAL_NAME).unlink(missing_ok=True)  # of a run that was killed at its last step


def check_output(plan: Plan, out: Path) -> None:
    """Reopen what was written, with our reader and the reference one, and compare with the plan."""
    written = Checkpoint.open(out)
    if json.dumps(written.config, sort_keys=True) != json.dumps(plan.config, sort_keys=True):
        raise CheckpointError(f"{out / 'config.json'}: differs from what was planned")
    for planned in plan.weights:
        found = written.weights.get(planned.source.name)
        if found is None or found.codec != planned.written_codec:
            raise CheckpointError(f"{out}: {planned.source.name} reads back as {found}")
    for file in plan.files:
        try:
            with safe_open(out / file.name, "pt") as opened:
                names = set(opened.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{out / file.name}: safetensors refuses it: {error}") from error
        if names != set(file.ranges):
            raise CheckpointError(f"{out / file.name}: holds other tensors than planned")
