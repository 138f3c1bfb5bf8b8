"""Laws that hold for every format in `CODECS`, so a new format is tested once it is listed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from requant.errors import FormatError
from requant.quant import CODECS, detect_format, format_name, grid, parse_format
from requant.quant.codec import TORCH_DTYPES, Codec, TensorSpec, bits_per_weight
from requant.quant.plain import Plain

EXTRA = ["int4[group_size=32]", "int4[group_size=64]", "int4[arithmetic=bf16]"]
EXTRA += ["int8-channel[arithmetic=bf16]", "fp8-block[block_rows=64,block_cols=32]"]
EXTRA += ["int4[symmetric=false]", "int4[group_size=-1]", "int4[scale=fp16,method=mse]"]
EXTRA += ["int4[group_size=32,symmetric=false,method=mse]", "int8-channel[method=mse]"]
EXTRA += ["int8-channel[container=sglang]", "int8-block[block_rows=64,block_cols=32]"]
EXTRA += ["nf4[double_quant=true]", "nf4[blocksize=128,dtype=fp16]"]
EXTRA += ["bnb-fp4[double_quant=true,blocksize=32]"]
EXTRA += [f"fp8-block[{o}]" for o in ("scale=ue8m0", "scale=e8m0,container=deepseek-v4")]
EXTRA += [f"fp8-block[{s}container=compressed-tensors]" for s in ("", "scale=bf16,")]
EXTRA += ["fp8-channel[scale=fp16]", "fp8-channel[arithmetic=bf16]", "mxfp8[container=minimax]"]
EXTRA += ["fp8-tensor[container=fp8]", "fp8-tensor[scale=bf16,arithmetic=bf16]"]
EXTRA += [f"mxfp4[{o}]" for o in ("exponent=ct", "method=mse", "container=deepseek-v4")]
EXTRA += ["mxfp4[container=deepseek-v4,codes=u8]", "nvfp4[container=modelopt]"]
EXTRA += ["nvfp4[method=mse]", "nvfp4[arithmetic=bf16]", "nvfp4[container=modelopt,method=mse]"]
EXTRA += ["int4-awq[group_size=32,method=mse]", "int4-awq[group_size=-1,scale=bf16]"]
EXTRA += ["int4-gptq[group_size=32,symmetric=false]", "int4-gptq[group_size=-1,version=2]"]
EXTRA += ["int4-gptq[symmetric=false,version=2,method=mse]", "int4-gptq[scale=bf16,method=mse]"]
ALL = [*CODECS, *map(parse_format, EXTRA)]
SHAPES = [(1, 1), (127, 129), (160, 256), (576, 200), (576, 256), (576, 7168)]


def holds(codec: Codec, shape: tuple[int, int]) -> bool:
    try:
        codec.specs(*shape)
    except FormatError:
        return False
    return True


def fits(codec: Codec, rows: int, cols: int) -> bool:
    """The shapes that a format's description says it holds."""
    match codec.name:
        case "int4":
            return cols % getattr(codec, "group_size", 1) == 0
        case "mxfp8" | "mxfp4":
            return cols % 32 == 0
        case "nvfp4":
            return cols % 16 == 0
        case "int4-awq":
            size = getattr(codec, "group_size", 1)
            return rows % 32 == 0 and (size == -1 or cols % size == 0)
        case _:
            return True


def pairs(codecs: list[Codec], shapes: list[tuple[int, int]]) -> list[Any]:
    """Every codec with every shape it can hold; what it refuses is tested with the errors."""
    return [
        pytest.param(codec, shape, id=f"{format_name(codec)}-{shape[0]}x{shape[1]}")
        for codec in codecs
        for shape in shapes
        if holds(codec, shape)
    ]


every = pytest.mark.parametrize("codec", ALL, ids=format_name)
small = pytest.mark.parametrize(("codec", "shape"), pairs(ALL, SHAPES[:-1]))
Shape = tuple[int, int]


def tiles(codec: Codec, rows: int, cols: int, factor: int) -> list[tuple[int, int]]:
    step = codec.row_alignment(cols) * factor
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def test_every_format_holds_every_usual_shape() -> None:
    """Should a format refuse more than its rule says, `pairs` would hide it."""
    for codec in ALL:
        refused = {shape for shape in SHAPES if not holds(codec, shape)}
        assert refused == {shape for shape in SHAPES if not fits(codec, *shape)}, codec


