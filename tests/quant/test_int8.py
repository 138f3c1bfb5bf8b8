"""INT8: SGLang's containers, scales of other dtypes, and codes that are handed over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file

from requant.errors import FormatError
from requant.quant import detect_format, parse_format
from requant.quant.codec import Codes, TensorSpec
from requant.quant.int8_block import Int8Block
from requant.quant.int8_channel import Int8Channel
from tests.quant.test_quant_golden import VECTORS
from tests.quant.test_quant_oracles import reference_encode
from tests.quant.test_quant_properties import FP32_SLACK, Case, cases, quick

SGLANG = Int8Channel("sglang")
BLOCK_CONFIG = {
    "quant_method": "blockwise_int8",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def formula(weight: torch.Tensor, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    """amax / 127 and round(clamp(w / s, -127, 127)), one block after the other."""
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // cols))
    for m in range(scale.shape[0]):
        for n in range(scale.shape[1]):
            block = slice(m * rows, (m + 1) * rows), slice(n * cols, (n + 1) * cols)
            scale[m, n] = weight[block].abs().max() / 127
            if scale[m, n] == 0:
                scale[m, n] = torch.finfo(torch.float32).eps
            codes[block] = (weight[block] / scale[m, n]).clamp(-127, 127).round().to(torch.int8)
    return codes, scale


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sglang_w8a8_int8", "int8-channel[container=sglang]"),
        ("sglang_blockwise_int8", "int8-block"),
    ],
)
def test_vectors(name: str, text: str, same: Any) -> None:
    tensors = load_file(VECTORS / f"{name}.safetensors")
    source = tensors.pop("input.weight").to(torch.float32)
    stored = {part.removeprefix("stored."): tensor for part, tensor in tensors.items()}
    codec, shape = parse_format(text), (source.shape[0], source.shape[1])
    parts = codec.encode(source, shape)
    assert set(parts) == set(stored)
    assert all(same(parts[part], tensor) for part, tensor in stored.items())
    scale = next(tensor for part, tensor in stored.items() if "scale" in part)
    each = scale.repeat_interleave(shape[0] // scale.shape[0], 0)
    assert torch.equal(codec.decode(stored, shape), stored["weight"].to(torch.float32) * each)


@pytest.mark.parametrize("shape", [(160, 256), (129, 1), (127, 300), (1, 1)])
@pytest.mark.parametrize("block", [(128, 128), (32, 64), (1, 7)])
def test_blocks_are_the_formula(
    shape: tuple[int, int], block: tuple[int, int], weight: Any, same: Any
) -> None:
    source = weight(*shape) * 1.1
    source[: block[0], : block[1]] = 0.0
    parts = Int8Block(*block).encode(source, shape)
    codes, scale = formula(source, *block)
    assert same(parts["weight"], codes) and same(parts["weight_scale_inv"], scale)
    whole = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    expected = codes.to(torch.float32) * whole[: shape[0], : shape[1]]
    assert same(Int8Block(*block).decode(parts, shape), expected)


@pytest.mark.parametrize("shape", [(160, 256), (3, 1), (1, 129)])
def test_sglangs_rows_are_the_formula(shape: tuple[int, int], weight: Any, same: Any) -> None:
    source = weight(*shape) * 1.1
    source[-1] = 0.0
    parts = SGLANG.encode(source, shape)
    codes, scale = formula(source, 1, shape[1])
    assert same(parts["weight"], codes) and same(parts["weight_scale"], scale)


@pytest.mark.parametrize(("scale", "dtype"), [("fp16", torch.float16), ("fp32", torch.float32)])
def test_other_scale_dtypes_decode_as_compressed_tensors_does(
    scale: str, dtype: torch.dtype, weight: Any, same: Any
) -> None:
    codec, source = parse_format(f"int8-channel[scale={scale}]"), weight(40, 256) * 1.1
    compressor, scheme, _ = reference_encode(codec, source.to(torch.bfloat16))
    parts = codec.encode(source, (40, 256))
    assert parts["weight_scale"].dtype == dtype
    decoded = compressor.decompress(parts, scheme)["weight"]
    assert same(codec.decode(parts, (40, 256)).to(dtype), decoded)


@quick
@given(case=cases())
def test_error_is_half_a_step_in_blocks(case: Case) -> None:
    """amax is 127 steps: nothing is clamped by more than the scale's rounding to float32."""
    source, shape = case.weight(), (case.rows, case.cols)
    parts = Int8Block(32, 16).encode(source, shape)
    scale = parts["weight_scale_inv"].repeat_interleave(32, 0).repeat_interleave(16, 1)
    step = scale[: case.rows, : case.cols]
    error = (Int8Block(32, 16).decode(parts, shape) - source).abs()
    assert (error <= step * 0.5 * FP32_SLACK + source.abs() * 2.0**-22).all()
    assert parts["weight"].min() >= -127


