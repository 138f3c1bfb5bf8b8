"""Oracles: compressed-tensors, transformers, and DeepSeek's formula written out, on random weights.

The reference libraries are not dependencies; without them these tests are skipped.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from requant.quant import parse_format
from requant.quant.fp8_block import Fp8Block
from requant.quant.packing import pack_nibbles, unpack_nibbles

INTEGERS = ["int8-channel", "int4", "int4[group_size=64]", "int4[group_size=32]"]
SHAPES = [(160, 256), (576, 384), (1, 128), (37, 640)]
RAGGED = [(160, 256), (576, 7168), (129, 1), (127, 129), (1, 1)]


def exact(text: str) -> Any:
    """The codec in compressed-tensors' own arithmetic."""
    head, _, options = text.rstrip("]").partition("[")
    return parse_format(f"{head}[{options + ',' if options else ''}arithmetic=bf16]")


def reference_encode(codec: Any, weight: torch.Tensor) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """compressed-tensors: compressor, scheme, and the tensors it stores of a BF16 weight."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import (
        IntQuantizationCompressor,
        PackedQuantizationCompressor,
    )
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.utils import calculate_qparams

    config = QuantizationConfig.model_validate(codec.config(["lm_head"]))
    scheme = config.config_groups["group_0"]
    size = scheme.weights.group_size or weight.shape[1]
    low, high = torch.aminmax(weight.reshape(weight.shape[0], -1, size), dim=-1)
    scale, zero_point = calculate_qparams(low, high, scheme.weights)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
    packed = codec.name == "int4"
    compressor = PackedQuantizationCompressor if packed else IntQuantizationCompressor
    return compressor, scheme, compressor.compress(state, scheme)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", INTEGERS)
def test_integers_are_compressed_tensors_bytes(
    text: str, shape: tuple[int, int], weight: Any, same: Any
) -> None:
    """Encode: codes, scales, packing and shape. Decode: theirs of ours is ours, in BF16."""
    codec, source = exact(text), weight(*shape, seed=shape[0])
    source[-1, :128] = 0.0  # a group (with one row of 128 columns, the weight) of zeros
    compressor, scheme, stored = reference_encode(codec, source.to(torch.bfloat16))
    parts = codec.encode(source, shape)
    assert set(stored) == set(parts)
    for name, tensor in stored.items():
        assert same(parts[name], tensor), name
    decoded = compressor.decompress(parts, scheme)["weight"]
    assert same(codec.decode(parts, shape).to(torch.bfloat16), decoded)


@pytest.mark.parametrize("text", ["int8-channel", "int4"])
def test_default_arithmetic_changes_codes_not_scales_and_not_their_decoder(
    text: str, weight: Any, same: Any
) -> None:
    """fp32 division: the same scales for a BF16 source, codes a step away at most, less error."""
    shape = (160, 256)
    codec, source = parse_format(text), weight(160, 256)
    compressor, scheme, stored = reference_encode(codec, source.to(torch.bfloat16))
    ours, theirs = codec.encode(source, shape), stored
    assert same(ours["weight_scale"], theirs["weight_scale"])
    assert same(
        codec.decode(ours, shape).to(torch.bfloat16), compressor.decompress(ours, scheme)["weight"]
    )
    our_error = codec.decode(ours, shape) - source
    their_error = codec.decode(theirs, shape) - source
    differs = our_error != their_error
    assert 0 < differs.float().mean() < 0.2
    assert our_error.square().sum() < their_error.square().sum()


@pytest.mark.parametrize("cols", [8, 12, 31, 128])
def test_packing_is_compressed_tensors(cols: int, same: Any) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    generator = torch.Generator().manual_seed(cols)
    codes = torch.randint(-8, 8, (5, cols), generator=generator, dtype=torch.int8)
    words = pack_nibbles((codes + 8).to(torch.uint8))
    assert same(words, pack_to_int32(codes, 4))
    assert torch.equal(unpack_nibbles(words, cols).to(torch.int8) - 8, codes)


@pytest.mark.parametrize("text", [*INTEGERS, "int4[arithmetic=bf16]"])
def test_config_is_accepted_by_compressed_tensors(text: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig

    codec = parse_format(text)
    config = codec.config(["lm_head"])
    read = QuantizationConfig.model_validate(config)
    assert read.ignore == ["lm_head"] and config is not None
    written = read.model_dump()["config_groups"]["group_0"]["weights"]
    ours = config["config_groups"]["group_0"]["weights"]
    assert {key: written[key] for key in ours} == ours


def deepseek_decode(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """weight_dequant_kernel of DeepSeek-V3's inference/kernel.py: one program per 128x128 block;
    x.to(float32) * s, the last blocks masked."""
    rows, cols = codes.shape
    out = torch.empty(rows, cols)
    for m in range(-(-rows // 128)):
        for n in range(-(-cols // 128)):
            block = slice(m * 128, (m + 1) * 128), slice(n * 128, (n + 1) * 128)
            out[block] = codes[block].to(torch.float32) * scale[m, n]
    return out


def deepseek_encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """act_quant_kernel's arithmetic on blocks of a weight: max(amax, 1e-4) / 448, x / s."""
    rows, cols = weight.shape
    codes = torch.empty(rows, cols, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-rows // 128), -(-cols // 128))
    for m in range(scale.shape[0]):
        for n in range(scale.shape[1]):
            block = slice(m * 128, (m + 1) * 128), slice(n * 128, (n + 1) * 128)
            scale[m, n] = torch.clamp_min(weight[block].abs().max(), 1e-4) / 448.0
            codes[block] = (weight[block] / scale[m, n]).to(torch.float8_e4m3fn)
    return codes, scale


@pytest.mark.parametrize("shape", RAGGED)
def test_fp8_is_deepseeks_formula(shape: tuple[int, int], weight: Any, same: Any) -> None:
    source = weight(*shape)
    parts = Fp8Block().encode(source, shape)
    codes, scale = deepseek_encode(source)
    assert same(parts["weight"], codes) and same(parts["weight_scale_inv"], scale)
    assert same(Fp8Block().decode(parts, shape), deepseek_decode(codes, scale))


@pytest.mark.parametrize("shape", RAGGED)
def test_fp8_decode_is_compressed_tensors(shape: tuple[int, int], weight: Any, same: Any) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

    parts = Fp8Block().encode(weight(*shape) * 1.1, shape)
    named = {f"layer.{name}": tensor for name, tensor in parts.items()}
    theirs = FP8BlockDequantizer(targets=["layer"]).process(named)["layer.weight"]
    assert same(Fp8Block().decode(parts, shape).to(torch.bfloat16), theirs)


def test_fp8_encode_is_transformers_within_its_reciprocals(weight: Any) -> None:
    """transformers multiplies by 448 / amax and stores 1 / (448 / amax): three roundings where
    DeepSeek's formula has one, so scales may differ by an ulp, and a quotient next to a tie may
    land on the neighbouring code. Everything else is equal."""
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    class Quantizer:
        quantization_config = transformers.FineGrainedFP8Config(weight_block_size=(128, 128))

    source = weight(256, 384)
    theirs = Fp8Quantize(Quantizer()).convert({"layer.weight": source.to(torch.bfloat16)})
    parts = Fp8Block().encode(source, (256, 384))
    ulps = parts["weight_scale_inv"].view(torch.int32) - theirs["layer.weight_scale_inv"].view(
        torch.int32
    )
    assert ulps.abs().max() <= 1
    ours = parts["weight"].view(torch.uint8).to(torch.int16)
    difference = (ours - theirs["layer.weight"].view(torch.uint8).to(torch.int16)).abs()
    assert difference.max() <= 1
    assert (difference != 0).float().mean() < 1e-3


def test_fp8_from_transformers_comes_back_through_fp32(weight: Any, same: Any) -> None:
    """Scales that are not amax / 448: one in eight is missed by the plain quotient."""
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    class Quantizer:
        quantization_config = transformers.FineGrainedFP8Config(weight_block_size=(32, 32))

    theirs = Fp8Quantize(Quantizer()).convert({"weight": weight(512, 512) * 1.1})
    parts = {name: tensor for name, tensor in theirs.items()}
    scale = parts["weight_scale_inv"]
    assert (448 * scale / 448 != scale).sum() > 5
    codec = Fp8Block(32, 32)
    again = codec.encode(codec.decode(parts, (512, 512)), (512, 512))
    assert same(again["weight"], parts["weight"]) and same(again["weight_scale_inv"], scale)


def test_fp8_config_is_read_by_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.FineGrainedFP8Config.from_dict(Fp8Block().config(["lm_head"]))
    assert list(config.weight_block_size) == [128, 128]
    assert config.modules_to_not_convert == ["lm_head"]
    assert config.activation_scheme == "dynamic" and not config.dequantize
