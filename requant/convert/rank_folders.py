"""A checkpoint that lies cut into ranks, opened as the whole one that it makes up.

Its weights are joined as they are read, so that all that takes a checkpoint takes it, too. What
ranks have alike is compared; what they have of a weight must make it up.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from requant.convert.cut_rules import rule_of
from requant.convert.deepseek import original
from requant.convert.folder import CONFIG_NAME, Folder, folder_at, read_json
from requant.convert.fused import StoredPart, StoredPiece
from requant.convert.journal import RANKS_NAME
from requant.convert.names import setting
from requant.convert.pairing import pair_parts, told
from requant.convert.parallel import Parallel
from requant.convert.source import Checkpoint
from requant.convert.weights import StoredWeight
from requant.errors import CheckpointError, FormatError
from requant.quant import Codec, TensorSpec
from requant.quant.codec import TORCH_DTYPES
from requant.quant.cutting import as_bytes, cut_rows, plan_cut

LAYOUT_VERSION = 1
#: `replicated`, `experts`, `rows a:b`, `experts, cols a:b`
_WHERE = re.compile(r"(?:replicated|experts)|(?:experts, )?(rows|cols) (\d{1,12}):(\d{1,12})")
_FOLDER = re.compile(r"[\w-][\w.-]*")
_MODEL_FILE = re.compile(r"model(\d{1,4})-mp(\d{1,4})\.safetensors")
_FILE = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*\.safetensors")


class Span(NamedTuple):
    """Rows (axis 0) or columns (axis 1) start:stop of a weight; all of it where axis is None."""

    axis: int | None
    start: int
    stop: int


#: Of a weight that was not cut.
WHOLE = Span(None, 0, 0)


@dataclass(frozen=True)
class Layout:
    """What ranks.json says: the layout's name, what each rank is called, its files, which piece it
    holds of each weight, the headers of the files of the whole checkpoint, and how it was cut.
    `renamed`: the files have DeepSeek's names of tensors, and the tables others."""

    name: str
    folders: tuple[str, ...]
    files: tuple[tuple[str, ...], ...]
    tables: tuple[Mapping[str, str], ...]
    headers: Mapping[str, str]
    parallel: Parallel
    renamed: bool = False


def rank_folder(rank: int) -> str:
    """The name of a rank's folder."""
    return f"rank-{rank:03}"


def read_layout(where: Path | Folder) -> Layout | None:
    """What ranks.json of a folder says; None without it. Raises CheckpointError for nonsense."""
    folder = folder_at(where)
    path = folder.path
    if not (path / RANKS_NAME).is_file():
        return None
    document = read_json(path / RANKS_NAME, "")
    try:
        version, ranks, headers = (document[key] for key in ("version", "ranks", "headers"))
        if version != LAYOUT_VERSION:
            raise CheckpointError(
                f"{path / RANKS_NAME}: version {version!r}, this requant reads {LAYOUT_VERSION}"
            )
        layout = Layout(
            document["layout"],
            tuple(rank["folder"] for rank in ranks),
            tuple(tuple(rank["files"]) for rank in ranks),
            tuple(dict(rank["weights"]) for rank in ranks),
            dict(headers),
            Parallel(document["tp"], document["ep"], document["pp"]),
            document["layout"] == "deepseek"
            and not any("embed.weight" in rank["weights"] for rank in ranks),
        )
        texts = [*layout.folders, *layout.headers, *layout.headers.values()]
        texts += [layout.name, *(file for files in layout.files for file in files)]
        texts += [text for table in layout.tables for text in (*table, *table.values())]
        if not all(isinstance(text, str) for text in texts) or not ranks:
            raise TypeError("names and pieces are strings")
        strange = [text for text in texts if not text.isprintable()]
        if strange:
            raise TypeError(f"unprintable characters in {strange[0]!a}")
        ways = (layout.parallel.tp, layout.parallel.ep, layout.parallel.pp)
        if not all(type(number) is int and number > 0 for number in ways):
            raise TypeError("tp, ep and pp are numbers from 1")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path / RANKS_NAME}: not what `requant shard` writes ({error})"
        ) from error
    for name in (*layout.folders, *layout.headers):
        if not _FOLDER.fullmatch(name):
            raise CheckpointError(f"{path / RANKS_NAME}: {name!r} is no name of a file or folder")
    for file in (file for files in layout.files for file in files):
        if not _FILE.fullmatch(file):
            raise CheckpointError(f"{path / RANKS_NAME}: {file!r} is no .safetensors file of it")
        if not folder.holds(file):
            raise CheckpointError(f"{path}: {file} is absent; copy it again")
    return layout


