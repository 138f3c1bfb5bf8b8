"""FP8 in all its containers: golden bytes, oracles, lossless hand-overs, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from requant.errors import FormatError
from requant.quant import detect_format, format_name, parse_format
from requant.quant.codec import TORCH_DTYPES, Codec, Codes, TensorSpec
from requant.quant.e4m3 import SCALE_DTYPES, exponents, upcast_e2m1
from requant.quant.e8m0 import e8m0_to_float32
from requant.quant.fp8_block import AMAX_FLOOR, Fp8Block
from requant.quant.fp8_channel import Fp8Channel
from requant.quant.fp8_tensor import Fp8Tensor
from requant.quant.mxfp8 import Mxfp8
from requant.quant.packing import unpack_nibbles

VECTORS = Path(__file__).parent.parent / "vectors"
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat((E2M1, -E2M1))
CT_BLOCK = "fp8-block[container=compressed-tensors]"
CT_BLOCK_BF16 = "fp8-block[scale=bf16,container=compressed-tensors]"

quick = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def says(*pieces: str) -> str:
    return ".*".join(re.escape(piece) for piece in pieces)


def load(name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """A vector file -> input weight, stored parts, the reference library's own decoded weight."""
    tensors = load_file(VECTORS / f"{name}.safetensors")
    parts = {k.removeprefix("stored."): v for k, v in tensors.items() if k.startswith("stored.")}
    decoded = [v for k, v in tensors.items() if k.startswith(("dequantized.", "decompressed."))]
    assert len(decoded) == 1
    return tensors["input.weight"].to(torch.float32), parts, decoded[0]


def specs_of(parts: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()} | {torch.uint8: "U8"}
    return {part: TensorSpec(names[t.dtype], tuple(t.shape)) for part, t in parts.items()}


def shape_of(parts: dict[str, torch.Tensor]) -> tuple[int, int]:
    return parts["weight"].shape[0], parts["weight"].shape[1]


def expand(scale: torch.Tensor, block: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
    """Each weight's own scale, from a grid."""
    scale = scale.to(torch.float32).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return scale[: shape[0], : shape[1]]


# --- golden

ENCODED = [
    ("deepseek_fp8_block128_160x192_ue8m0", "fp8-block[scale=ue8m0]"),
    ("hf_fp8_block128_ue8m0", "fp8-block[scale=e8m0]"),
    ("ct_fp8_channel", "fp8-channel[arithmetic=bf16]"),
    ("ct_fp8_tensor", "fp8-tensor[scale=bf16,arithmetic=bf16]"),
    ("ct_mxfp8a16", "mxfp8[exponent=ct]"),
]


@pytest.mark.parametrize(("name", "text"), ENCODED)
def test_encode_gives_the_reference_bytes(name: str, text: str, same: Any) -> None:
    source, stored, _ = load(name)
    parts = parse_format(text).encode(source, (source.shape[0], source.shape[1]))
    assert set(parts) == set(stored)
    for part, tensor in stored.items():
        assert same(parts[part], tensor), part


@pytest.mark.parametrize(
    ("name", "text", "config"),
    [
        *((name, text, parse_format(text).config([])) for name, text in ENCODED),
        ("ct_fp8_block_160x192", CT_BLOCK_BF16, parse_format(CT_BLOCK_BF16).config([])),
    ],
)
def test_stored_vectors_are_detected_and_decode_to_the_reference(
    name: str, text: str, config: Any, same: Any
) -> None:
    """The references round to BF16; our float32 product is exact, so one rounding gives theirs."""
    _, stored, reference = load(name)
    codec = detect_format(specs_of(stored), config)
    assert codec == parse_format(text)
    shape = shape_of(stored)
    assert codec.shape(specs_of(stored)) == shape
    assert same(codec.decode(stored, shape).to(torch.bfloat16), reference)


def test_block_scales_in_bf16_are_compressed_tensors_and_codes_a_step_away() -> None:
    """compressed-tensors divides in BF16; the scales are its own, codes differ at near-ties."""
    source, stored, _ = load("ct_fp8_block_160x192")
    parts = parse_format(CT_BLOCK_BF16).encode(source, (160, 192))
    assert torch.equal(parts["weight_scale"], stored["weight_scale"])
    ours, theirs = (p["weight"].view(torch.uint8).to(torch.int16) for p in (parts, stored))
    assert (ours - theirs).abs().max() == 1
    assert (ours != theirs).float().mean() < 0.05


def test_all_zero_and_tiny_blocks_by_container() -> None:
    """DeepSeek's floor is 2^-22, the power of two above 1e-4 / 448; transformers stores 1.0 for a
    zero block and has no floor; compressed-tensors stores the dtype's epsilon for zero."""
    zero, tiny = torch.zeros(1, 1), torch.full((1, 1), 7e-10)
    scales = {
        "fp8-block[scale=ue8m0]": (2.0**-22, 2.0**-22),
        "fp8-block[scale=e8m0]": (1.0, 2.0**-39),
        "fp8-block[scale=e8m0,container=deepseek-v4]": (1.0, 2.0**-39),
        CT_BLOCK: (2.0**-23, (torch.tensor(7e-10) / 448).item()),
        CT_BLOCK_BF16: (2.0**-7, (torch.tensor(7e-10) / 448).to(torch.bfloat16).item()),
        "fp8-channel": (2.0**-7, (torch.tensor(7e-10) / 448).to(torch.bfloat16).item()),
        "fp8-channel[scale=fp16]": (2.0**-10, 2.0**-10),
        "fp8-tensor": (2.0**-23, (torch.tensor(7e-10) / 448).item()),
    }
    assert torch.tensor(AMAX_FLOOR) / 448 <= 2.0**-22 < 2 * torch.tensor(AMAX_FLOOR) / 448
    for text, expected in scales.items():
        codec = parse_format(text)
        stored = [list(codec.encode(w, (1, 1)).values())[1] for w in (zero, tiny)]
        assert tuple(s.to(torch.float32).item() for s in stored) == expected, text


def test_power_of_two_scales_by_hand() -> None:
    """amax 448 * 2^n has the scale 2^n and the code 448; one ulp more has the next power, 224.
    compressed-tensors goes up at 448 already."""
    above = torch.nextafter(torch.tensor(448.0), torch.tensor(1e9))
    amax = torch.tensor([448.0, above, 447.0, 224.0, 3.5, 2.0**-120, 2.0**-149, 0.0])
    assert exponents(amax).tolist() == [127, 128, 127, 126, 120, 0, 0, 0]
    assert exponents(amax, "ct").tolist() == [128, 128, 127, 127, 121, 0, 0, 0]
    largest = torch.tensor([torch.finfo(torch.float32).max])
    assert exponents(largest).tolist() == [247]


@pytest.mark.parametrize("scale", ["ue8m0", "e8m0"])
def test_powers_of_two_are_not_taken_for_rounded_products(scale: str) -> None:
    """256 and an ulp looks like the code 256 times a scale of 1 and an ulp; float32 scales take
    that, powers of two cannot."""
    source = torch.tensor([[256 * (1 + 2.0**-23)]])
    parts = Fp8Block(scale=scale).encode(source, (1, 1))
    assert parts["weight"].to(torch.float32).item() == 256.0
    assert parts["weight_scale_inv"].to(torch.float32).item() == 1.0
    assert parts["weight_scale_inv"].dtype == TORCH_DTYPES[SCALE_DTYPES[scale]]


def test_every_exponent_is_its_power_of_two() -> None:
    every = torch.arange(255, dtype=torch.uint8)
    expected = torch.ldexp(torch.ones(255, dtype=torch.float64), torch.arange(255) - 127)
    assert torch.equal(e8m0_to_float32(every).to(torch.float64), expected)
    assert torch.equal(e8m0_to_float32(every.view(torch.float8_e8m0fnu)).double(), expected)
    assert e8m0_to_float32(every)[0] == 2.0**-127  # a float32 subnormal


def test_mxfp8_rules_differ_where_amax_is_448_times_a_power_of_two() -> None:
    """There "ceil" has the smaller scale and twice the codes, the largest 448 instead of 224."""
    source, stored, reference = load("ct_mxfp8a16")
    parts = Mxfp8().encode(source, (16, 64))
    lower = stored["weight_scale"] - parts["weight_scale"]
    amax = source.view(16, 2, 32).abs().amax(2)
    assert torch.equal(lower == 1, torch.frexp(amax).mantissa == 0.875) and lower.any()
    assert lower.max() == 1
    error, theirs = Mxfp8().decode(parts, (16, 64)) - source, reference.float() - source
    assert (error.abs() <= theirs.abs()).all()


def test_mxfp8_first_row_by_hand() -> None:
    source, stored, _ = load("ct_mxfp8a16")
    parts = Mxfp8().encode(source, (16, 64))
    assert parts["weight_scale"][0].tolist() == [0x77, 0x78]
    assert bytes(parts["weight"].view(torch.uint8)[0, :4].tolist()).hex() == "f0e8b867"


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("fp8-channel", "ct_fp8_dynamic.json"),
        (CT_BLOCK, "ct_fp8_block.json"),
        ("mxfp8", "ct_mxfp8a16.json"),
    ],
)
def test_config_is_compressed_tensors_own(text: str, file: str) -> None:
    expected = json.loads((VECTORS / file).read_text())
    assert expected.pop("moe_sparsity_config") is None
    assert parse_format(text).config(["lm_head"]) == expected


