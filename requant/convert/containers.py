"""What each weight is written as, so that one checkpoint has one valid quantization_config.

A config has one `quant_method`. compressed-tensors' can say any mixture of its own formats;
DeepSeek's `fp8` its FP8 blocks and, in V4, FP4 experts; every other says one format. A mixture is
therefore moved into compressed-tensors where all its formats have a container there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from requant.convert.patterns import module_patterns, natural_key
from requant.convert.recipe import Recipe, plain_codec
from requant.convert.source import Checkpoint
from requant.convert.weights import Kind, StoredWeight
from requant.errors import FormatError
from requant.quant import Codec, format_name
from requant.quant.compressed_tensors import (
    QUANT_METHOD,
    Groups,
    groups_config,
    one_scheme_config,
    stored_scheme,
)
from requant.quant.plain import Plain

#: The container of DeepSeek-V4's own names, where FP4 and FP8 stand side by side.
_V4 = "deepseek-v4"
#: Keys under which the configs of other containers name what is in plain floats.
_LISTS = frozenset("modules_to_not_convert ignored_layers ignore exclude_modules dynamic".split())


class Choice(NamedTuple):
    """Weights of one kind that are written alike, in source order: in `codec`, or with their bytes
    copied (None). `target` is what the recipe wants for them, None where they have it."""

    kind: Kind
    target: Codec | None
    codec: Codec | None
    weights: Sequence[StoredWeight]

    @property
    def written(self) -> Codec | None:
        """The codec that reads the result."""
        return self.codec or self.kind.codec

    @property
    def quantized(self) -> bool:
        """Whether the result is in no plain floats."""
        return self.written is not None and not isinstance(self.written, Plain)


def choose_codecs(source: Checkpoint, recipe: Recipe) -> list[Choice]:
    """What each weight is written with, in the order of each choice's first weight.

    Raises FormatError for a mixture that no config can say.
    """
    choices = list(_targets(source, recipe))
    wanted: dict[Codec, str] = {}
    for choice in choices:
        codec = choice.target or choice.kind.codec
        if codec is not None and not isinstance(codec, Plain) and choice.kind.linear:
            wanted.setdefault(codec, choice.weights[0].name)
    together = _together(recipe, wanted)
    choices = [
        choice._replace(codec=_choose(choice.kind, choice.target, together, source.config))
        for choice in choices
    ]
    _require_equal_sets(source, recipe, choices)
    return choices


def _targets(source: Checkpoint, recipe: Recipe) -> Iterator[Choice]:
    """What the recipe wants, before it is known which formats can stand together."""
    wanted: list[tuple[Kind, Codec | None, list[StoredWeight]]] = []
    for kind, weights in source.kinds.items():
        if not recipe.tells_numbers:
            wanted.append((kind, recipe.target(weights[0]), weights))
            continue
        parted: dict[Codec | None, list[StoredWeight]] = {}
        for weight in weights:
            parted.setdefault(recipe.target(weight), []).append(weight)
        wanted += [(kind, target, members) for target, members in parted.items()]
    if recipe.tells_numbers:
        place = {name: number for number, name in enumerate(source.weights)}
        wanted.sort(key=lambda item: place[item[2][0].name])
    for kind, target, weights in wanted:
        has_it = target is not None and kind.codec is not None and target.accepts(kind.codec)
        yield Choice(kind, None if has_it else target, None, weights)


def quantization_config(source: Checkpoint, choices: Sequence[Choice]) -> dict[str, Any] | None:
    """The config of what is written; None when all of it is plain."""
    quantized: dict[Codec, list[Choice]] = {}
    linear: dict[Codec, None] = {}
    kept, kept_like = {"lm_head"}, {"lm_head"}
    for choice in choices:
        codec = choice.written
        if codec is not None and choice.quantized:
            quantized.setdefault(codec, []).append(choice)
            if choice.kind.linear:
                linear[codec] = None
        elif codec and choice.kind.purpose not in ("embedding", "norm", "bias"):
            kept_like.add(choice.kind.module)
            kept.update(weight.module for weight in choice.weights)
    if not quantized:
        return None
    for choice in (choice for same in quantized.values() for choice in same):
        if choice.kind.module in kept_like:
            kept.difference_update(weight.module for weight in choice.weights)
    first = _leader(linear or quantized)
    stored = source.quantization_config or {}
    if first.quant_method != QUANT_METHOD:
        config = first.config(sorted(kept, key=natural_key))
        copied = not any(choice.codec for same in quantized.values() for choice in same)
        return _in_words_of(stored, config or {}) if copied else config
    groups: dict[str, list[StoredWeight]] = {}
    for scheme, weights in _schemes(source, quantized):
        groups.setdefault(scheme, []).extend(weights)
    every: dict[str, list[str]] = {}
    for kind, weights in source.kinds.items():
        every.setdefault(kind.module, []).extend([weight.module for weight in weights])
    ignored = module_patterns(kept, every)
    if len(groups) == 1:
        config = one_scheme_config(json.loads(next(iter(groups))), ignored)
    else:
        modules = [[weight.module for weight in weights] for weights in groups.values()]
        targets = [module_patterns(chosen, every) for chosen in modules]
        config = groups_config(list(zip(targets, map(json.loads, groups), strict=True)), ignored)
    if stored.get("quant_method") == QUANT_METHOD:  # its scales, such as k_scale, are copied
        config["kv_cache_scheme"] = stored.get("kv_cache_scheme")
    return config


def expert_dtype(choices: Sequence[Choice], method: str | None) -> str | None:
    """What DeepSeek-V4's `expert_dtype` must say of the routed experts; None to drop it."""
    for choice in choices:
        if method == "fp8" and choice.written and choice.kind.purpose == "routed_expert":
            return {"mxfp4": "fp4", "fp8-block": "fp8"}.get(choice.written.name)
    return None


