"""bitsandbytes' formats against bytes that bitsandbytes made, by hand, and within their error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from requant.errors import FormatError
from requant.quant import detect_format, parse_format
from requant.quant.codec import TensorSpec
from requant.quant.nf4 import BLOCK_SIZES, MAPS, BitsAndBytes, dynamic_map

VECTORS = Path(__file__).parent.parent / "vectors"
GOLDEN = [
    ("bnb_nf4", "nf4"),
    ("bnb_nf4_dq", "nf4[double_quant=true]"),
    ("bnb_fp4", "bnb-fp4"),
    ("bnb_fp4_dq", "bnb-fp4[double_quant=true]"),
]
VARIANTS = [text for _, text in GOLDEN]
VARIANTS += ["nf4[blocksize=32]", "bnb-fp4[double_quant=true,blocksize=4096]"]
STATE = "weight.quant_state.bitsandbytes__nf4"

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def codec(text: str) -> BitsAndBytes:
    parsed = parse_format(text)
    assert isinstance(parsed, BitsAndBytes)
    return parsed


def load(name: str) -> dict[str, torch.Tensor]:
    """`input.weight`, `dequantized.weight` and the stored parts under their own names."""
    tensors = load_file(VECTORS / f"{name}.safetensors")
    return {key.removeprefix("stored."): tensor for key, tensor in tensors.items()}


def header(parts: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    """What a file's header tells of bitsandbytes parts."""
    dtype = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16"}
    return {part: TensorSpec(dtype[t.dtype], tuple(t.shape)) for part, t in parts.items()}


def content(parts: dict[str, torch.Tensor], found: BitsAndBytes) -> dict[str, bytes]:
    return {part: parts[part].numpy().tobytes() for part in found.needs_content}


def read(parts: dict[str, torch.Tensor], config: Any = None) -> BitsAndBytes:
    """The codec of these parts, as the file layer finds it."""
    found = detect_format(header(parts), config)
    assert isinstance(found, BitsAndBytes)
    return found.with_content(content(parts, found))


def without_state(parts: dict[str, Any]) -> set[str]:
    return {part for part in parts if "quant_state" not in part}


@pytest.mark.parametrize(("name", "text"), GOLDEN)
def test_encode_gives_bitsandbytes_bytes(name: str, text: str, same: Any) -> None:
    """The JSON too; with double quantization there are spaces behind it."""
    golden, shape = load(name), (16, 128)
    source = golden.pop("input.weight").to(torch.float32)
    golden.pop("dequantized.weight")
    parts = codec(text).encode(source, shape)
    assert set(parts) == set(golden)
    for part in without_state(golden):
        assert same(parts[part], golden[part]), part
    state = codec(text).state_part
    ours, theirs = (bytes(p[state].numpy()) for p in (parts, golden))
    assert ours.rstrip(b" ") == theirs
    assert len(ours) == len(theirs) or codec(text).double_quant


@pytest.mark.parametrize(("name", "text"), GOLDEN)
def test_decode_gives_bitsandbytes_weight(name: str, text: str, same: Any) -> None:
    golden = load(name)
    source, expected = golden.pop("input.weight"), golden.pop("dequantized.weight")
    found = read(golden)
    assert found == codec(text) and found.shape(header(golden)) == tuple(source.shape)
    assert same(found.decode(golden, (16, 128)).to(torch.bfloat16), expected)


def test_dynamic_map_is_bitsandbytes(same: Any) -> None:
    stored = load("bnb_nf4_dq")["weight.nested_quant_map"]
    assert same(dynamic_map(), stored)
    assert stored[127] == 0.0 and stored[255] == 1.0 and stored[0] > -1.0


def test_high_nibble_first_and_ties_go_down_by_hand() -> None:
    """absmax 1: values of the map are their own codes; halfway between 0 and 0.0796 is 0's; a
    hair above it is the next one's."""
    nf4 = torch.tensor(MAPS["nf4"])
    tie = (nf4[7] + nf4[8]) / 2
    above = torch.nextafter(tie, torch.tensor(1.0))
    source = torch.cat((nf4, torch.stack((tie, above)))).reshape(1, 18)
    parts = codec("nf4").encode(source, (1, 18))
    assert bytes(parts["weight"].numpy()).hex(" ") == "01 23 45 67 89 ab cd ef 78"
    assert parts["weight.absmax"].tolist() == [1.0]
    assert codec("nf4").decode(parts, (1, 18))[0, :16].tolist() == list(MAPS["nf4"])


