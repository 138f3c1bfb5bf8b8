"""The verdict: compare every weight of source and output, run both, and judge.

Both are streamed layer by layer: a layer's weights are compared first, which leaves them in the
page cache, then the layer is run. Memory: activations, two weight caches of `CACHE_BYTES` and a few
tiles, whatever the models' size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from requant.convert.names import TensorName
from requant.convert.source import Checkpoint
from requant.demo import heldout_text
from requant.errors import CheckpointError, RequantError
from requant.memory import peak_bytes
from requant.runner.model import Model
from requant.runner.tokenizer import load_tokenizer
from requant.verify import stream
from requant.verify.metrics import LogitSums
from requant.verify.structure import Structure, check_structure, linear_formats
from requant.verify.tensors import WeightCheck, compare_weight
from requant.verify.text import token_sequences
from requant.verify.verdict import Measurements, default_max_kl, numbers, problems_of, shortened

#: Decoded weights that each runner may keep. A layer's weights are needed once, so the cache saves
#: work only where a model is small; larger matrices are decoded in tiles.
CACHE_BYTES = 128 << 20
#: Wrong weights for which a look-alike is searched.
MAX_SEARCHES = 16

Progress = Callable[[int], None]


def verify(
    source: Path,
    output: Path,
    *,
    device: torch.device | str = "cpu",
    max_kl: float | None = None,
    tokens: int = 2048,
    text: str | None = None,
    progress: Progress = lambda nbytes: None,
) -> dict[str, Any]:
    """Judge whether `output` is a faithful conversion of `source`; returns verify's JSON keys.

    At least `tokens` tokens of `text`, or of the built-in held-out text, are run. `max_kl` is the
    largest mean KL in nats per token, by default that of the output's formats. `progress` is told
    of source bytes as they are done. Raises RequantError where the question cannot be asked (no
    such folder, an unusable source, a model the runner does not run, too short a text); an output
    that cannot be opened or run is an answer: not ok.
    """
    started = time.monotonic()
    original = Checkpoint.open(source)
    model = Model(original, device, CACHE_BYTES)
    ids = token_sequences(
        load_tokenizer(source),
        heldout_text() if text is None else text,
        tokens,
        model.config.max_position_embeddings,
    )
    if not output.is_dir():
        raise CheckpointError(f"{output}: no such folder; give the converted checkpoint")
    converted: Checkpoint | None = None
    found, problems = Measurements(), []
    try:
        converted = Checkpoint.open(output)
    except RequantError as error:
        problems = [str(error)]
    if converted is not None:
        structure = check_structure(original, converted)
        other, reason = _output_model(converted, structure, device)
        problems = [*structure.problems, *reason]
        found = _measure(model, other, original, converted, structure, ids, progress)
    limit = default_max_kl(found.checks) if max_kl is None else max_kl
    problems += problems_of(found, limit)
    return {
        "ok": not problems and found.sums is not None,
        "source": str(source),
        "output": str(output),
        "format": "+".join(linear_formats(converted)) or "none" if converted else None,
        **numbers(found, limit),
        "problems": shortened(problems),
        "seconds": round(time.monotonic() - started, 3),
        "peak_rss_bytes": peak_bytes(),
    }


def _output_model(
    converted: Checkpoint, structure: Structure, device: torch.device | str
) -> tuple[Model | None, list[str]]:
    """The output's runner, or None and why, unless the structure's problems tell already."""
    if not structure.runnable:
        return None, []
    try:
        return Model(converted, device, CACHE_BYTES), []
    except RequantError as error:
        return None, [] if structure.problems else [str(error)]


def _measure(
    source: Model,
    output: Model | None,
    original: Checkpoint,
    converted: Checkpoint,
    structure: Structure,
    ids: torch.Tensor,
    progress: Progress,
) -> Measurements:
    """Compare and run everything, layer by layer. `output` None: compare only."""
    checks: list[WeightCheck] = []
    layers: list[stream.LayerCheck] = []
    groups = _by_layer(structure.comparable)

    wrong: list[str] = []

    def compare(names: Iterable[str]) -> None:
        for name in names:
            search = len(wrong) < MAX_SEARCHES
            check = compare_weight(original, converted, name, source.device, search)
            checks.append(check)
            if check.problem:
                wrong.append(name)
            progress(original.weights[name].nbytes)

    compare(groups.pop(None, []))
    state = stream.start(source, output, ids) if output else None
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
