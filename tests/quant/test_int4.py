"""INT4: zero points, groups of any size, act-order, and codes that are handed over."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given

from requant.errors import FormatError
from requant.quant import detect_format, parse_format
from requant.quant.codec import Codes, TensorSpec
from requant.quant.int4 import Int4
from requant.quant.packing import pack_nibbles, unpack_nibbles
from tests.quant.test_quant_golden import VECTORS, load
from tests.quant.test_quant_oracles import exact, reference_encode
from tests.quant.test_quant_properties import BF16_UNIT, FP32_SLACK, Case, cases, quick

VARIANTS = [
    "int4[symmetric=false]",
    "int4[group_size=32,symmetric=false]",
    "int4[group_size=16]",
    "int4[group_size=-1]",
    "int4[group_size=-1,symmetric=false]",
]

#: As Kimi-K2-Thinking's config.json has it: keys beyond the library's own, no format per group.
KIMI: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}


def changed(codec: Int4, **changes: Any) -> dict[str, Any]:
    """The codec's config with other weight arguments."""
    config = codec.config([])
    assert config is not None
    config["config_groups"]["group_0"]["weights"].update(changes)
    return config


# Bytes of compressed-tensors.


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ct_w4a16_asym_g128", "int4[symmetric=false]"),
        ("ct_w4a16_channel_sym_12cols", "int4[group_size=-1]"),
    ],
)
def test_vectors_both_ways(name: str, text: str, same: Any) -> None:
    source, stored, reference = load(name)
    codec, shape = exact(text), (source.shape[0], source.shape[1])
    parts = codec.encode(source, shape)
    assert set(parts) == set(stored)
    for part, tensor in stored.items():
        assert same(parts[part], tensor), part
    assert same(codec.decode(stored, shape).to(torch.bfloat16), reference)


@pytest.mark.parametrize("shape", [(160, 256), (37, 640), (1, 128), (5, 384)])
@pytest.mark.parametrize("text", VARIANTS)
def test_variants_are_compressed_tensors_bytes(
    text: str, shape: tuple[int, int], weight: Any, same: Any
) -> None:
    codec, source = exact(text), weight(*shape, seed=shape[0])
    source[-1, :128] = 0.0
    source[0, :32] = source[0, :32].abs()  # no negative value in a group
    compressor, scheme, stored = reference_encode(codec, source.to(torch.bfloat16))
    parts = codec.encode(source, shape)
    assert set(stored) == set(parts)
    for name, tensor in stored.items():
        assert same(parts[name], tensor), name
    if not codec.symmetric and shape[0] <= 8 and parts["weight_scale"].shape[1] > 1:
        return  # a single row of zero point words, which compressed-tensors 0.20.0 cannot view
    decoded = compressor.decompress(parts, scheme)["weight"]
    assert same(codec.decode(parts, shape).to(torch.bfloat16), decoded)


@pytest.mark.parametrize("shape", [(9, 12), (4, 31), (3, 1)])
@pytest.mark.parametrize("text", VARIANTS[3:])
def test_widths_that_fill_no_word(
    text: str, shape: tuple[int, int], weight: Any, same: Any
) -> None:
    codec = exact(text)
    source = weight(*shape, seed=shape[1])
    compressor, scheme, stored = reference_encode(codec, source.to(torch.bfloat16))
    parts = codec.encode(source, shape)
    assert all(same(parts[name], tensor) for name, tensor in stored.items())
    decoded = compressor.decompress(parts, scheme)["weight"]
    assert same(codec.decode(parts, shape).to(torch.bfloat16), decoded)


