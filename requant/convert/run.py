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
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

import requant
from requant.convert.fused import StoredPart
from requant.convert.journal import JOURNAL_NAME, MANIFEST_NAME, Journal, read_manifest
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
from requant.quant import Codec

#: Elements a worker holds at a time; about 10 bytes each at the peak of encoding.
TILE_ELEMENTS = 1 << 20
#: Bytes a worker copies at a time.
COPY_BYTES = 1 << 23

#: Rows of a tile, at least, where they lie along the columns of a stored part.
TALL_ROWS = 1024
#: Tiles that are measured at a time.
IN_FLIGHT = 8

Progress = Callable[[int], None]
Task = Callable[[], int]
T = TypeVar("T")


@dataclass(frozen=True)
class Runtime:
    """Where and how widely tiles are computed."""

    device: torch.device
    workers: int


def convert(
    plan: Plan, out: Path, runtime: Runtime, progress: Progress = lambda nbytes: None
) -> dict[str, Any]:
    """Write the planned checkpoint and return convert's stable JSON keys.

    `progress` is told of source bytes as they are done. Raises CheckpointError or FormatError; what
    was finished by then is kept and continued by the same call. A finished `out` is left as it is.
    """
    started = time.monotonic()
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
    # Not Path.resolve: it raises RuntimeError for a link to itself.
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(plan.source.path)):
        raise CheckpointError(f"{out}: lies in the source folder; choose another one")
    with writing(out):
        if out.exists() and not out.is_dir():
            raise CheckpointError(f"{out}: is a file; choose a folder")
        out.mkdir(parents=True, exist_ok=True)
    with writing(out / MANIFEST_NAME):
        journal = Journal(out, plan.key)
    sizes = {file.name: file.nbytes for file in plan.files}
    for name, nbytes in list(journal.finished.items()):
        path = out / name
        if sizes.get(name) != nbytes or not path.is_file() or path.stat().st_size != nbytes:
            del journal.finished[name]
    return journal


def _require_room(plan: Plan, out: Path, journal: Journal) -> None:
    """Raise CheckpointError when the disk cannot hold what is still to be written."""
    for file in plan.files:  # what a killed run left half-written is room
        with writing(out):
            (out / (file.name + PARTIAL_SUFFIX)).unlink(missing_ok=True)
    needed = plan.written_bytes - sum(journal.finished.values())
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
        with ThreadPoolExecutor(runtime.workers) as pool:
            summaries = Summaries(plan.source, runtime.device, pool)
            for planned in plan.files:
                if planned.name in journal.finished:
                    progress(sum(weight.source.nbytes for weight in planned.weights))
                    continue
                file = OutputFile(out / planned.name, planned.nbytes)
                try:
                    file.write(0, planned.header)
                    tasks = _tasks(plan.source, planned, file, runtime.device, summaries)
                    _drain(pool, tasks, 2 * runtime.workers, progress)
                    file.commit()
                except BaseException:
                    file.abandon()
                    raise
                with writing(journal.path):
                    journal.finish(planned.name, planned.nbytes)
    finally:
        torch.set_num_threads(threads)


def _drain(
    pool: ThreadPoolExecutor, tasks: Iterator[Task], in_flight: int, progress: Progress
) -> None:
    """Run tasks with at most `in_flight` of them submitted; the first error ends all."""
    pending: set[Future[int]] = set()
    try:
        for task in tasks:
            pending.add(pool.submit(task))
            if len(pending) >= in_flight:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    progress(future.result())
        for future in pending:
            progress(future.result())
    finally:
        for future in pending:
            future.cancel()
        wait(pending)


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
        def measure(stored: StoredWeight, start: int, stop: int) -> torch.Tensor:
            tile = self._source.decode_rows(stored, start, stop, self._device)
            return _of_rows(stored, start, stop, lambda: codec.measure(tile))

        # A window of tiles at a time: what waits holds no memory, what is done only its measure.
        measured: list[torch.Tensor] = []
        pending: deque[Future[torch.Tensor]] = deque()
        for stored in companions:
            for start, stop in _tile_ranges(stored, codec):
                pending.append(self._pool.submit(measure, stored, start, stop))
                if len(pending) >= IN_FLIGHT:
                    measured.append(pending.popleft().result())
        measured += [future.result() for future in pending]
        return codec.summarize(measured)