def deepseek_layout(where: Path | Folder, config: dict[str, Any]) -> Layout:
    """The layout of a folder that DeepSeek's convert.py wrote, for a model of this config.json.

    Raises CheckpointError when files are absent, or are not of one run.
    """
    folder = folder_at(where)
    path = folder.path
    found = {file: _MODEL_FILE.fullmatch(file) for file in folder.weight_files()}
    numbers = {(int(match[1]), int(match[2])): name for name, match in found.items() if match}
    counts = {count for _, count in numbers}
    if len(counts) != 1 or sorted(numbers) != [(rank, max(counts)) for rank in range(max(counts))]:
        raise CheckpointError(
            f"{path}: expected model0-mpN.safetensors to model(N-1)-mpN.safetensors of DeepSeek's "
            f"convert.py, or {RANKS_NAME}; has {', '.join(sorted(found)[:5]) or 'none'}"
        )
    files = tuple((numbers[number],) for number in sorted(numbers))
    native = str(setting(config, "model_type")).startswith("deepseek_v4")
    count = len(files)
    layout = Layout("deepseek", tuple(f for f, in files), files, (), {}, Parallel(count, count),
                    renamed=not native)  # fmt: skip
    tables: list[dict[str, str]] = []
    ends: dict[str, int] = {}
    for rank in range(count):
        weights = open_rank(folder, layout, rank, config).weights
        tables.append({})
        for name, weight in weights.items():
            axis = None if weight.kind == "routed_expert" else rule_of(weight, weights).axis
            if axis is None:
                tables[-1][name] = "experts" if weight.kind == "routed_expert" else "replicated"
                continue
            start = ends.get(name, 0)
            ends[name] = start + weight.shape[axis]
            tables[-1][name] = f"{('rows', 'cols')[axis]} {start}:{ends[name]}"
    return dataclasses.replace(layout, tables=tuple(tables))


def open_ranks(
    where: Path | Folder, layout: Layout, config: dict[str, Any] | None = None
) -> Checkpoint:
    """The whole checkpoint; of this config where the folder has none. Raises CheckpointError or
    FormatError naming rank, weight, numbers."""
    folder = folder_at(where)
    path = folder.path
    config = config or read_json(path / CONFIG_NAME, "not a checkpoint folder")
    ranks = [open_rank(folder, layout, rank, config) for rank in range(len(layout.folders))]
    files = tuple(file for rank in ranks for file in rank.files)
    facts = {file: fact for rank in ranks for file, fact in rank.facts.items()}
    held: dict[str, list[tuple[int, StoredWeight]]] = {}
    for number, rank in enumerate(ranks):
        for name, weight in rank.weights.items():
            held.setdefault(name, []).append((number, weight))
    weights = {}
    for name, pieces in held.items():
        try:
            spans = [layout.tables[number][name] for number, _ in pieces]
            weights[name] = _joined([weight for _, weight in pieces], spans)
        except FormatError as error:
            raise CheckpointError(f"{path}: {name}: {error}") from error
    whole = Checkpoint(folder, config, files, facts, weights)
    completed = {
        name: weight.stored_as(
            told(whole, weight.codec, weight.parts), weight.shape, weight.parts, weight.activations
        )
        for name, weight in weights.items()
        if weight.codec is not None and weight.codec.needs_content
    }
    return dataclasses.replace(whole, weights={**weights, **completed})


def open_rank(
    where: Path | Folder, layout: Layout, rank: int, config: dict[str, Any] | None = None
) -> Checkpoint:
    """What one rank holds, under the whole checkpoint's names; its files are named from `path`.

    Raises CheckpointError when it is not what the layout's tables, if any, say.
    """
    folder = folder_at(where)
    path = folder.path
    config = config or read_json(path / CONFIG_NAME, "not a checkpoint folder")
    files = layout.files[rank]
    tensors: dict[str, StoredPart] = {}
    for file, found in folder.tensors(files):
        for name, part in found.items():
            whole = original(name) if layout.renamed else name
            if whole in tensors:
                raise CheckpointError(f"{path / file}: {name} is in another file of its rank, too")
            tensors[whole] = part._replace(name=whole)
    checkpoint = Checkpoint(folder, config, files, {f: folder.facts(f) for f in files}, {})
    weights = pair_parts(checkpoint, tensors)
    differ = set(weights) ^ set(layout.tables[rank]) if layout.tables else set()
    if differ:
        name, own = min(differ), layout.folders[rank]
        lacks = RANKS_NAME if name in weights else own
        raise CheckpointError(f"{path / own}: {name} is not in {lacks}")
    return dataclasses.replace(checkpoint, weights=weights)


