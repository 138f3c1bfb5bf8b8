"""Codes and grids of scales: the compiled loops give torch's bits, and both what the words say."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numba
import pytest
import torch

from requant.errors import FormatError
from requant.quant import CODECS, Codec, compiled, format_name, grid, loops
from requant.quant.bnb_maps import MAPS, middles
from requant.quant.e8m0 import RULES, e8m0_to_float32, exponent_bytes
from requant.quant.grid import Alphabet
from requant.quant.packing import pack_nibbles

ALPHABETS: tuple[Alphabet, ...] = ("e4m3", "e2m1", "int4", "int8")
SHAPES = [(1, 16), (7, 96), (128, 256), (130, 320)]
BLOCKS = [(1, 16), (1, 32), (1, -1), (128, 128), (3, 48), (-1, -1)]
#: From the smallest subnormal to where products overflow.
POWERS = [-149, -130, -60, 0, 60, 127]


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`by_torch(f, ...)`: the call as where Numba is not installed."""

    def call(work: Callable[..., Any], *arguments: Any) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(compiled, "_loops", lambda: None)
            return work(*arguments)

    return call


def decode(
    alphabet: Alphabet,
    codes: torch.Tensor,
    scale: torch.Tensor,
    block: tuple[int, int],
    cols: int | None = None,
) -> torch.Tensor:
    """Codes of so many columns, all that there are unless told, times their scales."""
    return grid.decode(coded(alphabet, codes, scale, block, cols))


def coded(
    alphabet: Alphabet,
    codes: torch.Tensor,
    scale: torch.Tensor,
    block: tuple[int, int],
    cols: int | None = None,
) -> grid.Coded:
    """A tile that is not decoded."""
    width = codes.shape[1] * (1 if alphabet in ("e4m3", "int8") else 2)
    return grid.Coded(alphabet, codes, scale, block, width if cols is None else cols)


def values_of(alphabet: Alphabet) -> torch.Tensor:
    """What all codes of an alphabet stand for, in ascending order."""
    match alphabet:
        case "e4m3":
            codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
            positive = codes.to(torch.float32)
            return torch.cat((-positive.flip(0)[:-1], positive))
        case "e2m1":
            positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
            return torch.cat((-positive.flip(0)[:-1], positive))
        case "int4":
            return torch.arange(-8.0, 8.0)
        case "int8":
            return torch.arange(-128.0, 128.0)
        case "nf4" | "fp4":
            return torch.tensor(MAPS[alphabet]).sort().values


def wild(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Floats of any finite bits, among them zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 0x7F800000, shape, generator=generator, dtype=torch.int32)
    tile = bits.view(torch.float32) * torch.randn(shape, generator=generator).sign()
    tile.view(-1)[::7] = 0.0
    tile.view(-1)[3::11] = -0.0
    return tile


