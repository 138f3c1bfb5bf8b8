"""GPTQ: gptqmodel's vectors, both versions of zero points, group orders, and lossless repacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from requant.errors import FormatError
from requant.quant import detect_format, parse_format
from requant.quant.codec import Codes, TensorSpec
from requant.quant.int4_awq import Int4Awq
from requant.quant.int4_gptq import Int4Gptq
from requant.quant.packing import pack_nibbles, unpack_nibbles

VECTORS = Path(__file__).parent.parent / "vectors"
ONES = 0x11111111
Tensors = dict[str, torch.Tensor]

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def vector(name: str, version: int) -> tuple[torch.Tensor, Tensors, torch.Tensor]:
    """Input weight float32 [16, 64], stored parts, gptqmodel's own decoded weight in float16."""
    tensors = load_file(VECTORS / f"{name}.safetensors")
    parts = {k.removeprefix("stored."): v for k, v in tensors.items() if k.startswith("stored.")}
    parts["qzeros"] = tensors[f"stored_v{version}.qzeros"]
    return tensors["input.weight"].to(torch.float32), parts, tensors["dequantized.weight"]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["gptq_sym_g32", "gptq_asym_g32"])
def test_encode_gives_gptqmodels_bytes_but_for_ties(name: str, version: int, same: Any) -> None:
    """The vector's codes are round((w + zero * s) / s), gptqmodel's own rounding is round(w / s) +
    zero (test_gptqmodel.py holds us to that): exact halves may go either way."""
    source, stored, _ = vector(name, version)
    codec = Int4Gptq(32, symmetric="asym" not in name, version=version)
    parts = codec.encode(source, (16, 64))
    assert list(parts) == ["qweight", "qzeros", "scales", "g_idx"]
    for part in ("qzeros", "scales", "g_idx"):
        assert same(parts[part], stored[part]), part
    ours, theirs = (unpack_nibbles(p["qweight"].T, 64).to(torch.int32) for p in (parts, stored))
    scale = stored["scales"].T.to(torch.float32).repeat_interleave(32, 1)
    halves = ((source / scale).frac().abs() - 0.5).abs() < 8 * 2.0**-11
    assert torch.equal(ours[~halves], theirs[~halves])
    assert (ours - theirs).abs().max() == 1 and (ours != theirs).sum() < 8


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["gptq_sym_g32", "gptq_asym_g32", "gptq_sym_g32_actorder"])
def test_decode_gives_gptqmodels_weight(name: str, version: int, same: Any) -> None:
    """It multiplies in float16; our float32 product is exact, so one rounding gives its result."""
    _, stored, reference = vector(name, version)
    decoded = Int4Gptq(32, version=version).decode(stored, (16, 64))
    assert decoded.dtype == torch.float32 and decoded.is_contiguous()
    assert same(decoded.to(torch.float16), reference)


def test_words_are_compressed_tensors_words_transposed(same: Any) -> None:
    """compressed-tensors' vector as GPTQ: its words; zero points and groups of gptqmodel's vector,
    which holds the same weight on the same grid."""
    tensors = load_file(VECTORS / "ct_w4a16_g32_sym.safetensors")
    ct = {k.removeprefix("stored."): v for k, v in tensors.items() if k.startswith("stored.")}
    codec = parse_format("int4[group_size=32]")
    packed = Int4Gptq(32).pack(codec.unpack(ct, (16, 64)), (16, 64))
    assert same(packed["qweight"], ct["weight_packed"].T.contiguous())
    source, parts, _ = vector("gptq_sym_g32", 1)
    assert same(source, tensors["input.weight"].to(torch.float32))
    assert same(packed["qzeros"], parts["qzeros"]) and same(packed["g_idx"], parts["g_idx"])
    ours, theirs = (unpack_nibbles(p["qweight"].T, 64).to(torch.int32) for p in (packed, parts))
    assert (ours - theirs).abs().max() == 1  # quotients rounded to BF16 there, to float32 here
    assert same(Int4Gptq(32).decode(packed, (16, 64)), codec.decode(ct, (16, 64)))


