"""A checkpoint on disk, opened from its config, index and headers alone.

Opening reads no weight data. A weight and its scale may lie in different files: parts are paired by
name over the whole checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from requant.convert.folder import (
    CONFIG_NAME,
    INDEX_NAME,
    MODELOPT_NAME,
    FileFacts,
    Folder,
    folder_at,
    indexed_files,
    last_name,
    read_json,
)
from requant.convert.fused import StoredPart, split_experts
from requant.convert.journal import Digest
from requant.convert.names import Role, TensorName, fused_set, kind_of, role_of, setting
from requant.convert.readahead import windows_of
from requant.errors import CheckpointError, FormatError
from requant.quant import (
    ACTIVATION_PARTS,
    PART_NAMES,
    PLAIN_NAMES,
    Codec,
    TensorSpec,
    detect_format,
    format_name,
)
from requant.quant.codec import DTYPE_BITS
from requant.quant.compressed_tensors import narrow

#: A lone matrix of these dtypes is a table of something else, not a weight without its scale.
_NEVER_CODES = frozenset("BOOL I16 U16 U32 F64 I64 U64 C64".split())
#: Largest part whose bytes are looked at when a checkpoint is opened.
MAX_CONTENT_BYTES = 1 << 16

#: Names of the config's groups that apply, and the parts' specs -> the codec that reads them.
_Detected = dict[tuple[tuple[str, ...], tuple[tuple[str, TensorSpec], ...]], Codec]


@dataclass(frozen=True)
class StoredWeight:
    """One weight: `codec` reads its parts; None for a tensor that is no matrix (copied as it is).

    `parts` maps what follows the module's name (`weight`, `weight_scale_inv`, ...) to the tensor;
    `activations` those that tell how the layer's input is quantized.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    codec: Codec | None
    parts: Mapping[str, StoredPart]
    activations: Mapping[str, StoredPart] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> dict[str, StoredPart]:
        """All that is stored of it, by part."""
        return {**self.parts, **self.activations}

    @property
    def nbytes(self) -> int:
        """Stored bytes of all parts."""
        return sum(part.spec.nbytes for part in self.tensors.values())

    @cached_property
    def codes(self) -> StoredPart:
        """The part that holds the codes, the largest; scales may lie elsewhere."""
        return max(self.parts.values(), key=lambda part: part.spec.nbytes)

    @property
    def file(self) -> str:
        """The file that holds the codes, or the first piece of them."""
        return self.codes.location.file

    @cached_property
    def module(self) -> str:
        """The layer's name: all before the part."""
        return TensorName.parse(self.name).module

    @cached_property
    def fused_set(self) -> str | None:
        """What identifies the layers that engines fuse with this one; None when it stands alone."""
        return fused_set(self.name)

    @cached_property
    def kind(self) -> Role:
        """What it is for by its own name; differs from `role` in an MTP layer only."""
        return kind_of(self.name, self.shape)

    @property
    def row_alignment(self) -> int:
        """Tiles that are decoded start on a multiple of this many rows."""
        return self.codec.row_alignment(self.shape[1]) if self.codec else 1

    @property
    def format(self) -> str:
        """The format's name with its options, or the dtype of a tensor that no codec reads."""
        if self.codec is not None:
            return format_name(self.codec)
        dtype = next(iter(self.parts.values())).spec.dtype
        return PLAIN_NAMES.get(dtype, dtype)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with `config.json`, `*.safetensors` and, for several files, an index.

    `facts`: what each of `files` was when it was opened.
    """

    folder: Folder
    config: dict[str, Any]
    files: tuple[str, ...]
    facts: Mapping[str, FileFacts]
    weights: Mapping[str, StoredWeight]

    @classmethod
    def open(cls, where: Path | Folder) -> Checkpoint:
        """Open a folder, also one that was cut into ranks, as the whole checkpoint.

        Raises CheckpointError or FormatError naming file, tensor and numbers.
        """
        from requant.convert.rank_folders import open_ranks, read_layout  # it builds on this module

        folder = folder_at(where)
        path = folder.path
        try:
            folder.require()
            config = read_json(path / CONFIG_NAME, "not a checkpoint folder")
            layout = read_layout(folder)
            if layout is not None:
                return open_ranks(folder, layout)
            files, index = indexed_files(folder)
        except OSError as error:  # a name too long, a folder without permission
            raise CheckpointError(f"{path}: cannot open it: {error}") from error
        facts = {file: folder.facts(file) for file in files}
        tensors: dict[str, StoredPart] = {}
        for file, found in folder.tensors(files):
            for name, part in found.items():
                if name in tensors:
                    raise CheckpointError(
                        f"{path}: {name} is in both {tensors[name].location.file} and {file}; "
                        "remove the stale file"
                    )
                tensors[name] = part
        for name, file in (index or {}).items():
            if name not in tensors or tensors[name].location.file != file:
                shown = [text if text.isprintable() else ascii(text) for text in (name, str(file))]
                raise CheckpointError(
                    f"{path / INDEX_NAME}: places {shown[0]} in {shown[1]}, which does not hold "
                    "it; download both again"
                )
        if not tensors:
            raise CheckpointError(f"{path}: holds no tensor in {len(files)} files")
        checkpoint = cls(folder, config, files, facts, {})
        return replace(checkpoint, weights=checkpoint.pair_parts(split_experts(tensors, config)))

    @property
    def path(self) -> Path:
        """Where the files lie; of a Hub repository, all but the weights."""
        return self.folder.path

    @cached_property
    def quantization_config(self) -> dict[str, Any] | None:
        """What config.json, or ModelOpt's hf_quant_config.json, says of the weights' formats; None
        for a plain checkpoint. Multimodal checkpoints may keep it with the language model's."""
        found = setting(self.config, "quantization_config")
        if isinstance(found, dict):
            return found
        if (self.path / MODELOPT_NAME).is_file():
            found = read_json(self.path / MODELOPT_NAME, "").get("quantization")
            if isinstance(found, dict):
                return {"quant_method": "modelopt", **found}
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as an index's total_size counts them."""
        return sum(weight.nbytes for weight in self.weights.values())

    @property
    def ignored_files(self) -> list[str]:
        """Files of the folder that could hold weights but are not in the index."""
        return sorted(set(self.folder.weight_files()) - set(self.files))

    @cached_property
    def files_by_name(self) -> Mapping[str, tuple[str, ...]]:
        """`files` by the last component: of ranks, each has one of the same name."""
        found: dict[str, tuple[str, ...]] = {}
        for file in self.files:
            name = last_name(file)
            found[name] = (*found.get(name, ()), file)
        return found

    def read_rows(self, part: StoredPart, start: int, stop: int) -> torch.Tensor:
        """Rows start:stop of a stored tensor (all of a scalar), in its own dtype, on the CPU."""
        shape = part.spec.shape
        return self.folder.reader.read(part, (stop - start, *shape[1:]) if shape else (), start, 0)

    def read_part(self, part: StoredPart, spec: TensorSpec, start: int, stop: int) -> torch.Tensor:
        """What a tile of rows start:stop of the weight has of a part; `spec` is its codec's."""
        # As long as it is stored: bitsandbytes' JSON is shorter than the longest, which we write.
        first, last = replace(spec, shape=part.spec.shape).row_range(start, stop)
        if spec.axis == 0:
            return self.read_rows(part, first, last)
        return self.folder.reader.read(part, (part.spec.shape[0], last - first), 0, first)

    def read_bytes(self, part: StoredPart, begin: int, end: int) -> torch.Tensor:
        """Bytes begin:end of a stored tensor that is no view, as uint8."""
        return self.folder.reader.read_part(part, begin, end)

    @contextlib.contextmanager
    def reading(
        self, files: Sequence[str], windows: int
    ) -> Iterator[Callable[[], dict[str, Digest]]]:
        """While inside, these files are read ahead from front to back, `windows` of them held in
        memory. Gives a function that reads the rest; the digest of each file.

        It raises CheckpointError when a file is not the one that was opened.
        """
        with contextlib.ExitStack() as stack:
            share = windows_of(len(files), windows)
            aheads = {
                file: stack.enter_context(
                    self.folder.reader.reading(file, self.facts[file].nbytes, *share)
                )
                for file in files
            }

            def finish() -> dict[str, Digest]:
                read = {file: ahead.finish() for file, ahead in aheads.items()}
                for file in files:
                    self.folder.require_unchanged(file, self.facts[file], read[file])
                return read

            yield finish

    def read_tile(self, weight: StoredWeight, start: int, stop: int) -> dict[str, torch.Tensor]:
        """The stored parts of rows start:stop of a matrix."""
        assert weight.codec is not None
        specs = weight.codec.specs(*weight.shape)
        return {
            part: self.read_part(weight.parts[part], spec, start, stop)
            for part, spec in specs.items()
        }

    def decode_rows(
        self, weight: StoredWeight, start: int, stop: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Rows start:stop decoded into float32 on `device`: [stop - start, cols] of a matrix, the
        stored shape of a tensor that no codec reads."""
        if weight.codec is None:
            (part,) = weight.parts.values()
            return self.read_rows(part, start, stop).to(device).to(torch.float32)
        return self._of_tile(weight, weight.codec.decode, start, stop, device)

    def amax_rows(
        self, weight: StoredWeight, start: int, stop: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """The largest magnitude that `decode_rows` gives, float32 [1]."""
        assert weight.codec is not None
        return self._of_tile(weight, weight.codec.amax, start, stop, device)

    def _of_tile(
        self,
        weight: StoredWeight,
        work: Callable[[Mapping[str, torch.Tensor], tuple[int, int]], torch.Tensor],
        start: int,
        stop: int,
        device: torch.device | str,
    ) -> torch.Tensor:
        """What a codec's method makes of the parts of some rows; a refusal names the weight."""
        parts = {p: t.to(device) for p, t in self.read_tile(weight, start, stop).items()}
        try:
            return work(parts, (stop - start, weight.shape[1]))
        except FormatError as error:
            raise FormatError(f"{weight.name}: {error}") from error

    def decode(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """A whole weight in float32, its true shape, whatever it is stored in."""
        weight = self.weights.get(name)
        if weight is None:
            raise CheckpointError(f"{self.path}: has no tensor {name}")
        return self.decode_rows(weight, 0, weight.shape[0] if weight.shape else 1, device)

    def pair_parts(self, tensors: Mapping[str, StoredPart]) -> dict[str, StoredWeight]:
        """Group stored tensors of this folder into weights and find what each is stored in."""
        modules: dict[str, dict[str, StoredPart]] = {}
        for name, tensor in tensors.items():
            parsed = TensorName.parse(name)
            parts = modules.setdefault(parsed.weight, {})
            if parsed.part in parts:
                raise CheckpointError(
                    f"{self.path}: {parts[parsed.part].name!r} and {name!r} are one name"
                )
            parts[parsed.part] = tensor
        weights: dict[str, StoredWeight] = {}
        detected: _Detected = {}
        for name, parts in modules.items():
            for weight in self._stored_weights(name, parts, detected):
                weights[weight.name] = weight
        return weights

    def _stored_weights(
        self, name: str, parts: dict[str, StoredPart], detected: _Detected
    ) -> Iterator[StoredWeight]:
        """The weight of these parts; several where parts turn out to be tensors of their own.

        `detected` remembers the formats found so far: ten thousands of experts are alike.
        """
        activations = {p: t for p, t in parts.items() if p in ACTIVATION_PARTS}
        encoded = {p: t for p, t in parts.items() if p not in ACTIVATION_PARTS}
        if not _is_encoded(encoded):
            for part in parts.values():
                yield self._plain_tensor(part, alone=len(parts) == 1)
            return
        module = name.removesuffix(".weight")
        try:
            config = narrow(self.quantization_config or {}, module)
            specs = {p: t.spec for p, t in encoded.items()}
            groups = config.get("config_groups")
            key = tuple(groups) if isinstance(groups, dict) else (), tuple(specs.items())
            if key not in detected:
                detected[key] = detect_format(specs, config)
            codec = self.told(detected[key], encoded)
            shape = codec.shape(specs)
        except FormatError as error:
            raise FormatError(f"{self.path}: {name}: {error}") from error
        role = role_of(name, shape, self.config)
        yield StoredWeight(name, role, shape, codec, encoded, activations)

    def told(self, codec: Codec, parts: Mapping[str, StoredPart]) -> Codec:
        """A detected codec, completed by the content of the small parts that it asks for."""
        if not codec.needs_content:
            return codec
        return codec.with_content(
            {part: self._content(parts[part]) for part in codec.needs_content}
        )

    def _content(self, part: StoredPart) -> bytes:
        """All bytes of a small part."""
        if part.spec.nbytes > MAX_CONTENT_BYTES:
            raise FormatError(
                f"{part.name} has {part.spec.nbytes} bytes, at most {MAX_CONTENT_BYTES} make sense"
            )
        return bytes(self.read_bytes(part, 0, part.spec.nbytes))

    def _plain_tensor(self, part: StoredPart, alone: bool) -> StoredWeight:
        """A tensor that is no matrix. Raises FormatError for what is a piece of a weight."""
        last = TensorName.parse(part.name).part
        dtype, shape = part.spec.dtype, part.spec.shape
        if last in PART_NAMES and last not in ("weight", "scale") or not alone:
            raise FormatError(
                f"{self.path}: {part.name} lies alone, the rest of its weight is in no file of "
                "the checkpoint; download the missing file"
            )
        if (
            DTYPE_BITS[dtype] <= 8
            and dtype.startswith("F")
            or (self.quantization_config is not None and dtype in ("U8", "I8") and len(shape) > 1)
        ):
            raise FormatError(
                f"{self.path}: {part.name} is {dtype} {list(shape)}: quantized, but in no "
                "format that `requant formats` reads; copying it would lose its meaning"
            )
        role = role_of(part.name, shape, self.config)
        return StoredWeight(part.name, role, shape, None, {last: part})


def _is_encoded(parts: Mapping[str, StoredPart]) -> bool:
    """Whether parts make up a matrix that a format may read: several, or one that is 2-D."""
    if len(parts) != 1:
        return bool(parts)
    (part,) = parts
    spec = parts[part].spec
    return (
        part == "weight"
        and len(spec.shape) == 2
        and spec.dtype not in _NEVER_CODES
        and (0 not in spec.shape)
    )


def iter_tiles(rows: int, cols: int, alignment: int, elements: int) -> Iterator[tuple[int, int]]:
    """Row ranges of about `elements` elements whose starts are multiples of `alignment`."""
    step = max(alignment, elements // max(cols, 1) // alignment * alignment)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
