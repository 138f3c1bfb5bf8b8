"""The formats. Adding one means one module and one line in `CODECS`."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any

from requant.errors import FormatError
from requant.quant.codec import Codec, TensorSpec, Tolerance, bits_per_weight
from requant.quant.fp8_block import Fp8Block
from requant.quant.fp8_channel import Fp8Channel
from requant.quant.fp8_tensor import Fp8Tensor
from requant.quant.int4 import Int4
from requant.quant.int4_awq import Int4Awq
from requant.quant.int4_gptq import Int4Gptq
from requant.quant.int8_block import Int8Block
from requant.quant.int8_channel import Int8Channel
from requant.quant.mxfp4 import Mxfp4
from requant.quant.mxfp8 import Mxfp8
from requant.quant.nf4 import BitsAndBytes
from requant.quant.nvfp4 import Nvfp4
from requant.quant.plain import Plain

CODECS: tuple[Codec, ...] = (
    Plain("bf16", "BF16", Tolerance(max_kl=0.01, min_sqnr_db=45.0)),
    Plain("fp16", "F16", Tolerance(max_kl=0.01, min_sqnr_db=45.0)),
    Plain("fp32", "F32", Tolerance(max_kl=1e-5, min_sqnr_db=120.0)),
    Fp8Block(),
    Fp8Channel(),
    Fp8Tensor(),
    Mxfp8(),
    Int8Channel(),
    Int8Block(),
    Int4(),
    Mxfp4(),
    Nvfp4(),
    Int4Awq(),
    Int4Gptq(),
    BitsAndBytes("nf4", Tolerance(max_kl=0.1, min_sqnr_db=10.0)),
    BitsAndBytes("bnb-fp4", Tolerance(max_kl=0.1, min_sqnr_db=10.0)),
)

__all__ = [
    "ACTIVATION_PARTS",
    "CODECS",
    "PART_NAMES",
    "PLAIN_NAMES",
    "Codec",
    "TensorSpec",
    "describe_formats",
    "detect_format",
    "format_name",
    "parse_format",
]

_BY_NAME = {codec.name: codec for codec in CODECS}

#: safetensors dtype -> the plain format's name.
PLAIN_NAMES = {codec.dtype: codec.name for codec in CODECS if isinstance(codec, Plain)}

#: Names that can stand in a part's place, e.g. `weight_scale_inv`: those that every format writes
#: by default, and those of its other containers and variants.
PART_NAMES: frozenset[str] = frozenset(
    {part for codec in CODECS for part in codec.specs(128, 128)}
    | {"weight_scale", "weight_scale_inv", "weight_zero_point", "weight_g_idx", "weight_packed"}
    | {"weight_shape", "weight_global_scale", "weight_scale_2", "scale", "qscale_weight"}
    | {"weight_blocks", "weight_scales"}
    | {"pre_quant_scale"}  # of ModelOpt's AWQ: no format reads it, and without it values are wrong
    | {"qweight", "qzeros", "scales", "g_idx"}
    | {f"weight.{name}" for name in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}
    | {f"weight.quant_state.bitsandbytes__{name}" for name in ("nf4", "fp4")}
)

#: Parts that tell how activations are quantized: they go with a weight that is copied, and say
#: nothing about one that is converted.
ACTIVATION_PARTS = frozenset(
    {"input_scale", "input_global_scale", "input_zero_point", "activation_scale", "qscale_act"}
)


def parse_format(text: str) -> Codec:
    """`int4[group_size=32]` -> codec. Raises FormatError naming what exists."""
    match = re.fullmatch(r"([a-z0-9-]+)(?:\[(.*)\])?", text.strip())
    name = match[1] if match else text
    if match is None or name not in _BY_NAME:
        near = difflib.get_close_matches(name, _BY_NAME, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise FormatError(f"unknown format {text!r}: one of {', '.join(_BY_NAME)}{hint}")
    codec = _BY_NAME[name]
    known = _options(codec)
    options: dict[str, Any] = {}
    for item in filter(None, (match[2] or "").split(",")):
        key, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals or key not in known:
            has = f"its options: {', '.join(known)}" if known else "it has no options"
            raise FormatError(f"{text}: {name} has no option {key!r}; {has}")
        if key in options:
            raise FormatError(f"{text}: {key} is given twice")
        try:
            options[key] = _parse_option(known[key], value)
        except ValueError as error:
            raise FormatError(f"{text}: {key} takes {error}, not {value!r}") from None
    return dataclasses.replace(codec, **options) if options else codec  # type: ignore[type-var]


def format_name(codec: Codec) -> str:
    """The inverse of `parse_format`: options that differ from the default, in brackets."""
    default = _options(_BY_NAME[codec.name])
    changed = {k: v for k, v in _options(codec).items() if v != default[k]}
    inside = ",".join(f"{key}={_option_text(value)}" for key, value in changed.items())
    return f"{codec.name}[{inside}]" if inside else codec.name


def detect_format(parts: Mapping[str, TensorSpec], config: Mapping[str, Any] | None) -> Codec:
    """The codec that reads these parts. Raises FormatError when none does."""
    for codec in CODECS:
        found = codec.detect(parts, config)
        if found is not None:
            return found
    weight = parts.get("weight")
    if weight is not None and weight.dtype.startswith("F8") and len(parts) == 1:
        raise FormatError(
            f"weight is {weight.dtype} and has no weight_scale_inv in any file of the checkpoint; "
            "download the missing file, or correct the index"
        )
    described = ", ".join(f"{p} {s.dtype} {list(s.shape)}" for p, s in sorted(parts.items()))
    raise FormatError(f"stored as {described}, which no format of `requant formats` reads")


def describe_formats() -> list[dict[str, Any]]:
    """What `requant formats` tells: name, options with defaults, bits per weight, parts."""
    return [
        {
            "name": codec.name,
            "options": _options(codec),
            "bits_per_weight": bits_per_weight(codec),
            "parts": {part: spec.dtype for part, spec in codec.specs(128, 128).items()},
            "reads": True,
            "writes": True,
            "max_kl": codec.tolerance.max_kl,
            "loaded_by": codec.loaded_by,
            "checked_against": codec.checked_against,
            "summary": codec.summary,
        }
        for codec in CODECS
    ]


def _options(codec: Codec) -> dict[str, Any]:
    """The codec's options and their values: the dataclass fields that have a default to change."""
    fields = dataclasses.fields(codec)  # type: ignore[arg-type]
    return {
        f.name: getattr(codec, f.name)
        for f in fields
        if f.default is not dataclasses.MISSING and not f.metadata.get("stored")
    }


def _parse_option(default: Any, text: str) -> Any:
    """An option's value in the type of its default. Raises ValueError saying what it takes."""
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise ValueError("true or false")
        return text == "true"
    try:
        return type(default)(text)
    except ValueError:
        raise ValueError("a number") from None


def _option_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