def test_tensor_config_is_static_weights_and_dynamic_activations() -> None:
    """The preset FP8's weights, FP8_DYNAMIC's activations: what needs no calibration data."""
    config = Fp8Tensor().config([])
    channel = Fp8Channel().config([])
    assert config is not None and channel is not None
    channel["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    assert config == channel


def test_deepseek_configs() -> None:
    published = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }
    for text in ("scale=ue8m0", "scale=e8m0", "scale=e8m0,container=deepseek-v4"):
        assert parse_format(f"fp8-block[{text}]").config([]) == published
    kept = parse_format("mxfp8[container=minimax]").config(["lm_head"])
    assert kept is not None and kept["modules_to_not_convert"] == ["lm_head"]
    assert kept["quant_method"] == "mxfp8" and kept["weight_block_size"] == [1, 32]
    assert kept["scale_fmt"] == "ue8m0"
    tensor = parse_format("fp8-tensor[container=fp8]").config(["lm_head"])
    assert tensor is not None and tensor["weight_block_size"] is None
    assert tensor["quant_method"] == "fp8" and tensor["modules_to_not_convert"] == ["lm_head"]


# --- detection


@pytest.mark.parametrize(
    ("parts", "config", "text"),
    [
        # V3.1 and V3.2: powers of two, kept as F32; V3: any F32.
        ({"weight_scale_inv": ("F32", (5, 2))}, {"scale_fmt": "ue8m0"}, "fp8-block[scale=ue8m0]"),
        ({"weight_scale_inv": ("F32", (5, 2))}, {"scale_fmt": "float"}, "fp8-block"),
        ({"weight_scale_inv": ("F8_E8M0", (5, 2))}, None, "fp8-block[scale=e8m0]"),
        # V4-Flash-Base keeps F32 scales; V4 E8M0; V4.1 in blocks of 32 x 32.
        ({"scale": ("F32", (5, 2))}, None, "fp8-block[container=deepseek-v4]"),
        (
            {"scale": ("F8_E8M0", (5, 2))},
            {"scale_fmt": "ue8m0"},
            "fp8-block[scale=e8m0,container=deepseek-v4]",
        ),
        (
            {"scale": ("F8_E8M0", (18, 8))},
            {"weight_block_size": [32, 32]},
            "fp8-block[block_rows=32,block_cols=32,scale=e8m0,container=deepseek-v4]",
        ),
        ({"weight_scale": ("F32", (5, 2))}, None, CT_BLOCK),
        ({"weight_scale": ("F16", (5, 2))}, None, CT_BLOCK.replace("[", "[scale=fp16,")),
        ({"weight_scale": ("F32", (576, 1))}, None, "fp8-channel[scale=fp32]"),
        ({"weight_scale": ("F16", (576, 1))}, {"quant_method": "fp8"}, "fp8-channel[scale=fp16]"),
        ({"weight_scale": ("BF16", (1,))}, None, "fp8-tensor[scale=bf16]"),
        ({"weight_scale": ("F32", ())}, None, "fp8-tensor"),
        ({"weight_scale": ("F32", ())}, {"quant_method": "fp8"}, "fp8-tensor[container=fp8]"),
        ({"weight_scale_inv": ("F32", (1,))}, None, "fp8-tensor[container=fp8]"),
        ({"weight_scale_inv": ("BF16", ())}, None, "fp8-tensor[scale=bf16,container=fp8]"),
        ({"qscale_weight": ("F32", ())}, None, "fp8-tensor[container=mistral]"),
        ({"weight_scale": ("U8", (576, 8))}, None, "mxfp8"),
        (
            {"weight_scale_inv": ("U8", (576, 8))},
            {"quant_method": "mxfp8"},
            "mxfp8[container=minimax]",
        ),
    ],
)
def test_detected_codec_and_its_specs(parts: Any, config: Any, text: str) -> None:
    """What is found in the file is what `specs` gives again, names and [] against [1] included."""
    found = {"weight": TensorSpec("F8_E4M3", (576, 256))}
    found |= {part: TensorSpec(*spec) for part, spec in parts.items()}
    codec = detect_format(found, config)
    assert format_name(codec) == format_name(parse_format(text)) and codec == parse_format(text)
    specs = codec.specs(576, 256)
    assert {p: (s.dtype, s.shape) for p, s in specs.items()} == {
        p: (s.dtype, s.shape) for p, s in found.items()
    }
    assert codec.shape(found) == (576, 256)


