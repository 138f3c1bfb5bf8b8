"""Properties: the error of one encode and decode, over magnitudes from 2^-100 to 2^100."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.quant import parse_format
from requant.quant.fp8_block import Fp8Block
from requant.quant.packing import pack_nibbles, unpack_nibbles
from requant.quant.plain import Plain

BF16_UNIT = 2.0**-8  # largest relative error of rounding to BF16's 8 significant bits
FP32_SLACK = 1 + 2.0**-20  # the float32 operations of encode and decode, 2^-24 each

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Case:
    """A weight by description, which is what hypothesis prints and shrinks."""

    rows: int
    cols: int
    exponent: int  # of the largest values
    spread: int  # rows and columns differ by up to this many powers of two
    seed: int

    def weight(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)

        def powers(*shape: int) -> torch.Tensor:
            down = torch.randint(0, self.spread + 1, shape, generator=generator)
            return torch.exp2(-down.to(torch.float32))

        values = torch.rand(self.rows, self.cols, generator=generator) * 2 - 1
        values *= powers(self.rows, 1) * powers(1, self.cols)
        return values * 2.0**self.exponent


def cases(multiple: int = 1, low: int = -100, high: int = 100) -> st.SearchStrategy[Case]:
    """Weights of up to 300 rows and 3 or 300 columns, a `multiple` of columns."""
    return st.builds(
        Case,
        rows=st.sampled_from([1, 2, 127, 128, 129, 300]),
        cols=st.integers(1, 3 if multiple > 1 else 300).map(lambda n: n * multiple),
        exponent=st.integers(low, high),
        spread=st.integers(0, 12),
        seed=st.integers(0, 2**32 - 1),
    )


def significand_step(values: torch.Tensor, bits: int, lowest: int) -> torch.Tensor:
    """The gap between floats of `bits` significant bits at `values`; 2^lowest where subnormal."""
    exponent = torch.frexp(values).exponent - bits
    return torch.exp2(torch.clamp_min(exponent, lowest).to(torch.float32))


@quick
@given(cases())
def test_fp8_error_is_half_a_step(case: Case) -> None:
    """E4M3 keeps 4 significant bits, 2^-9 apart at the bottom; scales are not rounded to BF16.
    Below DeepSeek's floor the step stays 2^-9 * 1e-4 / 448: small weights lose bits, then all."""
    source, shape = case.weight(), (case.rows, case.cols)
    codec = Fp8Block()
    parts = codec.encode(source, shape)
    scale = parts["weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    scale = scale[: case.rows, : case.cols]
    assert scale.min() >= torch.tensor(1e-4) / 448
    largest = parts["weight"].to(torch.float32).abs().max()
    assert largest == 448 or source.abs().max() < 1e-4  # the whole range is used
    half = significand_step(source / scale, 4, -9) / 2 * scale
    error = (codec.decode(parts, shape) - source).abs()
    assert (error <= half * FP32_SLACK + source.abs() * 2.0**-22).all()


def check_integers(case: Case, text: str, half_range: float, group: int, roundings: int) -> None:
    """|error| <= (1/2 + roundings * half_range * 2^-8) steps.

    BF16 may round the scale down by 2^-8: then amax / scale is up to half_range * (1 + 2^-8), of
    which the code keeps half_range - 1/2 (positive end): half a step and the scale's rounding.
    Exact BF16 arithmetic also rounds the weight and the quotient, by 2^-8 of at most half_range.
    """
    source, shape = case.weight(), (case.rows, case.cols)
    codec = parse_format(text)
    parts = codec.encode(source, shape)
    error = (codec.decode(parts, shape) - source).abs().reshape(case.rows, -1, group)
    step = parts["weight_scale"].to(torch.float32)[..., None]
    limit = 0.5 + roundings * half_range * BF16_UNIT * (1 + 2 * BF16_UNIT)
    assert (error <= step * limit * FP32_SLACK).all()
    amax = source.abs().reshape(case.rows, -1, group).amax(-1, keepdim=True)
    close = (step / (amax / half_range) - 1).abs() <= (1 + roundings // 2) * BF16_UNIT * FP32_SLACK
    assert close.all()


@pytest.mark.parametrize(("arithmetic", "roundings"), [("fp32", 1), ("bf16", 3)])
@quick
@given(case=cases())
def test_int8_error(arithmetic: str, roundings: int, case: Case) -> None:
    text = f"int8-channel[arithmetic={arithmetic}]"
    check_integers(case, text, 127.5, case.cols, roundings)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("arithmetic", "roundings"), [("fp32", 1), ("bf16", 3)])
@quick
@given(case=cases(multiple=128))
def test_int4_error(group: int, arithmetic: str, roundings: int, case: Case) -> None:
    text = f"int4[group_size={group},arithmetic={arithmetic}]"
    check_integers(case, text, 7.5, group, roundings)


@pytest.mark.parametrize("text", ["int8-channel", "int4"])
@quick
@given(case=cases(multiple=128))
def test_integers_inside_the_range_are_within_half_a_step(text: str, case: Case) -> None:
    """Away from the positive end nothing is clamped: half a step, whatever scale BF16 gave."""
    source, shape = case.weight(), (case.rows, case.cols)
    codec = parse_format(text)
    parts = codec.encode(source, shape)
    scale = parts["weight_scale"].to(torch.float32)
    step = scale.repeat_interleave(case.cols // scale.shape[1], dim=1)
    inside = source / step <= (127 if text == "int8-channel" else 7)
    error = (codec.decode(parts, shape) - source).abs()
    assert (error[inside] <= step[inside] / 2 * FP32_SLACK).all()


@pytest.mark.parametrize(("text", "bits", "lowest"), [("bf16", 8, -133), ("fp32", 24, -149)])
@quick
@given(case=cases())
def test_plain_error_is_half_a_step(text: str, bits: int, lowest: int, case: Case) -> None:
    source, shape = case.weight(), (case.rows, case.cols)
    codec = parse_format(text)
    error = (codec.decode(codec.encode(source, shape), shape) - source).abs()
    assert (error <= significand_step(source, bits, lowest) / 2).all()
    assert isinstance(codec, Plain) and (text != "fp32" or not error.any())


@quick
@given(case=cases(low=-40, high=15))
def test_fp16_error_is_half_a_step_down_to_its_subnormals(case: Case) -> None:
    """11 bits, 2^-24 apart at the bottom: a weight under 2^-25 becomes zero."""
    source, shape = case.weight(), (case.rows, case.cols)
    codec = parse_format("fp16")
    error = (codec.decode(codec.encode(source, shape), shape) - source).abs()
    assert (error <= significand_step(source, 11, -24) / 2).all()


@quick
@given(rows=st.integers(1, 9), cols=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_packing_loses_nothing(rows: int, cols: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, cols), generator=generator, dtype=torch.uint8)
    words = pack_nibbles(codes)
    assert words.shape == (rows, -(-cols // 8)) and words.dtype == torch.int32
    assert torch.equal(unpack_nibbles(words, cols), codes)
    for row in range(rows):
        for k in range(cols):
            assert int(words[row, k // 8]) >> 4 * (k % 8) & 0xF == codes[row, k]
