"""What the formats refuse, and what they say: both numbers, and the way out."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from requant.errors import FormatError, RequantError
from requant.quant import CODECS, PART_NAMES, detect_format, parse_format
from requant.quant.codec import TensorSpec
from requant.quant.fp8_block import Fp8Block
from requant.quant.int4 import Int4
from requant.quant.int8_channel import Int8Channel

FP8 = {"weight": TensorSpec("F8_E4M3", (576, 7168))}
SCALE = TensorSpec("F32", (5, 56), rows=128)


def says(*pieces: str) -> str:
    """A pattern for pytest.raises: the pieces in this order."""
    return ".*".join(re.escape(piece) for piece in pieces)


@pytest.mark.parametrize(
    ("group_size", "cols", "pieces"),
    [
        (128, 10944, ["128 does not divide 10944", "= 64)", "int4[group_size=32]"]),
        (128, 10944, ["int4[group_size=32] or int4[group_size=64], or leave", "recipe"]),
        (128, 96, ["group size 128", "96 columns", "use int4[group_size=32], or leave"]),
        (32, 200, ["group size 32 does not divide 200 columns (200 % 32 = 8); leave", "bf16"]),
        (64, 1, ["group size 64", "1 columns"]),
    ],
)
def test_group_that_does_not_divide_the_columns(
    group_size: int, cols: int, pieces: list[str]
) -> None:
    with pytest.raises(FormatError, match=says(*pieces)):
        Int4(group_size).specs(16, cols)


@pytest.mark.parametrize("size", [0, -2, -32, 4, 12, 127])
def test_bad_group_size(size: int) -> None:
    with pytest.raises(FormatError, match=says(f"group_size={size}", "32, 64, 128")):
        parse_format(f"int4[group_size={size}]")


@pytest.mark.parametrize("option", ["block_rows", "block_cols"])
@pytest.mark.parametrize("size", [0, -128])
def test_bad_block_size(option: str, size: int) -> None:
    with pytest.raises(FormatError, match=says(f"{option}={size}", "at least one row")):
        parse_format(f"fp8-block[{option}={size}]")


@pytest.mark.parametrize("name", ["int4", "int8-channel"])
def test_bad_arithmetic(name: str) -> None:
    with pytest.raises(FormatError, match=says("arithmetic=fp16", "fp32, bf16")):
        parse_format(f"{name}[arithmetic=fp16]")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("fp8_block", "; did you mean fp8-block?"),
        ("int8-chanel", "; did you mean int8-channel?"),
        ("int5[group_size=32]", "; did you mean int4?"),
        ("bf61", "; did you mean bf16?"),
        ("int4[group_size=32", "one of bf16, fp16, fp32, fp8-block, fp8-channel"),
        ("zzz", "one of bf16, fp16, fp32, fp8-block, fp8-channel"),
        ("", "one of bf16, fp16, fp32, fp8-block, fp8-channel"),
    ],
)
def test_unknown_format(text: str, hint: str) -> None:
    with pytest.raises(FormatError, match=says(f"unknown format {text!r}", hint)):
        parse_format(text)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("int4[group=32]", ["int4 has no option 'group'", "group_size, symmetric, scale"]),
        ("int4[group_size]", ["int4 has no option 'group_size'", "group_size, symmetric, scale"]),
        ("int4[group_size=many]", ["group_size takes a number, not 'many'"]),
        ("int4[group_size=]", ["group_size takes a number, not ''"]),
        ("bf16[group_size=32]", ["bf16 has no option", "it has no options"]),
        ("bf16[dtype=F16]", ["bf16 has no option 'dtype'", "it has no options"]),
        ("int4[group_size=32,group_size=64]", ["group_size is given twice"]),
        ("fp8-block[scales=ue8m0]", ["no option 'scales'", "block_rows, block_cols, scale"]),
    ],
)
def test_unknown_option(text: str, pieces: list[str]) -> None:
    with pytest.raises(FormatError, match=says(text, *pieces)):
        parse_format(text)


@pytest.mark.parametrize("value", [65520.0, -65520.0, 1e6])
def test_fp16_overflow(value: float) -> None:
    pattern = says(f"holds {abs(value):.6g}", "fp16", "65504", "use bf16 or fp32")
    with pytest.raises(FormatError, match=pattern):
        parse_format("fp16").encode(torch.tensor([[1.0, value]]), (1, 2))


def test_fp16_keeps_what_rounds_into_its_range() -> None:
    source = torch.tensor([[65504.0, -65519.0]])
    encoded = parse_format("fp16").encode(source, (1, 2))["weight"]
    assert encoded.tolist() == [[65504.0, -65504.0]]


def test_bf16_overflow() -> None:
    """float32 goes on for half a BF16 step after BF16's largest value."""
    largest = torch.finfo(torch.float32).max
    with pytest.raises(FormatError, match=says("3.40282e+38", "bf16", "3.38953e+38")):
        parse_format("bf16").encode(torch.tensor([[largest]]), (1, 1))


@pytest.mark.parametrize("grid", [(4, 56), (56, 5), (5, 55), (576, 7168), (1, 1)])
def test_wrong_scale_grid(grid: tuple[int, int]) -> None:
    parts = {**FP8, "weight_scale_inv": TensorSpec("F32", grid)}
    pieces = [str(list(grid)), "expected [5, 56] for a [576, 7168] weight in 128x128 blocks"]
    with pytest.raises(FormatError, match=says("weight_scale_inv is", *pieces)):
        detect_format(parts, None)


