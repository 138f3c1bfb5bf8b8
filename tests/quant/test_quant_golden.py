"""Golden: bytes made by other libraries, or by hand, compared exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from requant.quant import grid, parse_format
from requant.quant.codec import Codec, TensorSpec
from requant.quant.e2m1 import E2M1_VALUES
from requant.quant.fp8_block import Fp8Block
from requant.quant.int4 import Int4
from requant.quant.int8_channel import Int8Channel
from requant.quant.packing import (
    centred_nibbles,
    e2m1_and_scale,
    e4m3_to_float32,
    pack_nibbles,
    unpack_nibbles,
)

VECTORS = Path(__file__).parent.parent / "vectors"

ENCODED = [
    ("deepseek_fp8_block128_160x192_f32", "fp8-block"),
    ("ct_int8_channel", "int8-channel[arithmetic=bf16]"),
    ("ct_w4a16_g128", "int4[arithmetic=bf16]"),
    ("ct_w4a16_g32_sym", "int4[group_size=32,arithmetic=bf16]"),
]


def load(name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """A vector file -> input weight, stored parts, the reference library's own decoded weight."""
    tensors = load_file(VECTORS / f"{name}.safetensors")
    parts = {k.removeprefix("stored."): v for k, v in tensors.items() if k.startswith("stored.")}
    decoded = [v for k, v in tensors.items() if k.startswith(("dequantized.", "decompressed."))]
    assert len(decoded) == 1
    return tensors["input.weight"].to(torch.float32), parts, decoded[0]


def word(value: int) -> int:
    """The int32 with these bits."""
    return value - (1 << 32) if value >= 1 << 31 else value


@pytest.mark.parametrize(("name", "format_text"), ENCODED)
def test_encode_gives_the_reference_bytes(name: str, format_text: str, same: Any) -> None:
    source, stored, _ = load(name)
    parts = parse_format(format_text).encode(source, (source.shape[0], source.shape[1]))
    assert set(parts) == set(stored)
    for part, tensor in stored.items():
        assert same(parts[part], tensor), part


@pytest.mark.parametrize(
    ("name", "format_text"), [*ENCODED, ("hf_fp8_block128_float", "fp8-block")]
)
def test_decode_gives_the_reference_weight(name: str, format_text: str, same: Any) -> None:
    """The references round to BF16; our float32 product is exact, so one rounding gives theirs."""
    source, stored, reference = load(name)
    decoded = parse_format(format_text).decode(stored, (source.shape[0], source.shape[1]))
    assert decoded.dtype == torch.float32
    assert same(decoded.to(torch.bfloat16), reference)


def test_all_zero_block_has_deepseeks_floor_not_transformers_one(same: Any) -> None:
    """The block (1, 1) of transformers' vector is zero: it stores the scale 1, DeepSeek's
    formula gives 1e-4 / 448. Both decode to zeros."""
    source, stored, _ = load("hf_fp8_block128_float")
    parts = Fp8Block().encode(source, (256, 256))
    assert stored["weight_scale_inv"][1, 1] == 1.0
    assert parts["weight_scale_inv"][1, 1] == torch.tensor(1e-4) / 448
    assert same(parts["weight"][128:, 128:], stored["weight"][128:, 128:])
    assert not parts["weight"][128:, 128:].view(torch.uint8).any()