def scales(shape: tuple[int, int], block: tuple[int, int], power: int) -> torch.Tensor:
    """Positive floats near a power of two, one for each block."""
    sides = (b if b > 0 else side for b, side in zip(block, shape, strict=True))
    rows, cols = (-(-side // b) for side, b in zip(shape, sides, strict=True))
    generator = torch.Generator().manual_seed(rows + cols)
    near = torch.rand(rows, cols, generator=generator) * 0.9 + 1
    return torch.ldexp(near, torch.tensor(power))


def test_numba_is_there() -> None:
    """The rest of this module would compare torch with torch."""
    assert compiled.loops_for(torch.zeros(1)) is not None
    assert compiled.loops_for(torch.zeros(1, device="meta")) is None


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_loops_encode_and_decode_as_torch_does(
    alphabet: Alphabet, shape: tuple[int, int], block: tuple[int, int], by_torch: Any, same: Any
) -> None:
    """Tiles around the scales, where every code is met, and tiles of any bits, which overflow."""
    for power in POWERS:
        scale = scales(shape, block, power)
        generator = torch.Generator().manual_seed(power)
        near = torch.randn(shape, generator=generator) * values_of(alphabet)[-1] / 2
        for tile in (torch.ldexp(near, torch.tensor(power)), wild(shape, power)):
            tile[~torch.isfinite(tile)] = 0
            codes = grid.encode(alphabet, tile, scale, block)
            assert same(codes, by_torch(grid.encode, alphabet, tile, scale, block))
            decoded = decode(alphabet, codes, scale, block, shape[1])
            assert same(decoded, by_torch(decode, alphabet, codes, scale, block, shape[1]))


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("shape", [(7, 40), (130, 320)])
@pytest.mark.parametrize("block", [*BLOCKS, (1, 24)])
@pytest.mark.parametrize("source_block", [(1, 32), (1, 16), (3, 48), (-1, -1), (1, 8)])
@pytest.mark.parametrize("kind", ["one power", "any power", "any scale"])
def test_codes_of_fp4_become_others(
    alphabet: Alphabet,
    shape: tuple[int, int],
    block: tuple[int, int],
    source_block: tuple[int, int],
    kind: str,
    by_torch: Any,
    same: Any,
) -> None:
    """As their floats do: with few scales, with more than there are tables, and with such that are
    no powers of two, where none are used."""
    generator = torch.Generator().manual_seed(sum(shape))
    packed = torch.randint(0, 256, (shape[0], shape[1] // 2), generator=generator)
    scale, divisor = scales(shape, source_block, 0), scales(shape, block, 0)
    if kind != "any scale":
        spread = 1 if kind == "one power" else 40
        scale = torch.randint(-spread, spread, scale.shape, generator=generator).float().exp2()
        near = torch.randint(-spread, spread, divisor.shape, generator=generator).float()
        divisor *= near.exp2()
    tile = coded("e2m1", packed.to(torch.uint8), scale, source_block)
    codes = grid.encode(alphabet, tile, divisor, block)
    assert same(codes, by_torch(grid.encode, alphabet, tile, divisor, block))


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_codes_are_the_nearest(alphabet: Alphabet, by_torch: Any, same: Any) -> None:
    """At every value, every point halfway between two, beside them, and beyond the last."""
    values = values_of(alphabet)
    halfway = torch.tensor([(low + high) / 2 for low, high in pairwise(values.tolist())])
    exact = torch.cat((values, halfway, values[[0, -1]] * 1.5, values[[0, -1]] * 1e30))
    infinity = torch.tensor(torch.inf)
    tile = torch.cat((exact, exact.nextafter(infinity), exact.nextafter(-infinity)))
    tile = torch.nn.functional.pad(tile, (0, -len(tile) % 8))[None]
    one = torch.ones(1, 1)
    codes = grid.encode(alphabet, tile, one, (1, -1))
    assert same(codes, by_torch(grid.encode, alphabet, tile, one, (1, -1)))
    decoded = decode(alphabet, codes, one, (1, -1), tile.shape[1])[0].double()
    distance = (tile[0].double()[:, None] - values.double()).abs()
    assert torch.equal((tile[0] - decoded).abs(), distance.amin(1))


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_every_byte_is_decoded_as_torch_does(alphabet: Alphabet, by_torch: Any, same: Any) -> None:
    """NaN codes included; from memory that is not contiguous, too."""
    codes = torch.arange(256, dtype=torch.uint8)[None].repeat(3, 1)
    if alphabet in ("e4m3", "int8"):
        codes = codes.view(torch.float8_e4m3fn if alphabet == "e4m3" else torch.int8)
    scale = torch.tensor([[3.0], [-0.1], [2.0**-149]])
    for stored in (codes, codes[:, 1::2]):
        found = decode(alphabet, stored, scale, (1, -1))
        expected = by_torch(decode, alphabet, stored.contiguous(), scale, (1, -1))
        assert torch.equal(found.isnan(), expected.isnan())
        assert same(found.nan_to_num(7), expected.nan_to_num(7))
        assert found.isnan().any() == (alphabet == "e4m3")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_maps(kind: Alphabet, shape: tuple[int, int], by_torch: Any, same: Any) -> None:
    """Of every value, every point between two, what is beside it, and much else: the nearest, as
    far as float32 has the point between."""
    values = torch.tensor(MAPS[kind])
    between, _ = middles(kind)
    exact = torch.cat((values, torch.tensor(between)))
    infinity = torch.tensor(torch.inf)
    near = torch.cat((exact, exact.nextafter(infinity), exact.nextafter(-infinity))).clamp(-1, 1)
    generator = torch.Generator().manual_seed(0)
    tile = torch.rand(shape, generator=generator) * 2 - 1
    count = min(len(near), tile.numel())
    tile.view(-1)[:count] = near[:count]
    scale = scales(shape, (1, 16), 3)
    factors, wide = 1 / scale, tile * scale.repeat_interleave(16, 1)
    for given, factor in ((tile, torch.ones(1, 1)), (wide, factors)):
        block = (1, 16) if factor is factors else (-1, -1)
        codes = grid.encode(kind, given, factor, block)
        assert codes.dtype == torch.uint8 and codes.shape == (shape[0], shape[1] // 2)
        assert same(codes, by_torch(grid.encode, kind, given, factor, block))
        decoded = decode(kind, codes, scale, (1, 16))
        assert same(decoded, by_torch(decode, kind, codes, scale, (1, 16)))
    codes = grid.encode(kind, tile, torch.ones(1, 1), (-1, -1))
    decoded = decode(kind, codes, torch.ones(1, 1), (-1, -1)).double()
    distance = (tile.double()[..., None] - values.double()).abs()
    assert bool(((tile - decoded).abs() <= distance.amin(2) + 2.0**-24).all())
    assert codes[0, 0] >> 4 == 0  # the first value's code, in the high nibble


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 40)])
@pytest.mark.parametrize("size", [16, 32, -1])
def test_zero_points(
    first: bool, shape: tuple[int, int], size: int, by_torch: Any, same: Any
) -> None:
    """Quotients at and beside ties, with zero points odd and even, added before or after rounding;
    and back."""
    generator = torch.Generator().manual_seed(1)
    halves = torch.randint(-60, 61, shape, generator=generator) / 2
    beside = torch.randint(-1, 2, shape, generator=generator) * 2.0**-22
    scale = scales(shape, (1, size), -5)
    zero = torch.randint(0, 16, scale.shape, generator=generator).to(torch.float32)
    width = size if size > 0 else shape[1]
    spread, zeros = (g.repeat_interleave(width, 1)[:, : shape[1]] for g in (scale, zero))
    for step in (torch.ones_like(scale), scale):
        tile = (halves + beside) * (spread if step is scale else 1)
        codes = grid.encode_with_zeros(tile, step, zero, size, first)
        assert same(codes, by_torch(grid.encode_with_zeros, tile, step, zero, size, first))
        quotient = tile / step.repeat_interleave(width, 1)[:, : shape[1]]
        number = ((quotient + (zeros - 8)).round() + 8) if first else quotient.round() + zeros
        number = number.clamp(0, 15)
        held = grid.Coded("int4", codes, step, (1, size), shape[1], zero)
        expected = (number - zeros) * step.repeat_interleave(width, 1)[:, : shape[1]]
        assert torch.equal(grid.decode(held), expected)
        assert same(grid.decode(held), by_torch(grid.decode, held))
        assert torch.equal(grid.largest(held), expected.abs().amax().reshape(1))


@pytest.mark.parametrize("shape", [*SHAPES, (5, 33), (3, 1)])
@pytest.mark.parametrize("size", [1, 8, 100, -1])
def test_ranges(shape: tuple[int, int], size: int, by_torch: Any, same: Any) -> None:
    """Of runs of any length and sign, zero in them all; NaN and infinity are refused."""
    tile = wild(shape, 6)
    for given in (tile, tile.abs(), -tile.abs()):
        runs = given.split(size if size > 0 else shape[1], dim=1)
        low, high = grid.ranges(given, size)
        assert torch.equal(low, torch.stack([run.amin(1).clamp_max(0) for run in runs], 1))
        assert torch.equal(high, torch.stack([run.amax(1).clamp_min(0) for run in runs], 1))
        for found, expected in zip(by_torch(grid.ranges, given, size), (low, high), strict=True):
            assert torch.equal(found, expected)
    for value in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        tile[-1, -1] = value
        with pytest.raises(FormatError, match="NaN or infinity"):
            grid.ranges(tile, size)
        with pytest.raises(FormatError, match="NaN or infinity"):
            by_torch(grid.ranges, tile, size)


@pytest.mark.parametrize("cols", [8, 12, 17])
def test_int4_of_any_width(cols: int, by_torch: Any, same: Any) -> None:
    """The last word is filled up with zero bits."""
    tile, one = torch.arange(2.0 * cols).remainder(16).sub(8).view(2, cols), torch.ones(2, 1)
    codes = grid.encode("int4", tile, one, (1, -1))
    assert codes.shape == (2, -(-cols // 8) * 4)
    assert same(codes, by_torch(grid.encode, "int4", tile, one, (1, -1)))
    assert not codes.flatten(0)[cols // 2 + 1 : codes.shape[1]].any()
    assert torch.equal(decode("int4", codes, one, (1, -1), cols), tile)


def test_upcast(by_torch: Any, same: Any) -> None:
    """Every E2M1 code times every power of two with which it is an E4M3 value."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(15)[None]
    scale = torch.arange(-8.0, 7.0).exp2()[None]
    narrow = coded("e2m1", pack_nibbles(codes).view(torch.uint8), scale, (1, 16))
    wide = grid.encode("e4m3", narrow, torch.ones(1, 1), (-1, -1))
    assert same(wide, by_torch(grid.encode, "e4m3", narrow, torch.ones(1, 1), (-1, -1)))
    values = values_of("e2m1")[7:]
    expected = torch.cat((values, -values)).repeat(15) * scale[0].repeat_interleave(16)
    assert torch.equal(wide.to(torch.float32)[0], expected)


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_largest(
    alphabet: Alphabet, shape: tuple[int, int], block: tuple[int, int], by_torch: Any, same: Any
) -> None:
    """That of the decoded tile, wherever it is, though scales be negative; NaN codes included."""
    generator = torch.Generator().manual_seed(0)
    width = shape[1] // 2 if alphabet in ("e2m1", "int4") else shape[1]
    for seed in range(8):
        codes = torch.randint(0, 0x7F, (shape[0], width), generator=generator, dtype=torch.uint8)
        if seed == 7:
            codes[-1, -1] = 0xFF
        if alphabet in ("e4m3", "int8"):
            codes = codes.view(torch.float8_e4m3fn if alphabet == "e4m3" else torch.int8)
        scale = scales(shape, block, seed) * torch.randn(1, generator=generator)
        tile = coded(alphabet, codes, scale, block)
        found = grid.largest(tile)
        expected = decode(alphabet, codes, scale, block).abs().amax().reshape(1)
        assert same(found.nan_to_num(-7), expected.nan_to_num(-7))
        assert same(
            by_torch(grid.largest, tile).nan_to_num(-7),
            expected.nan_to_num(-7),
        )


@pytest.mark.parametrize("shape", [*SHAPES, (5, 33), (3, 1)])
@pytest.mark.parametrize("size", [1, 8, 16, 32, 100, -1])
def test_amax(shape: tuple[int, int], size: int, by_torch: Any, same: Any) -> None:
    """Of runs of any length, the last one partial."""
    tile = wild(shape, 1)
    runs = tile.abs().split(size if size > 0 else shape[1], dim=1)
    expected = torch.stack([run.amax(1) for run in runs], 1)
    assert same(grid.amax(tile, size), expected)
    assert same(by_torch(grid.amax, tile, size), expected)
    assert grid.amax(tile[:0], size).shape == (0, expected.shape[1])


@pytest.mark.parametrize("rows", [1, 2, 128])
def test_column_peaks(rows: int, by_torch: Any, same: Any) -> None:
    """Of runs of rows, the last one partial; NaN is the largest of all."""
    tile = wild((130, 48), 2)
    tile[1, 3] = torch.nan
    expected = torch.stack([strip.abs().amax(0) for strip in tile.split(rows)])
    for found in (grid.column_peaks(tile, rows), by_torch(grid.column_peaks, tile, rows)):
        assert torch.equal(found.isnan(), expected.isnan())
        assert same(found.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("block", [(128, 128), (3, 48), (-1, -1)])
def test_differences(block: tuple[int, int], by_torch: Any) -> None:
    """Ulps that are put there: of each block the most below and above, whatever the sign."""
    shape = (130, 320)
    generator = torch.Generator().manual_seed(5)
    codes = torch.randn(shape, generator=generator).mul_(50).to(torch.float8_e4m3fn)
    other = coded("e4m3", codes, scales(shape, block, -9), block)
    ulps = torch.randint(-9, 10, shape, generator=generator, dtype=torch.int32)
    values = grid.decode(other)
    ulps[values.abs() < 1e-30] = 0
    tile = (values.view(torch.int32) + ulps).view(torch.float32)
    rows, cols = (b if b > 0 else side for b, side in zip(block, shape, strict=True))
    blocks = [row.split(cols, dim=1) for row in ulps.split(rows)]
    low = torch.stack([torch.stack([b.amin().clamp_max(0) for b in row]) for row in blocks])
    high = torch.stack([torch.stack([b.amax().clamp_min(0) for b in row]) for row in blocks])
    for found in (grid.differences(tile, other), by_torch(grid.differences, tile, other)):
        assert torch.equal(found[0], low) and torch.equal(found[1], high)


@pytest.mark.parametrize("cols", [1, 31, 320, 1024])
@pytest.mark.parametrize("size", [1, 7, 16, 24, 32, 64, 80, 128, -1])
def test_squared_errors(cols: int, size: int, by_torch: Any, same: Any) -> None:
    """Of groups of any size, the last one partial: the sum, to the bits of torch's."""
    generator = torch.Generator().manual_seed(cols)
    tile = torch.randn(3, cols, generator=generator)
    scale = scales((3, cols), (1, size), -8)
    coded = grid.Coded("int8", grid.encode("int8", tile, scale, (1, size)), scale, (1, size), cols)
    factor = torch.full_like(scale, 0.5)
    found = grid.squared_errors(tile, coded, factor)
    assert same(found, by_torch(grid.squared_errors, tile, coded, factor))
    squares = (grid.decode(coded).double() - tile).mul(0.5).square()
    runs = squares.split(size if size > 0 else cols, dim=1)
    expected = torch.stack([run.sum(1) for run in runs], 1)
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("position", [0, 17, 95])
def test_amax_refuses(value: float, sign: float, position: int, by_torch: Any) -> None:
    """NaN and infinity of either sign, wherever they are."""
    tile = torch.ones(3, 96)
    tile[1, position] = torch.tensor(value).copysign(torch.tensor(sign))
    for size in (8, 16, 32, -1):
        with pytest.raises(FormatError, match="NaN or infinity"):
            grid.amax(tile, size)
        with pytest.raises(FormatError, match="NaN or infinity"):
            by_torch(grid.amax, tile, size)


def test_bf16(same: Any) -> None:
    """Torch's rounding, of any bits; what has no finite BF16 is noticed."""
    tile = wild((64, 512), 3)
    tile = tile.where(tile.abs() < 3.38e38, 0.0)
    rounded, finite = grid.round_to_bf16(tile)
    assert finite and same(rounded, tile.to(torch.bfloat16))
    largest = torch.finfo(torch.bfloat16).max
    beyond = torch.tensor([0x7F7F8000], dtype=torch.int32).view(torch.float32)  # half a step on
    for value, kept in ((largest, True), (float(beyond), False), (torch.inf, False)):
        tile[3, 5] = -value
        assert grid.round_to_bf16(tile)[1] is kept
    tile[3, 5] = torch.nan
    assert not grid.round_to_bf16(tile)[1]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("largest", [6.0, 448.0])
def test_exponents(largest: float, rule: str, by_torch: Any, same: Any) -> None:
    """Of zeros, subnormals, the largest float32 and all between; and their powers of two."""
    amax = torch.cat((wild((64, 512), 4).abs().flatten(), torch.tensor([0.0, 2.0**-149, 3.4e38])))
    found = exponent_bytes(amax, largest, rule)
    assert same(found, by_torch(exponent_bytes, amax, largest, rule))
    every = torch.arange(255, dtype=torch.uint8)
    assert same(e8m0_to_float32(every), by_torch(e8m0_to_float32, every))
    with pytest.raises(FormatError, match="255"):
        by_torch(e8m0_to_float32, torch.tensor([255], dtype=torch.uint8))


@pytest.mark.parametrize("codec", CODECS, ids=format_name)
def test_formats_are_the_same_without_numba(codec: Codec, by_torch: Any, same: Any) -> None:
    """All parts, of a weight that came from BF16 and one that came from FP8; and back."""
    shape = (256, 512)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * 0.02
    scale = torch.rand(2, 4, generator=generator) * 1e-4
    raised = decode("e4m3", (weight * 1e4).to(torch.float8_e4m3fn), scale, (128, 128))
    for tile in (weight.to(torch.bfloat16).to(torch.float32), raised):
        parts = codec.encode(tile, shape)
        expected = by_torch(codec.encode, tile, shape)
        assert all(same(parts[name], expected[name]) for name in codec.specs(*shape))
        decoded = codec.decode(parts, shape)
        assert same(decoded, by_torch(codec.decode, parts, shape))
        assert same(
            grid.largest(codec.tile(parts, shape)),
            by_torch(grid.largest, codec.tile(parts, shape)),
        )


def test_loops_compile_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba refuses to keep machine code when it finds no folder for it: then it does not."""

    def njit(cache: bool = False, **options: Any) -> Callable[..., Any]:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return numba.njit(**options)

    monkeypatch.setattr(loops, "njit", njit)
    assert loops._compiled(lambda number: number + 1)(2) == 3


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (3, 2)])
def test_scales_that_do_not_fit_are_refused(shape: tuple[int, int]) -> None:
    """Compiled loops would read beyond them."""
    tile, codes = torch.ones(200, 256), torch.zeros(200, 256, dtype=torch.uint8)
    with pytest.raises(FormatError, match=r"expected float32 \[2, 2\] for blocks of 128x128"):
        grid.encode("int8", tile, torch.ones(shape), (128, 128))
    with pytest.raises(FormatError, match=r"of a \[200, 256\] tile"):
        coded("e4m3", codes.view(torch.float8_e4m3fn), torch.ones(shape), (128, 128))
    with pytest.raises(FormatError, match="expected float32"):
        grid.encode("int8", tile, torch.ones(2, 2, dtype=torch.float64), (128, 128))
    with pytest.raises(FormatError, match=r"expected float32 \[200, 8\]"):
        grid.encode_with_zeros(tile, torch.ones(200, 8), torch.ones(200, 4), 32)
    with pytest.raises(FormatError, match=r"expected float32 \[200, 1\]"):
        grid.Coded("int4", codes, torch.ones(200, 1), (1, -1), 512, torch.ones(2, 1))
    with pytest.raises(FormatError, match="513 columns of e2m1 do not fit into 256 bytes"):
        decode("e2m1", codes, torch.ones(200, 1), (1, -1), 513)