@pytest.mark.parametrize(("scale", "dtype"), [("fp16", torch.float16), ("fp32", torch.float32)])
@pytest.mark.parametrize("text", ["int4[{}]", "int4[symmetric=false,{}]"])
def test_other_scale_dtypes_decode_as_compressed_tensors_does(
    text: str, scale: str, dtype: torch.dtype, weight: Any, same: Any
) -> None:
    codec, source = parse_format(text.format(f"scale={scale}")), weight(40, 256) * 1.1
    compressor, scheme, _ = reference_encode(codec, source.to(torch.bfloat16))
    parts = codec.encode(source, (40, 256))
    assert parts["weight_scale"].dtype == dtype
    decoded = compressor.decompress(parts, scheme)["weight"]
    assert same(codec.decode(parts, (40, 256)).to(dtype), decoded)


def test_asymmetric_config_is_compressed_tensors_own() -> None:
    expected = json.loads((VECTORS / "ct_w4a16_asym.json").read_text())
    assert expected.pop("moe_sparsity_config") is None
    assert parse_format("int4[symmetric=false]").config(["lm_head"]) == expected


@pytest.mark.parametrize("text", VARIANTS)
def test_configs_are_accepted_by_compressed_tensors(text: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig

    config = parse_format(text).config(["lm_head"])
    assert config is not None
    written = QuantizationConfig.model_validate(config).model_dump()
    ours = config["config_groups"]["group_0"]["weights"]
    theirs = written["config_groups"]["group_0"]["weights"]
    assert {key: theirs[key] for key in ours} == ours


# By hand.


def test_zero_points_by_hand() -> None:
    """0..15 needs the step 1 and the lowest code for 0: code -8 and zero point -8, nibbles 0."""
    row = torch.arange(16.0).reshape(1, 16)
    parts = Int4(16, symmetric=False).encode(row, (1, 16))
    assert parts["weight_scale"].tolist() == [[1.0]]
    assert parts["weight_zero_point"].tolist() == [[0]]
    assert unpack_nibbles(parts["weight_packed"], 16).tolist() == [list(range(16))]
    shifted = Int4(16, symmetric=False).encode(row - 5, (1, 16))
    assert shifted["weight_zero_point"].tolist() == [[5]]
    assert torch.equal(Int4(16, symmetric=False).decode(shifted, (1, 16)), row - 5)


def test_zero_points_are_packed_along_the_rows() -> None:
    """Row n lies in word n // 8, nibble n % 8; rows that are missing are zero bits."""
    source = torch.arange(16.0).repeat(10, 1) - torch.arange(10.0)[:, None]
    parts = Int4(16, symmetric=False).encode(source, (10, 16))
    assert parts["weight_zero_point"].tolist() == [[0x76543210], [0x98]]


def test_a_range_without_zero_still_holds_zero() -> None:
    """compressed-tensors takes 0 into every range: 8..15 has steps of 1 and not of 7 / 15."""
    row = torch.arange(8.0, 16.0).repeat(2).reshape(1, 16)
    parts = Int4(16, symmetric=False).encode(row, (1, 16))
    assert parts["weight_scale"].tolist() == [[1.0]]
    assert torch.equal(Int4(16, symmetric=False).decode(parts, (1, 16)), row)


@quick
@given(case=cases(multiple=128))
def test_asymmetric_error(case: Case) -> None:
    """Half a step, and 15 steps' worth of rounding the scale to BF16 at the clamped end: the zero
    point moves the ends by up to half a step, and what goes beyond is clamped."""
    source, shape = case.weight(), (case.rows, case.cols)
    codec = parse_format("int4[group_size=32,symmetric=false]")
    parts = codec.encode(source, shape)
    step = parts["weight_scale"].to(torch.float32).repeat_interleave(32, dim=1)
    error = (codec.decode(parts, shape) - source).abs()
    assert (error <= step * (0.5 + 15 * BF16_UNIT * (1 + 2 * BF16_UNIT)) * FP32_SLACK).all()
    low = source.reshape(case.rows, -1, 32).amin(-1).clamp_max(0)
    high = source.reshape(case.rows, -1, 32).amax(-1).clamp_min(0)
    close = parts["weight_scale"].to(torch.float32) / ((high - low) / 15) - 1
    assert (close.abs() <= BF16_UNIT * FP32_SLACK).all()


def test_the_zero_point_belongs_to_the_stored_scale(weight: Any) -> None:
    """round(-8 - min / scale) with the scale as BF16 stores it, not as it was before."""
    codec, source = Int4(32, symmetric=False), weight(256, 256) * 1.1
    parts = codec.encode(source, (256, 256))
    codes = codec.unpack(parts, (256, 256))
    assert codes.zero is not None
    low = source.reshape(256, -1, 32).amin(-1).clamp_max(0)
    expected = (-8 - low / codes.scale.to(torch.float32)).round().clamp(-8, 7) + 8
    assert torch.equal(codes.zero.to(torch.float32), expected)


def test_asymmetric_beats_symmetric_on_skewed_weights(weight: Any) -> None:
    source = weight(64, 256).abs()
    errors = []
    for text in ("int4", "int4[symmetric=false]"):
        codec = parse_format(text)
        errors.append(
            float((codec.decode(codec.encode(source, (64, 256)), (64, 256)) - source).norm())
        )
    assert errors[1] < 0.6 * errors[0]


def test_scales_beyond_fp16() -> None:
    source = torch.full((1, 128), 1e6)
    with pytest.raises(FormatError, match=r"scale 133333, beyond fp16's .* 65504; use scale=bf16"):
        parse_format("int4[scale=fp16]").encode(source, (1, 128))
    assert parse_format("int4").encode(source, (1, 128))


@pytest.mark.parametrize("options", ["arithmetic=bf16,method=mse", "arithmetic=bf16,scale=fp32"])
def test_options_that_do_not_go_together(options: str) -> None:
    with pytest.raises(FormatError, match="arithmetic=bf16 repeats compressed-tensors"):
        parse_format(f"int4[{options}]")


# Detection.


def test_kimis_config_is_read() -> None:
    assert detect_format(Int4(32).specs(2048, 7168), KIMI) == Int4(32)


@pytest.mark.parametrize("scale", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("text", VARIANTS)
def test_every_scale_dtype_is_detected(text: str, scale: str) -> None:
    codec = replace(parse_format(text), scale=scale)  # type: ignore[type-var]
    found = detect_format(codec.specs(24, 256), codec.config([]))
    assert found == codec
    assert parse_format(text).accepts(found)
    other = "fp32" if scale != "fp32" else "fp16"
    assert not replace(parse_format(text), scale=other).accepts(found)  # type: ignore[type-var]


def test_accepts_only_its_own_groups_and_symmetry() -> None:
    assert Int4().accepts(Int4(scale="fp32")) and Int4(method="mse").accepts(Int4())
    for other in (Int4(64), Int4(symmetric=False), Int4(act_order=True), parse_format("bf16")):
        assert not Int4().accepts(other)


@pytest.mark.parametrize(
    ("codec", "changes", "message"),
    [
        (Int4(), {"symmetric": False}, "weight_zero_point is missing"),
        (Int4(symmetric=False), {"symmetric": True}, "weight_zero_point, and a config"),
        (Int4(), {"group_size": 64}, r"weight_packed is I32 \[16, 16\], expected I32 \[16, 8\]"),
        (Int4(), {"actorder": "group"}, "weight_g_idx is missing"),
        (Int4(64), {"strategy": "channel", "group_size": None}, r"BF16 \[16, 2\], .* \[16, 1\]"),
    ],
)
def test_parts_that_contradict_the_config(
    codec: Int4, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        codec.detect(codec.specs(16, 128), changed(codec, **changes))


def test_other_packings_are_not_claimed() -> None:
    config = changed(Int4(), num_bits=8)
    parts = {**Int4().specs(16, 128), "weight_packed": TensorSpec("I32", (16, 32))}
    assert Int4().detect(parts, config) is None
    parts["weight_packed"] = TensorSpec("U8", (16, 64))
    assert Int4().detect(parts, Int4().config([])) is None


def test_a_channel_wise_weights_width_comes_from_weight_shape() -> None:
    codec = Int4(-1)
    assert codec.needs_content == ("weight_shape",) and Int4().needs_content == ()
    specs = codec.specs(4, 12)
    found = codec.detect(specs, codec.config([]))
    assert found is not None

    def content(rows: int, cols: int) -> dict[str, bytes]:
        return {"weight_shape": bytes(torch.tensor([rows, cols]).view(torch.uint8).tolist())}

    complete = found.with_content(content(4, 12))
    assert complete == codec and complete.shape(specs) == (4, 12)
    for rows, cols in ((4, 8), (4, 17), (5, 12), (4, -3)):
        with pytest.raises(FormatError, match=rf"\[{rows}, {cols}\].* 4 rows of 9 to 16 columns"):
            found.with_content(content(rows, cols)).shape(specs)


# Act-order.


def act_ordered(weight: Any, symmetric: bool) -> tuple[Int4, dict[str, torch.Tensor], torch.Tensor]:
    """A weight whose groups are every fourth column, its parts, and its decoded values."""
    shape, plain = (16, 128), Int4(32, symmetric)
    sorted_parts = plain.encode(weight(*shape), shape)
    expected = plain.decode(sorted_parts, shape)
    order = torch.arange(128).reshape(32, 4).T.flatten()  # column order[k] belongs to k // 32
    place = torch.argsort(order)
    codes = unpack_nibbles(sorted_parts["weight_packed"], 128)[:, place]
    parts = {
        **sorted_parts,
        "weight_packed": pack_nibbles(codes.contiguous()),
        "weight_g_idx": (torch.arange(128) % 4).to(torch.int32),
    }
    return Int4(32, symmetric, act_order=True), parts, expected[:, place]


@pytest.mark.parametrize("symmetric", [True, False])
def test_act_order_is_read(symmetric: bool, weight: Any) -> None:
    codec, parts, expected = act_ordered(weight, symmetric)
    assert torch.equal(codec.decode(parts, (16, 128)), expected)
    specs = codec.specs(16, 128)
    for config in (codec.config([]), Int4(32, symmetric).config([])):
        assert detect_format(specs, config) == codec


def test_act_order_is_not_written(weight: Any) -> None:
    codec, parts, _ = act_ordered(weight, True)
    with pytest.raises(FormatError, match="only read"):
        codec.encode(weight(16, 128), (16, 128))
    with pytest.raises(FormatError, match="act-order: the columns of a group are not adjacent"):
        codec.unpack(parts, (16, 128))
    with pytest.raises(FormatError, match="only read"):
        codec.pack(
            Int4(32).unpack(Int4(32).encode(weight(16, 128), (16, 128)), (16, 128)), (16, 128)
        )


def test_act_order_in_order_is_handed_over(weight: Any, same: Any) -> None:
    plain = Int4(32).encode(weight(16, 128), (16, 128))
    parts = {**plain, "weight_g_idx": (torch.arange(128) // 32).to(torch.int32)}
    codes = Int4(32, act_order=True).unpack(parts, (16, 128))
    again = Int4(32).pack(codes, (16, 128))
    assert all(same(again[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("group", [-1, 4])
def test_act_order_with_a_group_that_does_not_exist(group: int, weight: Any) -> None:
    codec, parts, _ = act_ordered(weight, True)
    parts["weight_g_idx"][5] = group
    with pytest.raises(FormatError, match=f"names the group {group} of 4"):
        codec.decode(parts, (16, 128))


# Codes handed over.


@pytest.mark.parametrize("text", ["int4", "int4[scale=fp16]", *VARIANTS])
def test_pack_undoes_unpack(text: str, weight: Any, same: Any) -> None:
    codec, shape = parse_format(text), (21, 256)
    parts = codec.encode(weight(*shape), shape)
    codes = codec.unpack(parts, shape)
    assert codes.alphabet == "int4" and codes.codes is not None
    assert codes.codes.shape == (21, 128)
    again = codec.pack(codes, shape)
    assert set(again) == set(parts)
    assert all(same(again[name], tensor) for name, tensor in parts.items())
    size = codes.block[1]
    values = unpack_nibbles(codes.codes, 256).to(torch.float32).reshape(21, -1, size)
    values -= 8 if codes.zero is None else codes.zero.to(torch.float32)[..., None]
    values *= codes.scale.to(torch.float32)[..., None]
    assert torch.equal(values.reshape(shape), codec.decode(parts, shape))


@pytest.mark.parametrize("text", ["int4", *VARIANTS])
def test_scales_are_handed_over_without_codes(text: str, weight: Any, same: Any) -> None:
    codec, shape = parse_format(text), (21, 256)
    parts = codec.encode(weight(*shape), shape)
    expected = {name: tensor for name, tensor in parts.items() if name != "weight_packed"}
    codes = codec.unpack(expected, shape)
    assert codes.codes is None
    again = codec.pack(codes, shape)
    assert set(again) == set(expected)
    assert all(same(again[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("symmetric", [True, False])
def test_finer_groups_repeat_scales_and_zero_points(symmetric: bool, weight: Any) -> None:
    coarse, fine, shape = Int4(128, symmetric), Int4(32, symmetric), (16, 256)
    parts = coarse.encode(weight(*shape), shape)
    again = fine.pack(coarse.unpack(parts, shape), shape)
    assert {n: t.shape for n, t in again.items()} == {
        n: torch.Size(s.shape) for n, s in fine.specs(*shape).items()
    }
    assert torch.equal(fine.decode(again, shape), coarse.decode(parts, shape))
    with pytest.raises(FormatError, match="one scale for 1x128 weights, the source one for 1x32"):
        coarse.pack(fine.unpack(again, shape), shape)


def test_symmetric_codes_become_asymmetric_and_come_back(weight: Any, same: Any) -> None:
    shape, skewed = (16, 256), Int4(symmetric=False)
    parts = Int4().encode(weight(*shape), shape)
    moved = skewed.pack(Int4().unpack(parts, shape), shape)
    assert moved["weight_zero_point"].unique().tolist() == [-0x77777778]  # 0x88888888
    assert torch.equal(skewed.decode(moved, shape), Int4().decode(parts, shape))
    back = Int4().pack(skewed.unpack(moved, shape), shape)
    assert all(same(back[name], tensor) for name, tensor in parts.items())
    true = skewed.encode(weight(*shape), shape)
    with pytest.raises(
        FormatError, match=r"zero point of \d+, symmetric int4 only 8; use int4\[sy"
    ):
        Int4().pack(skewed.unpack(true, shape), shape)


def test_scales_are_handed_over_exactly_or_not_at_all(weight: Any) -> None:
    shape, full = (16, 256), Int4(scale="fp32")
    codes = full.unpack(full.encode(weight(*shape) * 1.1, shape), shape)
    with pytest.raises(FormatError, match="has no exact bfloat16"):
        Int4().pack(codes, shape)
    rounded = replace(codes, scale=codes.scale.to(torch.bfloat16))
    assert Int4().pack(rounded, shape)["weight_scale"].dtype == torch.bfloat16
    assert torch.equal(full.pack(rounded, shape)["weight_scale"], rounded.scale.to(torch.float32))


def test_codes_of_another_alphabet_are_refused() -> None:
    codes = Codes("int8", None, torch.ones(16, 1), (1, 256))
    with pytest.raises(FormatError, match="int4 takes no codes of int8"):
        Int4().pack(codes, (16, 256))
    codes = Codes("int4", None, torch.ones(16, 2), (1, 100))
    with pytest.raises(FormatError, match="128 does not divide 200"):
        Int4().pack(codes, (16, 200))
