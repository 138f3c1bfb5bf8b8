"""The plan: a pure function of headers and recipe that says every byte range `convert` will write.

Output files mirror the source's files: a weight goes where its codes were, its scales beside it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

import requant
from requant.convert.containers import Choice, choose_codecs, expert_dtype, quantization_config
from requant.convert.engines import engine_notes
from requant.convert.folder import INDEX_NAME, SINGLE_NAME, last_name
from requant.convert.forms import Form, PlannedWeight, companions_of, plan_weights
from requant.convert.header import layout
from requant.convert.names import setting
from requant.convert.recipe import Recipe
from requant.convert.source import Checkpoint
from requant.convert.weights import Kind
from requant.errors import FormatError
from requant.quant import Codec, TensorSpec, format_name
from requant.quant.codec import TORCH_DTYPES
from requant.quant.cutting import PartCut
from requant.quant.plain import Plain

_DTYPE_KEYS = ("torch_dtype", "dtype")
_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class PlannedPiece:
    """What one output file holds of a weight, and the names of its parts there.

    `cuts` say which bytes of each part; None: all of it, as every part that they do not name. Then
    `shape` is that of the piece, and `shift` what `Codec.relocate` adds to the number of a column.
    `in_place`: the file's header was not laid out here, and has its one part next, whatever size.
    """

    weight: PlannedWeight
    names: Mapping[str, str]
    cuts: Mapping[str, PartCut] | None = None
    shape: tuple[int, int] = (0, 0)
    shift: int = 0
    in_place: bool = False

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The tensors of the file, by part."""
        return self.weight.form.specs if self.cuts is None else self._cut_specs

    @cached_property
    def _cut_specs(self) -> Mapping[str, TensorSpec]:
        assert self.cuts is not None
        return {p: self.cuts[p].spec if p in self.cuts else s for p, s in self.weight.specs.items()}

    @property
    def streamed(self) -> str | None:
        """The part that can be written as it is made; see `PlannedWeight.streamed`."""
        if self.in_place:
            return next(iter(self.specs))
        part = self.weight.streamed
        return part if part is not None and self.specs[part].nbytes % 8 == 0 else None

    def relocate(self, part: str, stored: torch.Tensor) -> torch.Tensor:
        """A part whose content depends on the shape, for the piece, from its bytes, uint8."""
        codec = self.weight.written_codec
        assert codec is not None and self.cuts is not None
        specs = self.weight.specs if self.cuts[part].patch is None else self.specs
        spec = specs[part]
        tensor = stored.view(TORCH_DTYPES[spec.dtype]).reshape(spec.shape)
        return codec.relocate(part, tensor, self.shape, self.shift)


@dataclass(frozen=True)
class PlannedFile:
    """One output file: its first bytes, its size, and each tensor's absolute byte range."""

    name: str
    header: bytes
    nbytes: int
    ranges: Mapping[str, tuple[int, int]]
    pieces: tuple[PlannedPiece, ...]


@dataclass(frozen=True)
class Stage:
    """Weights that are read together, in the order of the bytes of the files named in `sources`."""

    sources: tuple[str, ...]
    weights: tuple[PlannedWeight, ...]


@dataclass(frozen=True)
class PlannedGroup:
    """Files that are written in one go, stage after stage, and finished together."""

    stages: tuple[Stage, ...]
    files: tuple[PlannedFile, ...]

    @property
    def weights(self) -> list[PlannedWeight]:
        """Every weight that goes into one of the files, in order."""
        return [weight for stage in self.stages for weight in stage.weights]


