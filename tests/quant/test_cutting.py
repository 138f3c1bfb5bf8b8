"""Cutting stored weights into pieces and joining them: laws over every format, slices by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from requant.errors import FormatError
from requant.quant import CODECS, format_name, parse_format
from requant.quant.codec import TORCH_DTYPES, Codec, TensorSpec
from requant.quant.cutting import AXES, Patch, cut, cut_alignment, cut_reason, join, plan_cut
from tests.quant.test_quant_laws import ALL, fits

#: Variants that `encode` refuses or that no other law lists.
STORED = ["mxfp4[container=gpt-oss]", "mxfp4[container=deepseek-v4,codes=f4]"]
STORED += ["fp8-tensor[container=mistral]", "int4[act_order=true]"]
STORED += ["int4-gptq[act_order=true]", "int4-gptq[group_size=1024]"]
STORED += ["fp8-block[block_rows=1,block_cols=32,scale=e8m0,container=deepseek-v4]"]
EVERY = [*ALL, *map(parse_format, STORED)]
Parts = dict[str, torch.Tensor]
Shape = tuple[int, int]

every = pytest.mark.parametrize("codec", EVERY, ids=format_name)
axes = pytest.mark.parametrize("axis", [0, 1], ids=AXES)


def random_weight(rows: int, cols: int, seed: int) -> torch.Tensor:
    """Values of both signs over a few powers of two, so that neighbouring scales differ."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-6, 1, (rows, -(-cols // 16)), generator=generator).to(torch.float32)
    spread = torch.exp2(steps).repeat_interleave(16, 1)[:, :cols]
    return torch.randn(rows, cols, generator=generator) * spread


def encoded(codec: Codec, source: torch.Tensor) -> Parts:
    """The parts of a weight; those that are only read from what is written."""
    shape = (source.shape[0], source.shape[1])
    match format_name(codec):
        case "mxfp4[container=gpt-oss]":
            parts = parse_format("mxfp4").encode(source, shape)
            blocks = parts["weight_packed"].reshape(len(source), -1, 16)
            return {"weight_blocks": blocks, "weight_scales": parts["weight_scale"]}
        case "fp8-tensor[container=mistral]":
            parts = parse_format("fp8-tensor[container=fp8]").encode(source, shape)
            return {"weight": parts["weight"], "qscale_weight": parts["weight_scale_inv"]}
        case "int4[act_order=true]":
            parts = parse_format("int4").encode(source, shape)
            order = torch.arange(shape[1], dtype=torch.int32) // 128
            tail = {"weight_shape": parts.pop("weight_shape")}
            return {**parts, "weight_g_idx": order, **tail}
        case "int4-gptq[act_order=true]":
            return parse_format("int4-gptq").encode(source, shape)
        case _:
            return codec.encode(source, shape)


def piece_shape(shape: Shape, axis: int, start: int, stop: int) -> Shape:
    return (stop - start, shape[1]) if axis == 0 else (shape[0], stop - start)


def part_slice(decoded: torch.Tensor, axis: int, start: int, stop: int) -> torch.Tensor:
    return decoded[start:stop] if axis == 0 else decoded[:, start:stop].contiguous()