@pytest.mark.parametrize("codec", [Int8Block(), SGLANG])
def test_configs_are_sglangs(codec: Any) -> None:
    kept = ["lm_head", "model.layers.0.mlp.gate"]
    if codec == SGLANG:
        assert codec.config(kept) == {"quant_method": "w8a8_int8", "ignore": kept}
        assert codec.quant_method == "w8a8_int8" and codec.scheme() is None
    else:
        assert codec.config([]) == BLOCK_CONFIG
        assert codec.config(kept) == {**BLOCK_CONFIG, "ignored_layers": kept}


# Detection.


@pytest.mark.parametrize("scale", ["auto", "bf16", "fp16", "fp32"])
def test_the_config_tells_the_containers_apart(scale: str) -> None:
    codec = Int8Channel(scale=scale)
    assert detect_format(codec.specs(24, 256), codec.config([])) == codec
    assert detect_format(SGLANG.specs(24, 256), {"quant_method": "w8a8_int8"}) == SGLANG
    assert Int8Channel().accepts(codec) and not Int8Channel().accepts(SGLANG)
    assert not SGLANG.accepts(codec) and SGLANG.accepts(Int8Channel("sglang", scale="fp32"))
    assert Int8Channel(scale="fp16").accepts(codec) == (scale == "fp16")


def test_a_scale_named_as_the_container_has_it_is_auto() -> None:
    assert Int8Channel(scale="bf16") == Int8Channel()
    assert Int8Channel("sglang", "fp32") == SGLANG
    for scale in ("bf16", "fp16"):
        with pytest.raises(FormatError, match=f"scale={scale}: expected auto, fp32"):
            Int8Channel("sglang", scale)
    with pytest.raises(FormatError, match="arithmetic=bf16 repeats compressed-tensors"):
        parse_format("int8-channel[container=sglang,arithmetic=bf16]")


def test_sglangs_scales_are_float32() -> None:
    with pytest.raises(FormatError, match=r"BF16 \[24, 1\], expected F32 \[24, 1\]"):
        detect_format(Int8Channel().specs(24, 256), SGLANG.config([]))


