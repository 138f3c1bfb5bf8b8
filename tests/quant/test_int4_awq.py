"""AWQ: AutoAWQ's bytes, its packing written out, what is refused, what moves without loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from requant.errors import FormatError
from requant.quant import compiled, detect_format, parse_format
from requant.quant.codec import Codes, TensorSpec
from requant.quant.int4_awq import Int4Awq, pack_rows, unpack_rows
from requant.quant.packing import pack_nibbles, unpack_nibbles

VECTORS = Path(__file__).parent.parent / "vectors"
#: Row 8c + ORDER[i] of the weight is nibble i of word c.
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
HALF_UNIT = 2.0**-11  # of F16's 11 significant bits

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def vector() -> dict[str, torch.Tensor]:
    return load_file(VECTORS / "awq_gemm_g32.safetensors")


def autoawq(weight: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
    """AutoAWQ 0.2.9 written out: `pseudo_quantize_tensor`, then `WQLinear_GEMM.from_linear`."""
    rows, cols = weight.shape
    groups = weight.reshape(-1, size)
    high, low = groups.amax(1, keepdim=True), groups.amin(1, keepdim=True)
    scales = (high - low).clamp(min=1e-5) / 15
    zeros = (-torch.round(low / scales)).clamp_(0, 15)
    rounded = (torch.clamp(torch.round(groups / scales) + zeros, 0, 15) - zeros) * scales
    rounded = rounded.reshape(rows, cols)
    scales, zeros = scales.view(rows, -1).t(), zeros.view(rows, -1).t()
    spread = torch.arange(cols) // size
    stored = scales.half()
    codes = torch.round((rounded.t() + (zeros * scales)[spread]) / stored[spread]).to(torch.int32)

    def pack(values: torch.Tensor) -> torch.Tensor:
        words = torch.zeros((values.shape[0], rows // 8), dtype=torch.int32)
        for column in range(rows // 8):
            for nibble in range(8):
                words[:, column] |= values[:, column * 8 + ORDER[nibble]] << (nibble * 4)
        return words

    return {"qweight": pack(codes), "qzeros": pack(zeros.to(torch.int32)), "scales": stored}


def test_encode_gives_autoawqs_bytes(same: Any) -> None:
    tensors = vector()
    parts = Int4Awq(32).encode(tensors["input.weight"].to(torch.float32), (32, 64))
    for part, tensor in parts.items():
        assert same(tensor, tensors[f"stored.{part}"]), part


def test_decode_gives_autoawqs_weight(same: Any) -> None:
    """It multiplies in float16; our float32 product is exact, so one rounding gives its result."""
    tensors = vector()
    parts = {part: tensors[f"stored.{part}"] for part in ("qweight", "qzeros", "scales")}
    decoded = Int4Awq(32).decode(parts, (32, 64))
    assert same(decoded.to(torch.float16), tensors["dequantized.weight"])


@pytest.mark.parametrize(("shape", "size"), [((32, 96), 32), ((160, 256), 128), ((64, 48), 16)])
@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_random_weights_give_autoawqs_bytes(
    shape: tuple[int, int], size: int, factor: float, weight: Any, same: Any
) -> None:
    source = weight(*shape, seed=size) * factor
    source[0, :size] = 0.0
    expected = autoawq(source, size)
    parts = Int4Awq(size).encode(source, shape)
    for part, tensor in expected.items():
        assert same(parts[part], tensor), part


def test_groups_of_one_sign_are_not_clipped() -> None:
    """AutoAWQ's scale is 1 / 15 here, its zero point 0 and so all that it keeps is 1."""
    row = torch.linspace(1.0, 2.0, 32).expand(32, 32)
    theirs = Int4Awq(32).decode(autoawq(row, 32), (32, 32))
    assert theirs.max() < 1.001
    for source in (row, -row):
        parts = Int4Awq(32).encode(source.contiguous(), (32, 32))
        assert (Int4Awq(32).decode(parts, (32, 32)) - source).abs().max() <= 1 / 15 + 2 * HALF_UNIT


def test_rows_are_packed_in_autoawqs_order() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[:, None]
    packed = pack_nibbles(codes).view(torch.uint8)
    assert pack_rows(packed, 1).tolist() == [[0x75316420]]
    assert torch.equal(unpack_rows(pack_rows(packed, 1)), packed)


@quick
@given(
    words=st.integers(1, 5),
    cols=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    numba=st.booleans(),
)
def test_packing_loses_nothing(words: int, cols: int, seed: int, numba: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (8 * words, cols), generator=generator, dtype=torch.uint8)
    nibbles = pack_nibbles(codes).view(torch.uint8)
    with pytest.MonkeyPatch.context() as patched:
        if not numba:
            patched.setattr(compiled, "_loops", lambda: None)
        packed = pack_rows(nibbles, cols)
        assert packed.shape == (cols, words) and packed.dtype == torch.int32
        assert torch.equal(unpack_rows(packed), nibbles)
    for nibble, row in enumerate(ORDER):
        assert torch.equal(packed >> 4 * nibble & 0xF, codes[row::8].T.to(torch.int32))


