"""A stored weight, and the kind it is of.

Ten thousands of weights are of some thirty kinds, alike but for the numbers in their names: what
can be said of a kind is worked out once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from requant.convert.fused import StoredPart
from requant.convert.names import LINEAR_ROLES, Role, fused_set, kind_of, split_part
from requant.quant import PLAIN_NAMES, Codec, TensorSpec, format_name

#: Times as wide, any weight has more bytes of codes than of scales.
_WIDER = 1024


def codes_part(codec: Codec, shape: tuple[int, int]) -> str:
    """The part of a weight that holds its codes: the largest of a wide one, of those that have rows
    of it."""
    wide = codec.specs(shape[0], shape[1] * _WIDER)
    return max(wide, key=lambda part: wide[part].nbytes if wide[part].rows else 0)


@dataclass(frozen=True, eq=False)
class Kind:
    """What weights share whose names differ in numbers only, and that are stored alike.

    `name` is that of one of them with 0 for all numbers between its dots: what a name says, but for
    the numbers, it says of every one. `specs` are those of the parts that `codec` reads; what they
    have beside these is alike, too.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    codec: Codec | None
    specs: Mapping[str, TensorSpec]

    @cached_property
    def purpose(self) -> Role:
        """See `StoredWeight.kind`."""
        return kind_of(self.name, self.shape)

    @property
    def linear(self) -> bool:
        """Whether they are weights of linear layers that formats are made for."""
        return self.purpose in LINEAR_ROLES

    @cached_property
    def module(self) -> str:
        """The layer's name, with 0 for all numbers."""
        return split_part(self.name)[0]

    @cached_property
    def tail(self) -> int:
        """How many characters follow the layer's name."""
        return len(self.name) - len(self.module)

    @property
    def leaf(self) -> str:
        """The last component of the layer's name."""
        return self.module.rpartition(".")[2]

    @cached_property
    def fused_set(self) -> str | None:
        """See `StoredWeight.fused_set`; with 0 for all numbers."""
        return fused_set(self.name)

    @cached_property
    def codes(self) -> str:
        """The part that holds the codes."""
        if self.codec is None:
            return next(iter(self.specs))
        return codes_part(self.codec, (self.shape[0], self.shape[1]))

    @cached_property
    def format(self) -> str:
        """See `StoredWeight.format`."""
        if self.codec is not None:
            return format_name(self.codec)
        dtype = next(iter(self.specs.values())).dtype
        return PLAIN_NAMES.get(dtype, dtype)

    @cached_property
    def row_alignment(self) -> int:
        """See `StoredWeight.row_alignment`."""
        return self.codec.row_alignment(self.shape[1]) if self.codec else 1


@dataclass(frozen=True)
class StoredWeight:
    """One weight. `parts` maps what follows the module's name (`weight`, `weight_scale_inv`, ...)
    to the tensor; `activations` those that tell how the layer's input is quantized.
    """

    name: str
    alike: Kind
    parts: Mapping[str, StoredPart]
    activations: Mapping[str, StoredPart] = field(default_factory=dict)

    @property
    def role(self) -> Role:
        """What it is for; `mtp` for all in an MTP layer."""
        return self.alike.role

    @property
    def kind(self) -> Role:
        """What it is for by its own name; differs from `role` in an MTP layer only."""
        return self.alike.purpose

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns of a matrix; what is stored of any other tensor."""
        return self.alike.shape

    @property
    def codec(self) -> Codec | None:
        """What reads its parts; None for a tensor that is no matrix (copied as it is)."""
        return self.alike.codec

    @property
    def tensors(self) -> dict[str, StoredPart]:
        """All that is stored of it, by part."""
        return {**self.parts, **self.activations}

    @property
    def nbytes(self) -> int:
        """Stored bytes of all parts."""
        return sum([part.spec.nbytes for part in self.tensors.values()])

    @property
    def codes(self) -> StoredPart:
        """The part that holds the codes; scales may lie elsewhere."""
        return self.parts[self.alike.codes]

    @property
    def file(self) -> str:
        """The file that holds the codes, or the first piece of them."""
        return self.codes.location.file

    @property
    def module(self) -> str:
        """The layer's name: all before the part."""
        return self.name[: -self.alike.tail]

    @property
    def fused_set(self) -> str | None:
        """What identifies the layers that engines fuse with this one; None when it stands alone."""
        return fused_set(self.name) if self.alike.fused_set else None

    @property
    def row_alignment(self) -> int:
        """Tiles that are decoded start on a multiple of this many rows."""
        return self.alike.row_alignment

    @property
    def format(self) -> str:
        """The format's name with its options, or the dtype of a tensor that no codec reads."""
        return self.alike.format

    def stored_as(
        self,
        codec: Codec | None,
        shape: tuple[int, ...],
        parts: Mapping[str, StoredPart],
        activations: Mapping[str, StoredPart],
    ) -> StoredWeight:
        """The same weight, stored in other parts."""
        specs = {part: tensor.spec for part, tensor in parts.items()}
        alike = replace(self.alike, codec=codec, shape=shape, specs=specs)
        return StoredWeight(self.name, alike, parts, activations)
