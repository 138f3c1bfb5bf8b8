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
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

import requant
from requant.convert.builder import Builder
from requant.convert.folder import CONFIG_NAME, origin
from requant.convert.forms import PlannedWeight
from requant.convert.journal import (
    JOURNAL_NAME,
    MANIFEST_NAME,
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

        def begin() -> tuple[list[str], dict[str, Halfway]] | None:
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
            return list(journal.finished), journal.halfway

        begun = team.first(begin)
        finished = None if begun is None else begun[0]
        if begun is not None:
            if not team.leads:
                with writing(out):
                    journal = leaving.enter_context(Journal(out, plan.key, team.rank))
                journal.halfway = begun[1]
            assert journal is not None
            _write_files(plan, journal, set(begun[0]), runtime, progress)
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
    kept = {name: n for half in journal.halfway.values() for name, n in half.positions.items()}
    for file in plan.files:  # what a killed run left half-written and cannot continue is room
        if file.name not in kept:
            with writing(out):
                (out / (file.name + PARTIAL_SUFFIX)).unlink(missing_ok=True)
    documents = plan.config, *plan.documents.values()
    needed = plan.written_bytes + sum(len(json_bytes(document)) for document in documents)
    needed += sum((plan.source.path / name).stat().st_size for name in side_files(plan.source.path))
    needed -= sum(facts.written.nbytes for facts in journal.finished.values())
    needed -= sum(nbytes for name, nbytes in kept.items() if name not in journal.finished)
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
        with ThreadPoolExecutor(runtime.workers) as pool:
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


def _complete(plan: Plan, out: Path, journal: Journal) -> None:
    """Side files, index, check, config, manifest: the folder becomes loadable only here."""
    written = {name: facts.written for name, facts in journal.finished.items()}
    read = {name: d for facts in journal.finished.values() for name, d in facts.read.items()}
    for name in sorted(set(plan.source.files) - set(read)):  # what holds nothing but scales
        with plan.source.reading([name], WINDOWS) as finish:
            read |= finish()
    written |= copy_side_files(plan.source.path, out)
    for name, document in plan.documents.items():
        written[name] = write_json(out / name, document)
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
    for name, codec in plan.reads_back.items():
        found = written.weights.get(name)
        if found is None or found.codec != codec:
            raise CheckpointError(f"{out}: {name} reads back as {found}")
    for file in plan.files:
        try:
            with safe_open(out / file.name, "pt") as opened:
                names = set(opened.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{out / file.name}: safetensors refuses it: {error}") from error
        if names != set(file.ranges):
            raise CheckpointError(f"{out / file.name}: holds other tensors than planned")
