"""The safetensors container: parse and check a header, lay out a new one.

Source: huggingface/safetensors 0.8.0, README.md and safetensors/src/tensor.rs. A file is a
little-endian u64 header length, that many bytes of JSON padded with spaces so that the data starts
8-aligned, then the data: tensors back to back, no holes, no overlap. `layout` orders tensors as the
reference writer does (widest dtype first, then by name), so its bytes equal `save_file`'s.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from requant.errors import CheckpointError
from requant.quant.codec import DTYPE_BITS, TensorSpec

#: The reference reader refuses longer headers.
MAX_HEADER_BYTES = 100_000_000

#: The reference writer's order of dtypes, widest last; tensors are stored in the reverse of it.
_DTYPE_ORDER = (
    "BOOL F4 F6_E2M3 F6_E3M2 U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ "
    "I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64 U64"
).split()


@dataclass(frozen=True)
class Location:
    """Where a stored tensor's bytes lie: a file and an absolute byte range in it."""

    file: str
    begin: int
    end: int


def read_header(path: Path) -> dict[str, tuple[TensorSpec, Location]]:
    """Every tensor of a safetensors file with its absolute byte range, checked against the file.

    Raises CheckpointError for a file that is truncated, too long, or contradicts itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: header of {length} bytes in a file of {size} bytes; "
                    "not a safetensors file, or truncated: download it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; cannot read it") from error
    try:
        entries = json.loads(raw, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: header is not a JSON object")
    entries.pop("__metadata__", None)
    tensors = {
        name: _parse_entry(f"{path}: {name}", entry, path.name, 8 + length)
        for name, entry in entries.items()
    }
    expected = 8 + length
    for name, (_, where) in sorted(tensors.items(), key=lambda item: item[1][1].begin):
        if where.begin != expected and where.begin != where.end:
            raise CheckpointError(
                f"{path}: {name} starts at byte {where.begin}, expected {expected}; "
                "tensors overlap or leave a hole"
            )
        expected = max(expected, where.end)
    if expected != size:
        raise CheckpointError(
            f"{path}: the header describes {expected} bytes, the file has {size}; "
            f"{'truncated: download it again' if size < expected else 'it has bytes to spare'}"
        )
    return tensors


def layout(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The first bytes of a file that will hold `specs`, and each tensor's absolute byte range."""
    order = sorted(specs, key=lambda name: (-_DTYPE_ORDER.index(specs[name].dtype), name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ranges: dict[str, tuple[int, int]] = {}
    offset = 0
    for name in order:
        spec = specs[name]
        ranges[name] = (offset, offset + spec.nbytes)
        entries[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": list(ranges[name]),
        }
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    prefix = len(text).to_bytes(8, "little") + text
    return prefix, {name: (start + b, start + e) for name, (b, e) in ranges.items()}


def _parse_entry(where: str, entry: object, file: str, start: int) -> tuple[TensorSpec, Location]:
    """Check one header entry; `start` is the absolute offset of the data."""
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: header entry is not an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{where}: shape {shape!r} and data_offsets {offsets!r} are not sizes"
        )
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    begin, end = offsets
    if bits != 8 * (end - begin):
        raise CheckpointError(
            f"{where}: {dtype} {shape} takes {bits // 8} bytes, data_offsets hold {end - begin}"
        )
    return TensorSpec(dtype, tuple(shape)), Location(file, start + begin, start + end)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in value
    )


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build an object, refusing a name that is given twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name is given twice")
    return result


def read_exactly(descriptor: int, begin: int, end: int, target: memoryview, path: Path) -> None:
    """Fill `target` with bytes begin:end. Raises CheckpointError when the file ends early."""
    done = 0
    while begin + done < end:
        try:
            count = os.preadv(descriptor, [target[done:]], begin + done)
        except OSError as error:
            raise CheckpointError(
                f"{path}: {error.strerror} at byte {begin + done}; check the disk"
            ) from error
        if count == 0:
            raise CheckpointError(
                f"{path}: ends at byte {begin + done}, expected {end}; it changed while being read"
            )
        done += count
