"""The safetensors container: parse and check a header, lay out a new one.

Source: huggingface/safetensors 0.8.0, README.md and safetensors/src/tensor.rs. A file is a
little-endian u64 header length, that many bytes of JSON padded with spaces so that the data starts
8-aligned, then the data: tensors back to back, no holes, no overlap, in any order.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from requant.errors import CheckpointError
from requant.quant.codec import DTYPE_BITS, TensorSpec

#: The reference reader refuses longer headers.
MAX_HEADER_BYTES = 100_000_000

#: Where the data of a written file starts is a multiple of this.
DATA_ALIGNMENT = 4096

#: An entry as all serializers write it, and what it says: name, dtype, shape, data_offsets. Without
#: escapes, and with numbers of at most 18 digits, below 2**63.
_ENTRY = re.compile(
    r'"([^"\\\x00-\x1f]*)":\{"dtype":"([A-Z0-9_]*)","shape":\[([0-9,]{0,200})\],'
    r'"data_offsets":\[(0|[1-9][0-9]{0,17}),(0|[1-9][0-9]{0,17})\]\}'
)
_SHAPE = re.compile(r"(?:(?:0|[1-9][0-9]{0,17})(?:,(?:0|[1-9][0-9]{0,17}))*)?")
#: A name without these is a JSON string between quotes; any other is encoded.
_ESCAPED = re.compile(r'["\\\x00-\x1f]')
_quoted = json.JSONEncoder(ensure_ascii=False).encode


class Location(NamedTuple):
    """Where a stored tensor's bytes lie: a file and an absolute byte range in it."""

    file: str
    begin: int
    end: int


#: What a header says of tensors: dtype and shape, and where each lies.
Tensors = dict[str, tuple[TensorSpec, Location]]


def read_header(path: Path, file: str = "") -> Tensors:
    """Every tensor of a safetensors file with its absolute byte range, checked against the file.
    Its locations name `file`, or the last component of its path.

    Raises CheckpointError for a file that is truncated, too long, or contradicts itself.
    """
    header, size = raw_header(path)
    return parse_header(header, size, path, file)


def raw_header(path: Path) -> tuple[bytes, int]:
    """The first bytes of a safetensors file, up to its data, and the size of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            return prefix + file.read(header_length(prefix, size, str(path))), size
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; cannot read it") from error


def header_length(prefix: bytes, size: int, where: str) -> int:
    """Bytes of the JSON that follows the first 8 bytes (`prefix`, or more) of a file of `size`
    bytes. Raises CheckpointError for a length that cannot be."""
    length = int.from_bytes(prefix[:8], "little")
    if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{where}: header of {length} bytes in a file of {size} bytes; "
            "not a safetensors file, or truncated: download it again"
        )
    return length


def parse_header(header: bytes, size: int | None, path: Path, file: str = "") -> Tensors:
    """What `read_header` gives, from the first bytes of a file of `size` bytes; None: as many as
    the header says. Raises CheckpointError for a header that contradicts itself."""
    text, start = header[8:], len(header)
    tensors = _parse_usual(text, file or path.name, start)
    if tensors is None:
        tensors = _parse_any(text, path, file or path.name, start)
    expected = start
    for name, (_, where) in _in_order(tensors):
        if where.begin != expected:
            raise CheckpointError(
                f"{path}: {name} starts at byte {where.begin}, expected {expected}; "
                "tensors overlap or leave a hole"
            )
        expected = where.end
    if size is not None and expected != size:
        raise CheckpointError(
            f"{path}: the header describes {expected} bytes, the file has {size}; "
            f"{'truncated: download it again' if size < expected else 'it has bytes to spare'}"
        )
    return tensors


def _in_order(tensors: Tensors) -> list[tuple[str, tuple[TensorSpec, Location]]]:
    """The tensors as they lie in the file."""
    return sorted(tensors.items(), key=lambda item: item[1][1][1:])


def _parse_usual(raw: bytes, file: str, start: int) -> Tensors | None:
    """The tensors of a header that is written as all serializers do, and has no fault but in how
    its tensors lie; None for any other. One pass: a header may have a hundred thousand entries."""
    try:
        pieces = _ENTRY.split(raw.decode().rstrip(" "))
    except UnicodeDecodeError:
        return None
    if len(pieces) == 1:
        return None
    # The text is an object of these entries, five pieces each, if what is between them fits.
    opening, *commas, closing = pieces[::6]
    names = pieces[1::6]
    tensors: Tensors = {}
    for name, dtype, shape, first, last in zip(
        names, pieces[2::6], pieces[3::6], pieces[4::6], pieces[5::6], strict=True
    ):
        spec = _usual_spec(dtype, shape)
        begin, end = int(first), int(last)
        if spec is None or end - begin != spec.nbytes:
            return None
        tensors[name] = spec, Location(file, start + begin, start + end)
    joined = closing == "}" and commas.count(",") == len(commas)
    plain = "".join(names).isprintable() and "__metadata__" not in tensors
    if not joined or not plain or len(tensors) < len(names) or not _opens(opening):
        return None
    return tensors


@lru_cache(maxsize=4096)
def _usual_spec(dtype: str, shape: str) -> TensorSpec | None:
    """The spec of a dtype and the text of a shape; one object for all that are alike."""
    if dtype not in DTYPE_BITS or not _SHAPE.fullmatch(shape):
        return None
    sides = tuple(map(int, shape.split(","))) if shape else ()
    bits = math.prod(sides) * DTYPE_BITS[dtype]
    return None if bits % 8 else TensorSpec(dtype, sides)


def _opens(text: str) -> bool:
    """Whether a header's text before the first tensor is its brace, or `__metadata__` alone."""
    if text == "{" or not text.endswith(","):
        return text == "{"
    try:
        value = _loads(text[:-1] + "}")
    except (ValueError, RecursionError):
        return False
    return list(value) == ["__metadata__"] and _are_texts(value["__metadata__"])