def test_a_strategy_in_the_config_decides_over_the_shape() -> None:
    """[576, 1] is a scale a row, or blocks of 1 x 256."""
    parts = {
        "weight": TensorSpec("F8_E4M3", (576, 256)),
        "weight_scale": TensorSpec("F32", (576, 1)),
    }
    blocks = parse_format("fp8-block[block_rows=1,block_cols=256,container=compressed-tensors]")
    assert detect_format(parts, blocks.config([])) == blocks
    assert detect_format(parts, Fp8Channel().config([])) == Fp8Channel("fp32")


@pytest.mark.parametrize(
    ("spec", "config", "message"),
    [
        (("F32", (5, 3)), parse_format(CT_BLOCK), "weight_scale is [5, 3], expected [5, 2]"),
        (("BF16", (5, 1)), Fp8Channel(), "weight_scale is BF16 [5, 1], expected BF16 [576, 1]"),
        (("U8", (576, 7)), Mxfp8(), "weight_scale is U8 [576, 7], expected U8 [576, 8]"),
        (("BF16", (5, 2)), Fp8Tensor(), "no format of `requant formats` reads"),
        (("F32", (1,)), parse_format(CT_BLOCK), "no format of `requant formats` reads"),
        (("I32", (5, 2)), None, "no format of `requant formats` reads"),
        (("F8_E8M0", (5, 2)), None, "no format of `requant formats` reads"),
    ],
)
def test_parts_that_contradict_each_other(spec: Any, config: Codec | None, message: str) -> None:
    parts = {"weight": TensorSpec("F8_E4M3", (576, 256)), "weight_scale": TensorSpec(*spec)}
    with pytest.raises(FormatError, match=says(message)):
        detect_format(parts, config and config.config([]))


def test_bad_block_structure() -> None:
    config = parse_format(CT_BLOCK).config([])
    assert config is not None
    config["config_groups"]["group_0"]["weights"]["block_structure"] = [128]
    parts = parse_format(CT_BLOCK).specs(576, 256)
    with pytest.raises(FormatError, match=says("block_structure is [128]", "from 1 to")):
        detect_format(parts, config)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("fp8-block[scale=int8]", ["scale=int8: expected fp32"]),
        ("fp8-block[scale=bf16]", ["scale=bf16", "deepseek has fp32, ue8m0, e8m0"]),
        ("fp8-block[scale=e8m0,container=compressed-tensors]", ["has fp32, bf16, fp16"]),
        ("fp8-block[container=gguf]", ["container=gguf", "deepseek, deepseek-v4"]),
        ("fp8-channel[scale=ue8m0]", ["scale=ue8m0: expected fp32, bf16, fp16"]),
        ("fp8-channel[arithmetic=fp16]", ["arithmetic=fp16: expected fp32, bf16"]),
        ("fp8-channel[scale=fp16,arithmetic=bf16]", ["scale=fp16 is not", "use scale=bf16"]),
        ("fp8-tensor[arithmetic=bf16]", ["scale=fp32 is not", "use scale=bf16"]),
        ("fp8-tensor[container=deepseek]", ["container=deepseek: expected compressed-tensors"]),
        ("mxfp8[container=deepseek]", ["container=deepseek: expected compressed-tensors, minimax"]),
        ("mxfp8[exponent=floor]", ["exponent=floor: expected ceil, ct"]),
    ],
)
def test_bad_options(text: str, pieces: list[str]) -> None:
    with pytest.raises(FormatError, match=says(*pieces)):
        parse_format(text)


def test_mxfp8_needs_full_groups() -> None:
    with pytest.raises(FormatError, match=says("200 columns (200 % 32 = 8)", "use fp8-channel")):
        Mxfp8().specs(16, 200)