@dataclass(frozen=True)
class Plan:
    """All that `convert` would do.

    `documents`: JSON files, beside `config`, by name. `reads_back`: the weights that the output
    then has, and the codec of each. `ranks`: how it is spread over several, if it is.
    """

    source: Checkpoint
    recipe: Recipe
    groups: tuple[PlannedGroup, ...]
    config: Mapping[str, Any]
    documents: Mapping[str, Mapping[str, Any]]
    reads_back: Mapping[str, Codec | None]
    ranks: Mapping[str, Any] | None = None

    @cached_property
    def files(self) -> list[PlannedFile]:
        """Every file that is written."""
        return [file for group in self.groups for file in group.files]

    @cached_property
    def weights(self) -> list[PlannedWeight]:
        """Every weight, in file order."""
        return [weight for group in self.groups for weight in group.weights]

    @cached_property
    def _alike(self) -> Mapping[tuple[Kind, Form], list[PlannedWeight]]:
        """The weights by what they are and how they are written, in file order."""
        alike: dict[tuple[Kind, Form], list[PlannedWeight]] = {}
        for weight in self.weights:
            alike.setdefault((weight.source.alike, weight.form), []).append(weight)
        return alike

    @property
    def read_bytes(self) -> int:
        """Tensor bytes that are read from the source."""
        return self.source.nbytes

    @property
    def written_bytes(self) -> int:
        """Size of the .safetensors files that are written, headers included."""
        return sum(file.nbytes for file in self.files)

    @cached_property
    def key(self) -> str:
        """Identifies source, recipe and version: an output is resumed only under the same key."""
        digest = hashlib.sha256(f"requant {requant.__version__}\n".encode())
        for name, facts in self.source.facts.items():
            digest.update(f"{name} {facts.nbytes} {facts.version}\n".encode())
        digest.update(json.dumps(self.config, sort_keys=True).encode())
        for file in self.files:
            digest.update(file.name.encode() + file.header)
            for piece in file.pieces:
                weight = piece.weight
                told = f"({weight.source.name!r}, {weight.form.identity}, {piece.cuts!r})"
                digest.update(told.encode())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """The stable JSON keys that `plan` and `convert` share."""
        return dict(self._summary)

    @cached_property
    def _summary(self) -> dict[str, Any]:
        copied = lossless = 0
        formats: Counter[str] = Counter()
        for (kind, form), weights in self._alike.items():
            formats[format_name(form.codec) if form.codec else kind.format] += len(weights)
            copied += len(weights) if form.codec is None else 0
            lossless += len(weights) if form.lossless else 0
        converted = [weight for weight in self.weights if weight.form.codec is not None]
        unknown = {k for k, _ in self._alike if k.purpose == "other" and k.leaf != "eh_proj"}
        return {
            "source": self.source.folder.label,
            "format": self.recipe.format,
            "recipe": self.recipe.name,
            "files": len(self.files),
            "tensors": len(self.weights),
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
            "identical_tensors": copied,
            "lossless_tensors": lossless,
            "requantized_tensors": len(converted) - lossless,
            "formats": dict(sorted(formats.items())),
            "not_lossless": [
                {"tensor": w.source.name, "reason": w.reason} for w in converted if w.reason
            ],
            "engine_notes": list(
                engine_notes(self._alike, setting(self.source.config, "model_type"))
            ),
            "ignored_files": self.source.ignored_files,
            "dropped_tensors": sorted(
                part.name for w in converted for part in w.source.activations.values()
            ),
            "unknown_tensors": sorted(
                w.source.name for w in self.weights if w.source.alike in unknown
            ),
            **({} if self.ranks is None else {"ranks": self.ranks}),
        }


def make_plan(source: Checkpoint, recipe: Recipe, require_lossless: bool = False) -> Plan:
    """Plan a conversion. Raises FormatError, naming the tensor, for what cannot be written."""
    recipe.require_effect(source)
    choices = choose_codecs(source, recipe)
    converts = any(choice.codec for choice in choices)
    if converts and (source.quantization_config or {}).get("transform_config"):
        raise FormatError(
            f"{source.path}: its weights are rotated (transform_config), and engines undo that by "
            "a config that requant does not write; convert the checkpoint it was made from"
        )
    sets = companions_of(source, choices)
    planned: dict[str, PlannedWeight | FormatError] = {}
    for choice in choices:
        planned.update(plan_weights(source, choice, sets))
    by_file: dict[str, list[PlannedWeight]] = {}
    files_of = {file: last_name(file) for file in source.files}
    refused: list[FormatError] = []
    for name in source.weights:
        weight = planned[name]
        if isinstance(weight, FormatError):
            refused.append(weight)
        else:
            by_file.setdefault(files_of[weight.source.file], []).append(weight)
    if refused:
        more = f"; so it is with {len(refused) - 1} more weights" if len(refused) > 1 else ""
        raise FormatError(f"{refused[0]}{more}")
    groups = tuple(
        _plan_group(name, by_file[name], source.files_by_name[name]) for name in sorted(by_file)
    )
    config = _config(source, recipe, choices)
    files = [file for group in groups for file in group.files]
    one = [file.name for file in files] == [SINGLE_NAME]
    documents = {} if one else {INDEX_NAME: index_of(files)}
    reads_back = {w.source.name: w.written_codec for group in groups for w in group.weights}
    plan = Plan(source, recipe, groups, config, documents, reads_back)
    if require_lossless:
        _require_lossless(plan)
    return plan


