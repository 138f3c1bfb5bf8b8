"""Judge one weight of the output against the source's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from requant.convert.names import TensorName
from requant.convert.rank_folders import WHOLE, Span
from requant.convert.source import Checkpoint
from requant.convert.weights import StoredWeight
from requant.quant import CODECS, Codec
from requant.quant.plain import Plain
from requant.verify.difference import Counts, Difference, count, measure, same_bytes

#: Rows that tell two weights apart.
SEARCH_ROWS = 128

_PLAIN = {codec.name: codec for codec in CODECS if isinstance(codec, Plain)}
_SIBLINGS = {"gate_proj": "up_proj", "up_proj": "gate_proj", "w1": "w3", "w3": "w1"}


@dataclass(frozen=True)
class WeightCheck:
    """What comparing one weight gave. `codec` reads the output's; `problem` is a sentence.

    `rank`: who holds it, or a piece of it; None in a checkpoint that is whole.
    """

    name: str
    codec: Codec | None
    identical: bool = False
    difference: Difference | None = None
    problem: str | None = None
    rank: int | None = None

    @property
    def layer(self) -> int | None:
        """The layer that it lies in, if any."""
        return TensorName.parse(self.name).layer

    @property
    def sqnr_db(self) -> float | None:
        """In dB; None where there is none to tell."""
        return self.difference.sqnr_db if self.difference else None

    @property
    def lossy(self) -> bool:
        """Whether any element changed its value."""
        return self.difference is not None and self.difference.noise != 0


def compare_weight(
    source: Checkpoint,
    output: Checkpoint,
    name: str,
    device: torch.device | str = "cpu",
    search: bool = True,
    rank: int | None = None,
    span: Span = WHOLE,
) -> WeightCheck:
    """Compare a weight that both hold in the same shape; memory is two tiles. Of a weight on a
    `rank`, which holds `span` of it and was not encoded again in the same format, every value must
    be equal.

    `search` looks for the weight that a wrong one resembles, to name a mix-up.
    """
    ours, theirs = source.weights[name], output.weights[name]

    def checked(problem: str | None, difference: Difference | None = None) -> WeightCheck:
        problem = problem or _shape_problem(output, name)
        if problem is not None and rank is not None:
            problem = f"rank {rank}: {problem}"
        return WeightCheck(name, theirs.codec, difference is None, difference, problem, rank)

    if same_bytes(source, ours, output, theirs, span):
        return checked(None)
    difference = measure(source, ours, output, theirs, device, span)

    def counted() -> Counts:
        return count(source, ours, output, theirs, device, span)

    def hint() -> str:
        match = resembles(source, output, name, device, span) if search else None
        return f"; it looks swapped with {match}" if match else ""

    if span.axis is not None and difference.noise == 0:  # parts of a piece may be written anew
        return checked(None, difference)
    copied = rank is not None and ours.format == theirs.format
    return checked(_judge(ours, theirs, difference, counted, output, hint, copied), difference)


def resembles(
    source: Checkpoint,
    output: Checkpoint,
    name: str,
    device: torch.device | str = "cpu",
    span: Span = WHOLE,
) -> str | None:
    """The source's weight that the output stores under `name` instead, if one is found.

    Looks at the first rows of the gate/up sibling, of other experts, and of other layers.
    """
    theirs, shape = output.weights[name], source.weights[name].shape
    limit = minimum_sqnr_db(theirs)
    for other in _candidates(source, name):
        if other == name or source.weights[other].shape != shape:
            continue
        found = measure(source, source.weights[other], output, theirs, device, span, SEARCH_ROWS)
        sqnr = found.sqnr_db
        equal = found.noise == 0 < found.signal
        if equal or (limit is not None and sqnr is not None and sqnr >= limit):
            return other
    return None


def minimum_sqnr_db(weight: StoredWeight) -> float | None:
    """What the weight's format may cost; None for a dtype that is no format's."""
    codec = weight.codec or _PLAIN.get(weight.format)
    return codec.tolerance.min_sqnr_db if codec else None


def _judge(
    ours: StoredWeight,
    theirs: StoredWeight,
    found: Difference,
    counted: Callable[[], Counts],
    output: Checkpoint,
    hint: Callable[[], str],
    copied: bool,
) -> str | None:
    """The sentence about what is wrong with a weight that is not bit-identical, or None."""
    name, elements = theirs.name, math.prod(theirs.shape)
    if not math.isfinite(found.noise):
        bad = counted()
        return (
            f"{name}: {bad.output_not_finite} of {elements} values are NaN or infinite"
            f"{_not_finite_parts(output, theirs)}, {bad.source_not_finite} in the source"
        )
    if found.energy == 0 < found.signal:
        rms = math.sqrt(found.signal / elements)
        return f"{name}: is all zero; the source has a root mean square of {rms:.4g}"
    if found.signal == 0 < found.energy:
        rms = math.sqrt(found.energy / elements)
        return f"{name}: has a root mean square of {rms:.4g}; the source is all zero"
    if found.noise == 0 and ours.format != theirs.format:
        return None
    sqnr = "only in their bits" if found.sqnr_db is None else f"SQNR {found.sqnr_db:.1f} dB"
    if copied or _must_be_identical(ours, theirs):
        return (
            f"{name}: {theirs.kind} was to be kept bit-identical ({ours.format} in the source, "
            f"{theirs.format} in the output), but {counted().different} of {elements} values "
            f"differ ({sqnr}){hint()}"
        )
    limit = minimum_sqnr_db(theirs)
    if limit is not None and found.sqnr_db is not None and found.sqnr_db < limit:
        return f"{name}: {sqnr} as {theirs.format}, at least {limit:g} dB is expected{hint()}"
    return None


def _must_be_identical(ours: StoredWeight, theirs: StoredWeight) -> bool:
    """Plain in both with the same dtype, or a router (FP32 is to stay FP32), or in no format."""
    plain = all(w.codec is None or isinstance(w.codec, Plain) for w in (ours, theirs))
    router = theirs.kind in ("router", "router_bias")
    return plain and (ours.format == theirs.format or router or minimum_sqnr_db(theirs) is None)


def _not_finite_parts(output: Checkpoint, weight: StoredWeight) -> str:
    """Which stored parts hold NaN or infinity, in brackets; integers cannot."""
    bad = []
    for part in weight.parts.values():
        values = output.read_rows(part, 0, part.spec.shape[0] if part.spec.shape else 1)
        if values.is_floating_point() and not bool(torch.isfinite(values.float()).all()):
            bad.append(part.name)
    return f" (in {', '.join(sorted(bad))})" if bad else ""


def _shape_problem(output: Checkpoint, name: str) -> str | None:
    """Whether the stored `weight_shape` of a packed weight tells its true shape."""
    weight = output.weights[name]
    part = weight.parts.get("weight_shape")
    if part is None:
        return None
    told = output.read_rows(part, 0, part.spec.shape[0]).tolist()
    if told == list(weight.shape):
        return None
    return f"{part.name}: tells {told}, the weight is {list(weight.shape)}"


def _candidates(source: Checkpoint, name: str) -> Iterator[str]:
    """Weights that could have been mixed up with `name`, likeliest first."""
    components = name.split(".")
    parsed = TensorName.parse(name)
    variants = [
        [_SIBLINGS[c] if c in _SIBLINGS and i == len(components) - 2 else c
         for i, c in enumerate(components)]
    ]  # fmt: skip
    for word, own in (("experts", parsed.expert), ("layers", parsed.layer)):
        if own is not None:
            place = components.index(word) + 1
            numbers = sorted({n for n in _numbers(source, components[:place])} - {own})
            variants += [[*components[:place], str(n), *components[place + 1 :]] for n in numbers]
    for variant in variants:
        if (candidate := ".".join(variant)) in source.weights:
            yield candidate


def _numbers(source: Checkpoint, prefix: list[str]) -> Iterator[int]:
    """The numbers that follow a dotted prefix in the checkpoint's names."""
    for name in source.weights:
        components = name.split(".")
        if components[: len(prefix)] == prefix and components[len(prefix)].isdecimal():
            yield int(components[len(prefix)])