def test_an_fp16_scale_that_overflows() -> None:
    with pytest.raises(FormatError, match=says("1e+09 / 448", "fp16", "use scale=bf16")):
        Fp8Channel("fp16").encode(torch.full((1, 32), 1e9), (1, 32))


def test_an_fp16_scale_that_is_rounded_down_saturates() -> None:
    """FP16's steps are 2^-24 at the bottom: 3.4 of them become 3, and 3.4 / 3 * 448 is clamped."""
    source = torch.tensor([[3.4 * 448 * 2.0**-24, -3.4 * 448 * 2.0**-24, 0.0]])
    parts = Fp8Channel("fp16").encode(source, (1, 3))
    assert parts["weight_scale"].item() == 3 * 2.0**-24
    assert parts["weight"].to(torch.float32).tolist() == [[448.0, -448.0, 0.0]]


def test_mistral_is_only_read() -> None:
    codec = parse_format("fp8-tensor[container=mistral]")
    parts = {"weight": torch.ones(2, 3).to(torch.float8_e4m3fn), "qscale_weight": torch.tensor(3.0)}
    assert codec.decode(parts, (2, 3)).unique().tolist() == [3.0]
    message = says("only read", "container=compressed-tensors or container=fp8")
    with pytest.raises(FormatError, match=message):
        codec.encode(torch.ones(2, 3), (2, 3))
    with pytest.raises(FormatError, match=message):
        codec.pack(codec.unpack(parts, (2, 3)), (2, 3))


@pytest.mark.parametrize("text", ["mxfp8", "fp8-block[scale=e8m0,block_rows=1,block_cols=32]"])
def test_an_exponent_of_255_is_refused(text: str, weight: Any) -> None:
    codec = parse_format(text)
    parts = codec.encode(weight(2, 64), (2, 64))
    next(p for name, p in parts.items() if name != "weight").view(torch.uint8)[1, 1] = 255
    with pytest.raises(FormatError, match="byte 255, which is NaN"):
        codec.decode(parts, (2, 64))


def test_plain_scales_are_kept_by_the_default() -> None:
    """F32 powers of two are F32; a BF16 scale of compressed-tensors is as good. E8M0 is not F32,
    and a target that names a dtype gets it."""

    def accepts(target: str, stored: str) -> bool:
        return parse_format(target).accepts(parse_format(stored))

    v4 = "fp8-block[container=deepseek-v4{}]"
    assert accepts("fp8-block", "fp8-block") and accepts("fp8-block", "fp8-block[scale=ue8m0]")
    assert accepts(v4.format(""), v4.format(",scale=ue8m0"))
    assert accepts(CT_BLOCK, CT_BLOCK_BF16) and not accepts(CT_BLOCK_BF16, CT_BLOCK)
    assert not accepts("fp8-block", "fp8-block[scale=e8m0]")
    assert not accepts("fp8-block[scale=ue8m0]", "fp8-block")
    assert not accepts("fp8-block", CT_BLOCK) and not accepts("fp8-block", v4.format(""))
    assert not accepts("fp8-block", "fp8-block[block_rows=64]")
    for name, other in (("fp8-channel", "fp16"), ("fp8-tensor", "bf16")):
        assert accepts(name, name) and accepts(name, f"{name}[scale={other}]")
        assert not accepts(f"{name}[scale={other}]", name)
        assert not accepts(name, "fp8-block") and not accepts("fp8-block", name)
    assert not accepts("fp8-tensor", "fp8-tensor[container=fp8]")


# --- oracles