def _require_lossless(plan: Plan) -> None:
    lossy = [w for w in plan.weights if w.codec is not None and not w.lossless]
    if lossy:
        first = lossy[0]
        assert first.codec is not None
        way = f"{first.source.format} -> {format_name(first.codec)}"
        raise FormatError(
            f"{first.source.name}: {way} is not lossless: {first.reason or 'it rounds'}; "
            f"so it is with {len(lossy) - 1} more weights; leave out --require-lossless, or keep "
            "these weights as they are"
        )


def _plan_group(name: str, weights: list[PlannedWeight], sources: tuple[str, ...]) -> PlannedGroup:
    """The file of this name, in the order of the source's (of ranks: those in every folder), so
    that all are read and written in one go."""
    weights = sorted(weights, key=lambda weight: weight.source.codes.location.begin)
    pieces = [PlannedPiece(weight, weight.names) for weight in weights]
    return PlannedGroup((Stage(sources, tuple(weights)),), (plan_file(name, pieces),))


def plan_file(name: str, pieces: Sequence[PlannedPiece]) -> PlannedFile:
    """Lay out a file that holds these pieces in this order."""
    header, ranges = layout({p.names[part]: s for p in pieces for part, s in p.specs.items()})
    nbytes = max((end for _, end in ranges.values()), default=len(header))
    return PlannedFile(name, header, nbytes, ranges, tuple(pieces))


def index_of(files: Sequence[PlannedFile]) -> dict[str, Any]:
    """The index of a folder that holds these files."""
    total = sum(s.nbytes for file in files for p in file.pieces for s in p.specs.values())
    places: dict[str, str] = {}
    for file in files:
        places.update(dict.fromkeys(file.ranges, last_name(file.name)))
    weight_map = {name: places[name] for name in sorted(places)}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _config(source: Checkpoint, recipe: Recipe, choices: Sequence[Choice]) -> dict[str, Any]:
    """config.json of the output: the source's, with what changed."""
    config: dict[str, Any] = copy.deepcopy(source.config)
    quantization = quantization_config(source, choices)
    if quantization is not None and not any(choice.codec for choice in choices):
        # With what the source says of activations, such as scale_fmt.
        if setting(config, "quantization_config") is None:
            config["quantization_config"] = source.quantization_config
        return config
    nested = config.get("text_config")
    parts = [config, nested] if isinstance(nested, dict) else [config]
    for part in parts:
        part.pop("quantization_config", None)
    plain = {c for c in recipe.roles.values() if c is not None}
    codec = next(iter(plain), None)
    if quantization is None and len(plain) == 1 and isinstance(codec, Plain):
        for part in parts:
            part.update({k: _TORCH_NAMES[codec.dtype] for k in _DTYPE_KEYS if k in part})
    experts = expert_dtype(choices, (quantization or {}).get("quant_method"))
    for part in parts:
        if part.pop("expert_dtype", None) is not None and experts is not None:
            part["expert_dtype"] = experts
    if quantization is not None:
        config["quantization_config"] = quantization  # at the top: all loaders look there
        if experts is not None and "expert_dtype" in (source.quantization_config or {}):
            quantization["expert_dtype"] = experts
    return config