def test_odd_counts_and_short_blocks_by_hand() -> None:
    """5 x 13 = 65 values: a block of 64 and one of 1, whose nibble is followed by zero's (7).
    A short block of zeros has the absmax 1e-38, a whole one 0."""
    source = torch.zeros(5, 13)
    source[0, 0] = -3.0
    parts = codec("nf4").encode(source, (5, 13))
    assert parts["weight"].flatten().tolist() == [0x07, *[0x77] * 32]
    assert parts["weight.absmax"].tolist() == [3.0, torch.tensor(1e-38).item()]
    decoded = codec("nf4").decode(parts, (5, 13))
    assert decoded[0, 0] == -3.0 and decoded.count_nonzero() == 1
    whole = codec("nf4").encode(torch.zeros(1, 64), (1, 64))
    assert whole["weight.absmax"].tolist() == [0.0]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_threshold_is_a_search_of_the_midpoints(kind: str) -> None:
    """bitsandbytes' rule, spelled out: the first midpoint not below the value. The 64 floats on
    either side of every midpoint, of zero and of every cell's border, and 2^16 others."""
    values = torch.tensor(MAPS[kind])
    order = values.argsort(stable=True)
    middle = (values[order[:-1]] + values[order[1:]]) / 2
    centres = torch.cat((middle, torch.linspace(-1, 1, 1025)))
    steps = torch.arange(-64, 65)[None]
    near = (centres.view(torch.int32)[:, None] + steps).flatten().to(torch.int32)
    near = near.view(torch.float32)
    spread = torch.rand(1 << 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    probe = torch.cat((near[near.abs() <= 1], spread))
    probe = torch.nn.functional.pad(probe, (0, -len(probe) % 63)).view(-1, 63)
    source = torch.cat((torch.ones(len(probe), 1), probe), 1)  # absmax 1 in every block
    parts = codec({"nf4": "nf4", "fp4": "bnb-fp4"}[kind]).encode(source, (len(source), 64))
    packed = parts["weight"]
    codes = torch.cat((packed >> 4, packed & 15), 1).view(len(source), 64)
    assert torch.equal(codes, order[torch.bucketize(source, middle)].to(torch.uint8))


@pytest.mark.parametrize("text", VARIANTS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (127, 129), (16, 128), (300, 1000)])
def test_what_is_written_reads_back(text: str, shape: tuple[int, int], weight: Any) -> None:
    """Headers alone give options, the JSON the shape."""
    wanted = codec(text)
    parts = wanted.encode(weight(*shape), shape)
    assert read(parts, wanted.config([])) == wanted
    assert read(parts, None).shape(header(parts)) == shape


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_states_dtype_counts_not_the_configs(dtype: str, weight: Any) -> None:
    wanted = codec(f"nf4[dtype={dtype}]")
    parts = wanted.encode(weight(4, 64), (4, 64))
    assert read(parts, {"bnb_4bit_compute_dtype": "float16"}) == wanted
    assert detect_format(header(parts), wanted.config([])) == wanted


def test_blocksize_of_the_state_counts_where_sizes_fit_several() -> None:
    """20 values are one block of 64 as well as of 32 or 4096."""
    wanted = codec("nf4[blocksize=4096]")
    parts = wanted.encode(torch.ones(4, 5), (4, 5))
    assert detect_format(header(parts), None) == codec("nf4")
    assert read(parts) == wanted


@pytest.mark.parametrize("scale", [1.0, 1.1754943508222875e-38, 0.00012345679104328156, 3e37])
def test_state_has_its_promised_size_and_is_json(scale: float) -> None:
    """Whatever digits the mean of absmax has."""
    wanted = codec("nf4[double_quant=true]")
    source = torch.full((2, 64), scale)
    state = bytes(wanted.encode(source, (2, 64))[STATE].numpy())
    assert len(state) == wanted.specs(2, 64)[STATE].nbytes
    assert json.loads(state)["nested_offset"] == torch.tensor(scale).item()


def test_tiles_share_one_mean(weight: Any, same: Any) -> None:
    """Rows of 40 need 2048 rows for a tile, whose last one is short here."""
    wanted, source = codec("nf4[double_quant=true]"), weight(5000, 40)
    step = wanted.row_alignment(40)
    assert step == 2048 and codec("nf4").row_alignment(40) == 8
    mean = wanted.summarize([wanted.measure(tile) for tile in source.split(step)])
    tiles = [wanted.encode(tile, (5000, 40), mean) for tile in source.split(step)]
    whole = wanted.encode(source, (5000, 40))
    for part, spec in wanted.specs(5000, 40).items():
        joined = torch.cat([t[part] for t in tiles]) if spec.rows else tiles[2][part]
        assert same(joined, whole[part]), part