def test_nibbles_are_packed_low_first() -> None:
    codes = torch.tensor([[4, 6, 8, 10, 12, 6, 8, 10]], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [[word(0xA86CA864)]]
    assert torch.equal(unpack_nibbles(pack_nibbles(codes), 8), codes)


def test_a_partial_word_is_padded_with_zero_bits() -> None:
    """Row `b84fc840 0000b84f`: 12 codes, as compressed-tensors stores a 12-column weight."""
    row = [0x0, 0x4, 0x8, 0xC, 0xF, 0x4, 0x8, 0xB, 0xF, 0x4, 0x8, 0xB]
    words = pack_nibbles(torch.tensor([row], dtype=torch.uint8))
    assert words.tolist() == [[word(0xB84FC840), 0x0000B84F]]
    assert unpack_nibbles(words, 12).tolist() == [row]


def test_e4m3_table_is_torchs_cast(same: Any) -> None:
    """Every pair of codes, NaN and -0 included; odd widths and strided tiles too."""
    byte = torch.arange(256, dtype=torch.uint8)
    pairs = torch.stack((byte.repeat_interleave(256), byte.repeat(256)), 1).reshape(256, 512)
    codes = pairs.view(torch.float8_e4m3fn)
    for tile in (codes, codes[:, :511], codes[::2, :510], codes[:, 1:], codes[:1, :1]):
        assert same(e4m3_to_float32(tile), tile.to(torch.float32))


def test_centred_nibbles_come_low_first() -> None:
    words = torch.tensor([[word(0xA86CA864), 0x0000B84F], [word(0xFFFFFFFF), 0]]).int()
    expected = [[code - 8.0 for code in row] for row in unpack_nibbles(words, 16).tolist()]
    assert centred_nibbles(words).tolist() == expected


@pytest.mark.parametrize("power", [-149, -127, 0, 113, 114, 127])
def test_scaled_e2m1(power: int, same: Any) -> None:
    """Every byte times scales from the smallest to those that have no 2^14-fold in float32."""
    packed = torch.arange(256, dtype=torch.uint8)[None]
    codes = unpack_nibbles(packed.view(torch.int32), 512)
    expected = torch.tensor(E2M1_VALUES)[codes.int()]
    for scale in (2.0**power, -(2.0**power)):
        values, moved = e2m1_and_scale(packed, torch.tensor(scale))
        assert same(values * moved, expected * scale)
    one = torch.ones(1, 1)
    assert same(grid.decode(grid.Coded("e2m1", packed, one, (-1, -1), 512)), expected)


def test_int4_first_row_by_hand() -> None:
    """-0.488 / 0.1187 = -4.1 -> -4 -> nibble 4, -0.246 -> -2 -> 6, -0.004 -> 0 -> 8, ..."""
    source, _, _ = load("ct_w4a16_g32_sym")
    assert source[0, :4].tolist() == [-0.48828125, -0.24609375, -0.00390625, 0.23828125]
    parts = Int4(32).encode(source, (16, 64))
    assert parts["weight_scale"][0].tolist() == [0.11865234375, 0.44921875]
    words = [0xA86CA864, 0xA86CA86C, 0xB73FB73F, 0xB72FB73F]
    assert parts["weight_packed"][0, :4].tolist() == [word(value) for value in words]


def test_int4_ties_and_range_by_hand() -> None:
    """amax 7.5 gives the scale 1: ties go to even, +7.5 saturates at 7, -7.5 reaches -8."""
    row = torch.zeros(1, 32)
    row[0, :8] = torch.tensor([7.5, -7.5, 0.5, 1.5, 2.5, -0.5, -1.5, 6.75])
    parts = Int4(32).encode(row, (1, 32))
    assert parts["weight_scale"].tolist() == [[1.0]]
    assert unpack_nibbles(parts["weight_packed"], 8).tolist() == [[15, 0, 8, 10, 10, 8, 6, 15]]
    assert parts["weight_shape"].tolist() == [1, 32]


def test_int4_zero_group_by_hand() -> None:
    """A zero scale becomes BF16's epsilon, 2^-7; code 0 is the nibble 8."""
    parts = Int4(32).encode(torch.zeros(1, 32), (1, 32))
    assert parts["weight_scale"].tolist() == [[2.0**-7]]
    assert parts["weight_packed"].tolist() == [[word(0x88888888)] * 4]


def test_int8_first_row_by_hand() -> None:
    source, _, _ = load("ct_int8_channel")
    parts = Int8Channel().encode(source, (16, 128))
    assert parts["weight_scale"][0].tolist() == [0.058837890625]  # bf16(7.5 / 127.5)
    assert parts["weight"][0, :16].tolist() == [
        -8,
        -4,
        0,
        4,
        8,
        -4,
        0,
        4,
        8,
        -5,
        0,
        4,
        8,
        -5,
        -1,
        3,
    ]


def test_int8_range_by_hand() -> None:
    """amax 127.5 gives the scale 1: -127.5 -> -128 (even), +127.5 clamps to 127."""
    parts = Int8Channel().encode(torch.tensor([[127.5, -127.5, 0.5, 1.5, -2.5]]), (1, 5))
    assert parts["weight_scale"].tolist() == [[1.0]]
    assert parts["weight"].tolist() == [[127, -128, 0, 2, -2]]


def test_fp8_codes_by_hand() -> None:
    """amax 448 gives the scale 1. E4M3 steps: 2 from 16 to 32, 2^-9 below 2^-6; ties to even."""
    row = torch.tensor([[448.0, -1.0, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10, -(2.0**-9)]])
    parts = Fp8Block().encode(row, (1, 7))
    assert parts["weight_scale_inv"].tolist() == [[1.0]]
    assert parts["weight"].view(torch.uint8).tolist() == [
        [0x7E, 0xB8, 0x58, 0x5A, 0x00, 0x02, 0x81]
    ]


def test_fp8_scale_multiplies_and_the_edge_block_is_its_own() -> None:
    """Row 128 and column 128 belong to the second blocks: index // 128, grid by ceil."""
    codes = torch.ones(129, 129).to(torch.float8_e4m3fn)
    scale = torch.tensor([[2.0, 3.0], [5.0, 7.0]])
    decoded = Fp8Block().decode({"weight": codes, "weight_scale_inv": scale}, (129, 129))
    assert decoded[127, 127:].tolist() == [2.0, 3.0]
    assert decoded[128, 127:].tolist() == [5.0, 7.0]


@pytest.mark.parametrize(
    ("codec", "file"), [(Int4(), "ct_w4a16.json"), (Int8Channel(), "ct_w8a8.json")]
)
def test_config_is_compressed_tensors_own(codec: Codec, file: str) -> None:
    """`moe_sparsity_config: null` is written by one version only; readers do without it."""
    expected = json.loads((VECTORS / file).read_text())
    assert expected.pop("moe_sparsity_config") is None
    assert codec.config(["lm_head"]) == expected


def test_config_of_other_group_sizes_differs_only_there() -> None:
    config, default = Int4(32).config(["lm_head"]), Int4().config(["lm_head"])
    assert config["config_groups"]["group_0"]["weights"].pop("group_size") == 32
    assert default["config_groups"]["group_0"]["weights"].pop("group_size") == 128
    assert config == default


def test_fp8_config_is_deepseeks() -> None:
    published = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    assert Fp8Block().config([]) == published
    kept = Fp8Block().config(["lm_head", "model.layers.0.mlp.gate"])
    assert kept == {**published, "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"]}


@pytest.mark.parametrize("text", ["bf16", "fp16", "fp32"])
def test_plain_formats_have_no_config(text: str) -> None:
    codec = parse_format(text)
    assert codec.config(["lm_head"]) is None
    dtype = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}[text]
    assert codec.specs(3, 5) == {"weight": TensorSpec(dtype, (3, 5))}
