"""A checkpoint on disk, opened from its config, index and headers alone.

Opening reads no weight data. A weight and its scale may lie in different files: parts are paired by
name over the whole checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

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
from requant.convert.names import setting
from requant.convert.pairing import pair_parts
from requant.convert.readahead import windows_of
from requant.convert.weights import Kind, StoredWeight
from requant.errors import CheckpointError, FormatError
from requant.quant import TensorSpec
from requant.quant.grid import Tile

T = TypeVar("T")


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
        return replace(checkpoint, weights=pair_parts(checkpoint, split_experts(tensors, config)))

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

    @cached_property
    def kinds(self) -> Mapping[Kind, list[StoredWeight]]:
        """The weights of each kind, in source order."""
        kinds: dict[Kind, list[StoredWeight]] = {}
        for weight in self.weights.values():
            kinds.setdefault(weight.alike, []).append(weight)
        return kinds

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

    def tile_rows(
        self, weight: StoredWeight, start: int, stop: int, device: torch.device | str = "cpu"
    ) -> Tile:
        """Rows start:stop of a matrix on `device`, decoded or not, as encoders take them."""
        assert weight.codec is not None
        return self._of_tile(weight, weight.codec.tile, start, stop, device)

    def _of_tile(
        self,
        weight: StoredWeight,
        work: Callable[[Mapping[str, torch.Tensor], tuple[int, int]], T],
        start: int,
        stop: int,
        device: torch.device | str,
    ) -> T:
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


def iter_tiles(rows: int, cols: int, alignment: int, elements: int) -> Iterator[tuple[int, int]]:
    """Row ranges of about `elements` elements whose starts are multiples of `alignment`."""
    step = max(alignment, elements // max(cols, 1) // alignment * alignment)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