def test_config_is_transformers_own() -> None:
    expected = json.loads((VECTORS / "hf_bnb_nf4_dq.json").read_text())
    assert expected.pop("llm_int8_skip_modules") is None
    config = codec("nf4[double_quant=true]").config(["lm_head"])
    assert config.pop("llm_int8_skip_modules") == ["lm_head"]
    assert config == expected
    fp4 = codec("bnb-fp4[dtype=fp16]").config(["lm_head"])
    changed = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
    changed |= {"bnb_4bit_compute_dtype": "float16", "llm_int8_skip_modules": ["lm_head"]}
    assert fp4 == expected | changed


def test_accepts_another_dtype_unless_one_is_asked_for() -> None:
    assert codec("nf4").accepts(codec("nf4[dtype=fp16]"))
    assert not codec("nf4[dtype=fp32]").accepts(codec("nf4[dtype=fp16]"))
    for other in ("bnb-fp4", "nf4[double_quant=true]", "nf4[blocksize=128]", "int4"):
        assert not codec("nf4").accepts(parse_format(other))


def test_double_quantized_sum_beyond_float32(weight: Any) -> None:
    source = torch.full((2, 64), 2e38)
    with pytest.raises(FormatError, match="beyond float32; use double_quant=false"):
        codec("nf4[double_quant=true]").encode(source, (2, 64))
    parts = codec("nf4").encode(source, (2, 64))
    assert torch.equal(codec("nf4").decode(parts, (2, 64)), source)


def test_double_quantized_absmax_whose_reciprocal_is_infinite() -> None:
    """The least float32 and three times it are 2^-149 away from their mean."""
    source = torch.tensor([[1.0], [3.0]]).expand(2, 64) * 2.0**-149
    wanted = codec("nf4[double_quant=true]")
    parts = wanted.encode(source.contiguous(), (2, 64))
    assert parts["weight.nested_absmax"].tolist() == [2.0**-149]
    decoded = wanted.decode(parts, (2, 64))
    assert (decoded.abs() <= source).all()  # 1e-38 and less is nothing to it


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_measure_refuses_what_encode_refuses(value: float) -> None:
    with pytest.raises(FormatError, match="NaN or infinity"):
        codec("nf4[double_quant=true]").measure(torch.full((1, 65), value))


