"""The plan: a pure function of headers and recipe that says every byte range `convert` will write.

Output files mirror the source's files: a weight goes where its codes were, its scales beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import requant
from requant.convert.header import layout
from requant.convert.names import LINEAR_ROLES, TensorName, is_index
from requant.convert.recipe import Recipe, plain_codec
from requant.convert.source import SINGLE_NAME, Checkpoint, StoredWeight
from requant.errors import FormatError
from requant.quant import Codec, TensorSpec, format_name
from requant.quant.plain import Plain

_DTYPE_KEYS = ("torch_dtype", "dtype")
_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class PlannedWeight:
    """One weight: where its parts go. `codec` None means: copy the stored bytes."""

    source: StoredWeight
    codec: Codec | None
    specs: Mapping[str, TensorSpec]

    def stored_name(self, part: str) -> str:
        """The full name of one of its parts in the output."""
        if self.codec is None:
            return self.source.parts[part].name
        return self.source.name.removesuffix("weight") + part

    @property
    def written_codec(self) -> Codec | None:
        """The codec that reads the result; None for a tensor that is no matrix."""
        return self.codec or self.source.codec


@dataclass(frozen=True)
class PlannedFile:
    """One output file: its first bytes, its size, and each tensor's absolute byte range."""

    name: str
    header: bytes
    nbytes: int
    ranges: Mapping[str, tuple[int, int]]
    weights: tuple[PlannedWeight, ...]


@dataclass(frozen=True)
class Plan:
    """All that `convert` would do."""

    source: Checkpoint
    recipe: Recipe
    files: tuple[PlannedFile, ...]
    config: Mapping[str, Any]
    index: Mapping[str, Any] | None

    @property
    def weights(self) -> list[PlannedWeight]:
        """Every weight, in file order."""
        return [weight for file in self.files for weight in file.weights]

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
        for name in self.source.files:
            stat = (self.source.path / name).stat()
            digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        digest.update(json.dumps(self.config, sort_keys=True).encode())
        for file in self.files:
            digest.update(file.name.encode() + file.header)
            for weight in file.weights:
                digest.update(repr((weight.source.name, weight.codec)).encode())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """The stable JSON keys that `plan` and `convert` share."""
        requantized = sum(weight.codec is not None for weight in self.weights)
        formats = Counter(
            format_name(w.codec) if w.codec else w.source.format for w in self.weights
        )
        return {
            "source": str(self.source.path),
            "format": self.recipe.format,
            "recipe": self.recipe.name,
            "files": len(self.files),
            "tensors": len(self.weights),
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
            "identical_tensors": len(self.weights) - requantized,
            "requantized_tensors": requantized,
            "formats": dict(sorted(formats.items())),
            "ignored_files": self.source.ignored_files,
            "unknown_tensors": sorted(
                w.source.name
                for w in self.weights
                if w.source.kind == "other" and not _is_eh_proj(w.source)
            ),
        }


def make_plan(source: Checkpoint, recipe: Recipe) -> Plan:
    """Plan a conversion. Raises FormatError, naming the tensor, for what cannot be written."""
    recipe.require_effect(source)
    targets = {name: recipe.target(weight) for name, weight in source.weights.items()}
    container = _container(recipe, source, targets)
    by_file: dict[str, list[PlannedWeight]] = {}
    refused: list[FormatError] = []
    for name, weight in source.weights.items():
        codec = _written_as(weight, targets[name], container, source.config)
        try:
            by_file.setdefault(weight.file, []).append(_plan_weight(weight, codec))
        except FormatError as error:
            refused.append(error)
    if refused:
        more = f"; so it is with {len(refused) - 1} more weights" if len(refused) > 1 else ""
        raise FormatError(f"{refused[0]}{more}")
    files = tuple(_plan_file(name, by_file[name]) for name in sorted(by_file))
    config = _config(source.config, container, recipe, [w for f in files for w in f.weights])
    return Plan(source, recipe, files, config, _index(files))