def _tasks(
    source: Checkpoint,
    planned: PlannedFile,
    file: OutputFile,
    device: torch.device,
    summaries: Summaries,
) -> Iterator[Task]:
    """One task per tile of each weight, in the order the bytes lie in the source."""
    for weight in sorted(planned.weights, key=_source_offset):
        if weight.codec is None:
            yield from _copy_tasks(source, weight, planned, file)
            continue
        if weight.repack:
            convert = partial(_repack, source, weight)
        else:
            convert = partial(_encode, source, weight, device, summaries.of(weight))
        for start, stop in _tile_ranges(weight.source, weight.codec):
            yield partial(_convert_tile, convert, weight, planned, file, start, stop)


def _tile_ranges(stored: StoredWeight, codec: Codec) -> Iterator[tuple[int, int]]:
    """Tiles that both formats can take. Where rows lie along the columns of a stored part, tiles
    are tall, so that each piece of it is a few KiB long."""
    rows, cols = stored.shape
    alignment = math.lcm(codec.row_alignment(cols), stored.row_alignment)
    assert stored.codec is not None
    specs = (*codec.specs(rows, cols).values(), *stored.codec.specs(rows, cols).values())
    turned = [p for p in stored.parts.values() if p.strides is not None and p.strides[1]]
    tall = turned or any(spec.axis == 1 for spec in specs)
    elements = max(TILE_ELEMENTS, TALL_ROWS * cols) if tall else TILE_ELEMENTS
    return iter_tiles(rows, cols, alignment, elements)


def _source_offset(weight: PlannedWeight) -> int:
    return max(weight.source.parts.values(), key=lambda p: p.spec.nbytes).location.begin


def _copy_tasks(
    source: Checkpoint, weight: PlannedWeight, planned: PlannedFile, file: OutputFile
) -> Iterator[Task]:
    """Copy the stored bytes in pieces; of a view that lies scattered, in whole rows."""
    for part, stored in (*weight.source.parts.items(), *weight.source.activations.items()):
        target, _ = planned.ranges[weight.stored_name(part)]
        begin, end = stored.location.begin, stored.location.end
        if stored.strides is None:
            for first in range(begin, end, COPY_BYTES):
                last = min(first + COPY_BYTES, end)
                offset = target + first - begin
                yield partial(_copy_bytes, source, stored.location.file, first, last, file, offset)
        else:
            rows = stored.spec.shape[0]
            row_bytes = stored.spec.nbytes // rows
            step = max(1, COPY_BYTES // max(row_bytes, 1))
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                offset = target + start * row_bytes
                yield partial(_copy_rows, source, stored, start, stop, file, offset)


def _copy_bytes(
    source: Checkpoint, name: str, begin: int, end: int, file: OutputFile, offset: int
) -> int:
    file.write(offset, source.read_bytes(name, begin, end))
    return end - begin


def _copy_rows(
    source: Checkpoint, part: StoredPart, start: int, stop: int, file: OutputFile, offset: int
) -> int:
    rows = source.read_rows(part, start, stop)
    file.write(offset, rows)
    return rows.nbytes


def _convert_tile(
    convert: Callable[[int, int], Mapping[str, torch.Tensor]],
    weight: PlannedWeight,
    planned: PlannedFile,
    file: OutputFile,
    start: int,
    stop: int,
) -> int:
    """Convert rows start:stop and write every part where the plan placed it."""
    stored = weight.source
    parts = _of_rows(stored, start, stop, lambda: convert(start, stop))
    for part, spec in weight.specs.items():
        if spec.rows == 0 and start:
            continue  # belongs to the whole weight: the first tile wrote it
        begin, _ = planned.ranges[weight.stored_name(part)]
        file.write_part(begin, spec, spec.row_range(start, stop)[0], parts[part].cpu())
    return (stop - start) * stored.nbytes // stored.shape[0]


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
    manifest = {"requant": requant.__version__, "key": plan.key, **plan.summary()}
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
