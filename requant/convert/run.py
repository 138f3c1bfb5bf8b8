"""Execute a plan: claim OUT, write its files from front to back, make it loadable at the end.

Steps (steps.py) are computed by any worker and appended in order, so the result does not depend on
the number of workers.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
from requant.convert.plan import Plan, PlannedFile
from requant.convert.processes import Team
from requant.convert.readahead import WINDOWS
from requant.convert.source import CONFIG_NAME, INDEX_NAME, Checkpoint, origin
from requant.convert.steps import Piece, Steps
from requant.convert.writer import (
    PARTIAL_SUFFIX,
    OutputFile,
    copy_side_files,
    json_bytes,
    side_files,
    write_json,
    writing,
)
from requant.errors import CheckpointError, RequantError
from requant.memory import peak_bytes
from requant.quant import TensorSpec

Progress = Callable[[int], None]

#: More than any temporary of a tile, and less than the 32 MiB up to which glibc learns.
MALLOC_BYTES = 31 << 20


@dataclass(frozen=True)
class Runtime:
    """Where and how widely tiles are computed, and by which processes. `windows` of the source are
    held in memory (readahead.py)."""

    device: torch.device
    workers: int
    windows: int = WINDOWS
    team: Team = field(default_factory=Team)


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
    `overwrite` removes an earlier conversion, finished or not, and starts over. With a team of
    processes, each calls this, and returns when all is done.
    """
    started = time.monotonic()
    team = runtime.team
    if team.first(lambda: plan.key) != plan.key:
        raise CheckpointError(
            f"process {team.rank} of this run plans something else than process 0: source, recipe "
            "or version differ; give all processes the same"
        )
    with contextlib.ExitStack() as leaving:
        journal: Journal | None = None
        created = team.leads and not os.path.lexists(out)

        def begin() -> list[str] | None:
            nonlocal journal
            if overwrite:
                _require_apart(plan, out)
                with writing(out):
                    clear(out)
            if (read_manifest(out) or {}).get("key") == plan.key:
                _check_finished(plan, out)
                return None
            journal = leaving.enter_context(_leaving(_claim(plan, out), created))
            _require_room(plan, out, journal)
            return list(journal.finished)

        finished = team.first(begin)
        if finished is not None:
            if not team.leads:
                with writing(out):
                    journal = leaving.enter_context(Journal(out, plan.key, team.rank))
            assert journal is not None
            _write_files(plan, journal, set(finished), runtime, progress)
            if not team.leads:
                journal.close()
            team.meet(progress)
            if team.leads:
                with writing(journal.path):
                    journal.absorb()
                _complete(plan, out, journal)
    return {
        **plan.summary(),
        "output": str(out),
        "seconds": round(time.monotonic() - started, 3),
        "peak_rss_bytes": peak_bytes(),
        "resumed_files": len(plan.files) if finished is None else len(finished),
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
        try:
            journal.absorb()
        except BaseException:
            journal.close()
            raise
    sizes = {file.name: file.nbytes for file in plan.files}
    for name, facts in list(journal.finished.items()):
        path, nbytes = out / name, facts.written.nbytes
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
    needed = plan.written_bytes + len(json_bytes(plan.config)) + len(json_bytes(plan.index or {}))
    needed += sum((plan.source.path / name).stat().st_size for name in side_files(plan.source.path))
    needed -= sum(facts.written.nbytes for facts in journal.finished.values())
    free = shutil.disk_usage(out).free
    if needed > free:
        raise CheckpointError(
            f"{out}: {needed} bytes are to be written, {free} are free; "
            "make room or choose another disk, then repeat the command"
        )


@contextlib.contextmanager
def _leaving(journal: Journal, created: bool) -> Iterator[Journal]:
    """Close the journal in the end; after a failure, keep what can be resumed, and remove what is
    nothing yet."""
    try:
        yield journal
    except BaseException:
        with contextlib.suppress(OSError):  # never instead of the error that led here
            if os.listdir(journal.out) == [JOURNAL_NAME]:
                journal.remove()
                if created:
                    journal.out.rmdir()
        raise
    finally:
        journal.close()


def _write_files(
    plan: Plan, journal: Journal, finished: Collection[str], runtime: Runtime, progress: Progress
) -> None:
    """Write the files that are not finished, one after the other, with all workers on each; other
    processes of the team take others."""
    team = runtime.team
    if team.leads:
        for planned in plan.files:
            if planned.name in finished:
                progress(sum(weight.source.nbytes for weight in planned.weights))
    todo = [planned for planned in plan.files if planned.name not in finished]
    # glibc keeps for later use what is smaller than the largest block that was freed so far, and
    # fresh memory takes as long to touch as it takes to compute a tile.
    torch.empty(MALLOC_BYTES, dtype=torch.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a sum over several threads depends on their number
    try:
        with ThreadPoolExecutor(runtime.workers) as pool:
            steps = Steps(plan.source, runtime.device, pool)
            for number in team.share(len(todo)):
                planned = todo[number]
                facts = _write_file(plan.source, planned, journal.out, steps, runtime, progress)
                with writing(journal.path):
                    journal.finish(planned.name, facts)
    finally:
        torch.set_num_threads(threads)


def _write_file(
    source: Checkpoint,
    planned: PlannedFile,
    out: Path,
    steps: Steps,
    runtime: Runtime,
    progress: Progress,
) -> Finished:
    """Write one file from the source's file of the same name."""

    def done(nbytes: int) -> None:
        progress(runtime.team.done(nbytes))

    with source.reading(planned.name, runtime.windows) as ahead:
        file = OutputFile(out / planned.name, planned.nbytes)
        try:
            _fill(Builder(planned, file), steps, runtime.workers + 1, done)
            read = ahead.finish()
            source.require_unchanged(planned.name)
            return Finished(file.commit(), read)
        except BaseException:
            file.abandon()
            raise


def _fill(builder: Builder, steps: Steps, ahead: int, progress: Progress) -> None:
    """Compute pieces with all workers, so many ahead, and append them in order."""
    pending: deque[Future[Piece]] = deque()

    def take() -> None:
        piece = pending.popleft().result()
        builder.add(piece)
        progress(piece.read_bytes)

    try:
        for work in steps.of(builder.planned):
            pending.append(steps.pool.submit(work))
            if len(pending) > ahead:
                take()
        while pending:
            take()
        builder.finish()
    finally:
        for future in pending:
            future.cancel()
        wait(pending)


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


def _complete(plan: Plan, out: Path, journal: Journal) -> None:
    """Side files, index, check, config, manifest: the folder becomes loadable only here."""
    written = {name: facts.written for name, facts in journal.finished.items()}
    read = {name: facts.read for name, facts in journal.finished.items()}
    for name in sorted(set(plan.source.files) - set(read)):  # what holds nothing but scales
        with plan.source.reading(name, WINDOWS) as ahead:
            read[name] = ahead.finish()
        plan.source.require_unchanged(name)
    written |= copy_side_files(plan.source.path, out)
    if plan.index is not None:
        written[INDEX_NAME] = write_json(out / INDEX_NAME, plan.index)
    written[CONFIG_NAME] = write_json(out / CONFIG_NAME, plan.config)
    try:
        check_output(plan, out)
    except BaseException:
        (out / CONFIG_NAME).unlink(missing_ok=True)
        raise
    manifest = {
        "requant": requant.__version__,
        "torch": torch.__version__,
        "key": plan.key,
        **plan.summary(),
        **origin(plan.source.path),
        "recipe_sha256": plan.recipe.sha256,
        "source_files": {name: asdict(read[name]) for name in sorted(read)},
        "written": {name: asdict(written[name]) for name in sorted(written)},
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
        raise CheckpointError(f"{out / CONFIG_NAME}: differs from what was planned")
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
