"""What the reference libraries make of a weight, format by format: encode and decode in float32.

Libraries decode in the dtype of the model they load for, BF16 or float16. Here each is told to
decode in float32, so that what comes next starts from the values themselves and not from rounded
ones. gptqmodel and AutoAWQ cannot be told: their formulas are written out, and test_matrix.py
holds them to gptqmodel's own float16.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from requant.quant import parse_format
from tests.helpers import Tensors
from tests.quant.test_int4_awq import ORDER, autoawq
from tests.quant.test_int8 import formula
from tests.quant.test_quant_oracles import deepseek_decode, deepseek_encode

#: Every format, in the variant whose codes a reference chooses too. compressed-tensors computes in
#: BF16 where its scales are BF16, and has a rule of its own for powers of two.
FORMATS = {
    "bf16": "bf16",
    "fp16": "fp16",
    "fp32": "fp32",
    "fp8-block": "fp8-block",
    "fp8-channel": "fp8-channel[arithmetic=bf16]",
    "fp8-tensor": "fp8-tensor",
    "mxfp8": "mxfp8[exponent=ct]",
    "int8-channel": "int8-channel[arithmetic=bf16]",
    "int8-block": "int8-block",
    "int4": "int4[arithmetic=bf16]",
    "mxfp4": "mxfp4[exponent=ct]",
    "nvfp4": "nvfp4[arithmetic=bf16]",
    "int4-awq": "int4-awq",
    "int4-gptq": "int4-gptq",
    "nf4": "nf4",
    "bnb-fp4": "bnb-fp4",
}
PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: What compressed-tensors rounds to BF16 before it encodes it, as the models it sees are in BF16.
IN_BF16 = {"fp8-channel", "int8-channel", "int4", "nvfp4"}
#: Formats whose scale for the whole weight is that of all layers an engine runs as one.
SHARED = {"fp8-tensor", "nvfp4"}
#: Sides of a block, and columns of a group.
SIDE = GROUP = 128


def decode(name: str, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    """The float32 weight [rows, cols] that the format's reference reads from its stored parts."""
    match name:
        case "bf16" | "fp16" | "fp32":
            return parts["weight"].to(torch.float32)
        case "fp8-block":
            return _deepseek_weight(parts)
        case "int8-block":
            return deepseek_decode(parts["weight"], parts["weight_scale_inv"])
        case "int4-awq":
            return _awq_weight(parts)
        case "int4-gptq":
            return _gptq_weight(parts)
        case "nf4" | "bnb-fp4":
            return _bitsandbytes_weight(parts)
        case "nvfp4":
            return _nvfp4_weight(parts)
    compressor, scheme = _compressor(name)
    scale = parts["weight_scale"]
    if scale.is_floating_point():  # decoded in its dtype; powers of two are exact in any
        parts = {**parts, "weight_scale": scale.to(torch.float32)}
    decoded: torch.Tensor = compressor.decompress(dict(parts), scheme)["weight"]
    return decoded.to(torch.float32)


def encode(name: str, weights: Sequence[torch.Tensor]) -> Tensors:
    """The parts that the format's reference stores of the first weight, float32 [rows, cols].

    The others are the layers that engines run with it as one: where the format has one scale for
    all, the reference encodes the whole of them. Not int4-gptq, which needs a process of its own.
    """
    weight = weights[0]
    match name:
        case "bf16" | "fp16" | "fp32":
            return {"weight": weight.to(PLAIN[name])}
        case "fp8-block" | "int8-block":
            codes, scale = (
                deepseek_encode(weight) if name == "fp8-block" else formula(weight, SIDE, SIDE)
            )
            return {"weight": codes, "weight_scale_inv": scale}
        case "int4-awq":
            return autoawq(weight, GROUP)
        case "nf4" | "bnb-fp4":
            return _bitsandbytes_parts(name, weight)
    if name not in SHARED:
        return _compress(name, weight)
    # Codes and scales of its rows, and the scale of the whole.
    parts = _compress(name, torch.cat(list(weights)))
    return {part: t[: len(weight)] if t.dim() == 2 else t for part, t in parts.items()}


