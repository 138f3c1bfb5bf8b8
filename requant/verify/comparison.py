"""The verdict: compare every weight of source and output, run both, and judge.

Both are streamed layer by layer: a layer's weights are compared first, which leaves them in the
page cache, then the layer is run. Memory: activations, two weight caches of `CACHE_BYTES` and a few
tiles, whatever the models' size.

Of an output that was cut into ranks, each process of a team that is as large opens, compares and
runs one rank, as an engine does; process 0 runs the source, and looks at all headers together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from requant.convert.folder import Folder, folder_at
from requant.convert.names import TensorName
from requant.convert.processes import Team
from requant.convert.rank_folders import (
    WHOLE,
    Layout,
    Span,
    open_rank,
    read_layout,
    span_of,
)
from requant.convert.source import Checkpoint
from requant.demo import heldout_text
from requant.errors import CheckpointError, RequantError
from requant.memory import peak_bytes
from requant.runner.model import Model
from requant.runner.ranks import Rank
from requant.runner.tokenizer import load_tokenizer
from requant.verify import stream
from requant.verify.metrics import LogitSums
from requant.verify.structure import Structure, check_structure, linear_formats
from requant.verify.tensors import WeightCheck, compare_weight
from requant.verify.text import token_sequences
from requant.verify.verdict import (
    Measurements,
    default_max_kl,
    numbers,
    problems_of,
    rank_reports,
    shortened,
)

#: Decoded weights that each runner may keep. A layer's weights are needed once, so the cache saves
#: work only where a model is small; larger matrices are decoded in tiles.
CACHE_BYTES = 128 << 20
#: Wrong weights for which a look-alike is searched.
MAX_SEARCHES = 16

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Held:
    """What this process has of the output: all of it, or one `rank` with its pieces."""

    checkpoint: Checkpoint
    layout: Layout | None = None
    rank: int | None = None

    def span(self, name: str) -> Span:
        """Which piece of a weight."""
        if self.layout is None or self.rank is None:
            return WHOLE
        return span_of(self.layout.tables[self.rank][name])


def verify(
    source: Path | Folder,
    output: Path | Folder,
    *,
    device: torch.device | str = "cpu",
    max_kl: float | None = None,
    tokens: int = 2048,
    text: str | None = None,
    progress: Progress = lambda nbytes: None,
    team: Team | None = None,
) -> dict[str, Any]:
    """Judge whether `output` is a faithful conversion of `source`; returns verify's JSON keys.

    At least `tokens` tokens of `text`, or of the built-in held-out text, are run. `max_kl` is the
    largest mean KL in nats per token, by default that of the output's formats. `progress` is told
    of source bytes as they are done. A `team` has as many processes as the output has ranks, and
    all of them call this alike. Raises RequantError where the question cannot be asked (no such
    folder, an unusable source, a model the runner does not run, too short a text); an output that
    cannot be opened or run is an answer: not ok.
    """
    started = time.monotonic()
    team = team or Team()
    converted = folder_at(output)
    original = team.each(lambda: Checkpoint.open(source))
    model = team.each(lambda: Model(original, device, CACHE_BYTES))
    words = heldout_text() if text is None else text
    positions = model.config.max_position_embeddings
    ids = team.each(
        lambda: token_sequences(load_tokenizer(original.path), words, tokens, positions)
    )
    structure, problems, form = team.first(lambda: _structure(original, converted))
    found = Measurements()
    if structure is not None:
        held = _held(converted, team)
        other, reasons = _output_model(held, structure, device, team)
        problems = [*problems, *reasons]
        found = _measure(model, other, original, held, structure, ids, progress, team)
    limit = default_max_kl(found.checks) if max_kl is None else max_kl
    problems += problems_of(found, limit)
    peak = max(team.gather(peak_bytes()))
    return team.first(
        lambda: {
            "ok": not problems and found.sums is not None,
            "source": original.folder.label,
            "output": converted.label,
            "format": form,
            **numbers(found, limit),
            "ranks": rank_reports(found.checks),
            "problems": shortened(problems),
            "seconds": round(time.monotonic() - started, 3),
            "peak_rss_bytes": peak,
        }
    )


def _structure(
    original: Checkpoint, output: Folder
) -> tuple[Structure | None, list[str], str | None]:
    """What the output's headers tell, its problems, and its formats; None if it cannot be opened.

    Of ranks, the headers of all: whether their pieces make up the whole.
    """
    if not output.path.is_dir():
        raise CheckpointError(f"{output.label}: no such folder; give the converted checkpoint")
    try:
        converted = Checkpoint.open(output)
    except RequantError as error:
        return None, [str(error)], None
    structure = check_structure(original, converted)
    form = "+".join(linear_formats(converted)) or "none"
    return structure, list(structure.problems), form


def _held(output: Folder, team: Team) -> Held:
    """What this process has of the output. Raises CheckpointError in every process."""
    if team.size == 1:
        return Held(Checkpoint.open(output))

    def ranks() -> Layout:
        layout = read_layout(output)
        count = 1 if layout is None else len(layout.folders)
        if layout is None or count != team.size:
            raise CheckpointError(
                f"{output.label}: {team.size} processes were started for a checkpoint of {count} "
                f"rank{'s' if count > 1 else ''}; start one for each"
            )
        return layout

    layout = team.each(ranks)
    return Held(team.each(lambda: open_rank(output, layout, team.rank)), layout, team.rank)


def _output_model(
    held: Held, structure: Structure, device: torch.device | str, team: Team
) -> tuple[Model | None, list[str]]:
    """The output's runner, or None and why, unless the structure's problems tell already."""
    if not structure.runnable:
        return None, []
    rank, made, reason = None, None, None
    if held.layout is not None:
        rank = Rank.of(held.checkpoint, held.layout, team, torch.device(device))
    try:
        made = Model(held.checkpoint, device, CACHE_BYTES, rank=rank)
    except RequantError as error:
        reason = str(error) if held.rank is None else f"rank {held.rank}: {error}"
    reasons = [reason for reason in team.gather(reason) if reason is not None]
    if reasons:
        return None, [] if structure.problems else reasons
    return made, []


def _measure(
    source: Model,
    output: Model | None,
    original: Checkpoint,
    held: Held,
    structure: Structure,
    ids: torch.Tensor,
    progress: Progress,
    team: Team,
) -> Measurements:
    """Compare and run everything, layer by layer. `output` None: compare only."""
    checks: list[WeightCheck] = []
    layers: list[stream.LayerCheck] = []
    groups = _by_layer(structure.comparable)

    wrong: list[str] = []

    def compared(name: str) -> WeightCheck:
        search, span = len(wrong) < MAX_SEARCHES, held.span(name)
        check = compare_weight(
            original, held.checkpoint, name, source.device, search, held.rank, span
        )
        if check.problem:
            wrong.append(name)
        weight = original.weights[name]
        part = 1 if span.axis is None else (span.stop - span.start) / weight.shape[span.axis]
        progress(team.done(int(weight.nbytes * part)))
        return check

    def own(names: Iterable[str]) -> list[WeightCheck]:
        try:
            return [compared(name) for name in names if name in held.checkpoint.weights]
        except RequantError as error:
            if held.rank is None:
                raise
            raise CheckpointError(f"rank {held.rank}: {error}") from error

    def compare(names: Iterable[str]) -> None:
        for found in team.gather(team.each(lambda: own(names))):
            checks.extend(found)

    compare(groups.pop(None, []))
    state = stream.start(team, source, output, ids) if output else None
    for layer in range(source.config.num_hidden_layers):
        compare(groups.pop(layer, []))
        if state is not None:
            state, check = stream.step(state, layer)
            layers.append(check)
    sums = stream.finish(state) if state else None
    mtp: LogitSums | None = None
    for layer in source.mtp_layers:
        compare(groups.pop(layer, []))
        if state is not None and layer in state.output.mtp_layers:
            check, layer_sums = stream.mtp_step(state, layer)
            layers.append(check)
            mtp = layer_sums if mtp is None else mtp + layer_sums
    for names in groups.values():
        compare(names)
    return Measurements(checks, layers, sums, mtp)


def _by_layer(names: Iterable[str]) -> dict[int | None, list[str]]:
    """Weight names by layer, None for what lies in none; sorted, so that reports repeat."""
    groups: dict[int | None, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(TensorName.parse(name).layer, []).append(name)
    return groups