@pytest.mark.parametrize("method", ["rtn", "mse"])
@quick
@given(exponent=st.integers(-30, 12), offset=st.floats(-2, 2), seed=st.integers(0, 2**32 - 1))
def test_error(method: str, exponent: int, offset: float, seed: int) -> None:
    """rtn: half a step, and what rounding the scale (to 2^-25 at least) moves the 15th code by.
    mse: never more squared error in a group than rtn."""
    generator = torch.Generator().manual_seed(seed)
    source = (torch.rand(32, 64, generator=generator) * 2 - 1 + offset) * 2.0**exponent
    parts = Int4Awq(32, method=method).encode(source, (32, 64))
    error = (Int4Awq(32).decode(parts, (32, 64)) - source).abs().reshape(32, 2, 32)
    if method == "rtn":
        step = parts["scales"].T.to(torch.float32)[..., None]
        moved = (step * HALF_UNIT).clamp_min(2.0**-25)
        assert (error <= (step / 2 + 15.5 * moved) * (1 + 2.0**-18)).all()
    else:
        plain = Int4Awq(32).decode(Int4Awq(32).encode(source, (32, 64)), (32, 64))
        limit = (plain - source).reshape(32, 2, 32).square().sum(2)
        assert (error.square().sum(2) <= limit * (1 + 2.0**-18)).all()


def test_mse_is_better(weight: Any) -> None:
    source = weight(64, 256, seed=1)

    def loss(method: str) -> float:
        codec = Int4Awq(method=method)
        decoded = codec.decode(codec.encode(source, (64, 256)), (64, 256))
        return float((decoded - source).square().sum())

    assert loss("mse") < 0.98 * loss("rtn")


@pytest.mark.parametrize(
    ("text", "shape", "pieces"),
    [
        ("int4-awq", (576, 200), "128 does not divide 200 columns .*= 72.*leave.*recipe"),
        ("int4-awq", (64, 96), r"use int4-awq\[group_size=16\] or int4-awq\[group_size=32\], or"),
        ("int4-awq", (40, 128), r"packs 32 rows .* not hold 40 \(40 % 32 = 8\); use int4-gptq"),
    ],
)
def test_shapes_that_do_not_fit(text: str, shape: tuple[int, int], pieces: str) -> None:
    with pytest.raises(FormatError, match=pieces):
        parse_format(text).specs(*shape)


@pytest.mark.parametrize("option", ["group_size=48", "scale=fp32", "method=gptq"])
def test_bad_options(option: str) -> None:
    with pytest.raises(FormatError, match=f"{option}: expected"):
        parse_format(f"int4-awq[{option}]")


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_scales_that_fp16_does_not_hold(method: str) -> None:
    source = torch.full((32, 32), 65520.0 * 15)
    with pytest.raises(FormatError, match="the scale 65520, over 65504.*scale=bf16"):
        Int4Awq(32, method=method).encode(source, (32, 32))
    codec = Int4Awq(32, scale="bf16", method=method)
    assert codec.decode(codec.encode(source, (32, 32)), (32, 32)).min() > 900_000
    largest = source * (65519 / 65520)  # rounds to 65504
    assert Int4Awq(32, method=method).encode(largest, (32, 32))["scales"].max() == 65504


def test_detection() -> None:
    codec = Int4Awq(32)
    specs, config = codec.specs(64, 128), codec.config([])
    assert config["modules_to_not_convert"] is None and "dynamic" not in config
    assert detect_format(specs, config) == codec == detect_format(specs, None)
    assert codec.shape(specs) == (64, 128)
    assert detect_format(Int4Awq(-1).specs(64, 96), None) == Int4Awq(-1)
    for version in ("gemv", "gemv_fast"):
        with pytest.raises(FormatError, match=f"version '{version}', and only 'gemm'"):
            detect_format(specs, {**config, "version": version})
    with pytest.raises(FormatError, match=r"qzeros is I32 \[4, 8\], expected I32 \[2, 8\]"):
        detect_format(specs, {**config, "group_size": 64})
    with pytest.raises(FormatError, match="5 groups over 128 columns"):
        detect_format({**specs, "scales": TensorSpec("F16", (5, 64))}, None)
    with pytest.raises(FormatError, match=r"qweight is I32 \[128, 7\], expected I32 \[128, 8\]"):
        detect_format({**specs, "qweight": TensorSpec("I32", (128, 7))}, config)


def test_scales_of_another_dtype_are_kept() -> None:
    assert Int4Awq().accepts(Int4Awq(scale="bf16"))
    assert not Int4Awq(scale="bf16").accepts(Int4Awq())
    assert not Int4Awq().accepts(Int4Awq(32)) and not Int4Awq().accepts(parse_format("int4"))


def test_codes_come_out_and_go_in_unchanged(weight: Any, same: Any) -> None:
    codec, shape = Int4Awq(32), (64, 96)
    parts = codec.encode(weight(*shape) + 0.1, shape)
    codes = codec.unpack(parts, shape)
    assert codes.codes is not None and codes.zero is not None
    value = unpack_nibbles(codes.codes, 96).to(torch.float32)
    value -= codes.zero.to(torch.float32).repeat_interleave(32, 1)
    value *= codes.scale.to(torch.float32).repeat_interleave(32, 1)
    assert same(value, codec.decode(parts, shape))
    again = codec.pack(codes, shape)
    assert list(again) == list(parts) and all(same(again[part], parts[part]) for part in parts)
    del parts["qweight"]
    scales = codec.unpack(parts, shape)
    assert scales.codes is None
    assert set(codec.pack(scales, shape)) == {"qzeros", "scales"}
    finer = Int4Awq(16).pack(codes, shape)
    assert same(Int4Awq(16).decode(finer, shape), value)


def test_codes_that_cannot_go_in() -> None:
    scale = torch.full((32, 1), 2.0**17)
    with pytest.raises(FormatError, match="scale 131072 has no exact float16"):
        Int4Awq(32).pack(Codes("int4", None, scale, (1, 32)), (32, 32))
    with pytest.raises(FormatError, match="one scale for 1x32 weights, the source one for 1x48"):
        Int4Awq(32).pack(Codes("int4", None, torch.ones(32, 1), (1, 48)), (32, 96))
    with pytest.raises(FormatError, match="takes no codes of e2m1"):
        Int4Awq(32).pack(Codes("e2m1", None, scale, (1, 32)), (32, 32))