def _parse_any(raw: bytes, path: Path, file: str, start: int) -> Tensors:
    """The tensors of any header. Raises CheckpointError saying what is wrong with it."""
    try:
        entries = _loads(raw.decode())  # json.loads would also take UTF-16 and a byte order mark
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: header is not a JSON object")
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not _are_texts(metadata):
        raise CheckpointError(f"{path}: __metadata__ does not map names to strings")
    for name in entries:
        if not name.isprintable():
            raise CheckpointError(f"{path}: {name!a}: unprintable characters in a tensor's name")
    return {
        name: _parse_entry(f"{path}: {name}", entry, file, start) for name, entry in entries.items()
    }


def layout(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The first bytes of a file that will hold `specs`, and each tensor's absolute byte range.

    Tensors lie in the order given, so that a file can be written from front to back, but for those
    whose size is no multiple of 8: they come last, the widest dtype first. So every tensor starts
    on a multiple of its element's size, which readers that view bytes as numbers need. The data
    starts on a multiple of 4096, as direct input and output wants.
    """
    # By identity: tensors that are alike share one spec.
    known = {id(spec): _written(spec) for spec in {id(s): s for s in specs.values()}.values()}
    order = sorted(specs, key=lambda name: known[id(specs[name])][0])
    quoted = _quoted if _ESCAPED.search("".join(order)) else '"{}"'.format
    entries = ['{"__metadata__":{"format":"pt"}']
    ends = [0]
    for name in order:
        _, nbytes, described = known[id(specs[name])]
        end = ends[-1] + nbytes
        entries.append(f'{quoted(name)}:{{{described},"data_offsets":[{ends[-1]},{end}]}}')
        ends.append(end)
    text = (",".join(entries) + "}").encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    start = 8 + len(text)
    ends = [start + end for end in ends]
    return len(text).to_bytes(8, "little") + text, dict(zip(order, pairwise(ends), strict=True))


def _written(spec: TensorSpec) -> tuple[int, int, str]:
    """Where a tensor lies in a file (0: among those of a multiple of 8 bytes; else the higher the
    narrower its elements), its size in bytes, and how its entry begins."""
    rank = 0 if spec.nbytes % 8 == 0 else 8 - DTYPE_BITS[spec.dtype] // 8
    sides = ",".join(map(str, spec.shape))
    return rank, spec.nbytes, f'"dtype":"{spec.dtype}","shape":[{sides}]'


def _parse_entry(where: str, entry: object, file: str, start: int) -> tuple[TensorSpec, Location]:
    """Check one header entry; `start` is the absolute offset of the data."""
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: header entry is not an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where}: unknown dtype {reprlib.repr(dtype)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{where}: shape {reprlib.repr(shape)} and data_offsets {reprlib.repr(offsets)} "
            "are not sizes"
        )
    begin, end = offsets
    bits = DTYPE_BITS[dtype]
    for side in shape:
        bits *= side
        if bits >= 2**66:  # beyond any offset; a long product of a hostile shape takes minutes
            break
    if bits != 8 * (end - begin):
        takes = bits / 8 if bits % 8 else bits // 8
        raise CheckpointError(
            f"{where}: {dtype} {reprlib.repr(shape)} takes {takes} bytes, "
            f"data_offsets hold {end - begin}"
        )
    return TensorSpec(dtype, tuple(shape)), Location(file, start + begin, start + end)


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)


def _are_texts(metadata: object) -> bool:
    return isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in value
    )


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build an object, refusing a name that is given twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!a} is given twice")
    return result


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


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
                f"{path}: has {os.fstat(descriptor).st_size} bytes, {end} are needed; "
                "it changed while being read"
            )
        done += count
