"""The form that each weight is written in: its parts, and what becomes of its values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from requant.convert.containers import Choice
from requant.convert.lossless import keeps_values, kept_by_formats
from requant.convert.source import Checkpoint
from requant.convert.weights import StoredWeight
from requant.errors import FormatError
from requant.quant import Codec, TensorSpec
from requant.quant.compressed_tensors import QUANT_METHOD


@dataclass(frozen=True, eq=False)
class Form:
    """How weights that are alike are written: their parts, and what becomes of their values.

    `codec` None means: copy the stored bytes. `lossless`: converted without a change of value;
    `repack`: by handing over its codes. `reason` says why codes that the target could take are
    requantized all the same.
    """

    codec: Codec | None
    specs: Mapping[str, TensorSpec]
    lossless: bool = False
    repack: bool = False
    reason: str | None = None

    @cached_property
    def streamed(self) -> str | None:
        """The part that can be written as its tiles come: the first, unless it is cut along its
        columns or of an odd size; what is copied is written part by part."""
        part, spec = next(iter(self.specs.items()))
        in_order = spec.axis == 0 and spec.rows != 0 and spec.nbytes % 8 == 0
        return part if in_order else None

    @cached_property
    def identity(self) -> str:
        """What tells it from others."""
        return f"{self.codec!r}, {self.repack!r}"


@dataclass(frozen=True)
class PlannedWeight:
    """One weight: where its parts go. `companions` are the weights that share the summary of a
    two-pass format with this one, itself included."""

    source: StoredWeight
    form: Form
    companions: tuple[StoredWeight, ...] = ()

    @property
    def codec(self) -> Codec | None:
        """What it is encoded with; None where its bytes are copied."""
        return self.form.codec

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Its parts in the output."""
        return self.form.specs

    @property
    def lossless(self) -> bool:
        """Whether it is converted, and no value changes."""
        return self.form.lossless

    @property
    def repack(self) -> bool:
        """Whether its codes are handed over."""
        return self.form.repack

    @property
    def reason(self) -> str | None:
        """Why its codes are not, though the target takes such."""
        return self.form.reason

    @property
    def streamed(self) -> str | None:
        """See `Form.streamed`."""
        return self.form.streamed

    @property
    def written_codec(self) -> Codec | None:
        """The codec that reads the result; None for a tensor that is no matrix."""
        return self.form.codec or self.source.codec

    def stored_name(self, part: str) -> str:
        """The full name of one of its parts in the output."""
        return self.names[part]

    @property
    def names(self) -> dict[str, str]:
        """The full names of its parts in the output."""
        if self.form.codec is None:
            tensors = self.source.tensors
            return {part: tensors[part].name for part in self.form.specs}
        module = self.source.name.removesuffix("weight")
        return {part: module + part for part in self.form.specs}


def companions_of(
    source: Checkpoint, choices: Sequence[Choice]
) -> dict[str, tuple[StoredWeight, ...]]:
    """For every fused set that is encoded in a format with one summary a set: its weights."""
    sharing = [choice for choice in choices if choice.codec and choice.codec.shares_summary]
    names = {weight.name for choice in sharing for weight in choice.weights}
    sets: dict[str, list[StoredWeight]] = {}
    for weight in source.weights.values() if sharing else ():
        key = weight.fused_set
        if key is not None and weight.name in names:
            sets.setdefault(key, []).append(weight)
    return {key: tuple(weights) for key, weights in sets.items()}


def plan_weights(
    source: Checkpoint, choice: Choice, sets: Mapping[str, tuple[StoredWeight, ...]]
) -> Iterator[tuple[str, PlannedWeight | FormatError]]:
    """Each weight of a choice as planned, or why it cannot be written so."""
    kind, codec = choice.kind, choice.codec
    form: Form | None
    if codec is None:
        specs = {part: tensor.spec for part, tensor in choice.weights[0].tensors.items()}
        form = Form(None, specs)
    else:
        rows, cols = kind.shape
        try:
            if not rows or not cols:
                raise FormatError(f"is [{rows}, {cols}]; a format needs rows and columns")
            specs = codec.specs(rows, cols)
        except FormatError as error:
            for weight in choice.weights:
                yield weight.name, FormatError(f"{weight.name}: {error}")
            return
        assert kind.codec is not None
        kept = kept_by_formats(kind.codec, codec, (rows, cols))
        form = None if kept is None else Form(codec, specs, kept.lossless, kept.repack)
    forms: dict[object, Form] = {}
    for weight in choice.weights:
        own = form or _by_scales(source, weight, codec, forms)
        companions: tuple[StoredWeight, ...] = ()
        if own.codec is not None and own.codec.two_pass and not own.repack:
            companions = sets.get(weight.fused_set or "", (weight,))
        yield weight.name, PlannedWeight(weight, own, companions)


def _by_scales(
    source: Checkpoint, weight: StoredWeight, codec: Codec | None, forms: dict[object, Form]
) -> Form:
    """The form of a weight whose scales decide whether it keeps its values; `forms` those so far
    of its kind."""
    assert codec is not None
    kept = keeps_values(source, weight, codec)
    other = _with_stored_scales(codec, weight.codec)
    if kept.reason is not None and other is not None:
        better = keeps_values(source, weight, other)
        if better.lossless:
            codec, kept = other, better
    key = codec, kept
    if key not in forms:
        rows, cols = weight.shape
        specs = codec.specs(rows, cols)
        forms[key] = Form(codec, specs, kept.lossless, kept.repack, kept.reason)
    return forms[key]


def _with_stored_scales(target: Codec, stored: Codec | None) -> Codec | None:
    """An integer format of compressed-tensors that asks for no dtype of scales, with the source's:
    engines take any. (FP8's scales differ in more than their dtype.)"""
    wanted, found = getattr(target, "scale", None), getattr(stored, "scale", None)
    asked = wanted != getattr(type(target), "scale", None)
    integers = target.alphabet in ("int4", "int8") and target.quant_method == QUANT_METHOD
    if not integers or asked or wanted is None or found is None:
        return None
    try:
        return dataclasses.replace(target, scale=found)  # type: ignore[type-var]
    except FormatError:
        return None