def test_version_1_stores_one_less() -> None:
    scale, zero = torch.ones(9, 1), torch.arange(1, 10, dtype=torch.uint8)[:, None]
    codes = Codes("int4", None, scale, (1, 8), zero)
    for version, words in ((1, [0x76543210]), (2, [0x87654321 - (1 << 32)])):
        codec = Int4Gptq(-1, symmetric=False, version=version)
        stored = codec.pack(codes, (9, 8))
        assert stored["qzeros"][0, :1].tolist() == words
        again = codec.unpack(stored, (9, 8)).zero
        assert again is not None and torch.equal(again, zero)
    # The unused nibbles borrow, as in gptqmodel's whole words.
    assert Int4Gptq(-1, symmetric=False).pack(codes, (9, 8))["qzeros"][0, 1] == 9 - ONES


def test_zero_points_of_0_in_version_1() -> None:
    """gptqmodel subtracts from whole words and adds to whole words, so it reads its own borrows;
    we read them as it does, and write none."""
    zero = torch.tensor([[3], [0], [0], [5], [0], [15], [1], [2]], dtype=torch.uint8)
    codes = Codes("int4", None, torch.ones(8, 1), (1, 8), zero)
    parts = Int4Gptq(-1, symmetric=False, version=2).pack(codes, (8, 8))
    first = {**parts, "qzeros": parts["qzeros"] - ONES}
    codec = Int4Gptq(-1, symmetric=False)
    read = codec.unpack(first, (8, 8)).zero
    assert read is not None and torch.equal(read, zero)
    with pytest.raises(FormatError, match=r"zero points of 0, .*symmetric=false,version=2"):
        codec.pack(codes, (8, 8))
    with pytest.raises(FormatError, match=r"other than 8 \(such as 3\).*symmetric=false"):
        Int4Gptq(-1).pack(codes, (8, 8))


@pytest.mark.parametrize("version", [1, 2])
def test_groups_of_one_sign(version: int) -> None:
    """Version 2 has zero point 0 and 15 steps above it; version 1 has zero point 1 and 14."""
    source = torch.linspace(0.0, 1.0, 32).expand(8, 32).contiguous()
    codec = Int4Gptq(32, symmetric=False, version=version)
    parts = codec.encode(source, (8, 32))
    zero = codec.unpack(parts, (8, 32)).zero
    assert zero is not None and (zero == 2 - version).all()
    error = (codec.decode(parts, (8, 32)) - source).abs().max()
    assert error <= 0.5 / (13 + version) * (1 + 2.0**-7)
    # Symmetric: gptqmodel would halve the scale and clip; here the grid has 0 in its middle.
    symmetric = Int4Gptq(32)
    decoded = symmetric.decode(symmetric.encode(source, (8, 32)), (8, 32))
    assert (decoded - source).abs().max() <= 1 / 15 * (1 + 2.0**-7)


