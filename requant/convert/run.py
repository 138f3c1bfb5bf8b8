"""Execute a plan: claim OUT, write its files from front to back, make it loadable at the end.

Steps (steps.py) are computed by any worker and appended in order, so the result does not depend on
the number of workers.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import requant
from requant.convert.builder import Builder
from requant.convert.check import check_file, check_finished, check_output
from requant.convert.claim import Receiver, claim, leaving_behind, require_apart, require_room
from requant.convert.folder import CONFIG_NAME, Folder
from requant.convert.forms import PlannedWeight
from requant.convert.journal import (
    MANIFEST_NAME,
    STAGING_NAME,
    Digest,
    Finished,
    Halfway,
    Journal,
    clear,
    read_manifest,
)
from requant.convert.plan import Plan, PlannedFile, PlannedGroup
from requant.convert.processes import Team
from requant.convert.readahead import WINDOWS
from requant.convert.source import Checkpoint
from requant.convert.steps import Steps, Tiles
from requant.convert.writer import OutputFile, copy_side_files, write_json, writing
from requant.errors import CheckpointError
from requant.memory import peak_bytes

Progress = Callable[[int], None]

#: More than any temporary of a tile, and less than the 32 MiB up to which glibc learns.
MALLOC_BYTES = 31 << 20


@dataclass(frozen=True)
class Runtime:
    """Where and how widely tiles are computed, and by which processes. `windows` of the source are
    held in memory (readahead.py), and at most `disk` bytes of one on the Hub on the disk. Finished
    files go to `receiver`.
    """

    device: torch.device
    workers: int
    windows: int = WINDOWS
    team: Team = field(default_factory=Team)
    disk: int | None = None
    receiver: Receiver | None = None


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

        def begin() -> tuple[list[str], dict[str, Halfway]] | None:
            nonlocal journal
            if overwrite:
                require_apart(plan, out)
                with writing(out):
                    clear(out)
            if (read_manifest(out) or {}).get("key") == plan.key:
                check_finished(plan, out, runtime.receiver)
                return None
            claimed = claim(plan, out, runtime.receiver)
            journal = leaving.enter_context(leaving_behind(claimed, created))
            require_room(plan, out, journal, runtime.disk, runtime.receiver)
            return list(journal.finished), journal.halfway

        begun = team.first(begin)
        finished = None if begun is None else begun[0]
        if begun is not None:
            if not team.leads:
                with writing(out):
                    journal = leaving.enter_context(Journal(out, plan.key, team.rank))
                journal.halfway = begun[1]
            assert journal is not None
            if runtime.receiver is not None:
                for name, facts in journal.finished.items():
                    runtime.receiver.file(name, facts.written)
            folder, staging = plan.source.folder, out / STAGING_NAME
            with folder.staged(staging, runtime.disk, team.rank, team.size):
                _write_files(plan, journal, set(begun[0]), runtime, progress)
                if not team.leads:
                    journal.close()
                team.meet(progress)
                if team.leads:
                    with writing(journal.path):
                        journal.absorb()
                    read = _read_rest(plan, journal)
            if team.leads:
                folder.settle(staging)
                _complete(plan, out, journal, read, runtime.receiver)
    return {
        **plan.summary(),
        "output": str(out),
        "seconds": round(time.monotonic() - started, 3),
        "peak_rss_bytes": peak_bytes(),
        "resumed_files": len(plan.files) if finished is None else len(finished),
    }


def _write_files(
    plan: Plan, journal: Journal, finished: Collection[str], runtime: Runtime, progress: Progress
) -> None:
    """Write the groups that are not finished, one after the other, with all workers on each; other
    processes of the team take others."""
    todo: list[PlannedGroup] = []
    for group in plan.groups:
        if any(file.name not in finished for file in group.files):
            todo.append(group)
        elif runtime.team.leads:
            progress(sum(weight.source.nbytes for weight in group.weights))
    # glibc keeps for later use what is smaller than the largest block that was freed so far, and
    # fresh memory takes as long to touch as it takes to compute a tile.
    torch.empty(MALLOC_BYTES, dtype=torch.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a sum over several threads depends on their number
    try:
        with contextlib.ExitStack() as leaving:
            pool = ThreadPoolExecutor(runtime.workers)
            leaving.callback(pool.shutdown, cancel_futures=True)
            steps = Steps(plan.source, runtime.device, pool)
            for number in runtime.team.share(len(todo)):
                files = [file for file in todo[number].files if file.name not in finished]
                _write_group(plan.source, todo[number], files, journal, steps, runtime, progress)
    finally:
        torch.set_num_threads(threads)


def _write_group(
    source: Checkpoint,
    group: PlannedGroup,
    files: Sequence[PlannedFile],
    journal: Journal,
    steps: Steps,
    runtime: Runtime,
    progress: Progress,
) -> None:
    """Write the given files of a group, reading the source's once."""

    def done(nbytes: int) -> None:
        progress(runtime.team.done(nbytes))

    name = group.files[0].name
    start = journal.halfway.get(name) or Halfway(0, {}, {}, {})
    read = dict(start.read)
    with contextlib.ExitStack() as leaving:
        outputs, builders = [], []
        for planned in files:
            path, begin = journal.out / planned.name, start.positions.get(planned.name, 0)
            with writing(path):
                path.parent.mkdir(exist_ok=True)
            outputs.append(OutputFile(path, planned.nbytes, len(files), begin))
            leaving.callback(outputs[-1].abandon)
            builders.append(Builder(planned, outputs[-1], start.late.get(planned.name)))
        for number, stage in enumerate(group.stages[start.stage :], start.stage + 1):
            with source.reading(stage.sources, runtime.windows) as finish:
                _fill(builders, stage.weights, steps, runtime.workers + 1, done)
                read |= finish()
            if number < len(group.stages):
                reached = Halfway(
                    number,
                    {file.name: output.sync() for file, output in zip(files, outputs, strict=True)},
                    {builder.planned.name: builder.late for builder in builders},
                    read,
                )
                with writing(journal.path):
                    journal.reach(name, reached)
        for builder in builders:
            builder.finish()
        for planned, output in zip(files, outputs, strict=True):
            written = output.commit()
            with writing(journal.path):
                journal.finish(planned.name, Finished(written, read))
            if runtime.receiver is not None:
                check_file(planned, output.path)
                runtime.receiver.file(planned.name, written)
        source.folder.release(read)


