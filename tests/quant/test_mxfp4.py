"""MXFP4, and what it is made of: E2M1 rounding, E8M0 exponents, three containers of one thing."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file

from requant.errors import FormatError
from requant.quant import detect_format, format_name, parse_format
from requant.quant.codec import Codes, TensorSpec
from requant.quant.e2m1 import E2M1_VALUES, e2m1_bytes
from requant.quant.e8m0 import e8m0_to_float32, exponent_bytes
from requant.quant.mxfp4 import Mxfp4
from requant.quant.packing import unpack_nibbles
from tests.quant.test_quant_properties import Case, cases, quick

VECTORS = Path(__file__).parent.parent / "vectors"
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CONTAINERS = [
    "mxfp4",
    "mxfp4[container=deepseek-v4]",
    "mxfp4[container=deepseek-v4,codes=u8]",
    "mxfp4[container=deepseek-v4,codes=f4]",
    "mxfp4[container=gpt-oss]",
]
Parts = dict[str, torch.Tensor]


def stored(name: str) -> tuple[Parts, Parts]:
    """All tensors of a vector, and its stored parts by their names."""
    tensors = load_file(VECTORS / f"{name}.safetensors")
    parts = {k.removeprefix("stored."): v for k, v in tensors.items() if k.startswith("stored.")}
    return tensors, parts


def nearest_code(value: float) -> int:
    """By exact fractions: the nearest magnitude, of two as near the one with the even code."""
    size = abs(Fraction(value))
    code = min(range(8), key=lambda c: (abs(Fraction(MAGNITUDES[c]) - size), c % 2))
    return code + 8 * (value < 0)


def nibbles(packed: torch.Tensor) -> list[int]:
    return [nibble for byte in packed.flatten().tolist() for nibble in (byte & 0xF, byte >> 4)]


def random_parts(codec: Mxfp4, rows: int, cols: int, low: int = 0, high: int = 254) -> Parts:
    """Every byte of codes, exponents from `low` to `high`, in the container of `codec`."""
    generator = torch.Generator().manual_seed(rows + cols)
    codes = torch.randint(0, 256, (rows, cols // 2), generator=generator, dtype=torch.uint8)
    scale = torch.randint(low, high + 1, (rows, cols // 32), generator=generator)
    views = {"I8": torch.int8, "U8": torch.uint8, "F4": torch.uint8}
    names = list(specs := codec.specs(rows, cols))
    exponents = scale.to(torch.uint8)
    if specs[names[1]].dtype == "F8_E8M0":
        exponents = exponents.view(torch.float8_e8m0fnu)
    codes = codes.view(views[specs[names[0]].dtype])
    if len(specs[names[0]].shape) == 3:
        codes = codes.view(specs[names[0]].shape)
    return {names[0]: codes, names[1]: exponents}


# E2M1


def test_rounding_is_exact_at_and_beside_every_halfway_point() -> None:
    halfway = [(low + high) / 2 for low, high in pairwise(MAGNITUDES)]
    exact = torch.tensor([*MAGNITUDES, *halfway, 7.0, 100.0, 2.0**-120, 3e38])
    infinity = torch.tensor(torch.inf)
    around = torch.cat((exact, exact.nextafter(infinity), exact.nextafter(-infinity)))
    around = around[torch.isfinite(around)]
    values = torch.cat((around, -around[around > 0], torch.zeros(2)))
    values = values[: len(values) // 2 * 2]
    assert nibbles(e2m1_bytes(values.clone()[None])) == [nearest_code(v) for v in values.tolist()]


def test_packed_low_nibble_first_by_hand() -> None:
    """Ties: 0.25 -> 0, 0.75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4; 9 saturates.
    -0.1 keeps its sign, -0.0 does not."""
    ties = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 9.0, -0.1, -0.0, -5.1, -0.25]])
    assert e2m1_bytes(ties).tolist() == [[0x20, 0x42, 0x64, 0x76, 0x08, 0x8F]]


@pytest.mark.parametrize("scale", [0.02, 1.0, 300.0])
def test_rounding_is_compressed_tensors(scale: float) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4

    values = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * scale
    values = torch.cat((values, values.to(torch.float8_e4m3fn).to(torch.float32)))  # ties
    theirs = pack_fp4_to_uint8(cast_to_fp4(values.clone()))
    assert torch.equal(e2m1_bytes(values), theirs)


# E8M0


def test_every_exponent() -> None:
    byte = torch.arange(255, dtype=torch.uint8)
    powers = e8m0_to_float32(byte)
    assert powers.tolist() == [2.0 ** (b - 127) for b in range(255)]
    with pytest.raises(FormatError, match="the E8M0 byte 255, which is NaN"):
        e8m0_to_float32(torch.tensor([3, 255], dtype=torch.uint8))


@pytest.mark.parametrize("largest", [6.0, 448.0])
def test_ceil_is_the_smallest_power_of_two_that_holds_amax(largest: float) -> None:
    """Exactly, in fractions: at, above and below largest * 2^e, from subnormal to the top."""
    infinity = torch.tensor(torch.inf)
    edges = (largest * torch.exp2(torch.arange(-157, 125).double())).float()
    edges = edges[torch.isfinite(edges) & (edges > 0)]
    amax = torch.cat((edges, edges.nextafter(infinity), edges.nextafter(-infinity)))
    amax = torch.cat((amax, torch.tensor([torch.finfo(torch.float32).max, 2.0**-149])))
    exponents = exponent_bytes(amax, largest, "ceil")
    for value, byte in zip(amax.tolist(), exponents.tolist(), strict=True):
        power, limit = Fraction(2) ** (byte - 127), Fraction(value) / Fraction(largest)
        assert 0 <= byte <= 254 and limit <= power
        assert byte == 0 or limit > power / 2
    assert exponent_bytes(torch.zeros(1), largest, "ceil").tolist() == [0]


@pytest.mark.parametrize("bits", [4, 8])
def test_ct_rule_is_compressed_tensors(bits: int) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

    amax = torch.rand(4000, generator=torch.Generator().manual_seed(2)) * 16
    amax = torch.cat((amax, torch.tensor([1.75, 1.7499999, 3.5, 7.0, 6.0, 448.0, 2.0**-90])))
    theirs = generate_mx_scales(amax.clone(), bits).to(torch.uint8)
    assert torch.equal(exponent_bytes(amax, {4: 6.0, 8: 448.0}[bits], "ct"), theirs)


def test_both_rules_by_hand() -> None:
    """Groups of the vectors: ct puts 3.375 and 7.5 at 3.375 / 0.5 = 6.75, which saturates at 6."""
    amax = torch.tensor([[0.890625, 3.375], [7.5, 0.953125], [1.84375, 7.5625], [7.0, 1.953125]])
    assert exponent_bytes(amax, 6.0, "ct").tolist() == [
        [125, 126],
        [128, 125],
        [126, 128],
        [128, 126],
    ]
    assert exponent_bytes(amax, 6.0, "ceil").tolist() == [
        [125, 127],
        [128, 125],
        [126, 128],
        [128, 126],
    ]


# Golden vectors


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ct_mxfp4a16", "mxfp4[exponent=ct]"),
        ("deepseek_v4_fp4_128x256", "mxfp4[container=deepseek-v4]"),
    ],
)
def test_reference_bytes_and_weight(name: str, text: str, same: Any) -> None:
    tensors, parts = stored(name)
    source, codec = tensors["input.weight"].to(torch.float32), parse_format(text)
    encoded = codec.encode(source, (source.shape[0], source.shape[1]))
    assert set(encoded) == set(parts)
    assert all(same(encoded[part], parts[part]) for part in parts)
    (reference,) = (v for k, v in tensors.items() if k.startswith(("dequant", "decompress")))
    decoded = codec.decode(parts, (source.shape[0], source.shape[1]))
    assert same(decoded.to(torch.bfloat16), reference)


def test_gpt_oss_expert_by_expert(same: Any) -> None:
    """`gate_up_proj` is decoded by transformers into [experts, in, out]; codes are those of
    compressed-tensors with exponents by "ceil"."""
    tensors, _ = stored("gptoss_mxfp4")
    codec, writer = parse_format("mxfp4[container=gpt-oss]"), Mxfp4()
    for expert in range(2):
        parts = {
            f"weight_{part}": tensors[f"stored.gate_up_proj_{part}"][expert]
            for part in ("blocks", "scales")
        }
        decoded = codec.decode(parts, (8, 64)).to(torch.bfloat16)
        assert same(decoded.T.contiguous(), tensors["dequantized.gate_up_proj"][expert])
        written = writer.pack(codec.unpack(parts, (8, 64)), (8, 64))
        encoded = writer.encode(tensors["input.weight"][expert].to(torch.float32), (8, 64))
        assert all(same(written[part], encoded[part]) for part in encoded)


def test_config_is_compressed_tensors_own() -> None:
    expected = json.loads((VECTORS / "ct_mxfp4a16.json").read_text())
    expected.pop("moe_sparsity_config", None)
    assert Mxfp4().config(["lm_head"]) == expected


def test_config_of_the_other_containers() -> None:
    v4 = parse_format("mxfp4[container=deepseek-v4]")
    assert v4.scheme() is None and v4.config([]) == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }
    gpt_oss = parse_format("mxfp4[container=gpt-oss]").config(["lm_head"])
    assert gpt_oss == {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


# Oracles


@pytest.mark.parametrize("shape", [(160, 256), (1, 32), (37, 640)])
def test_bytes_are_compressed_tensors(shape: tuple[int, int], weight: Any, same: Any) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.utils import calculate_qparams

    codec, source = Mxfp4(exponent="ct"), weight(*shape, seed=shape[0])
    source[-1, :32] = 0.0
    config = QuantizationConfig.model_validate(codec.config(["lm_head"]))
    scheme = config.config_groups["group_0"]
    original = source.to(torch.bfloat16)
    low, high = torch.aminmax(original.reshape(shape[0], -1, 32), dim=-1)
    scale, _ = calculate_qparams(low, high, scheme.weights)
    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    state = {"weight": original, "weight_scale": scale}
    theirs, ours = compressor.compress(state, scheme), codec.encode(source, shape)
    assert set(theirs) == set(ours)
    assert all(same(ours[part], theirs[part]) for part in ours)
    ceil = Mxfp4().encode(source, shape)
    decoded = compressor.decompress(ceil, scheme)["weight"]
    assert same(codec.decode(ceil, shape).to(torch.bfloat16), decoded.to(torch.bfloat16))


def test_decode_is_transformers(same: Any) -> None:
    pytest.importorskip("transformers")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    codec = Mxfp4("gpt-oss")
    parts = random_parts(codec, 24, 96, low=30, high=220)
    theirs = convert_moe_packed_tensors(parts["weight_blocks"][None], parts["weight_scales"][None])
    decoded = codec.decode(parts, (24, 96)).to(torch.bfloat16)
    assert same(decoded, theirs[0].T.contiguous())


# Codes that are handed over


@pytest.mark.parametrize(("source", "target"), list(product(CONTAINERS, CONTAINERS[:-1])))
def test_containers_hold_the_same(source: str, target: str, same: Any) -> None:
    """Every byte and every exponent survives, and decodes to the same bits where it fits."""
    reader, writer = parse_format(source), parse_format(target)
    assert isinstance(reader, Mxfp4) and isinstance(writer, Mxfp4)
    shape = (40, 224)
    parts = random_parts(reader, *shape)
    codes = reader.unpack(parts, shape)
    assert codes.codes is not None and codes.codes.dtype == torch.uint8
    assert codes.codes.shape == (40, 112) and unpack_nibbles(codes.codes, 224).max() == 15
    written = writer.pack(codes, shape)
    expected = random_parts(writer, *shape)
    assert list(written) == list(expected)
    assert all(same(written[part], expected[part]) for part in expected)
    assert same(reader.decode(parts, shape), writer.decode(written, shape))
    scale = list(parts)[1]
    only = writer.pack(reader.unpack({scale: parts[scale]}, shape), shape)
    assert list(only) == list(written)[1:] and same(only[list(only)[0]], written[list(only)[0]])


def test_unpacked_codes_and_scales_are_the_value(weight: Any) -> None:
    codec, shape = Mxfp4(), (33, 96)
    parts = codec.encode(weight(*shape), shape)
    codes = codec.unpack(parts, shape)
    assert codes.codes is not None and codes.block == (1, 32) and codes.divisor is None
    values = torch.tensor(E2M1_VALUES)[unpack_nibbles(codes.codes, 96).long()]
    scale = codes.scale.to(torch.float32).repeat_interleave(32, dim=1)
    assert torch.equal(values * scale, codec.decode(parts, shape))


def test_wider_groups_and_other_dtypes_of_powers_of_two_are_taken() -> None:
    codes = torch.arange(128, dtype=torch.uint8).view(2, 64)
    scale = torch.tensor([[0.5, 4.0], [1.0, 2.0**-120]])
    parts = Mxfp4().pack(Codes("e2m1", codes, scale, (1, 64)), (2, 128))
    assert parts["weight_scale"].tolist() == [[126, 126, 129, 129], [127, 127, 7, 7]]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (Codes("int4", None, torch.ones(2, 4), (1, 32)), "no codes of int4"),
        (Codes("e2m1", None, torch.full((2, 4), 1.5), (1, 32)), "1.5 has no exact float8_e8m0fnu"),
        (Codes("e2m1", None, torch.ones(2, 8), (1, 16)), "one scale for 1x32.*1x16"),
        (
            Codes("e2m1", None, torch.ones(2, 8), (1, 16), divisor=torch.ones(())),
            "power of two for 32 weights; the source is nvfp4",
        ),
    ],
)
def test_what_cannot_be_packed(codes: Codes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Mxfp4().pack(codes, (2, 128))


# What is stored, and what is refused


def test_stored_parts_name_their_format() -> None:
    for text in CONTAINERS:
        codec = parse_format(text)
        specs = codec.specs(48, 96)
        assert detect_format(specs, codec.config([])) == codec and format_name(codec) == text
        assert codec.shape(specs) == (48, 96)


def test_f4_headers_count_elements() -> None:
    specs = Mxfp4("deepseek-v4", "f4").specs(8, 64)
    assert specs["weight"] == TensorSpec("F4", (8, 64)) and specs["weight"].nbytes == 8 * 32
    assert specs["scale"] == TensorSpec("F8_E8M0", (8, 2), cols=32)


def test_parts_of_other_formats_are_left_to_them() -> None:
    packed, scale = TensorSpec("U8", (8, 48)), TensorSpec("U8", (8, 2))
    config = {"config_groups": {"group_0": {"weights": {"num_bits": 6, "type": "float"}}}}
    assert Mxfp4().detect({"weight_packed": packed, "weight_scale": scale}, config) is None
    words = TensorSpec("I32", (8, 8))
    assert Mxfp4().detect({"weight_packed": words, "weight_scale": scale}, None) is None
    fp8 = {"weight": TensorSpec("F8_E4M3", (8, 64)), "scale": TensorSpec("F8_E8M0", (1, 1))}
    assert Mxfp4().detect(fp8, None) is None


def test_contradicting_shapes_are_refused() -> None:
    parts = {"weight_packed": TensorSpec("U8", (8, 48)), "weight_scale": TensorSpec("U8", (8, 2))}
    with pytest.raises(FormatError, match=r"weight_packed is U8 \[8, 48\], expected U8 \[8, 32\]"):
        Mxfp4().detect(parts, None)


def test_any_dtype_of_codes_is_in_the_format_already() -> None:
    v4 = Mxfp4("deepseek-v4")
    assert v4.accepts(Mxfp4("deepseek-v4", "u8")) and v4.accepts(Mxfp4("deepseek-v4", "f4"))
    assert not v4.accepts(Mxfp4()) and not Mxfp4("deepseek-v4", "f4").accepts(v4)
    assert Mxfp4(method="mse").accepts(Mxfp4()) and not Mxfp4().accepts(parse_format("bf16"))


@pytest.mark.parametrize("text", CONTAINERS)
def test_exponent_255_is_refused(text: str) -> None:
    codec = parse_format(text)
    assert isinstance(codec, Mxfp4)
    parts = random_parts(codec, 4, 64)
    parts[list(parts)[1]].view(torch.uint8)[3, 1] = 255
    for read in (codec.decode, codec.unpack):
        with pytest.raises(FormatError, match="E8M0 byte 255, which is NaN"):
            read(parts, (4, 64))


def test_gpt_oss_is_only_read() -> None:
    codec = parse_format("mxfp4[container=gpt-oss]")
    codes = Mxfp4().unpack(random_parts(Mxfp4(), 4, 64), (4, 64))
    assert codec.read_only and codec.fused_only
    assert not Mxfp4().read_only and not Mxfp4("deepseek-v4").fused_only
    with pytest.raises(FormatError, match="only read.*use mxfp4, compressed-tensors'"):
        codec.encode(torch.ones(4, 64), (4, 64))
    with pytest.raises(FormatError, match="only read.*use mxfp4, compressed-tensors'"):
        codec.pack(codes, (4, 64))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mxfp4[container=hf]", "container=hf: expected compressed-tensors, deepseek-v4, gpt-oss"),
        ("mxfp4[exponent=floor]", "exponent=floor: expected ceil, ct"),
        ("mxfp4[method=best]", "method=best: expected rtn, mse"),
        ("mxfp4[codes=i4]", "codes=i4: expected i8, u8, f4"),
        ("mxfp4[codes=u8]", "codes=u8 is for container=deepseek-v4"),
        ("mxfp4[exponent=ct,method=mse]", "exponent=ct says nothing with method=mse"),
    ],
)
def test_bad_options(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_format(text)


def test_columns_that_32_does_not_divide() -> None:
    with pytest.raises(FormatError, match=r"groups of 32.*200 columns \(200 % 32 = 8\).*bf16"):
        Mxfp4().specs(16, 200)


# Errors and searches


def group_errors(codec: Mxfp4, source: torch.Tensor) -> torch.Tensor:
    shape = (source.shape[0], source.shape[1])
    error = codec.decode(codec.encode(source, shape), shape).double() - source.double()
    return error.square().view(shape[0], -1, 32).sum(-1)


def test_mse_is_the_better_of_both_exponents(weight: Any) -> None:
    """Brute force: by "ceil" and by "ct", which is "ceil" or one less; and it does help."""
    source = weight(96, 256) * 1.1
    ceil, mse = group_errors(Mxfp4(), source), group_errors(Mxfp4(method="mse"), source)
    ct = group_errors(Mxfp4(exponent="ct"), source)
    assert (mse <= torch.minimum(ceil, ct) * (1 + 1e-6)).all()
    assert 0.1 < (mse < ceil).float().mean() < 0.5
    exponents = Mxfp4(method="mse").encode(source, (96, 256))["weight_scale"].int()
    below = Mxfp4().encode(source, (96, 256))["weight_scale"].int() - exponents
    assert set(below.unique().tolist()) == {0, 1}
    assert torch.equal(below == 1, mse < ceil)


@pytest.mark.parametrize("rule", ["ceil", "ct"])
@quick
@given(case=cases(multiple=32))
def test_error_is_half_a_step(rule: str, case: Case) -> None:
    """All of it is exact but the one rounding: steps of a half, one and two scales. "ceil" has the
    largest weight in (3, 6] scales, "ct" in [3.5, 7): what saturates is off by less than one."""
    source, shape = case.weight(), (case.rows, case.cols)
    codec = Mxfp4(exponent=rule)
    parts = codec.encode(source, shape)
    scale = torch.exp2(parts["weight_scale"].float() - 127)[..., None]
    groups = source.view(case.rows, -1, 32) / scale
    amax = groups.abs().amax(-1)
    amax = amax[amax > 0]
    low, high = (3, 6) if rule == "ceil" else (3.5, 7)
    assert (amax > low if rule == "ceil" else amax >= low).all()
    assert (amax <= high if rule == "ceil" else amax < high).all()
    error = (codec.decode(parts, shape) - source).abs().view_as(groups) / scale
    half = torch.where(groups.abs() < 2, 0.25, torch.where(groups.abs() < 4, 0.5, 1.0))
    assert (error <= half).all()


@pytest.mark.parametrize("text", ["mxfp4", "mxfp4[method=mse]", "mxfp4[exponent=ct]"])
@pytest.mark.parametrize("exponent", [-149, -140, -126, -125, 100, 125])
def test_the_ends_of_the_range(text: str, exponent: int) -> None:
    """Subnormal float32 included: 2^-127 is the smallest scale, so steps end at 2^-128."""
    codec = parse_format(text)
    source = torch.full((1, 32), 1.0) * 2.0**exponent if exponent > -127 else torch.zeros(1, 32)
    source[0, 0] = 2.0**exponent
    parts = codec.encode(source, (1, 32))
    assert parts["weight_scale"].max() < 255
    decoded = codec.decode(parts, (1, 32))
    assert torch.isfinite(decoded).all()
    assert ((decoded - source).abs() <= max(2.0**-129, 2.0**exponent / 6)).all()


def test_a_decoded_weight_keeps_its_values() -> None:
    """The exponent may move (values of up to 3 scales are up to 6 of half the scale)."""
    codec = Mxfp4()
    parts = random_parts(codec, 32, 128, low=60, high=200)
    decoded = codec.decode(parts, (32, 128))
    again = codec.encode(decoded, (32, 128))
    assert torch.equal(codec.decode(again, (32, 128)), decoded)