def test_block_size_of_the_config_decides() -> None:
    parts = {**FP8, "weight_scale_inv": TensorSpec("F32", (18, 224))}
    config = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    assert detect_format(parts, config) == Fp8Block(32, 32)
    with pytest.raises(FormatError, match=says("[18, 224], expected [5, 56]")):
        detect_format(parts, {"quant_method": "fp8", "weight_block_size": None})


@pytest.mark.parametrize(
    "block",
    [[128], [0, 128], [-1, 128], "128", 128, [128, 1.5], [1, 2, 3], [True, True], [128, 10**12]],
)
def test_bad_block_size_in_the_config(block: Any) -> None:
    parts = {**FP8, "weight_scale_inv": SCALE}
    with pytest.raises(FormatError, match=says(f"weight_block_size is {block!r}", "from 1")):
        detect_format(parts, {"weight_block_size": block})


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_fp8_weight_without_its_scale(dtype: str) -> None:
    with pytest.raises(FormatError, match=says(dtype, "no weight_scale_inv", "download")):
        detect_format({"weight": TensorSpec(dtype, (576, 7168))}, None)


UNREADABLE = {
    "sglang int8": {"weight": TensorSpec("I8", (576, 7168)), "weight_scale_inv": SCALE},
    "deepseek with fp16 scales": {**FP8, "weight_scale_inv": TensorSpec("F16", (5, 56))},
    "three scales": {**FP8, "weight_scale_inv": TensorSpec("F32", (3,))},
    "ct fp8 channel in fp64": {**FP8, "weight_scale": TensorSpec("F64", (576, 1))},
    "asymmetric int8": {
        "weight": TensorSpec("I8", (8, 8)),
        "weight_scale": TensorSpec("BF16", (8, 1)),
        "weight_zero_point": TensorSpec("I8", (8, 1)),
    },
    "stacked fp8": {
        "weight": TensorSpec("F8_E4M3", (4, 128, 128)),
        "weight_scale_inv": TensorSpec("F32", (4, 1)),
    },
    "stacked int8": {
        "weight": TensorSpec("I8", (4, 128, 128)),
        "weight_scale": TensorSpec("BF16", (4, 1)),
    },
    "one-dimensional int8": {
        "weight": TensorSpec("I8", (8,)),
        "weight_scale": TensorSpec("BF16", (8, 1)),
    },
    "fp64": {"weight": TensorSpec("F64", (8, 8))},
    "int8 alone": {"weight": TensorSpec("I8", (8, 8))},
    "scale alone": {"weight_scale_inv": SCALE},
    "gptq": {"qweight": TensorSpec("I32", (4, 8)), "scales": TensorSpec("F16", (1, 8))},
}


@pytest.mark.parametrize("parts", UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_parts_are_named(parts: dict[str, TensorSpec]) -> None:
    part, spec = sorted(parts.items())[0]
    described = f"stored as {part} {spec.dtype} {list(spec.shape)}"
    with pytest.raises(FormatError, match=says(described, "requant formats")):
        detect_format(parts, {"quant_method": "fp8", "weight_block_size": [128, 128]})


@pytest.mark.parametrize(
    ("part", "spec"),
    [("weight_scale", TensorSpec("F64", (16, 1))), ("weight_scale", TensorSpec("BF16", (1, 16)))],
)
def test_int8_parts_that_contradict_each_other(part: str, spec: TensorSpec) -> None:
    parts = {**Int8Channel().specs(16, 128), part: spec}
    shown = f"{part} is {spec.dtype} {list(spec.shape)}, expected BF16 [16, 1]"
    with pytest.raises(FormatError, match=says(shown)):
        detect_format(parts, Int8Channel().config([]))


@pytest.mark.parametrize(
    ("part", "spec", "expected"),
    [
        ("weight_packed", TensorSpec("I32", (16, 15)), "I32 [16, 16]"),
        ("weight_scale", TensorSpec("BF16", (15, 1)), "BF16 [16, 1]"),
        ("weight_scale", TensorSpec("F64", (16, 1)), "BF16 [16, 1]"),
        ("weight_shape", TensorSpec("I32", (2,)), "I64 [2]"),
    ],
)
def test_int4_parts_that_contradict_each_other(part: str, spec: TensorSpec, expected: str) -> None:
    parts = {**Int4().specs(16, 128), part: spec}
    shown = f"{part} is {spec.dtype} {list(spec.shape)}, expected {expected}"
    with pytest.raises(FormatError, match=says(shown)):
        detect_format(parts, Int4().config([]))


def int4_config(**changes: Any) -> dict[str, Any]:
    config = Int4().config([])
    config["config_groups"]["group_0"]["weights"].update(changes)
    return config


HOSTILE = [
    None,
    {},
    {"config_groups": []},
    {"config_groups": {}},
    {"config_groups": {"group_0": "W4A16"}},
    {"config_groups": {"group_0": {"weights": None}}},
    {"config_groups": {"group_0": {"weights": [4]}}},
    {"config_groups": {**int4_config()["config_groups"], "group_1": {}}},
    int4_config(num_bits=8),
    int4_config(symmetric="no"),
    int4_config(type="float"),
    int4_config(strategy="block"),
    int4_config(strategy="channel"),
    int4_config(group_size=12),
    int4_config(group_size=[128]),
]


@pytest.mark.parametrize("config", HOSTILE, ids=range(len(HOSTILE)))
def test_int4_needs_a_config_that_says_so(config: Any) -> None:
    with pytest.raises(FormatError, match="no format of `requant formats` reads"):
        detect_format(Int4().specs(16, 128), config)


def test_part_names_hold_every_part() -> None:
    assert {part for codec in CODECS for part in codec.specs(128, 128)} <= PART_NAMES
    assert "bias" not in PART_NAMES
    assert issubclass(FormatError, RequantError)
