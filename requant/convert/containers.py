"""What each weight is written as, so that one checkpoint has one valid quantization_config.

A config has one `quant_method`. compressed-tensors' can say any mixture of its own formats;
DeepSeek's `fp8` its FP8 blocks and, in V4, FP4 experts; every other says one format. A mixture is
therefore moved into compressed-tensors where all its formats have a container there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from requant.convert.names import LINEAR_ROLES
from requant.convert.patterns import module_patterns, natural_key
from requant.convert.recipe import Recipe, plain_codec
from requant.convert.source import Checkpoint, StoredWeight
from requant.errors import FormatError
from requant.quant import Codec, format_name
from requant.quant.compressed_tensors import (
    QUANT_METHOD,
    groups_config,
    narrow,
    one_scheme_config,
    stored_scheme,
)
from requant.quant.plain import Plain

#: The container of DeepSeek-V4's own names, where FP4 and FP8 stand side by side.
_V4 = "deepseek-v4"
#: Keys under which the configs of other containers name what is in plain floats.
_LISTS = frozenset("modules_to_not_convert ignored_layers ignore exclude_modules dynamic".split())


def choose_codecs(source: Checkpoint, recipe: Recipe) -> dict[str, Codec | None]:
    """For every weight the codec to write it with; None copies its bytes.

    Raises FormatError for a mixture that no config can say.
    """
    targets = {name: recipe.target(weight) for name, weight in source.weights.items()}
    for name, target in targets.items():
        stored = source.weights[name].codec
        if target is not None and stored is not None and target.accepts(stored):
            targets[name] = None
    wanted: dict[Codec, str] = {}
    for name, weight in source.weights.items():
        codec = targets[name] or weight.codec
        if codec is not None and not isinstance(codec, Plain) and weight.kind in LINEAR_ROLES:
            wanted.setdefault(codec, name)
    together = _together(recipe, wanted)
    chosen = {
        name: _choose(weight, targets[name], together, source.config)
        for name, weight in source.weights.items()
    }
    _require_equal_sets(source, recipe, targets, chosen)
    return chosen


def quantization_config(
    source: Checkpoint, chosen: Mapping[str, Codec | None]
) -> dict[str, Any] | None:
    """The config of what is written, weight by weight; None when all of it is plain."""
    written = {name: chosen[name] or w.codec for name, w in source.weights.items()}
    modules: dict[Codec, list[str]] = {}
    linear: dict[Codec, None] = {}
    kept = {"lm_head"}
    for name, codec in written.items():
        module = source.weights[name].module
        if codec is not None and not isinstance(codec, Plain):
            modules.setdefault(codec, []).append(name)
            if source.weights[name].kind in LINEAR_ROLES:
                linear[codec] = None
        elif codec and source.weights[name].kind not in ("embedding", "norm", "bias"):
            kept.add(module)
    if not modules:
        return None
    kept -= {source.weights[name].module for names in modules.values() for name in names}
    first = _leader(linear or modules)
    stored = source.quantization_config or {}
    if first.quant_method != QUANT_METHOD:
        config = first.config(sorted(kept, key=natural_key))
        copied = not any(chosen[name] for names in modules.values() for name in names)
        return _in_words_of(stored, config or {}) if copied else config
    groups: dict[str, list[str]] = {}
    pairs = [(source.weights[name], codec) for codec, names in modules.items() for name in names]
    # transformers takes the first group that speaks of experts, shared ones too, for the routed.
    for weight, codec in sorted(pairs, key=lambda pair: pair[0].kind != "routed_expert"):
        scheme = _scheme(source, weight.name, chosen[weight.name], codec)
        groups.setdefault(scheme, []).append(weight.module)
    every = [weight.module for weight in source.weights.values()]
    ignored = module_patterns(kept, every)
    if len(groups) == 1:
        config = one_scheme_config(json.loads(next(iter(groups))), ignored)
    else:
        targeted = [(module_patterns(m, every), json.loads(scheme)) for scheme, m in groups.items()]
        config = groups_config(targeted, ignored)
    if stored.get("quant_method") == QUANT_METHOD:  # its scales, such as k_scale, are copied
        config["kv_cache_scheme"] = stored.get("kv_cache_scheme")
    return config


def expert_dtype(
    source: Checkpoint, chosen: Mapping[str, Codec | None], method: str | None
) -> str | None:
    """What DeepSeek-V4's `expert_dtype` must say of the routed experts; None to drop it."""
    for name, weight in source.weights.items():
        codec = chosen[name] or weight.codec
        if method == "fp8" and codec is not None and weight.kind == "routed_expert":
            return {"mxfp4": "fp4", "fp8-block": "fp8"}.get(codec.name)
    return None


def _in_words_of(stored: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The config of weights that are all copied: as the source says it, how activations are
    quantized for example, with what stays in plain floats now."""
    if stored.get("quant_method") != config.get("quant_method"):
        return config
    told = {k: v for k, v in stored.items() if k not in _LISTS and k != "expert_dtype"}
    return {**told, **{k: v for k, v in config.items() if k in _LISTS}}


def _scheme(source: Checkpoint, name: str, chosen: Codec | None, codec: Codec) -> str:
    """A weight's compressed-tensors scheme as JSON: the source's own for what is copied."""
    stored = None
    config = source.quantization_config or {}
    if chosen is None and config.get("quant_method") == QUANT_METHOD:
        stored = stored_scheme(narrow(config, name.removesuffix(".weight")))
    return json.dumps(stored or codec.scheme())


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
    weight: StoredWeight,
    target: Codec | None,
    together: Sequence[Codec],
    config: Mapping[str, Any],
) -> Codec | None:
    """The codec to write a weight with among those that stand together; None to copy it."""
    codec = target or weight.codec
    if codec is None or isinstance(codec, Plain):
        return target
    fp8 = {other.quant_method for other in together} == {"fp8"} == {codec.quant_method}
    if fp8 and weight.kind == "embedding":
        return None  # DeepSeek-V4.1's engram tables, which no config names
    if codec not in together:
        # Moved with the others; or a layer of no linear role (DeepSeek-V3.2's indexer), which
        # stays quantized only in a format that the linear layers have as well.
        moved = _in_compressed_tensors(codec)
        alike = (other for other in together if _differs_in_container(codec, other))
        codec = moved if moved and moved in together else next(alike, plain_codec(config))
    return None if codec == weight.codec else codec


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


def _require_equal_sets(
    source: Checkpoint,
    recipe: Recipe,
    targets: Mapping[str, Codec | None],
    chosen: Mapping[str, Codec | None],
) -> None:
    """Raise FormatError when layers that engines fuse would be stored in different formats."""
    sets: dict[str, tuple[str, str]] = {}
    for name, weight in source.weights.items():
        key = weight.fused_set
        if key is None or weight.codec is None or weight.kind not in LINEAR_ROLES:
            continue
        form = format_name(chosen[name] or weight.codec)
        first, expected = sets.setdefault(key, (name, form))
        if form != expected and (targets[name] or targets[first]):
            raise FormatError(
                f"recipe {recipe.name}: {first} would be {expected} and {name} {form}; engines "
                "run both as one layer, which has one format: give both the same"
            )