@pytest.mark.parametrize("text", ["nf4", "bnb-fp4"])
@quick
@given(
    rows=st.sampled_from([1, 3, 64]),
    cols=st.integers(1, 130),
    exponent=st.integers(-100, 100),
    double_quant=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_error(
    text: str, rows: int, cols: int, exponent: int, double_quant: bool, seed: int
) -> None:
    """As near as the map has a value for weight / absmax. Double quantization moves absmax by up
    to half the largest gap of its map, 0.9 / 64 / 2 of nested_absmax, and half a place of 65536."""
    generator = torch.Generator().manual_seed(seed)
    source = (torch.rand(rows, cols, generator=generator) * 2 - 1) * 2.0**exponent
    wanted = replace(codec(text), double_quant=double_quant)
    parts = wanted.encode(source, (rows, cols))
    decoded = wanted.decode(parts, (rows, cols)).flatten()
    plain = codec(text).encode(source, (rows, cols))
    absmax = plain["weight.absmax"].repeat_interleave(64)[: rows * cols]
    grid = torch.tensor(MAPS[wanted.kind]) * absmax[:, None]
    nearest = (source.reshape(-1, 1) - grid).abs().amin(1)
    slack = absmax * 2.0**-20
    if double_quant:
        assert torch.equal(plain["weight"], parts["weight"])
        slack += parts["weight.nested_absmax"].max() * (0.9 / 128 + 1 / 65535)
    assert ((decoded - source.flatten()).abs() <= nearest + slack).all()


# ---- what is refused


def changed_state(parts: dict[str, torch.Tensor], **changes: Any) -> dict[str, torch.Tensor]:
    state = json.loads(bytes(parts[STATE].numpy())) | changes
    text = json.dumps({key: value for key, value in state.items() if value is not ...})
    return {**parts, STATE: torch.tensor(list(text.encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_type": "fp4"}, "quant_type 'fp4', not 'nf4'"),
        ({"blocksize": 48}, "blocksize 48, which makes no sense"),
        ({"blocksize": True}, "blocksize True"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"dtype": ["float16"]}, "dtype"),
        ({"shape": None}, "shape None"),
        ({"shape": [2, 4, 256]}, "shape"),
        ({"shape": [-16, -128]}, "shape"),
        ({"shape": [16.0, 128]}, "shape"),
        ({"shape": ...}, "shape None"),
        ({"nested_blocksize": 128}, "nested_blocksize 128, not 256"),
        ({"nested_dtype": "float16"}, "nested_dtype 'float16', not 'float32'"),
        ({"nested_offset": float("nan")}, "nested_offset nan"),
        ({"nested_offset": "6"}, "nested_offset '6'"),
        ({"nested_offset": 10**400}, "nested_offset"),
        ({"nested_offset": ...}, "only one of them"),
    ],
)
def test_states_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    parts = codec("nf4[double_quant=true]").encode(torch.ones(16, 128), (16, 128))
    with pytest.raises(FormatError, match=message):
        read(changed_state(parts, **changes))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\xff", "[" * 1000, "9" * 1000])
def test_states_that_are_no_json_object(text: str) -> None:
    wanted = codec("nf4")
    parts = content(wanted.encode(torch.ones(1, 64), (1, 64)), wanted)
    with pytest.raises(FormatError, match="no JSON object"):
        wanted.with_content({**parts, STATE: text.encode("latin1")})


@pytest.mark.parametrize("shape", [[16, 127], [17, 128], [1, 1], [10**9, 10**9]])
def test_a_shape_that_its_parts_contradict(shape: list[int]) -> None:
    parts = codec("nf4").encode(torch.ones(16, 128), (16, 128))
    changed = changed_state(parts, shape=shape)
    with pytest.raises(FormatError, match=r"says \[\d+, \d+\], blocks of 64, but weight is U8"):
        read(changed).shape(header(changed))


def test_a_blocksize_that_its_parts_contradict() -> None:
    parts = codec("nf4").encode(torch.ones(16, 128), (16, 128))
    changed = changed_state(parts, blocksize=32)
    with pytest.raises(FormatError, match=r"blocks of 32, but weight.absmax is F32 \[32\]"):
        read(changed).shape(header(changed))


def test_another_map_is_refused() -> None:
    """The kernels use their own map whatever is stored, so a different one cannot be meant."""
    parts = codec("nf4").encode(torch.ones(1, 64), (1, 64))
    parts["weight.quant_map"][3] += 1e-6
    with pytest.raises(FormatError, match="quant_map is not bitsandbytes' map of nf4"):
        read(parts)


@pytest.mark.parametrize(
    ("part", "spec", "message"),
    [
        ("weight", TensorSpec("BF16", (512, 1)), "bnb_4bit_quant_storage=uint8"),
        ("weight", TensorSpec("U8", (1, 1024)), "no blocksize gives"),
        ("weight", TensorSpec("U8", (512, 2)), r"expected U8 \[512, 1\]"),
        ("weight.absmax", TensorSpec("F32", (31,)), r"absmax is \[31\].* have 32"),
        ("weight.absmax", TensorSpec("U8", (32,)), r"expected F32 \[32\]"),
        ("weight.quant_map", TensorSpec("F32", (256,)), r"expected F32 \[16\]"),
        ("weight.nested_absmax", TensorSpec("F32", (1,)), r"absmax is F32 .*expected U8 \[32\]"),
        (STATE, TensorSpec("I8", (79,)), "expected U8"),
        (STATE, TensorSpec("U8", (5000,)), "has 5000 bytes, more than 1024"),
        ("weight_scale", TensorSpec("F32", (1,)), "no format of `requant formats` reads"),
    ],
)
def test_parts_that_contradict_each_other(part: str, spec: TensorSpec, message: str) -> None:
    parts = {**codec("nf4").specs(16, 128), part: spec}
    with pytest.raises(FormatError, match=message):
        detect_format(parts, None)


def test_parts_that_are_missing() -> None:
    parts = codec("nf4").specs(16, 128)
    parts.pop("weight.quant_map")
    with pytest.raises(FormatError, match="weight.quant_map is missing"):
        detect_format(parts, None)


def test_eight_bit_checkpoints_are_not_read() -> None:
    parts = {"weight": TensorSpec("I8", (16, 128)), "SCB": TensorSpec("F32", (16,))}
    with pytest.raises(FormatError, match="no format of `requant formats` reads"):
        detect_format(parts, {"quant_method": "bitsandbytes", "load_in_8bit": True})


def test_the_shape_is_not_guessed() -> None:
    found = detect_format(codec("nf4").specs(16, 128), None)
    with pytest.raises(FormatError, match="was not read"):
        found.shape(codec("nf4").specs(16, 128))


def test_options_that_do_not_exist() -> None:
    with pytest.raises(FormatError, match="blocksize=48: expected 32, 64, 128"):
        parse_format("nf4[blocksize=48]")
    with pytest.raises(FormatError, match="dtype=fp8: expected bf16, fp16, fp32"):
        parse_format("bnb-fp4[dtype=fp8]")
    with pytest.raises(FormatError, match="no option 'stored_shape'"):
        parse_format("nf4[stored_shape=1]")
    assert BLOCK_SIZES[0] == codec("nf4").blocksize