def reference(codec: Codec, weight: torch.Tensor) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """compressed-tensors: compressor, scheme, and the tensors it stores of this very weight."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import (
        FloatQuantizationCompressor,
        MXFP8QuantizationCompressor,
    )
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationConfig.model_validate(codec.config([])).config_groups["group_0"]
    match codec.name:
        case "fp8-tensor":
            low, high = torch.aminmax(weight)
        case "fp8-channel":
            low, high = torch.aminmax(weight, dim=1, keepdim=True)
        case "mxfp8":
            low, high = torch.aminmax(weight.unflatten(1, (-1, 32)), dim=2)
        case _:
            rows, cols = scheme.weights.block_structure
            padding = (0, -weight.shape[1] % cols, 0, -weight.shape[0] % rows)
            padded = torch.nn.functional.pad(weight, padding)
            blocks = padded.unflatten(1, (-1, cols)).unflatten(0, (-1, rows))
            low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    scale, zero_point = calculate_qparams(low, high, scheme.weights)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
    compressor = (
        MXFP8QuantizationCompressor if codec.name == "mxfp8" else FloatQuantizationCompressor
    )
    return compressor, scheme, compressor.compress(state, scheme)


@pytest.mark.parametrize("shape", [(160, 256), (1, 128), (37, 640), (130, 32)])
@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("fp8-channel[arithmetic=bf16]", torch.bfloat16),
        ("fp8-channel[scale=fp32]", torch.float32),
        ("fp8-tensor[scale=bf16,arithmetic=bf16]", torch.bfloat16),
        ("fp8-tensor", torch.float32),
        (CT_BLOCK, torch.float32),
        ("fp8-block[container=compressed-tensors,block_rows=32,block_cols=64]", torch.float32),
        ("mxfp8[exponent=ct]", torch.bfloat16),
        ("mxfp8[exponent=ct]", torch.float32),
    ],
)
def test_encode_is_compressed_tensors_bytes(
    text: str, dtype: torch.dtype, shape: tuple[int, int], weight: Any, same: Any
) -> None:
    """Of BF16 weights in BF16 arithmetic, of float32 weights in ours; ragged blocks, zeros."""
    codec, source = parse_format(text), weight(*shape, seed=shape[0]) * 1.1
    source = source.to(dtype).to(torch.float32)
    source[-1, :32] = 0.0
    if shape[0] > 1:
        source[0] = 0.0
    compressor, scheme, stored = reference(codec, source.to(dtype))
    parts = codec.encode(source, shape)
    assert set(stored) == set(parts)
    for name, tensor in stored.items():
        assert same(parts[name], tensor), name
    decoded = compressor.decompress(parts, scheme)["weight"]
    assert same(codec.decode(parts, shape).to(decoded.dtype), decoded)


@pytest.mark.parametrize("text", ["fp8-channel", "fp8-tensor", CT_BLOCK, "mxfp8"])
def test_config_is_accepted_by_compressed_tensors(text: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig

    config = parse_format(text).config(["lm_head"])
    read = QuantizationConfig.model_validate(config)
    assert config is not None and read.ignore == ["lm_head"]
    written = read.model_dump()["config_groups"]["group_0"]["weights"]
    ours = config["config_groups"]["group_0"]["weights"]
    assert {key: written[key] for key in ours} == ours


@pytest.mark.parametrize(
    "text",
    [
        "fp8-block[scale=ue8m0]",
        "fp8-block[scale=e8m0]",
        "fp8-block[scale=e8m0,block_rows=32,block_cols=32]",
        "fp8-tensor[container=fp8]",
        "mxfp8[container=minimax]",
    ],
)
def test_decode_is_transformers(text: str, weight: Any, same: Any) -> None:
    pytest.importorskip("transformers")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codec = parse_format(text)
    parts = codec.encode(weight(256, 384) * 1.1, (256, 384))
    theirs = Fp8Dequantize(None).convert({name: [tensor] for name, tensor in parts.items()})
    theirs_weight = theirs["weight"]
    assert same(codec.decode(parts, (256, 384)).to(theirs_weight.dtype), theirs_weight)


@pytest.mark.parametrize("side", [32, 128])
def test_e8m0_encode_is_transformers(side: int, weight: Any, same: Any) -> None:
    """Except where amax / 448 is a power of two to within its roundings; random weights are not."""
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    class Quantizer:
        quantization_config = transformers.FineGrainedFP8Config(
            weight_block_size=(side, side), scale_fmt="ue8m0"
        )

    source = weight(256, 384) * 1.1
    source[:128, :128] = 0.0
    source[128:, :128] *= 1e-6
    theirs = Fp8Quantize(Quantizer()).convert({"weight": source})
    parts = Fp8Block(side, side, "e8m0").encode(source, (256, 384))
    assert set(parts) == set(theirs)
    assert all(same(parts[name], theirs[name]) for name in parts)


@pytest.mark.parametrize(
    "text",
    ["fp8-block[scale=ue8m0]", "fp8-block[scale=e8m0]", "mxfp8[container=minimax]"]
    + ["fp8-tensor[container=fp8]"],
)
def test_config_is_read_by_transformers(text: str) -> None:
    transformers = pytest.importorskip("transformers")
    written = parse_format(text).config(["lm_head"])
    config = transformers.FineGrainedFP8Config.from_dict(written)
    assert config.modules_to_not_convert == ["lm_head"] and not config.dequantize
    assert config.weight_block_size == written["weight_block_size"]
    assert config.scale_fmt == written.get("scale_fmt", "float")
    assert config.quant_method == written["quant_method"]


@pytest.fixture(scope="module")
def llama() -> Any:
    """A tiny random Llama in BF16, whose linear layers have sides that are multiples of 128."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "text",
    [
        "fp8-block[scale=ue8m0]",
        "fp8-block[scale=e8m0]",
        "fp8-tensor[container=fp8]",
        "mxfp8[container=minimax]",
        CT_BLOCK,
        "fp8-channel",
        "fp8-tensor",
        "mxfp8",
    ],
)
def test_transformers_loads_the_checkpoint(text: str, llama: Any, tmp_path: Path) -> None:
    """A whole directory, decoded by transformers as it loads: our weights, rounded to BF16."""
    import transformers

    codec, stored, expected = parse_format(text), {}, {}
    for name, tensor in llama.state_dict().items():
        if "proj" not in name:
            stored[name] = tensor
            continue
        shape = (tensor.shape[0], tensor.shape[1])
        parts = codec.encode(tensor.float(), shape)
        expected[name] = codec.decode(parts, shape).to(torch.bfloat16)
        stored |= {name.removesuffix("weight") + part: value for part, value in parts.items()}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = llama.config.to_dict() | {"quantization_config": codec.config(["lm_head"])}
    (tmp_path / "config.json").write_text(json.dumps(config))
    kind = transformers.CompressedTensorsConfig
    options = {"quantization_config": kind(dequantize=True)} if codec.scheme() else {}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options).state_dict()
    assert len(expected) == 7
    for name, tensor in expected.items():
        assert torch.equal(loaded[name].to(torch.float32), tensor.to(torch.float32)), name


# --- handing codes over


def fp4(rows: int, cols: int, low: int, high: int, seed: int = 0) -> Codes:
    """Random FP4 codes with E8M0 exponents from `low` to `high`, both present in every block."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, cols // 2), generator=generator, dtype=torch.uint8)
    grid = (rows, -(-cols // 32))
    exponent = torch.randint(low, high + 1, grid, generator=generator, dtype=torch.uint8)
    exponent[0::2], exponent[1::2] = low, high
    return Codes("e2m1", codes, exponent.view(torch.float8_e8m0fnu), (1, 32))


def fp4_values(codes: Codes) -> torch.Tensor:
    assert codes.codes is not None
    shape = (codes.codes.shape[0], 2 * codes.codes.shape[1])
    return E2M1[unpack_nibbles(codes.codes, shape[1]).long()] * expand(codes.scale, (1, 32), shape)


def test_upcast_is_deepseeks(same: Any) -> None:
    """The reference's FP8 codes and E8M0 scales of the same FP4 weight; -0 stays -0."""
    tensors = load_file(VECTORS / "deepseek_v4_fp4_128x256.safetensors")
    packed = tensors["stored.weight"].view(torch.uint8)
    codes = Codes("e2m1", packed, tensors["stored.scale"], (1, 32))
    v4 = parse_format("fp8-block[scale=e8m0,container=deepseek-v4]")
    parts = v4.pack(codes, (128, 256))
    assert same(parts["weight"], tensors["upcast.weight"])
    assert same(parts["scale"], tensors["upcast.scale"])
    decoded = v4.decode(parts, (128, 256))
    assert same(decoded.to(torch.bfloat16), tensors["dequantized.weight"])
    in_f32 = Fp8Block().pack(codes, (128, 256))
    assert same(in_f32["weight"], parts["weight"])
    assert torch.equal(in_f32["weight_scale_inv"], parts["scale"].to(torch.float32))


