"""Plans that spread a checkpoint over ranks, and put it together again.

The layout `hf`: a folder a rank, rank-000, rank-001, ..., with the source's file names and tensor
names; beside them config.json and ranks.json, which says what each rank holds of each weight, and
keeps the headers of the source's files, so that `merge` gives back the same bytes. The layout
`deepseek` has one file a rank (deepseek.py), and the same ranks.json beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from requant.convert import deepseek
from requant.convert.folder import INDEX_NAME, SINGLE_NAME, Folder, folder_at, read_json
from requant.convert.forms import Form, PlannedWeight
from requant.convert.fused import StoredPart
from requant.convert.header import Location, parse_header
from requant.convert.journal import RANKS_NAME
from requant.convert.names import zeroed
from requant.convert.patterns import natural_key
from requant.convert.plan import (
    Plan,
    PlannedFile,
    PlannedGroup,
    PlannedPiece,
    Stage,
    index_of,
    plan_file,
)
from requant.convert.rank_folders import (
    LAYOUT_VERSION,
    deepseek_layout,
    open_ranks,
    rank_folder,
    read_layout,
)
from requant.convert.ranks import Piece, Split
from requant.convert.recipe import KEEP
from requant.convert.source import Checkpoint
from requant.convert.weights import Kind, StoredWeight
from requant.errors import CheckpointError, FormatError, RequantError
from requant.quant.cutting import cut_rows, plan_cut


def as_written(plan: Plan) -> Checkpoint:
    """The checkpoint that a plan would write, from its headers: what is to be cut."""
    weights: dict[str, StoredWeight] = {}
    kinds: dict[tuple[Kind, Form], Kind] = {}
    for file in plan.files:
        for piece in file.pieces:
            source, specs = piece.weight.source, piece.weight.specs
            parts = {
                part: StoredPart(name, specs[part], Location(file.name, *file.ranges[name]))
                for part, name in piece.names.items()
            }
            beside = {part: parts.pop(part) for part in source.activations if part in parts}
            key = source.alike, piece.weight.form
            if key not in kinds:
                specs = {part: specs[part] for part in parts}
                codec = piece.weight.written_codec
                kinds[key] = dataclasses.replace(source.alike, codec=codec, specs=specs)
            weights[source.name] = StoredWeight(source.name, kinds[key], parts, beside)
    in_order = {name: weights[name] for name in plan.source.weights}
    return dataclasses.replace(plan.source, config=dict(plan.config), weights=in_order)


def shard(plan: Plan, split: Split, layout: str = "hf") -> Plan:
    """A plan that writes what `plan` does, spread over ranks; `split` is one of `as_written`, and
    for the layout `deepseek` one of `split_deepseek`.

    Raises FormatError for a piece that cannot be cut out without a change.
    """
    ranks = range(split.parallel.ranks)
    held = [{piece.weight.name: piece for piece in split.pieces(rank)} for rank in ranks]
    pieces: dict[str, list[PlannedPiece]] = {}
    rank_of: dict[str, int] = {}
    together: list[list[str]] = []
    for group in plan.groups:
        (whole,) = group.files
        together.append([])
        for rank in ranks:
            folder = rank_folder(rank)
            for piece in whole.pieces:
                here = held[rank].get(piece.weight.source.name)
                if here is None:
                    continue
                cut = _cut(piece, here)
                path = f"{folder}/{whole.name}"
                if layout == "deepseek":
                    name = piece.weight.source.name
                    path = deepseek.file_name(name, rank, len(ranks), plan.config)
                    names = {part: deepseek.rename(name) for part, name in cut.names.items()}
                    cut = dataclasses.replace(cut, names=names)
                if path not in rank_of:
                    rank_of[path] = rank
                    together[-1].append(path)
                pieces.setdefault(path, []).append(cut)
    files = {path: plan_file(path, content) for path, content in pieces.items()}
    groups = [
        PlannedGroup(group.stages, tuple(files[path] for path in paths))
        for group, paths in zip(plan.groups, together, strict=True)
    ]
    if layout == "deepseek":  # one file a rank, which all of the source's go into
        stages = tuple(stage for group in plan.groups for stage in group.stages)
        groups = [PlannedGroup(stages, tuple(files.values()))]
    summary = {"layout": layout, **split.summary()}
    by_rank = [[path for path in files if rank_of[path] == rank] for rank in ranks]
    documents: dict[str, Mapping[str, Any]] = {
        RANKS_NAME: {
            "version": LAYOUT_VERSION,
            **{key: value for key, value in summary.items() if key in _SUMMARY_KEYS},
            "ranks": [
                {
                    "folder": rank_folder(rank) if layout == "hf" else by_rank[rank][0],
                    "files": by_rank[rank],
                    "weights": split.table(rank),
                }
                for rank in ranks
            ],
            "headers": _headers(plan),
        }
    }
    if layout == "deepseek":
        documents[ENGINE_CONFIG] = deepseek.engine_config(split.survey.checkpoint)
        summary["engine_notes"] = deepseek.engine_notes(split.survey.checkpoint)
    else:
        documents |= {
            f"{rank_folder(rank)}/{INDEX_NAME}": index_of([files[path] for path in by_rank[rank]])
            for rank in ranks
            if by_rank[rank] != [f"{rank_folder(rank)}/{SINGLE_NAME}"]
        }
    return dataclasses.replace(plan, groups=tuple(groups), documents=documents, ranks=summary)


_SUMMARY_KEYS = ("layout", "tp", "ep", "pp", "redundant_experts")
#: Size of the files of a merged checkpoint whose own are unknown.
FILE_BYTES = 4_300_000_000
#: What DeepSeek's generate.py takes with --config.
ENGINE_CONFIG = "deepseek-inference.json"


def _headers(plan: Plan) -> dict[str, str]:
    """The headers of the files of the whole checkpoint, to merge into: the source's own where all
    its tensors are copied, else as planned."""
    weights = [piece.weight for file in plan.files for piece in file.pieces]
    stored = [part for weight in weights for part in weight.source.parts.values()]
    if any(w.codec is not None for w in weights) or any(p.strides or p.pieces for p in stored):
        return {file.name: file.header[8:].decode() for file in plan.files}
    headers = plan.source.folder.raw_headers(plan.source.files)
    return {name: header[8:].decode() for name, header, _ in headers}


def _cut(piece: PlannedPiece, here: Piece) -> PlannedPiece:
    """What a rank holds of a weight that `piece` has as a whole."""
    if here.axis is None:
        return piece
    weight = piece.weight
    codec = weight.written_codec
    if codec is None:
        ((part, spec),) = weight.specs.items()
        return dataclasses.replace(piece, cuts={part: cut_rows(spec, here.start, here.stop)})
    rows, cols = weight.source.shape
    side = here.stop - here.start
    try:
        cuts = plan_cut(codec, (rows, cols), here.axis, here.start, here.stop)
    except FormatError as error:
        raise FormatError(f"{weight.source.name}: {error}") from error
    shape = (side, cols) if here.axis == 0 else (rows, side)
    shift = -here.start * here.axis
    return dataclasses.replace(piece, cuts=cuts, shape=shape, shift=shift)


def merge(where: Path | Folder, config: Path | None = None) -> Plan:
    """A plan that writes the checkpoint that was spread over ranks, byte for byte as it was.

    `config`: the model's config.json, for what DeepSeek's own convert.py wrote; then the tensors
    are those it was given, in files of FILE_BYTES. Raises CheckpointError for what is no ranks.
    """
    ranks = folder_at(where)
    ranks.require()
    layout = read_layout(ranks)
    if layout is not None and config is not None:
        raise RequantError(f"--config has no effect: {ranks.label} has its own")
    if layout is None and config is None:
        raise CheckpointError(
            f"{ranks.label}: has no {RANKS_NAME}; give a folder that `requant shard` wrote, or one "
            "of DeepSeek's convert.py with --config, the model's config.json"
        )
    if layout is None:
        assert config is not None
        settings = read_json(config, "it is the model's")
        layout = deepseek_layout(ranks, settings)
        source = open_ranks(ranks, layout, settings)
        plan = _in_new_files(source)
    else:
        source = open_ranks(ranks, layout)
        tensors = {
            tensor.name: (weight, part, tensor)
            for weight in source.weights.values()
            for part, tensor in weight.tensors.items()
        }
        groups = []
        for file, text in layout.headers.items():
            raw = text.encode()
            header = len(raw).to_bytes(8, "little") + raw
            groups.append(_merged(file, header, tensors, source))
        plan = Plan(source, KEEP, tuple(groups), source.config, {}, {})
    documents = (
        {} if [f.name for f in plan.files] == [SINGLE_NAME] else {INDEX_NAME: index_of(plan.files)}
    )
    reads_back = {name: weight.codec for name, weight in source.weights.items()}
    return dataclasses.replace(plan, documents=documents, reads_back=reads_back)


def _in_new_files(source: Checkpoint) -> Plan:
    """A copy of all weights by layer, in files of about FILE_BYTES."""
    files: list[list[PlannedPiece]] = [[]]
    room = FILE_BYTES
    for name in sorted(source.weights, key=natural_key):
        weight = source.weights[name]
        specs = {part: tensor.spec for part, tensor in weight.parts.items()}
        if weight.nbytes > room and files[-1]:
            files.append([])
            room = FILE_BYTES
        room -= weight.nbytes
        planned = PlannedWeight(weight, Form(None, specs))
        files[-1].append(PlannedPiece(planned, planned.names))
    groups = []
    for number, pieces in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):06}.safetensors"
        stage = Stage((), tuple(piece.weight for piece in pieces))
        groups.append(PlannedGroup((stage,), (plan_file(name, pieces),)))
    return Plan(source, KEEP, tuple(groups), source.config, {}, {})


def _merged(
    file: str,
    header: bytes,
    tensors: Mapping[str, tuple[StoredWeight, str, StoredPart]],
    source: Checkpoint,
) -> PlannedGroup:
    """One file of the whole checkpoint, tensor by tensor in the order of its header."""
    found = parse_header(header, None, source.path / RANKS_NAME)
    places = sorted(found.items(), key=lambda item: (item[1][1].begin, item[1][1].end))
    pieces, ranges, end = [], {}, len(header)
    for name, (spec, where) in places:
        if name not in tensors:
            raise CheckpointError(f"{source.path}: {name} of {file} is on no rank")
        weight, part, tensor = tensors[name]
        if (tensor.spec.dtype, tensor.spec.shape) != (spec.dtype, spec.shape):
            raise CheckpointError(
                f"{source.path}: {name} is {tensor.spec.dtype} {list(tensor.spec.shape)} on the "
                f"ranks, {spec.dtype} {list(spec.shape)} in {RANKS_NAME}"
            )
        alike = Kind(zeroed(name), weight.role, spec.shape, None, {part: spec})
        planned = PlannedWeight(StoredWeight(name, alike, {part: tensor}), Form(None, {part: spec}))
        pieces.append(PlannedPiece(planned, {part: name}, in_place=True))
        ranges[name], end = (where.begin, where.end), where.end
    planned_file = PlannedFile(file, header, end, ranges, tuple(pieces))
    # Of DeepSeek's layout each file holds all of the model: read here and there.
    sources = source.files_by_name.get(file, ())
    weights = tuple(piece.weight for piece in pieces)
    return PlannedGroup((Stage(sources, weights),), (planned_file,))