def _in_words_of(stored: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The config of weights that are all copied: as the source says it, how activations are
    quantized for example, with what stays in plain floats now."""
    if stored.get("quant_method") != config.get("quant_method"):
        return config
    told = {k: v for k, v in stored.items() if k not in _LISTS and k != "expert_dtype"}
    return {**told, **{k: v for k, v in config.items() if k in _LISTS}}


def _schemes(
    source: Checkpoint, quantized: Mapping[Codec, Sequence[Choice]]
) -> Iterator[tuple[str, Sequence[StoredWeight]]]:
    """The compressed-tensors schemes as JSON, and weights in them: the source's own scheme for what
    is copied. Routed experts come first: transformers takes the first group that speaks of experts,
    shared ones too, for the routed."""
    config = source.quantization_config or {}
    groups = Groups(config)
    place = {name: number for number, name in enumerate(source.weights)}
    found: list[tuple[tuple[bool, int, int], str, Sequence[StoredWeight]]] = []
    for number, (codec, choices) in enumerate(quantized.items()):
        for choice in choices:
            parted: dict[str | None, Sequence[StoredWeight]] = {None: choice.weights}
            own = choice.codec is None and config.get("quant_method") == QUANT_METHOD
            if own and groups.several:
                parted = _by_group(groups, choice.weights)
            for group, weights in parted.items():
                stored = stored_scheme(groups.only(group)) if own else None
                order = choice.kind.purpose != "routed_expert", number, place[weights[0].name]
                found.append((order, json.dumps(stored or codec.scheme()), weights))
    for _, scheme, weights in sorted(found, key=lambda item: item[0]):
        yield scheme, weights


def _by_group(
    groups: Groups, weights: Iterable[StoredWeight]
) -> dict[str | None, Sequence[StoredWeight]]:
    """Weights by the group of the source's config that targets them."""
    parted: dict[str | None, list[StoredWeight]] = {}
    for weight in weights:
        parted.setdefault(groups.target(weight.name.removesuffix(".weight")), []).append(weight)
    return dict(parted)


def _leader(codecs: Iterable[Codec]) -> Codec:
    """The codec whose config speaks for all of a non-compressed-tensors mixture."""
    return min(codecs, key=lambda c: (c.name != "fp8-block", getattr(c, "scale", "") == "fp32"))


def _together(recipe: Recipe, wanted: Mapping[Codec, str]) -> list[Codec]:
    """The quantized formats of the output's linear layers, moved where they can stand together."""
    codecs = list(wanted)
    moved = [_in_compressed_tensors(c) if c.fused_only else c for c in codecs]
    if None not in moved and _compatible([c for c in moved if c]):
        return [c for c in moved if c]
    moved = [_in_compressed_tensors(codec) for codec in codecs]
    if None not in moved:
        return [c for c in moved if c]
    stuck = codecs[moved.index(None)]
    other = next((c for c in codecs if c != stuck), None)
    if other is None:
        raise FormatError(
            f"{wanted[stuck]}: {format_name(stuck)} holds fused experts only; choose another format"
        )
    raise FormatError(
        f"recipe {recipe.name}: {wanted[stuck]} would be {format_name(stuck)} and {wanted[other]} "
        f"{format_name(other)}; {stuck.quant_method}'s config holds one format: give their roles "
        "the same format, or one of them bf16"
    )


def _choose(
    kind: Kind,
    target: Codec | None,
    together: Sequence[Codec],
    config: Mapping[str, Any],
) -> Codec | None:
    """The codec to write a kind with among those that stand together; None to copy it."""
    codec = target or kind.codec
    if codec is None or isinstance(codec, Plain):
        return target
    fp8 = {other.quant_method for other in together} == {"fp8"} == {codec.quant_method}
    if fp8 and kind.purpose == "embedding":
        return None  # DeepSeek-V4.1's engram tables, which no config names
    if codec not in together:
        # Moved with the others; or a layer of no linear role (DeepSeek-V3.2's indexer), which
        # stays quantized only in a format that the linear layers have as well.
        moved = _in_compressed_tensors(codec)
        alike = (other for other in together if _differs_in_container(codec, other))
        codec = moved if moved and moved in together else next(alike, plain_codec(config))
    return None if codec == kind.codec else codec


def _compatible(codecs: Sequence[Codec]) -> bool:
    """Whether one quantization_config can say all of them."""
    methods = {codec.quant_method for codec in codecs}
    if len(set(codecs)) < 2 or methods == {QUANT_METHOD}:
        return True
    blocks = {c for c in codecs if c.name == "fp8-block"}
    sides = {(getattr(c, "block_rows", 0), getattr(c, "block_cols", 0)) for c in blocks}
    containers = {getattr(c, "container", None) for c in codecs}
    if methods != {"fp8"} or len(sides) != 1 or len(containers) != 1:
        return False
    others = {c.name for c in codecs} - {"fp8-block"}
    return not others or (others == {"mxfp4"} and containers == {_V4})


def _in_compressed_tensors(codec: Codec) -> Codec | None:
    """The same format in compressed-tensors' container, if it has one there."""
    if codec.quant_method == QUANT_METHOD:
        return codec
    if not hasattr(codec, "container"):
        return None
    # Without what only the stored parts told; powers of two are kept as float32 there.
    fields = dataclasses.fields(codec)  # type: ignore[arg-type]
    changes = {f.name: f.default for f in fields if f.metadata.get("stored")}
    if getattr(codec, "scale", None) in ("ue8m0", "e8m0"):
        changes["scale"] = "fp32"
    try:
        moved: Codec = dataclasses.replace(codec, container=QUANT_METHOD, **changes)  # type: ignore[type-var]
    except FormatError:
        return None
    return moved if moved.quant_method == QUANT_METHOD else None


def _differs_in_container(codec: Codec, other: Codec) -> bool:
    """Whether two codecs are one format but for the container and the dtype of the scales."""
    first, second = (
        {
            field.name: getattr(c, field.name)
            for field in dataclasses.fields(c)  # type: ignore[arg-type]
            if field.compare and field.name not in ("container", "scale")
        }
        for c in (codec, other)
    )
    return codec.name == other.name and first == second


def _require_equal_sets(source: Checkpoint, recipe: Recipe, choices: Sequence[Choice]) -> None:
    """Raise FormatError when layers that engines fuse would be stored in different formats."""
    forms: dict[str, set[str]] = {}
    for choice in choices:
        if choice.kind.fused_set and choice.written and choice.kind.linear:
            forms.setdefault(choice.kind.fused_set, set()).add(format_name(choice.written))
    if all(len(found) == 1 for found in forms.values()):
        return
    by_name = {weight.name: choice for choice in choices for weight in choice.weights}
    sets: dict[str, tuple[str, str]] = {}
    for name, weight in source.weights.items():
        choice, key = by_name[name], weight.fused_set
        if key is None or choice.written is None or not choice.kind.linear:
            continue
        form = format_name(choice.written)
        first, expected = sets.setdefault(key, (name, form))
        if form != expected and (choice.target or by_name[first].target):
            raise FormatError(
                f"recipe {recipe.name}: {first} would be {expected} and {name} {form}; engines "
                "run both as one layer, which has one format: give both the same"
            )