@pytest.mark.parametrize("shape", [(128, 128), (1, 32), (160, 192), (576, 320), (3, 48)])
@pytest.mark.parametrize(
    "text",
    ["fp8-block", "fp8-block[scale=e8m0]", CT_BLOCK_BF16, "fp8-block[block_rows=32,block_cols=64]"]
    + ["fp8-channel", "mxfp8", "mxfp8[container=minimax]"],
)
def test_fp4_becomes_fp8_without_loss(text: str, shape: tuple[int, int]) -> None:
    """A span of 14 exponents is the most, and it is reached; partial blocks too."""
    codec = parse_format(text)
    if codec.name == "mxfp8" and shape[1] % 32:
        pytest.skip("no full groups")
    codes = fp4(*shape, 110, 124)
    parts = codec.pack(codes, shape)
    specs = codec.specs(*shape)
    assert set(parts) == set(specs)
    for name, spec in specs.items():
        assert parts[name].dtype == TORCH_DTYPES[spec.dtype]
        assert tuple(parts[name].shape) == spec.shape
    assert torch.equal(codec.decode(parts, shape), fp4_values(codes))
    scales = Codes("e2m1", None, codes.scale, codes.block)
    only = codec.pack(scales, shape)
    assert set(only) == set(parts) - {"weight"}
    assert all(torch.equal(only[n].to(torch.float32), parts[n].to(torch.float32)) for n in only)


def test_mxfp8_keeps_the_exponents_of_fp4() -> None:
    codes = fp4(4, 64, 3, 124)
    parts = Mxfp8().pack(codes, (4, 64))
    assert torch.equal(parts["weight_scale"], codes.scale.view(torch.uint8))
    with pytest.raises(FormatError, match=says("48 columns (48 % 32 = 16)")):
        Mxfp8().pack(fp4(4, 48, 3, 124), (4, 48))


def test_upcast_of_tiles_is_the_upcast_of_the_whole(same: Any) -> None:
    codec, codes, shape = Fp8Block(), fp4(300, 192, 112, 120), (300, 192)
    whole = codec.pack(codes, shape)
    assert codes.codes is not None
    for start, stop in ((0, 128), (128, 256), (256, 300)):
        tile = Codes("e2m1", codes.codes[start:stop], codes.scale[start:stop], (1, 32))
        parts = codec.pack(tile, shape)
        for name, spec in codec.specs(*shape).items():
            assert same(parts[name], spec.take(whole[name], start, stop)), (name, start)


def test_a_span_of_15_is_refused() -> None:
    """Block (1, 0) of 128 x 128; and the scales alone tell."""
    codes = fp4(256, 128, 120, 120)
    exponent = codes.scale.view(torch.uint8).clone()
    exponent[200, 3] = 105
    for content in (codes.codes, None):
        spread = Codes("e2m1", content, exponent.view(torch.float8_e8m0fnu), (1, 32))
        with pytest.raises(FormatError, match=says("block (1, 0) of 128x128 span 15", "holds 14")):
            Fp8Block().pack(spread, (256, 128))
    exponent[200, 3] = 106
    Fp8Block().pack(Codes("e2m1", None, exponent.view(torch.float8_e8m0fnu), (1, 32)), (256, 128))


def test_exponents_at_the_bottom_stay_exact() -> None:
    """A block whose largest exponent is 3 has no room for / 64: its scale is 2^-127."""
    codes = fp4(128, 128, 0, 3)
    parts = Fp8Block(scale="e8m0").pack(codes, (128, 128))
    assert parts["weight_scale_inv"].view(torch.uint8).item() == 0
    values = fp4_values(codes).double()
    assert torch.equal(Fp8Block(scale="e8m0").decode(parts, (128, 128)).double(), values)


def test_groups_with_the_byte_0_are_zeros_or_refused() -> None:
    """The second group of 32 columns: of its values, the last one decides."""
    codes = fp4(128, 128, 120, 120)
    assert codes.codes is not None
    codes.scale.view(torch.uint8)[3, 1] = 0
    codes.codes[3, 16:32] = 0x80  # zeros of both signs
    parts = Fp8Block().pack(codes, (128, 128))
    assert torch.equal(Fp8Block().decode(parts, (128, 128)), fp4_values(codes))
    codes.codes[3, 31] = 0x10
    with pytest.raises(FormatError, match=says("near 2^-127 beside far larger ones")):
        Fp8Block().pack(codes, (128, 128))


def test_fp4_that_cannot_become_fp8() -> None:
    nan = fp4(2, 64, 120, 120)
    nan.scale.view(torch.uint8)[1, 1] = 255
    with pytest.raises(FormatError, match=says("FP4 scale nan")):
        Fp8Block().pack(nan, (2, 64))
    plain = Codes("e2m1", None, torch.full((2, 2), 0.3), (1, 32))
    with pytest.raises(FormatError, match=says("FP4 scale 0.3", "float8_e8m0fnu")):
        Fp8Block().pack(plain, (2, 64))
    nvfp4 = Codes("e2m1", None, torch.ones(2, 4), (1, 16), divisor=torch.tensor(2.0))
    with pytest.raises(FormatError, match="global scale"):
        Fp8Block().pack(nvfp4, (2, 64))
    with pytest.raises(FormatError, match=says("1x32 do not fill blocks of 2x48")):
        Fp8Block(128, 48).pack(fp4(2, 96, 120, 120), (2, 96))
    with pytest.raises(FormatError, match=says("do not fill", "16")):
        upcast_e2m1(fp4(2, 64, 120, 120), (2, 16), (2, 64))