def test_int4_codes_in_bytes_are_not_int8() -> None:
    """compressed-tensors' W4A8 keeps 4-bit codes one a byte, in groups."""
    config = Int8Channel().config([])
    assert config is not None
    config["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    assert Int8Channel().detect(Int8Channel().specs(24, 256), config) is None


def test_blocks_need_a_config_that_says_so() -> None:
    specs = Int8Block().specs(576, 7168)
    assert detect_format(specs, BLOCK_CONFIG) == Int8Block()
    assert Int8Block().detect(specs, None) is None
    assert Int8Block().detect(specs, {"quant_method": "fp8"}) is None
    small = {**BLOCK_CONFIG, "weight_block_size": [64, 32]}
    assert detect_format(Int8Block(64, 32).specs(576, 7168), small) == Int8Block(64, 32)
    with pytest.raises(FormatError, match=r"F32 \[5, 56\], expected F32 \[9, 224\]"):
        detect_format(specs, small)
    stacked = {name: TensorSpec(s.dtype, (4, *s.shape)) for name, s in specs.items()}
    assert Int8Block().detect(stacked, BLOCK_CONFIG) is None


@pytest.mark.parametrize("block", [[128], [0, 128], "128", [128, 1.5], [128, 10**12]])
def test_bad_block_size_in_the_config(block: Any) -> None:
    config = {**BLOCK_CONFIG, "weight_block_size": block}
    with pytest.raises(FormatError, match="weight_block_size is .* two integers from 1"):
        detect_format(Int8Block().specs(576, 7168), config)
    with pytest.raises(FormatError, match="at least one row"):
        parse_format("int8-block[block_rows=0]")


# Codes handed over.


def test_compressed_tensors_to_sglang_and_back(weight: Any, same: Any) -> None:
    """BF16 scales are float32 scales; the other way only those that BF16 holds."""
    shape = (160, 256)
    parts = Int8Channel().encode(weight(*shape), shape)
    moved = SGLANG.pack(Int8Channel().unpack(parts, shape), shape)
    assert moved["weight_scale"].dtype == torch.float32
    assert same(moved["weight"], parts["weight"])
    assert same(SGLANG.decode(moved, shape), Int8Channel().decode(parts, shape))
    back = Int8Channel().pack(SGLANG.unpack(moved, shape), shape)
    assert all(same(back[name], tensor) for name, tensor in parts.items())
    own = SGLANG.encode(weight(*shape), shape)
    with pytest.raises(FormatError, match="has no exact bfloat16"):
        Int8Channel().pack(SGLANG.unpack(own, shape), shape)
    kept = Int8Channel(scale="fp32").pack(SGLANG.unpack(own, shape), shape)
    assert all(same(kept[name], tensor) for name, tensor in own.items())


@pytest.mark.parametrize("codec", [Int8Channel(), SGLANG, Int8Block(), Int8Block(64, 32)])
def test_pack_undoes_unpack(codec: Any, weight: Any, same: Any) -> None:
    shape = (160, 200)
    parts = codec.encode(weight(*shape), shape)
    again = codec.pack(codec.unpack(parts, shape), shape)
    assert all(same(again[name], tensor) for name, tensor in parts.items())
    scales = {name: tensor for name, tensor in parts.items() if name != "weight"}
    again = codec.pack(codec.unpack(scales, shape), shape)
    assert set(again) == set(scales)
    assert all(same(again[name], tensor) for name, tensor in scales.items())


def test_finer_blocks_repeat_scales(weight: Any) -> None:
    shape = (160, 200)
    coarse, fine = Int8Block(128, 64), Int8Block(32, 32)
    parts = coarse.encode(weight(*shape), shape)
    again = fine.pack(coarse.unpack(parts, shape), shape)
    assert again["weight_scale_inv"].shape == (5, 7)
    assert torch.equal(fine.decode(again, shape), coarse.decode(parts, shape))
    with pytest.raises(FormatError, match="one scale for 128x64 weights, the source one for 32x32"):
        coarse.pack(fine.unpack(again, shape), shape)
    with pytest.raises(FormatError, match="the source one for 1x200"):
        coarse.pack(SGLANG.unpack(SGLANG.encode(weight(*shape), shape), shape), shape)
    with pytest.raises(FormatError, match="int8-block takes no codes of e4m3"):
        coarse.pack(Codes("e4m3", None, torch.ones(2, 4), (128, 64)), shape)


def test_blocks_as_wide_as_the_weight_become_rows(weight: Any) -> None:
    shape, wide = (64, 128), Int8Block(32, 128)
    parts = wide.encode(weight(*shape), shape)
    moved = SGLANG.pack(wide.unpack(parts, shape), shape)
    assert torch.equal(SGLANG.decode(moved, shape), wide.decode(parts, shape))
