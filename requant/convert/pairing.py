"""Which stored tensors make up which weight, and what each weight is stored in.

A weight and its scale may lie in different files: parts are paired by name over all of a
checkpoint. What a kind of weights is stored in is found out once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from requant.convert.fused import StoredPart
from requant.convert.names import (
    layer_at,
    mtp_layers,
    role_of,
    split_numbers,
    split_part,
    weight_of,
    zeroed,
)
from requant.convert.weights import Kind, StoredWeight
from requant.errors import CheckpointError, FormatError
from requant.quant import ACTIVATION_PARTS, PART_NAMES, Codec, TensorSpec, detect_format
from requant.quant.codec import DTYPE_BITS
from requant.quant.compressed_tensors import Groups

if TYPE_CHECKING:
    from requant.convert.source import Checkpoint

#: A lone matrix of these dtypes is a table of something else, not a weight without its scale.
_NEVER_CODES = frozenset("BOOL I16 U16 U32 F64 I64 U64 C64".split())
#: Largest part whose bytes are looked at when a checkpoint is opened.
MAX_CONTENT_BYTES = 1 << 16

#: Parts of one weight, by what follows the module's name.
Parts = dict[str, StoredPart]


def pair_parts(
    checkpoint: Checkpoint, tensors: Mapping[str, StoredPart]
) -> dict[str, StoredWeight]:
    """Group stored tensors of this folder into weights and find what each is stored in."""
    modules: dict[str, Parts] = {}
    for name, tensor in tensors.items():
        module, part = split_part(name)
        weight = weight_of(module, part)
        parts = modules.get(weight)
        if parts is None:
            modules[weight] = {part: tensor}
            continue
        if part in parts:
            raise CheckpointError(
                f"{checkpoint.path}: {parts[part].name!r} and {name!r} are one name"
            )
        parts[part] = tensor
    kinds = _Kinds(checkpoint)
    weights = [kinds.weight(name, parts) for name, parts in modules.items()]
    return {weight.name: weight for weight in weights}


def told(checkpoint: Checkpoint, codec: Codec, parts: Mapping[str, StoredPart]) -> Codec:
    """A detected codec, completed by the content of the small parts that it asks for."""
    if not codec.needs_content:
        return codec
    content = {part: _content(checkpoint, parts[part]) for part in codec.needs_content}
    return codec.with_content(content)


class _Found(NamedTuple):
    """What is known of a kind of parts. `codec` is as detected; `kind` None where it wants to be
    told of content. `beside` tells whether there are activations."""

    codec: Codec | None
    kind: Kind | None
    beside: bool


class _Kinds:
    """The kinds of weights that were found so far in a checkpoint.

    All that tells what a weight is stored in makes up the key, which are its parts and the group of
    the config that targets it; and all that tells its role: its name but for the numbers, and
    whether it lies in an MTP layer.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._groups = Groups(checkpoint.quantization_config or {})
        self._mtp_layers = mtp_layers(checkpoint.config)
        self._layer_at: dict[tuple[str, ...], int | None] = {}
        self._found: dict[object, _Found] = {}
        self._nothing: Parts = {}

    def weight(self, name: str, parts: Parts) -> StoredWeight:
        """The weight of these parts. Raises FormatError where they are none."""
        around, numbers = split_numbers(name)
        if around not in self._layer_at:
            self._layer_at[around] = layer_at(around)
        at = self._layer_at[around]
        mtp = at is not None and int(numbers[at]) in self._mtp_layers
        group = self._group(name, parts) if self._groups.several else None
        key = around, mtp, group, tuple(parts), tuple([tensor.spec for tensor in parts.values()])
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self._find(name, parts, group)
        if found.codec is None:
            (part,) = parts.values()
            assert found.kind is not None
            return StoredWeight(part.name, found.kind, parts, self._nothing)
        encoded, activations = _apart(parts) if found.beside else (parts, self._nothing)
        kind = found.kind or self._kind(name, encoded, found.codec)
        return StoredWeight(name, kind, encoded, activations)

    def _group(self, name: str, parts: Parts) -> str | None:
        """The group of the config that targets a weight, if it is one."""
        if not _is_encoded(_apart(parts)[0]):
            return None
        try:
            return self._groups.target(name.removesuffix(".weight"))
        except FormatError as error:
            raise self._refused(name, error) from error

    def _find(self, name: str, parts: Parts, group: str | None) -> _Found:
        encoded, activations = _apart(parts)
        if not _is_encoded(encoded):
            first = next(iter(parts.values()))
            _require_plain(self._checkpoint, first, alone=len(parts) == 1)
            specs = {part: tensor.spec for part, tensor in parts.items()}
            return _Found(None, self._make(first.name, first.spec.shape, None, specs), False)
        specs = {part: tensor.spec for part, tensor in encoded.items()}
        try:
            codec = detect_format(specs, self._groups.only(group))
        except FormatError as error:
            raise self._refused(name, error) from error
        kind = None if codec.needs_content else self._kind(name, encoded, codec)
        return _Found(codec, kind, bool(activations))

    def _kind(self, name: str, parts: Parts, codec: Codec) -> Kind:
        """The kind of a weight in a format that was detected."""
        specs = {part: tensor.spec for part, tensor in parts.items()}
        try:
            codec = told(self._checkpoint, codec, parts)
            shape = codec.shape(specs)
        except FormatError as error:
            raise self._refused(name, error) from error
        return self._make(name, shape, codec, specs)

    def _make(
        self,
        name: str,
        shape: tuple[int, ...],
        codec: Codec | None,
        specs: Mapping[str, TensorSpec],
    ) -> Kind:
        role = role_of(name, shape, self._checkpoint.config)
        return Kind(zeroed(name), role, shape, codec, specs)

    def _refused(self, name: str, error: FormatError) -> FormatError:
        return FormatError(f"{self._checkpoint.path}: {name}: {error}")


def _apart(parts: Parts) -> tuple[Parts, Parts]:
    """The parts that hold a weight, and those that tell of activations."""
    encoded = {p: t for p, t in parts.items() if p not in ACTIVATION_PARTS}
    return encoded, {p: t for p, t in parts.items() if p in ACTIVATION_PARTS}


def _content(checkpoint: Checkpoint, part: StoredPart) -> bytes:
    """All bytes of a small part."""
    if part.spec.nbytes > MAX_CONTENT_BYTES:
        raise FormatError(
            f"{part.name} has {part.spec.nbytes} bytes, at most {MAX_CONTENT_BYTES} make sense"
        )
    return bytes(checkpoint.read_bytes(part, 0, part.spec.nbytes))


def _require_plain(checkpoint: Checkpoint, part: StoredPart, alone: bool) -> None:
    """Raise FormatError for a tensor that is a piece of a weight, where it should be none."""
    _, last = split_part(part.name)
    dtype, shape = part.spec.dtype, part.spec.shape
    if last in PART_NAMES and last not in ("weight", "scale") or not alone:
        raise FormatError(
            f"{checkpoint.path}: {part.name} lies alone, the rest of its weight is in no file of "
            "the checkpoint; download the missing file"
        )
    if (
        DTYPE_BITS[dtype] <= 8
        and dtype.startswith("F")
        or (checkpoint.quantization_config is not None and dtype in ("U8", "I8") and len(shape) > 1)
    ):
        raise FormatError(
            f"{checkpoint.path}: {part.name} is {dtype} {list(shape)}: quantized, but in no "
            "format that `requant formats` reads; copying it would lose its meaning"
        )


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