LOSSLESS = [
    ("fp8-block", "fp8-block[block_rows=32,block_cols=64]"),
    ("fp8-block", CT_BLOCK),
    ("fp8-block", "fp8-block[container=deepseek-v4]"),
    ("fp8-block[scale=ue8m0]", "fp8-block[scale=e8m0]"),
    ("fp8-block[scale=ue8m0]", "fp8-block[scale=e8m0,container=deepseek-v4]"),
    ("fp8-block[scale=e8m0]", "fp8-block[scale=ue8m0]"),
    ("fp8-block[scale=e8m0]", "fp8-block"),
    ("fp8-block[scale=ue8m0]", "mxfp8"),
    ("fp8-block[scale=e8m0]", "mxfp8[container=minimax]"),
    ("fp8-block[scale=ue8m0]", CT_BLOCK_BF16),
    (CT_BLOCK_BF16, "fp8-block"),
    ("fp8-channel", "fp8-channel[scale=fp32]"),
    ("fp8-channel", "fp8-block[block_rows=1]"),
    ("fp8-tensor", "fp8-channel[scale=fp32]"),
    ("fp8-tensor", "fp8-block"),
    ("fp8-tensor", "fp8-tensor[container=fp8]"),
    ("fp8-tensor[container=fp8]", "fp8-tensor"),
    ("mxfp8", "mxfp8[container=minimax]"),
    ("mxfp8", "fp8-block[scale=e8m0,block_rows=1,block_cols=32]"),
]


@pytest.mark.parametrize(("source", "target"), LOSSLESS)
@pytest.mark.parametrize("shape", [(160, 256), (1, 32), (300, 192)])
def test_lossless_hand_over(
    source: str, target: str, shape: tuple[int, int], weight: Any, same: Any
) -> None:
    """Codes untouched, values bit for bit, the parts that `specs` names; scales alone the same."""
    old, new = parse_format(source), parse_format(target)
    stored = old.encode(weight(*shape) * 1.1, shape)
    codes = old.unpack(stored, shape)
    assert codes.alphabet == old.alphabet == new.alphabet and codes.codes is not None
    parts = new.pack(codes, shape)
    for name, spec in new.specs(*shape).items():
        assert parts[name].dtype == TORCH_DTYPES[spec.dtype], name
        assert tuple(parts[name].shape) == spec.shape, name
    assert same(parts["weight"], stored["weight"])
    assert same(new.decode(parts, shape), old.decode(stored, shape))
    only = {name: part for name, part in stored.items() if name != "weight"}
    again = new.pack(old.unpack(only, shape), shape)
    assert set(again) == set(parts) - {"weight"}
    assert all(same(again[name], parts[name]) for name in again)


@pytest.mark.parametrize(
    ("source", "target", "pieces"),
    [
        ("fp8-block", "fp8-block[scale=ue8m0]", ["fp8-block[scale=ue8m0]", "no exact"]),
        ("fp8-block", "fp8-block[scale=e8m0]", ["scale=e8m0", "no exact float8_e8m0fnu"]),
        ("fp8-block", CT_BLOCK_BF16, ["no exact bfloat16"]),
        ("fp8-block", "mxfp8", ["mxfp8[scale=e8m0]", "no exact"]),
        ("fp8-block[block_rows=64]", "fp8-block", ["one scale for 128x128", "64x128"]),
        ("fp8-block", "fp8-channel", ["one scale for 1x256", "128x128"]),
        ("fp8-channel", "fp8-tensor", ["whole 256x256 weight", "1x256"]),
        ("fp8-block", "fp8-tensor", ["whole 256x256 weight", "128x128"]),
        ("mxfp8", "fp8-block", ["one scale for 128x128", "1x32"]),
    ],
)
def test_what_cannot_be_handed_over(
    source: str, target: str, pieces: list[str], weight: Any
) -> None:
    old, new = parse_format(source), parse_format(target)
    codes = old.unpack(old.encode(weight(256, 256) * 1.1, (256, 256)), (256, 256))
    with pytest.raises(FormatError, match=says(*pieces)):
        new.pack(codes, (256, 256))


def test_a_tile_of_one_block_does_not_pass_for_the_whole_weight(weight: Any) -> None:
    """128 rows of a 256-row weight have one scale here, but the weight has two."""
    tile = weight(128, 128)
    codes = Fp8Block().unpack(Fp8Block().encode(tile, (256, 128)), (128, 128))
    with pytest.raises(FormatError, match=says("whole 256x128 weight", "128x128")):
        Fp8Tensor().pack(codes, (256, 128))


@pytest.mark.parametrize("alphabet", ["int4", "int8"])
@pytest.mark.parametrize("text", ["fp8-block", "fp8-channel", "fp8-tensor", "mxfp8"])
def test_integers_are_not_taken(text: str, alphabet: Any) -> None:
    codes = Codes(alphabet, None, torch.ones(1, 1), (-1, -1))
    with pytest.raises(FormatError, match=says(text, alphabet)):
        parse_format(text).pack(codes, (32, 32))


# --- round trips and bounds


@pytest.mark.parametrize(
    "text",
    ["fp8-channel", "fp8-channel[scale=fp32]", "fp8-tensor", "fp8-tensor[scale=bf16]"]
    + [CT_BLOCK, CT_BLOCK_BF16],
)
def test_plain_scales_repeat_themselves_through_fp32(text: str, weight: Any, same: Any) -> None:
    """Every block has a code of 448, so amax / 448 is the scale again, and all codes come back."""
    codec, shape = parse_format(text), (300, 200)
    first = codec.encode(weight(*shape) * 1.1, shape)
    second = codec.encode(codec.decode(first, shape), shape)
    assert all(same(first[name], second[name]) for name in first)