def _fill(
    builders: Sequence[Builder],
    weights: Sequence[PlannedWeight],
    steps: Steps,
    ahead: int,
    progress: Progress,
) -> None:
    """Compute pieces with all workers, so many ahead, and append them in order."""
    pending: deque[Future[Tiles]] = deque()

    def take() -> None:
        made = pending.popleft().result()
        for builder in builders:
            builder.add(made)
        progress(made.read_bytes)

    try:
        for work in steps.of(weights):
            pending.append(steps.pool.submit(work))
            if len(pending) > ahead:
                take()
        while pending:
            take()
    finally:
        for future in pending:
            future.cancel()
        wait(pending)


def _read_rest(plan: Plan, journal: Journal) -> dict[str, Digest]:
    """The digests of all source files, also of those that hold nothing but scales."""
    read = {name: d for facts in journal.finished.values() for name, d in facts.read.items()}
    for name in sorted(set(plan.source.files) - set(read)):
        with plan.source.reading([name], WINDOWS) as finish:
            read |= finish()
    return read


def _complete(
    plan: Plan,
    out: Path,
    journal: Journal,
    read: Mapping[str, Digest],
    receiver: Receiver | None,
) -> None:
    """Side files, index, check, config, manifest: the folder becomes loadable only here."""
    folder = Folder(out) if receiver is None else receiver.settle()
    written = {name: facts.written for name, facts in journal.finished.items()}
    written |= copy_side_files(plan.source.path, out)
    for name, document in plan.documents.items():
        written[name] = write_json(out / name, document)
    written[CONFIG_NAME] = write_json(out / CONFIG_NAME, plan.config)
    try:
        check_output(plan, folder)
    except BaseException:
        (out / CONFIG_NAME).unlink(missing_ok=True)
        raise
    manifest = {
        "requant": requant.__version__,
        "torch": torch.__version__,
        "key": plan.key,
        **plan.summary(),
        **plan.source.folder.origin,
        "recipe_sha256": plan.recipe.sha256,
        "source_files": {name: asdict(read[name]) for name in sorted(read)},
        "written": {name: asdict(written[name]) for name in sorted(written)},
    }
    write_json(out / MANIFEST_NAME, manifest)
    journal.remove()