@pytest.mark.parametrize(("symmetric", "version"), [(True, 1), (False, 1), (False, 2)])
@pytest.mark.parametrize("method", ["rtn", "mse"])
@quick
@given(exponent=st.integers(-24, 12), offset=st.floats(-2, 2), seed=st.integers(0, 2**32 - 1))
def test_error(
    symmetric: bool, version: int, method: str, exponent: int, offset: float, seed: int
) -> None:
    """rtn: half a step, and what rounding the scale (to 2^-25 at least) moves the 15th code by.
    mse: never more squared error in a group than rtn. 50 columns: the last group is short."""
    generator = torch.Generator().manual_seed(seed)
    source = (torch.rand(9, 50, generator=generator) * 2 - 1 + offset) * 2.0**exponent
    codec, shape = Int4Gptq(32, symmetric, version, method=method), (9, 50)
    parts = codec.encode(source, shape)
    error = (codec.decode(parts, shape) - source).abs()
    step = parts["scales"].T.to(torch.float32)[:, torch.arange(50) // 32]
    if method == "rtn":
        moved = (step * 2.0**-11).clamp_min(2.0**-25)
        assert (error <= (step / 2 + 15.5 * moved) * (1 + 2.0**-18)).all()
    else:
        plain = Int4Gptq(32, symmetric, version)
        limit = (plain.decode(plain.encode(source, shape), shape) - source).square()
        for columns in (slice(0, 32), slice(32, 50)):
            total = error[:, columns].square().sum(1)
            assert (total <= limit[:, columns].sum(1) * (1 + 2.0**-18)).all()


def test_groups_of_zeros_are_gptqmodels() -> None:
    parts = Int4Gptq(32).encode(torch.zeros(8, 32), (8, 32))
    assert parts["scales"].unique().tolist() == [torch.tensor(2 / 15).to(torch.float16)]
    assert parts["qweight"].unique().tolist() == [0x88888888 - (1 << 32)]
    assert parts["qzeros"].unique().tolist() == [0x77777777]


def test_act_order_is_read_and_not_written(weight: Any) -> None:
    source, stored, _ = vector("gptq_sym_g32_actorder", 1)
    config = {**Int4Gptq(32).config([]), "desc_act": True}
    codec = detect_format(Int4Gptq(32).specs(16, 64), config)
    assert codec == Int4Gptq(32, act_order=True) and codec.read_only
    with pytest.raises(FormatError, match="act-order groups"):
        codec.unpack(stored, (16, 64))
    with pytest.raises(FormatError, match="act_order=true is read, not written"):
        codec.encode(source, (16, 64))
    with pytest.raises(FormatError, match="act_order=true is read, not written"):
        codec.pack(Codes("int4", None, torch.ones(16, 2), (1, 32)), (16, 64))
    regular = Int4Gptq(32).encode(source, (16, 64))
    assert codec.unpack(regular, (16, 64)).codes is not None


def test_scales_below_fp16_become_its_smallest() -> None:
    """2 amax / 15 is a quarter of 2^-24 here and would be 0; 2^-24 holds the weight exactly."""
    source = torch.tensor([[2.0**-23, -(2.0**-23), 2.0**-24, 0.0] * 8])
    parts = Int4Gptq(32).encode(source, (1, 32))
    assert parts["scales"].item() == 2.0**-24
    assert torch.equal(Int4Gptq(32).decode(parts, (1, 32)), source)


@pytest.mark.parametrize("shape", [(1, 8), (5, 8), (5, 1), (1, 1), (8, 16), (9, 17)])
def test_the_smallest_weights(shape: tuple[int, int], weight: Any, same: Any) -> None:
    """One word a row, one row a word: strides that torch leaves open."""
    for codec in (Int4Gptq(-1), Int4Gptq(16, symmetric=False)):
        parts = codec.encode(weight(*shape), shape)
        decoded = codec.decode(parts, shape)
        assert (decoded - weight(*shape)).abs().max() <= parts["scales"].max() * 0.51
        again = codec.pack(codec.unpack(parts, shape), shape)
        assert all(same(again[name], parts[name]) for name in parts)


def test_any_order_of_groups_decodes(weight: Any, same: Any) -> None:
    """Shuffled columns with their groups: the columns of the plain weight, shuffled."""
    codec, shape = Int4Gptq(32, symmetric=False), (16, 96)
    parts = codec.encode(weight(*shape), shape)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    codes = pack_nibbles(unpack_nibbles(parts["qweight"].T, 96)[:, order]).view(torch.uint8)
    packed = Int4Gptq(32).pack(Codes("int4", codes, torch.ones(16, 3), (1, 32)), shape)
    shuffled = {**parts, "qweight": packed["qweight"], "g_idx": parts["g_idx"][order]}
    assert same(codec.decode(shuffled, shape), codec.decode(parts, shape)[:, order].contiguous())
    for bad in (-1, 3):
        outside = {**parts, "g_idx": torch.full((96,), bad, dtype=torch.int32)}
        with pytest.raises(FormatError, match="g_idx points outside the 3 groups"):
            codec.decode(outside, shape)


@pytest.mark.parametrize(
    ("part", "spec", "message"),
    [
        ("qweight", TensorSpec("I32", (32, 64)), "32 words .* for 128 columns, 8 bits each; only"),
        ("qzeros", TensorSpec("I32", (4, 9)), r"qzeros is I32 \[4, 9\], expected I32 \[4, 8\]"),
        ("scales", TensorSpec("F32", (4, 64)), r"scales is F32 \[4, 64\], expected F16 \[4, 64\]"),
        ("scales", TensorSpec("F16", (3, 64)), r"scales is F16 \[3, 64\], expected F16 \[4, 64\]"),
        ("g_idx", None, "g_idx is missing"),
    ],
)
def test_parts_that_contradict_each_other(part: str, spec: TensorSpec | None, message: str) -> None:
    parts = {**Int4Gptq(32).specs(64, 128), part: spec}
    with pytest.raises(FormatError, match=message):
        detect_format({k: v for k, v in parts.items() if v}, Int4Gptq(32).config([]))


def test_detection() -> None:
    codec = Int4Gptq(32, symmetric=False, version=2)
    specs, config = codec.specs(64, 100), codec.config(["lm_head"])
    assert detect_format(specs, config) == codec
    renamed = {**config, "format": config["checkpoint_format"]}
    del renamed["checkpoint_format"]
    assert detect_format(specs, renamed) == codec
    with pytest.raises(FormatError, match="checkpoint_format 'gptq_p', and only gptq and gptq_v2"):
        detect_format(specs, {**config, "checkpoint_format": "gptq_p"})
    assert detect_format(Int4Gptq(64).specs(8, 128), None) == Int4Gptq(64)
    assert Int4Gptq(32, scale="bf16").accepts(Int4Gptq(32)) is False
    assert Int4Gptq(32).accepts(Int4Gptq(32, scale="bf16"))
    assert not Int4Gptq(32).accepts(Int4Gptq(32, version=2))
    assert config["dynamic"] == {"-:^lm_head$": {}} and "dynamic" not in codec.config([])


def test_kept_modules_are_matched_as_a_whole() -> None:
    import re

    (rule,) = Int4Gptq().config(["model.layers.1.mlp.gate"])["dynamic"]
    pattern = re.compile(rule.removeprefix("-:"))
    assert pattern.match("model.layers.1.mlp.gate")
    assert not pattern.match("model.layers.1.mlp.gate_proj")
    assert not pattern.match("model.layers.10mlp.gate")


@pytest.mark.parametrize("option", ["group_size=48", "version=3", "scale=fp32", "method=gptq"])
def test_bad_options(option: str) -> None:
    with pytest.raises(FormatError, match=f"{option}: expected"):
        parse_format(f"int4-gptq[{option}]")


REPACKS = [
    ("int4[group_size=32]", "int4-gptq[group_size=32]"),
    ("int4[group_size=32]", "int4-gptq[group_size=32,version=2]"),
    ("int4[group_size=64]", "int4-awq[group_size=32]"),
    ("int4-gptq[group_size=32]", "int4[group_size=32,scale=fp16]"),
    ("int4-gptq[group_size=32]", "int4-awq[group_size=32]"),
    ("int4-gptq[group_size=32,symmetric=false]", "int4-awq[group_size=32]"),
    ("int4-gptq[group_size=-1,symmetric=false]", "int4-awq[group_size=-1]"),
    ("int4-awq[group_size=32]", "int4-gptq[group_size=32,symmetric=false,version=2]"),
    ("int4-awq[group_size=32]", "int4[group_size=32,symmetric=false,scale=fp16]"),
    ("int4[group_size=32,symmetric=false]", "int4-awq[group_size=32]"),
]


@pytest.mark.parametrize(("source", "target"), REPACKS)
def test_repacks_lose_nothing(source: str, target: str, weight: Any, same: Any) -> None:
    """The decoded weight bit for bit, of the whole as of tiles; where scales do, all goes."""
    old, new, shape = parse_format(source), parse_format(target), (64, 192)
    parts = old.encode(weight(*shape) + 1.0, shape)
    packed = new.pack(old.unpack(parts, shape), shape)
    assert same(new.decode(packed, shape), old.decode(parts, shape))
    specs, whole = new.specs(*shape), old.specs(*shape)
    assert list(packed) == list(specs)
    for start in (0, 32):
        tile = {n: whole[n].take(parts[n], start, start + 32).contiguous() for n in whole}
        got = new.pack(old.unpack(tile, (32, 192)), shape)
        for name, spec in specs.items():
            assert same(got[name], spec.take(packed[name], start, start + 32)), name
    scales = {name: t for name, t in parts.items() if name not in ("qweight", "weight_packed")}
    alone = new.pack(old.unpack(scales, shape), shape)
    assert set(packed) - set(alone) <= {"qweight", "weight_packed"} and alone
    assert all(same(alone[name], packed[name]) for name in alone)


def test_there_and_back(weight: Any, same: Any) -> None:
    gptq, awq, shape = Int4Gptq(32, symmetric=False), Int4Awq(32), (32, 96)
    parts = gptq.encode(weight(*shape), shape)
    moved = awq.pack(gptq.unpack(parts, shape), shape)
    again = gptq.pack(awq.unpack(moved, shape), shape)
    assert all(same(again[name], parts[name]) for name in parts)