def _container(
    recipe: Recipe, source: Checkpoint, targets: Mapping[str, Codec | None]
) -> Codec | None:
    """The one quantized format of the output, which its config describes; None when plain."""
    found: dict[Codec, str] = {}
    for name, weight in source.weights.items():
        codec = targets[name]
        if codec is None and weight.kind in LINEAR_ROLES:
            codec = weight.codec
        if codec is not None and not isinstance(codec, Plain):
            found.setdefault(codec, name)
    if len(found) > 1:
        (first, a), (second, b) = list(found.items())[:2]
        raise FormatError(
            f"recipe {recipe.name}: {a} would be {format_name(first)} and {b} "
            f"{format_name(second)}; one checkpoint holds one quantized format: give their roles "
            "the same format, or one of them bf16"
        )
    return next(iter(found), None)


def _written_as(
    weight: StoredWeight,
    target: Codec | None,
    container: Codec | None,
    config: Mapping[str, Any],
) -> Codec | None:
    """The codec to write a weight with, or None to copy its bytes."""
    if weight.codec is None or target == weight.codec:
        return None
    if target is None and not isinstance(weight.codec, Plain) and weight.codec != container:
        # Never converted by role, but stored in a format the output's config cannot describe.
        return plain_codec(config)
    return target


def _plan_weight(weight: StoredWeight, codec: Codec | None) -> PlannedWeight:
    if codec is None:
        return PlannedWeight(weight, None, {p: t.spec for p, t in weight.parts.items()})
    rows, cols = weight.shape
    if not rows or not cols:
        raise FormatError(f"{weight.name}: is [{rows}, {cols}]; a format needs rows and columns")
    try:
        return PlannedWeight(weight, codec, codec.specs(rows, cols))
    except FormatError as error:
        raise FormatError(f"{weight.name}: {error}") from error


def _plan_file(name: str, weights: list[PlannedWeight]) -> PlannedFile:
    header, ranges = layout({w.stored_name(p): s for w in weights for p, s in w.specs.items()})
    nbytes = max((end for _, end in ranges.values()), default=len(header))
    return PlannedFile(name, header, nbytes, ranges, tuple(weights))


def _index(files: tuple[PlannedFile, ...]) -> dict[str, Any] | None:
    if [file.name for file in files] == [SINGLE_NAME]:
        return None
    total = sum(spec.nbytes for f in files for w in f.weights for spec in w.specs.values())
    places = {w.stored_name(p): f.name for f in files for w in f.weights for p in w.specs}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def _config(
    source: Mapping[str, Any],
    container: Codec | None,
    recipe: Recipe,
    weights: list[PlannedWeight],
) -> dict[str, Any]:
    """config.json of the output: the source's, with what changed."""
    if container is not None and all(weight.codec is None for weight in weights):
        return dict(source)  # with what it says of activations, such as scale_fmt
    config = {k: v for k, v in source.items() if k != "quantization_config"}
    nested = config.get("text_config")
    if isinstance(nested, dict):
        nested = {k: v for k, v in nested.items() if k != "quantization_config"}
        config["text_config"] = nested
    plain = {c for c in recipe.roles.values() if c is not None}
    codec = next(iter(plain), None)
    if container is None and len(plain) == 1 and isinstance(codec, Plain):
        for part in (config, nested if isinstance(nested, dict) else {}):
            part.update({k: _TORCH_NAMES[codec.dtype] for k in _DTYPE_KEYS if k in part})
    if container is not None:
        config["quantization_config"] = container.config(_kept_modules(weights))
    return config


def _kept_modules(weights: list[PlannedWeight]) -> list[str]:
    """Linear modules that the output holds in plain floats, in the checkpoint's own names."""
    kept = {
        TensorName.parse(w.source.name).module
        for w in weights
        if isinstance(w.written_codec, Plain) and w.source.kind not in ("embedding", "norm", "bias")
    }
    return sorted(kept | {"lm_head"}, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that counts layers as numbers."""
    return [(int(c), "") if is_index(c) else (-1, c) for c in name.split(".")]


def _is_eh_proj(weight: StoredWeight) -> bool:
    return TensorName.parse(weight.name).module.rpartition(".")[2] == "eh_proj"