@functools.cache
def _compressor(name: str) -> tuple[Any, Any]:
    """compressed-tensors' compressor and scheme, from the config that we write."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(parse_format(name).config([]))
    compressor = BaseCompressor.get_value_from_registry(config.format)
    return compressor, config.config_groups["group_0"]


def _compress(name: str, weight: torch.Tensor) -> Tensors:
    """What compressed-tensors stores. Without zero points, which symmetric formats do not store:
    adding one of 0 would turn -0.0 into 0.0 and change nothing else."""
    compressor, scheme = _compressor(name)
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    state, whole = {}, None
    if name in IN_BF16:
        weight = weight.to(torch.bfloat16)
    if name == "nvfp4":
        whole = generate_gparam(*torch.aminmax(weight.to(torch.float32)))
        state["weight_global_scale"] = whole
    if name == "fp8-tensor":
        low, high = torch.aminmax(weight)
    else:
        groups = weight.unflatten(1, (-1, scheme.weights.group_size or weight.shape[1]))
        low, high = torch.aminmax(groups, dim=2)
    scale, _ = calculate_qparams(low, high, scheme.weights, global_scale=whole)
    stored = compressor.compress({"weight": weight, "weight_scale": scale, **state}, scheme)
    return dict(stored)


def _nvfp4_weight(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """NVFP4PackedCompressor.decompress, with float32 where it says BF16."""
    scheme = _compressor("nvfp4")[1]
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    packed = parts["weight_packed"]
    rows, words = packed.shape
    decoded: torch.Tensor = dequantize(
        x_q=unpack_fp4_from_uint8(packed, rows, 2 * words, torch.float32),
        scale=parts["weight_scale"].to(torch.float32),
        args=scheme.weights,
        dtype=torch.float32,
        global_scale=parts["weight_global_scale"],
    )
    return decoded


def _deepseek_weight(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """compressed-tensors' reader of DeepSeek's blocks."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

    reader = FP8BlockDequantizer(targets=["layer"], dtype=torch.float32)
    decoded: torch.Tensor = reader.process({f"layer.{k}": v for k, v in parts.items()})[
        "layer.weight"
    ]
    return decoded


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 [...] -> [..., 8], the lowest first."""
    return words[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32) & 15


def _gptq_weight(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """TorchLinear.dequantize_weight after convert_gptq_v1_to_v2_format_module: one is added to the
    zero points, scale * (code - zero) by each column's group, turned."""
    codes = _nibbles(parts["qweight"]).transpose(1, 2).flatten(0, 1)
    zeros = _nibbles(parts["qzeros"]).flatten(1) + 1
    group = parts["g_idx"].long()
    return (parts["scales"].to(torch.float32)[group] * (codes - zeros[group])).T.contiguous()


def _awq_weight(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """AutoAWQ's dequantize_gemm: nibble i is row ORDER[i] of eight; (code - zero) * scale."""
    place = [ORDER.index(row) for row in range(8)]
    codes, zeros = (_nibbles(parts[part])[..., place].flatten(1) for part in ("qweight", "qzeros"))
    zeros, scales = (t.repeat_interleave(GROUP, 0) for t in (zeros, parts["scales"]))
    return ((codes - zeros) * scales.to(torch.float32)).T.contiguous()


def _bitsandbytes_weight(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Decoded by bitsandbytes, told by the JSON that the weight was float32. Its kernels differ
    among themselves in the sign of FP4's second zero: all zeros are positive here."""
    from tests.quant.test_bitsandbytes import their_weight

    (state,) = (part for part in parts if "quant_state" in part)
    told = json.loads(bytes(parts[state].numpy())) | {"dtype": "float32"}
    content = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
    return their_weight({**parts, state: content}) + 0.0


def _bitsandbytes_parts(name: str, weight: torch.Tensor) -> Tensors:
    """Encoded by bitsandbytes, told that the weight was BF16 as the model is."""
    from tests.quant.test_bitsandbytes import KINDS, bnb

    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type=KINDS[name])
    state.dtype = torch.bfloat16
    stored = state.as_dict(packed=True)
    return {"weight": packed, **{f"weight.{key}": value for key, value in stored.items()}}