@pytest.mark.parametrize(("codec", "shape"), pairs(ALL, SHAPES))
def test_encode_returns_what_specs_promise(codec: Codec, shape: Shape, weight: Any) -> None:
    source = weight(*shape)
    before = source.clone()
    specs, parts = codec.specs(*shape), codec.encode(source, shape)
    assert list(parts) == list(specs)
    for name, spec in specs.items():
        assert parts[name].dtype == TORCH_DTYPES[spec.dtype], name
        assert tuple(parts[name].shape) == spec.shape, name
        assert parts[name].numel() * parts[name].element_size() == spec.nbytes, name
    assert torch.equal(source, before)


@small
def test_decode_gives_float32_of_the_shape_and_leaves_the_parts(
    codec: Codec, shape: Shape, weight: Any, same: Any
) -> None:
    parts = codec.encode(weight(*shape), shape)
    before = {name: tensor.clone() for name, tensor in parts.items()}
    decoded = codec.decode(parts, shape)
    assert decoded.dtype == torch.float32 and decoded.shape == shape
    assert all(same(parts[name], before[name]) for name in parts)


@small
def test_amax_is_that_of_the_decoded_tile(codec: Codec, shape: Shape, weight: Any) -> None:
    parts = codec.encode(weight(*shape), shape)
    amax = grid.largest(codec.tile(parts, shape))
    assert amax.dtype == torch.float32 and amax.shape == (1,)
    assert amax == codec.decode(parts, shape).abs().max()


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32", "fp8-block", "int8-channel", "int4"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_amax_of_a_damaged_part_is_not_finite(name: str, value: float, weight: Any) -> None:
    """In the weight itself where its dtype has such a value, in a scale elsewhere."""
    codec = parse_format(name)
    parts = codec.encode(weight(130, 256), (130, 256))
    for part, stored in parts.items():
        if stored.dtype.is_floating_point and not (
            stored.dtype == torch.float8_e4m3fn and value == value
        ):
            damaged = stored.clone()
            damaged[-1, -1] = value
            tile = codec.tile({**parts, part: damaged}, (130, 256))
            assert not grid.largest(tile).isfinite().any()


@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize(("codec", "shape"), pairs(ALL, [(1, 1), (127, 129), (160, 256)]))
def test_tiles_give_the_bytes_of_the_whole(
    codec: Codec, shape: Shape, factor: int, weight: Any, same: Any
) -> None:
    """Values below use all 24 bits, so FP8's search for an original scale runs as well."""
    source = weight(*shape) * 1.1
    whole, specs = codec.encode(source, shape), codec.specs(*shape)
    decoded = codec.decode(whole, shape)
    covered = {name: [0] * (s.shape[s.axis] if s.shape else 1) for name, s in specs.items()}
    ranges = tiles(codec, *shape, factor)
    summary = None
    if codec.two_pass:
        summary = codec.summarize([codec.measure(source[a:b]) for a, b in ranges])
    for start, stop in ranges:
        parts = codec.encode(source[start:stop], shape, summary)
        stored = {}
        for name, spec in specs.items():
            first, last = spec.row_range(start, stop)
            assert same(parts[name], spec.take(whole[name], start, stop)), (name, start)
            stored[name] = spec.take(whole[name], start, stop)
            covered[name][first:last] = [1] * (last - first)
        again = codec.decode(stored, (stop - start, shape[1]))
        assert same(again, decoded[start:stop]), start
    assert all(all(rows) for rows in covered.values())


@every
@pytest.mark.parametrize("shape", [(160, 256), (33, 576)])
def test_tiles_need_not_be_decoded(codec: Codec, shape: Shape, weight: Any, same: Any) -> None:
    """Of whatever format: encoders take the codes, and give the bytes they give for the floats."""
    source = weight(*shape) * 1.1
    for stored in ALL if holds(codec, shape) else []:
        if not holds(stored, shape):
            continue
        held = stored.encode(source, shape)
        tile, decoded = stored.tile(held, shape), stored.decode(held, shape)
        summary = codec.summarize([codec.measure(tile)]) if codec.two_pass else None
        if codec.two_pass:
            assert same(codec.measure(tile), codec.measure(decoded))
        for given in (summary, None):
            parts = codec.encode(tile, shape, given)
            expected = codec.encode(decoded, shape, given)
            assert all(same(parts[name], expected[name]) for name in expected), stored