@pytest.mark.parametrize("text", ["fp8-block[scale=ue8m0]", "fp8-block[scale=e8m0]", "mxfp8"])
@pytest.mark.parametrize("via", [torch.bfloat16, torch.float32])
def test_powers_of_two_repeat_themselves_while_codes_are_large(
    text: str, via: torch.dtype, weight: Any, same: Any
) -> None:
    """Encoding puts the largest code in [224, 448]. At 224 itself (amax just above 448 * 2^n), the
    decoded amax is 224 * 2^(n + 1) = 448 * 2^n, and the smaller scale 2^n holds it: values are the
    same, codes are not. Such groups are few, and values never change."""
    codec, shape = parse_format(text), (256, 256)
    first = codec.encode(weight(*shape) * 1.1, shape)
    decoded = codec.decode(first, shape).to(via).to(torch.float32)
    assert same(decoded, codec.decode(first, shape))  # powers of two: exact in BF16 as well
    second = codec.encode(decoded, shape)
    assert torch.equal(codec.decode(second, shape), decoded)


def test_a_block_with_small_codes_gets_a_smaller_scale() -> None:
    """What a repack keeps, decode and encode does not: the largest code is 100, so 2^2 less."""
    parts = {
        "weight": torch.full((4, 4), 100.0).to(torch.float8_e4m3fn),  # 96
        "weight_scale_inv": torch.ones(1, 1),
    }
    codec = Fp8Block(scale="ue8m0")
    again = codec.encode(codec.decode(parts, (4, 4)), (4, 4))
    assert again["weight_scale_inv"].item() == 0.25
    assert torch.equal(codec.decode(again, (4, 4)), codec.decode(parts, (4, 4)))
    packed = parse_format("fp8-block[scale=e8m0]").pack(codec.unpack(parts, (4, 4)), (4, 4))
    assert packed["weight_scale_inv"].to(torch.float32).item() == 1.0


def spread_weight(rows: int, cols: int, exponent: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randint(0, 13, (rows, 1), generator=generator).to(torch.float32)
    values = torch.rand(rows, cols, generator=generator) * 2 - 1
    return values * torch.exp2(-down) * 2.0**exponent


def e4m3_step(values: torch.Tensor) -> torch.Tensor:
    """The gap between E4M3 values there: 4 significant bits, 2^-9 at the bottom."""
    return torch.exp2((torch.frexp(values).exponent - 4).clamp_min(-9).to(torch.float32))


weights = {
    "rows": st.sampled_from([1, 2, 33, 128, 130]),
    "groups": st.integers(1, 4),
    "exponent": st.integers(-90, 90),
    "seed": st.integers(0, 2**32 - 1),
}


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("mxfp8", (1, 32)),
        ("mxfp8[exponent=ct]", (1, 32)),
        ("fp8-block[scale=e8m0]", (128, 128)),
        ("fp8-block[scale=e8m0,block_rows=32,block_cols=32]", (32, 32)),
    ],
)
@quick
@given(**weights)
def test_power_of_two_scales_are_half_a_step_and_never_saturate(
    text: str, block: tuple[int, int], rows: int, groups: int, exponent: int, seed: int
) -> None:
    """amax / scale in (224, 448]; the division is exact, so the error is half a step, no more."""
    shape = (rows, groups * 32)
    source, codec = spread_weight(*shape, exponent, seed), parse_format(text)
    parts = codec.encode(source, shape)
    stored = list(parts.values())[1].view(torch.float8_e8m0fnu)
    scale = expand(stored, block, shape)
    quotient = (source / scale).abs()
    assert quotient.max() <= 448
    largest = torch.nn.functional.pad(quotient, (0, -shape[1] % block[1], 0, -rows % block[0]))
    largest = largest.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).amax((1, 3))
    assert (largest >= 224).all() and (largest > 224 if "ct" not in text else largest < 448).all()
    error = (codec.decode(parts, shape) - source).abs()
    assert (error <= e4m3_step(quotient) / 2 * scale).all()


@pytest.mark.parametrize(("text", "unit"), [("fp8-channel", 2.0**-8), ("fp8-tensor", 2.0**-24)])
@quick
@given(**weights)
def test_plain_scales_are_half_a_step_but_at_the_clamp(
    text: str, unit: float, rows: int, groups: int, exponent: int, seed: int
) -> None:
    """A scale that was rounded down by `unit` leaves values up to 448 (1 + unit), clamped at 448:
    less than half the last step of 32, and the float32 roundings beside it."""
    shape = (rows, groups * 32)
    source, codec = spread_weight(*shape, exponent, seed), parse_format(text)
    parts = codec.encode(source, shape)
    scale = parts["weight_scale"].to(torch.float32)
    amax = source.abs().amax(1, keepdim=True) if text == "fp8-channel" else source.abs().max()
    assert ((scale * 448 / amax - 1).abs() <= unit * 1.01 + 2.0**-22).all()
    error = (codec.decode(parts, shape) - source).abs()
    bound = e4m3_step((source / scale).clamp(-448, 448)) / 2 * scale
    assert (error <= bound * (1 + 2.0**-20) + source.abs() * 2.0**-22).all()


def test_the_tensor_scale_is_the_summary_of_all_tiles(weight: Any, same: Any) -> None:
    """Of fused weights too: a summary from elsewhere is taken as it is."""
    source, codec = weight(64, 96), Fp8Tensor()
    measured = [codec.measure(tile) for tile in source.split(16)]
    assert codec.summarize(measured).item() == source.abs().max()
    larger = codec.summarize([*measured, torch.tensor([1000.0])])
    parts = codec.encode(source[:16], (64, 96), larger)
    assert parts["weight_scale"].item() == torch.tensor(1000.0) / 448
    assert codec.two_pass and codec.shares_summary