def check(codec: Codec, shape: Shape, axis: int, edges: list[int], seed: int, same: Any) -> None:
    """Everything that a cut at these edges promises."""
    parts = encoded(codec, random_weight(*shape, seed))
    before = {part: tensor.clone() for part, tensor in parts.items()}
    decoded = codec.decode(parts, shape)
    config = codec.config([])
    pieces = []
    for start, stop in pairwise(edges):
        new = piece_shape(shape, axis, start, stop)
        piece = cut(codec, parts, shape, axis, start, stop)
        header = {}
        assert list(piece) == list(codec.specs(*new))
        for part, spec in codec.specs(*new).items():
            dims = tuple(piece[part].shape)
            header[part] = TensorSpec(spec.dtype, spec.shape)
            assert piece[part].dtype == TORCH_DTYPES[spec.dtype], part
            assert dims == spec.shape or spec.dtype == "F4" and dims == (new[0], new[1] // 2), part
        found = codec.detect(header, config)
        assert found == codec and type(found) is type(codec)
        if found.needs_content:
            content = {part: piece[part].numpy().tobytes() for part in found.needs_content}
            found = found.with_content(content)
        assert found.shape(header) == new
        assert same(codec.decode(piece, new), part_slice(decoded, axis, start, stop)), start
        pieces.append(piece)
    joined = join(codec, pieces, shape, axis)
    assert list(joined) == list(parts)
    assert all(same(joined[part], before[part]) for part in parts)
    assert all(same(parts[part], before[part]) for part in parts)


def other_side(codec: Codec, axis: int) -> int:
    """A side that every format holds; nested blocks need rows of 8192 columns or more."""
    if axis == 1:
        return 2 if getattr(codec, "double_quant", False) else 160
    return 1024 if "1024" in format_name(codec) else 384


def unit(codec: Codec, axis: int) -> int:
    """The multiple that cuts of a large weight fall on."""
    width = 1 << 14 if axis else other_side(codec, 0)
    multiple = cut_alignment(codec, (other_side(codec, 1) if axis else 1 << 14, width), axis)
    assert multiple is not None
    return multiple


def ragged(codec: Codec, axis: int, multiple: int) -> int:
    """What a last piece may have beyond a multiple."""
    rest = max(multiple // 2 - 1, 0)
    shape = (rest, other_side(codec, 0)) if axis == 0 else (other_side(codec, 1), rest)
    flattened = codec.quant_method == "bitsandbytes"
    return rest if rest and fits(codec, *shape) and not (flattened and axis) else 0


@pytest.mark.parametrize("count", [2, 3, 4, 8])
@axes
@every
def test_pieces_are_weights_that_decode_to_their_slices(
    codec: Codec, axis: int, count: int, same: Any
) -> None:
    """Pieces of several blocks, the last one ragged where the format holds that."""
    multiple = unit(codec, axis)
    step = multiple * max(1, 24 // multiple)
    edges = [step * number for number in range(count)]
    edges.append(step * count + ragged(codec, axis, multiple))
    shape = (edges[-1], other_side(codec, 0)) if axis == 0 else (other_side(codec, 1), edges[-1])
    check(codec, shape, axis, edges, count, same)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_pieces_of_any_size(data: st.DataObject, same: Any) -> None:
    codec = data.draw(st.sampled_from(EVERY))
    axis = data.draw(st.sampled_from([0, 1]))
    multiple = unit(codec, axis)
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    edges = [multiple * sum(sizes[:end]) for end in range(len(sizes) + 1)]
    edges[-1] += ragged(codec, axis, multiple) * data.draw(st.sampled_from([0, 1]))
    shape = (edges[-1], other_side(codec, 0)) if axis == 0 else (other_side(codec, 1), edges[-1])
    check(codec, shape, axis, edges, data.draw(st.integers(0, 9)), same)


@axes
@every
def test_cuts_elsewhere_are_refused(codec: Codec, axis: int) -> None:
    multiple = unit(codec, axis)
    side = 4 * multiple
    shape = (side, other_side(codec, 0)) if axis == 0 else (other_side(codec, 1), side)
    for start, stop in [(-1, multiple), (0, side + 1), (multiple, multiple), (multiple, 0)]:
        with pytest.raises(FormatError, match=f"{AXES[axis]} {start}:{stop} of {side}: expected"):
            plan_cut(codec, shape, axis, start, stop)
    for wrong in {multiple + 1, 2 * multiple - 1} if multiple > 1 else ():
        rest = f"multiples of {multiple} {AXES[axis]}, .*{wrong} % {multiple} = {wrong % multiple}"
        for start, stop in [(0, wrong), (wrong, side)]:
            with pytest.raises(FormatError, match=f"{AXES[axis]} {start}:{stop} of {side}.*{rest}"):
                plan_cut(codec, shape, axis, start, stop)


#: Of a [1024, 1024] weight: the multiples of rows and of columns that cuts fall on.
MULTIPLES: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(["bf16", "fp16", "fp32", "fp8-channel", "fp8-tensor", "int8-channel"], (1, 1)),
    **dict.fromkeys(["fp8-block", "int8-block"], (128, 128)),
    "fp8-block[block_rows=64,block_cols=32]": (64, 32),
    "mxfp8": (1, 32),
    "mxfp4": (1, 32),
    "nvfp4": (1, 16),
    "int4": (1, 128),
    "int4[group_size=32,symmetric=false]": (8, 32),
    "int4[group_size=-1]": (1, 8),
    "int4-awq": (32, 128),
    "int4-awq[group_size=-1]": (32, 1),
    "int4-gptq": (8, 128),
    "int4-gptq[group_size=-1]": (8, 8),
    "nf4": (1, 64),
    "bnb-fp4": (1, 64),
    "nf4[double_quant=true]": (16, None),
}


def test_multiples() -> None:
    found = {
        text: tuple(cut_alignment(parse_format(text), (1024, 1024), axis) for axis in (0, 1))
        for text in MULTIPLES
    }
    assert found == MULTIPLES
    assert {codec.name for codec in CODECS} <= set(MULTIPLES)


def test_reasons_name_the_part_that_decides() -> None:
    def reason(text: str, axis: int, shape: Shape = (1024, 1024)) -> str:
        return cut_reason(parse_format(text), shape, axis)

    assert reason("fp8-block", 0) == "one step of weight_scale_inv is 128 rows"
    assert reason("fp8-block", 1) == "one step of weight_scale_inv is 128 columns"
    assert reason("fp8-tensor", 1) == "every part goes by single columns"
    assert reason("int4-awq", 0) == "int4-awq packs 32 rows at a time"
    assert reason("int4-gptq", 0) == "one step of qzeros is 8 rows"
    flat = "one step of weight.absmax is 64 values of the flattened weight"
    assert reason("nf4", 0, (8, 200)) == flat
    assert reason("nf4", 1, (8, 200)) == f"{flat}, and 64 do not divide 200 columns"
    nested = "weight.nested_absmax is 16384 values of the flattened weight"
    whole = f"one step of {nested}, and 16384 do not divide 7168 columns"
    assert reason("nf4[double_quant=true]", 1, (16384, 7168)) == whole


def test_rows_of_a_flattened_weight_share_blocks() -> None:
    """200 columns and blocks of 64 meet after every 8 rows; columns cannot be cut at all."""
    codec = parse_format("nf4")
    assert cut_alignment(codec, (24, 200), 0) == 8
    assert cut_alignment(codec, (24, 200), 1) is None
    with pytest.raises(FormatError, match="nf4 cannot be cut along columns here: .*64 do not"):
        plan_cut(codec, (24, 200), 1, 0, 64)
    assert cut_alignment(parse_format("nf4[double_quant=true]"), (7168, 16384), 1) == 16384


def test_flattened_rows_in_pieces(same: Any) -> None:
    """Row counts that end within a block, and an odd count of values."""
    check(parse_format("nf4"), (71, 201), 0, [0, 64, 71], 0, same)
    check(parse_format("nf4"), (21, 200), 0, [0, 8, 16, 21], 0, same)
    check(parse_format("nf4[blocksize=32]"), (69, 25), 0, [0, 32, 64, 69], 0, same)
    check(parse_format("nf4[double_quant=true]"), (70, 512), 0, [0, 32, 64, 70], 0, same)


def test_a_block_that_is_cut_is_refused() -> None:
    """576 rows are 4.5 blocks: rank 1's first block would be another than engines expect."""
    codec = parse_format("fp8-block")
    assert list(plan_cut(codec, (576, 7168), 0, 512, 576)) == ["weight", "weight_scale_inv"]
    with pytest.raises(
        FormatError,
        match=r"rows 288:576 of 576: cuts of fp8-block fall on multiples of 128 rows, since one "
        r"step of weight_scale_inv is 128 rows \(288 % 128 = 32\)",
    ):
        plan_cut(codec, (576, 7168), 0, 288, 576)


def test_a_plan_tells_byte_ranges() -> None:
    found = plan_cut(parse_format("fp8-block"), (576, 512), 1, 128, 512)
    assert found["weight"].patch == Patch(512, (0, 576), (128, 512))
    assert found["weight_scale_inv"].patch == Patch(16, (0, 5), (4, 16))
    assert found["weight_scale_inv"].spec.shape == (5, 3)
    found = plan_cut(parse_format("int4-gptq"), (64, 256), 0, 8, 24)
    assert found["qweight"].patch == Patch(256, (0, 32), (32, 96))
    assert found["qzeros"].patch == Patch(32, (0, 2), (4, 12))
    assert found["g_idx"].patch is None and found["g_idx"].rewritten
    found = plan_cut(parse_format("int4-gptq"), (64, 256), 1, 128, 256)
    assert found["g_idx"].patch == Patch(4, (128, 256), (0, 4)) and found["g_idx"].rewritten
    found = plan_cut(parse_format("nf4"), (6, 256), 1, 64, 192)
    assert found["weight"].patch == Patch(128, (0, 6), (32, 96))
    assert found["weight.absmax"].patch == Patch(16, (0, 6), (4, 12))
    assert found["weight.quant_map"].patch is None and not found["weight.quant_map"].rewritten
    found = plan_cut(parse_format("mxfp4[container=gpt-oss]"), (4, 256), 1, 64, 128)
    assert found["weight_blocks"].patch == Patch(128, (0, 4), (32, 64))


@axes
@every
def test_patches_are_what_a_cut_takes(codec: Codec, axis: int) -> None:
    """Read as a file is, byte range by byte range."""
    multiple = unit(codec, axis)
    first, last, side = 2 * multiple, 5 * multiple, 6 * multiple
    shape = (side, other_side(codec, 0)) if axis == 0 else (other_side(codec, 1), side)
    parts = encoded(codec, random_weight(*shape, 0))
    piece = cut(codec, parts, shape, axis, first, last)
    for part, here in plan_cut(codec, shape, axis, first, last).items():
        raw = parts[part].contiguous().flatten().view(torch.uint8).numpy().tobytes()
        if here.patch is not None:
            pitch, (begin, end) = here.patch.pitch, here.patch.span
            lines = range(*here.patch.lines)
            raw = b"".join(raw[line * pitch + begin : line * pitch + end] for line in lines)
        taken = piece[part].contiguous().flatten().view(torch.uint8).numpy().tobytes()
        assert len(taken) == here.spec.nbytes
        assert here.rewritten or taken == raw, part


def by_hand(text: str, parts: Parts, shape: Shape, axis: int, a: int, b: int) -> Parts:
    """Slices as one would write them for each format on its own."""
    r, c = (slice(a, b), slice(None)) if axis == 0 else (slice(None), slice(a, b))

    def every_nth(tensor: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
        """Of a part with one element for `rows` x `cols` weights; 0: it has no such axis."""
        if axis == 0:
            return tensor[a // rows : -(-b // rows)] if rows else tensor
        return tensor[:, a // cols : -(-b // cols)] if cols else tensor

    match text:
        case "fp8-block":
            return {
                "weight": parts["weight"][r, c],
                "weight_scale_inv": every_nth(parts["weight_scale_inv"], 128, 128),
            }
        case "int8-channel":
            scale = parts["weight_scale"]
            return {"weight": parts["weight"][r, c], "weight_scale": scale[r]}
        case "int4[symmetric=false]":
            rows, cols = piece_shape(shape, axis, a, b)
            return {
                "weight_packed": every_nth(parts["weight_packed"], 1, 8),
                "weight_scale": every_nth(parts["weight_scale"], 1, 128),
                "weight_zero_point": every_nth(parts["weight_zero_point"], 8, 128),
                "weight_shape": torch.tensor([rows, cols]),
            }
        case "int4-awq":
            return {
                "qweight": every_nth(parts["qweight"].T, 8, 1).T,
                "qzeros": every_nth(parts["qzeros"].T, 8, 128).T,
                "scales": every_nth(parts["scales"].T, 1, 128).T,
            }
        case "int4-gptq":
            return {
                "qweight": every_nth(parts["qweight"].T, 1, 8).T,
                "qzeros": every_nth(parts["qzeros"].T, 8, 128).T,
                "scales": every_nth(parts["scales"].T, 1, 128).T,
                "g_idx": parts["g_idx"] if axis == 0 else parts["g_idx"][: b - a],
            }
        case "nvfp4":
            return {
                "weight_packed": every_nth(parts["weight_packed"], 1, 2),
                "weight_scale": every_nth(parts["weight_scale"].view(torch.uint8), 1, 16).view(
                    torch.float8_e4m3fn
                ),
                "weight_global_scale": parts["weight_global_scale"],
            }
        case "mxfp4":
            return {
                "weight_packed": every_nth(parts["weight_packed"], 1, 2),
                "weight_scale": every_nth(parts["weight_scale"], 1, 32),
            }
        case "nf4":
            rows, cols = piece_shape(shape, axis, a, b)
            state = f'{{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [{rows}'
            state += f", {cols}]}}"
            bytes_ = every_nth(parts["weight"].view(shape[0], -1), 1, 2)
            absmax = every_nth(parts["weight.absmax"].view(shape[0], -1), 1, 64)
            return {
                "weight": bytes_.reshape(-1, 1),
                "weight.absmax": absmax.reshape(-1),
                "weight.quant_map": parts["weight.quant_map"],
                "weight.quant_state.bitsandbytes__nf4": torch.tensor(
                    list(state.encode()), dtype=torch.uint8
                ),
            }
    raise AssertionError(text)


HANDS = ["fp8-block", "int8-channel", "int4[symmetric=false]", "int4-awq", "int4-gptq"]
HANDS += ["nvfp4", "mxfp4", "nf4"]


@pytest.mark.parametrize("where", [(0, 128), (128, 384), (256, 512)])
@axes
@pytest.mark.parametrize("text", HANDS)
def test_slices_by_hand(text: str, axis: int, where: Shape, same: Any) -> None:
    codec, shape = parse_format(text), (512, 512)
    parts = codec.encode(random_weight(*shape, 7), shape)
    piece, hand = cut(codec, parts, shape, axis, *where), by_hand(text, parts, shape, axis, *where)
    assert list(piece) == list(hand)
    for part, tensor in hand.items():
        assert same(piece[part], tensor.contiguous()), part


def gptq(groups: list[int]) -> tuple[Codec, Parts, Shape]:
    """A [16, 128] weight in groups of 32 columns, those of each column as told."""
    codec, shape = parse_format("int4-gptq[group_size=32]"), (16, 128)
    parts = codec.encode(random_weight(*shape, 0), shape)
    return codec, {**parts, "g_idx": torch.tensor(groups, dtype=torch.int32)}, shape


def test_act_order_is_refused_along_columns_when_it_is_seen(same: Any) -> None:
    """Columns that need scales of another piece; along rows every piece has all of them."""
    codec, parts, shape = gptq([column % 4 for column in range(128)])
    decoded = codec.decode(parts, shape)
    pieces = [cut(codec, parts, shape, 0, start, start + 8) for start in (0, 8)]
    assert same(torch.cat([codec.decode(piece, (8, 128)) for piece in pieces]), decoded)
    assert all(same(tensor, parts[p]) for p, tensor in join(codec, pieces, shape, 0).items())
    with pytest.raises(FormatError, match="g_idx puts a column into group 3 of 2, .*act-order"):
        cut(codec, parts, shape, 1, 0, 64)
    with pytest.raises(FormatError, match="g_idx puts a column into group -2 of 2, .*act-order"):
        cut(codec, parts, shape, 1, 64, 128)


def test_act_order_within_a_piece_is_kept(same: Any) -> None:
    codec, parts, shape = gptq([c % 2 for c in range(64)] + [2 + c % 2 for c in range(64)])
    decoded = codec.decode(parts, shape)
    pieces = [cut(codec, parts, shape, 1, start, start + 64) for start in (0, 64)]
    assert pieces[1]["g_idx"].tolist() == [c % 2 for c in range(64)]
    for piece, half in zip(pieces, decoded.split(64, 1), strict=True):
        assert same(codec.decode(piece, (16, 64)), half)
    assert all(same(tensor, parts[p]) for p, tensor in join(codec, pieces, shape, 1).items())


def test_compressed_tensors_act_order_is_refused_too() -> None:
    codec, shape = parse_format("int4[act_order=true,group_size=32]"), (16, 128)
    parts = parse_format("int4[group_size=32]").encode(random_weight(*shape, 0), shape)
    parts["weight_g_idx"] = (torch.arange(128) % 4).to(torch.int32)
    assert cut(codec, parts, shape, 0, 0, 8)["weight_g_idx"] is not None
    with pytest.raises(FormatError, match="weight_g_idx puts a column into group 3 of 2"):
        cut(codec, parts, shape, 1, 0, 64)


@pytest.mark.parametrize("text", ["nf4[double_quant=true]", "bnb-fp4[double_quant=true]"])
def test_bitsandbytes_own_json_is_shorter(text: str, same: Any) -> None:
    """Without spaces behind it; the mean of absmax that it tells goes to every piece."""
    codec, shape = parse_format(text), (64, 512)
    parts = codec.encode(random_weight(*shape, 0) + 0.1, shape)
    decoded = codec.decode(parts, shape)
    (state,) = (part for part in parts if "quant_state" in part)
    end = len(bytes(parts[state].numpy()).rstrip())
    short = {**parts, state: parts[state][:end]}
    pieces = [cut(codec, short, shape, 0, start, start + 32) for start in (0, 32)]
    assert same(torch.cat([codec.decode(piece, (32, 512)) for piece in pieces]), decoded)
    assert same(join(codec, pieces, shape, 0)[state], parts[state])


Change = Callable[[Parts], object]


@pytest.mark.parametrize(
    ("text", "axis", "part", "change"),
    [
        ("int8-channel", 1, "weight_scale", lambda p: p["weight_scale"][3].mul_(2)),
        ("fp8-tensor", 0, "weight_scale", lambda p: p["weight_scale"].mul_(2)),
        ("nvfp4", 1, "weight_global_scale", lambda p: p["weight_global_scale"].mul_(2)),
        ("int4-gptq", 0, "g_idx", lambda p: p["g_idx"][0].add_(1)),
        ("nf4", 0, "weight.quant_map", lambda p: p["weight.quant_map"][0].mul_(2)),
    ],
)
def test_pieces_must_agree_on_what_all_have(
    text: str, axis: int, part: str, change: Change
) -> None:
    codec, shape = parse_format(text), (256, 256)
    parts = codec.encode(random_weight(*shape, 0), shape)
    pieces = [cut(codec, parts, shape, axis, start, start + 128) for start in (0, 128)]
    pieces[1] = {name: tensor.clone() for name, tensor in pieces[1].items()}
    change(pieces[1])
    with pytest.raises(FormatError, match=f"piece 1 of 2: {part} is not the one of piece 0"):
        join(codec, pieces, shape, axis)


def test_pieces_of_two_means_of_absmax_are_refused() -> None:
    codec, shape = parse_format("nf4[double_quant=true]"), (64, 512)
    pieces = []
    for seed in (0, 1):
        pieces.append(codec.encode(random_weight(32, 512, seed), (32, 512)))
    with pytest.raises(FormatError, match="quant_state.bitsandbytes__nf4 is not the one of"):
        join(codec, pieces, shape, 0)


def test_pieces_that_do_not_make_up_the_weight() -> None:
    codec, shape = parse_format("fp8-block"), (512, 256)
    parts = codec.encode(random_weight(*shape, 0), shape)
    first, second = (cut(codec, parts, shape, 0, start, start + 256) for start in (0, 256))
    with pytest.raises(FormatError, match="pieces have 256 rows of 512"):
        join(codec, [first], shape, 0)
    with pytest.raises(FormatError, match="pieces have 0 columns of 256"):
        join(codec, [], shape, 1)
    with pytest.raises(FormatError, match="piece 2 of 3: rows 512:512 of 512: expected"):
        join(codec, [first, second, second], shape, 0)
    with pytest.raises(FormatError, match="piece 1 of 2: weight_scale_inv is missing; has weight"):
        join(codec, [first, {"weight": second["weight"]}], shape, 0)
    with pytest.raises(FormatError, match="piece 1 of 2: weight is missing; has weight_scale_inv"):
        join(codec, [first, {"weight_scale_inv": second["weight_scale_inv"]}], shape, 0)
    wrong = {**second, "weight_scale_inv": second["weight_scale_inv"][:1]}
    message = r"weight_scale_inv is float32 \[1, 2\], expected F32 \[2, 2\]"
    with pytest.raises(FormatError, match=f"piece 1 of 2: {message}"):
        join(codec, [first, wrong], shape, 0)
    with pytest.raises(FormatError, match=r"weight is uint8 \[256, 256\], expected F8_E4M3"):
        join(codec, [{**first, "weight": first["weight"].view(torch.uint8)}, second], shape, 0)
    ragged = [cut(codec, parts, shape, 0, 0, 384), second]
    with pytest.raises(FormatError, match="piece 1 of 2: .*is float8_e4m3fn"):
        join(codec, ragged, shape, 0)


def test_parts_of_another_shape_are_not_cut() -> None:
    codec = parse_format("fp8-block")
    parts = codec.encode(random_weight(512, 256, 0), (512, 256))
    with pytest.raises(FormatError, match=r"weight is float8_e4m3fn \[512, 256\], expected"):
        cut(codec, parts, (512, 512), 1, 0, 128)
    with pytest.raises(FormatError, match="weight is missing; has weight_scale_inv"):
        cut(codec, {"weight_scale_inv": parts["weight_scale_inv"]}, (512, 256), 0, 0, 128)


def test_parts_need_not_be_contiguous(same: Any) -> None:
    codec, shape = parse_format("int8-channel"), (64, 96)
    parts = codec.encode(random_weight(*shape, 0), shape)
    turned = {part: tensor.T.contiguous().T for part, tensor in parts.items()}
    for axis in (0, 1):
        piece = cut(codec, turned, shape, axis, 16, 48)
        plain = cut(codec, parts, shape, axis, 16, 48)
        assert all(same(piece[part], plain[part]) for part in parts)


def test_cuts_of_cuts(same: Any) -> None:
    """Rows of columns are columns of rows."""
    for codec in map(parse_format, HANDS):
        parts = codec.encode(random_weight(512, 512, 0), (512, 512))
        down = cut(codec, parts, (512, 512), 0, 128, 384)
        across = cut(codec, parts, (512, 512), 1, 128, 256)
        one = cut(codec, down, (256, 512), 1, 128, 256)
        other = cut(codec, across, (512, 128), 0, 128, 384)
        assert all(same(one[part], other[part]) for part in one)


def test_columns_of_a_part_are_those_of_the_weight() -> None:
    """A part whose `cols` was forgotten would have another count."""
    for codec in EVERY:
        shape = (1024, 1 << 14)
        for part, spec in codec.specs(*shape).items():
            if spec.cols is None or not spec.cols:
                continue
            along = 1 - spec.axis if spec.rows else spec.axis
            assert -(-shape[1] // spec.cols) == spec.shape[along], (format_name(codec), part)