@small
def test_zeros_stay_zero(codec: Codec, shape: Shape, weight: Any) -> None:
    assert not codec.decode(codec.encode(torch.zeros(shape), shape), shape).any()
    source = weight(*shape)
    source[:, ::3] = 0.0
    source[-1] = -0.0
    decoded = codec.decode(codec.encode(source, shape), shape)
    assert not decoded[source == 0].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [(0, 0), (129, 255)])
@every
def test_nan_and_infinity_are_refused(
    codec: Codec, where: tuple[int, int], value: float, weight: Any
) -> None:
    source = weight(130, 256)
    source[where] = value
    with pytest.raises(FormatError, match="NaN or infinity"):
        codec.encode(source, (130, 256))


@every
def test_a_format_detects_itself(codec: Codec) -> None:
    """From the parts and the config it writes, and not from another format's parts."""
    shape = (576, 256)
    config = codec.config(["lm_head"])
    assert codec.detect(codec.specs(*shape), config) == codec
    assert detect_format(codec.specs(*shape), config) == codec
    for other in CODECS:
        if other.name != codec.name:
            assert codec.detect(other.specs(*shape), other.config([])) is None


@every
def test_names_parse_back(codec: Codec) -> None:
    again = parse_format(format_name(codec))
    assert again == codec and type(again) is type(codec)
    assert getattr(again, "arithmetic", None) == getattr(codec, "arithmetic", None)


def test_names_show_only_what_differs_from_the_default() -> None:
    assert [format_name(codec) for codec in CODECS] == [codec.name for codec in CODECS]
    assert [format_name(parse_format(text)) for text in EXTRA] == EXTRA
    assert format_name(parse_format("int4[group_size=128]")) == "int4"
    assert parse_format(" int4[ group_size = 32 ] ") == parse_format("int4[group_size=32]")


@every
def test_every_format_describes_itself(codec: Codec) -> None:
    assert codec.summary and "\n" not in codec.summary
    assert codec.row_alignment(7168) >= 1
    assert 0 < codec.tolerance.max_kl < 1 and codec.tolerance.min_sqnr_db > 0
    config = codec.config(["model.layers.0.mlp.gate", "lm_head"])
    rules = [r"-:^model\.layers\.0\.mlp\.gate$", "-:^lm_head$"]  # gptqmodel's patterns
    kept = [["model.layers.0.mlp.gate", "lm_head"], dict.fromkeys(rules, {})]
    assert config is None or any(names in config.values() for names in kept)


@every
def test_signal_to_noise_is_within_the_formats_own_tolerance(codec: Codec, weight: Any) -> None:
    """`verify` must not refuse a normal weight that was converted as well as the format allows."""
    source = weight(160, 256) * 1.1
    noise = codec.decode(codec.encode(source, (160, 256)), (160, 256)) - source
    ratio = source.square().sum() / noise.square().sum().clamp_min(1e-30)
    assert 10 * torch.log10(ratio) > codec.tolerance.min_sqnr_db


def test_bits_per_weight_count_the_scales() -> None:
    bits = {format_name(codec): bits_per_weight(codec) for codec in ALL}
    assert (bits["bf16"], bits["fp16"], bits["fp32"]) == (16.0, 16.0, 32.0)
    assert bits["fp8-block"] == 8 + 32 / 128**2
    assert bits["int8-channel"] == 8 + 16 / 7168
    shape_part = 128 / 7168**2
    assert bits["int4"] == 4 + 16 / 128 + shape_part
    assert bits["int4[group_size=32]"] == 4 + 16 / 32 + shape_part


def test_row_range_covers_partial_blocks() -> None:
    scales = TensorSpec("F32", (5, 56), rows=128)
    assert scales.row_range(0, 128) == (0, 1)
    assert scales.row_range(128, 512) == (1, 4)
    assert scales.row_range(512, 576) == (4, 5)
    assert TensorSpec("I8", (576, 56)).row_range(512, 576) == (512, 576)
    assert TensorSpec("I64", (2,), rows=0).row_range(512, 576) == (0, 2)


@pytest.mark.parametrize("codec", [c for c in CODECS if isinstance(c, Plain)], ids=format_name)
def test_plain_formats_repeat_themselves(codec: Codec, weight: Any, same: Any) -> None:
    """Rounding a rounded value changes nothing, bit for bit; FP32 keeps all."""
    source = weight(127, 129) * 1.1
    first = codec.encode(source, (127, 129))
    second = codec.encode(codec.decode(first, (127, 129)), (127, 129))
    assert same(first["weight"], second["weight"])
    assert same(first["weight"], source) == (codec.name == "fp32")
