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
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

import requant
from requant.convert.journal import JOURNAL_NAME, MANIFEST_NAME, Journal, read_manifest
from requant.convert.plan import Plan, PlannedFile, PlannedWeight
from requant.convert.source import INDEX_NAME, Checkpoint, iter_tiles
from requant.convert.writer import (
    PARTIAL_SUFFIX,
    OutputFile,
    copy_side_files,
    side_files,
    write_json,
    writing,
)
from requant.errors import CheckpointError, FormatError, RequantError

#: Elements a worker holds at a time; about 10 bytes each at the peak of encoding.
TILE_ELEMENTS = 1 << 20
#: Bytes a worker copies at a time.
COPY_BYTES = 1 << 23

Progress = Callable[[int], None]
Task = Callable[[], int]


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
    if runtime.workers > 1:
        torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(runtime.workers) as pool:
            for planned in plan.files:
                if planned.name in journal.finished:
                    progress(sum(weight.source.nbytes for weight in planned.weights))
                    continue
                file = OutputFile(out / planned.name, planned.nbytes)
                try:
                    file.write(0, planned.header)
                    tasks = _tasks(plan.source, planned, file, runtime.device)
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


def _tasks(
    source: Checkpoint, planned: PlannedFile, file: OutputFile, device: torch.device
) -> Iterator[Task]:
    """One task per tile of each weight, in the order the bytes lie in the source."""
    for weight in sorted(planned.weights, key=_source_offset):
        if weight.codec is None:
            yield from _copy_tasks(source, weight, planned, file)
        else:
            rows, cols = weight.source.shape
            assert weight.source.codec is not None
            alignment = math.lcm(weight.codec.row_alignment(cols), weight.source.row_alignment)
            for start, stop in iter_tiles(rows, cols, alignment, TILE_ELEMENTS):
                yield _encode_task(source, weight, planned, file, device, start, stop)


def _source_offset(weight: PlannedWeight) -> int:
    return max(weight.source.parts.values(), key=lambda p: p.spec.nbytes).location.begin


def _copy_tasks(
    source: Checkpoint, weight: PlannedWeight, planned: PlannedFile, file: OutputFile
) -> Iterator[Task]:
    for part, stored in weight.source.parts.items():
        begin, end = stored.location.begin, stored.location.end
        shift = planned.ranges[weight.stored_name(part)][0] - begin
        for first in range(begin, end, COPY_BYTES):
            last = min(first + COPY_BYTES, end)

            def copy(name: str = stored.location.file, a: int = first, b: int = last,
                     shift: int = shift) -> int:  # fmt: skip
                file.write(a + shift, source.read_bytes(name, a, b))
                return b - a

            yield copy


def _encode_task(
    source: Checkpoint,
    weight: PlannedWeight,
    planned: PlannedFile,
    file: OutputFile,
    device: torch.device,
    start: int,
    stop: int,
) -> Task:
    codec, stored = weight.codec, weight.source
    assert codec is not None
    rows, cols = stored.shape

    def encode() -> int:
        tile = source.decode_rows(stored, start, stop, device)
        try:
            parts = codec.encode(tile, (rows, cols))
        except FormatError as error:
            raise FormatError(f"{stored.name}, rows {start}:{stop}: {error}") from error
        for part, spec in weight.specs.items():
            if spec.rows == 0 and start:
                continue  # belongs to the whole weight: the first tile wrote it
            begin, end = planned.ranges[weight.stored_name(part)]
            first, _ = spec.row_range(start, stop)
            stride = (end - begin) // spec.shape[0]
            file.write(begin + first * stride, parts[part].cpu())
        return (stop - start) * stored.nbytes // rows

    return encode


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