def span_of(where: str) -> Span:
    """Which piece ranks.json tells of. Raises FormatError for what it cannot say."""
    match = _WHERE.fullmatch(where)
    if match is None:
        raise FormatError(f"{where!r} is none of the pieces a rank may hold")
    if match[1] is None:
        return WHOLE
    return Span(("rows", "cols").index(match[1]), int(match[2]), int(match[3]))


def _joined(pieces: list[StoredWeight], where: list[str]) -> StoredWeight:
    """The whole weight from what each rank has of it. Raises FormatError when it is not all."""
    cuts = [span_of(text) for text in where]
    first = pieces[0]
    axes = {cut.axis for cut in cuts}
    if len(axes) != 1:
        raise FormatError(f"cut along different axes: {', '.join(sorted(set(where)))}")
    (axis,) = axes
    if axis is None:
        parts = {
            part: _alike(tensor, [_part(piece, part) for piece in pieces])
            for part, tensor in first.parts.items()
        }
        return dataclasses.replace(first, parts=parts)
    end = 0
    for start, stop in sorted({(cut.start, cut.stop) for cut in cuts}):
        if start != end or stop <= start:
            raise FormatError(f"{', '.join(sorted(set(where)))}: there is a gap at {end}")
        end = stop
    return _put_together(pieces, [(cut.start, cut.stop) for cut in cuts], axis, end)


def _put_together(
    pieces: list[StoredWeight], spans: list[tuple[int, int]], axis: int, side: int
) -> StoredWeight:
    """The weight of which the pieces have rows or columns `spans`; that axis is `side` long."""
    first = pieces[0]
    codec = None if first.codec is None else _as_detected(first.codec)
    shape = (side, *first.shape[1:]) if axis == 0 else (first.shape[0], side)
    if codec is None:
        ((part, tensor),) = first.parts.items()
        specs = {part: TensorSpec(tensor.spec.dtype, shape)}
        cuts = [{part: cut_rows(specs[part], *span)} for span in spans]
    else:
        rows, cols = shape
        specs = codec.specs(rows, cols)
        cuts = [plan_cut(codec, (rows, cols), axis, *span) for span in spans]
    parts = {}
    for part, spec in specs.items():
        joined = []
        for piece, cut, (start, _) in zip(pieces, cuts, spans, strict=True):
            stored = _part(piece, part)
            expected = cut[part].spec
            rewritten = cut[part].rewritten
            if not rewritten and (stored.spec.dtype, stored.spec.shape) != (
                expected.dtype,
                expected.shape,
            ):
                raise FormatError(
                    f"{stored.location.file}: {part} is {stored.spec.dtype} "
                    f"{list(stored.spec.shape)}, expected {expected.dtype} {list(expected.shape)}"
                )
            moved = None
            if rewritten:
                assert codec is not None
                moved = partial(
                    _moved, codec, part, stored.spec, (shape[0], shape[1]), start * axis
                )
            joined.append(StoredPiece(stored.location, cut[part].patch, moved))
        parts[part] = first.parts[part]._replace(spec=spec, pieces=tuple(joined))
    activations = {
        part: _alike(tensor, [_part(piece, part) for piece in pieces])
        for part, tensor in first.activations.items()
    }
    return first.stored_as(codec, shape, parts, activations)


def _as_detected(codec: Codec) -> Codec:
    """The codec without what the bytes of a piece told it."""
    stored = [f for f in dataclasses.fields(codec) if f.metadata.get("stored")]  # type: ignore[arg-type]
    return dataclasses.replace(codec, **{f.name: f.default for f in stored})  # type: ignore[type-var]


def _moved(
    codec: Codec,
    part: str,
    spec: TensorSpec,
    shape: tuple[int, int],
    shift: int,
    stored: torch.Tensor,
) -> torch.Tensor:
    """A rewritten part as the whole weight has it, as bytes."""
    tensor = stored.view(TORCH_DTYPES[spec.dtype]).reshape(spec.shape)
    return as_bytes(codec.relocate(part, tensor, shape, shift))


def _alike(tensor: StoredPart, copies: Iterable[StoredPart]) -> StoredPart:
    """A tensor that every rank has: all copies are read, and compared."""
    pieces = tuple(StoredPiece(copy.location, None) for copy in copies)
    return tensor._replace(pieces=pieces)


def _part(weight: StoredWeight, part: str) -> StoredPart:
    if part not in weight.tensors:
        raise FormatError(f"{weight.file}: has no {part}, as other ranks have")
    return weight.tensors[part]
