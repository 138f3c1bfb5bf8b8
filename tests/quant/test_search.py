"""`method=mse`: the best of the candidates, per group, and never worse than plain rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given

from requant.errors import FormatError
from requant.quant import compiled, grid, parse_format
from requant.quant.grid import Coded, Tile
from requant.quant.search import CLIPS, search
from tests.quant.test_quant_properties import Case, cases, quick

FORMATS = ["int4", "int4[group_size=32]", "int4[group_size=-1]", "int4[scale=fp16]"]
FORMATS += ["int4[symmetric=false]", "int8-channel", "int8-channel[container=sglang]"]


def searched(text: str) -> Any:
    """The format with method=mse."""
    head, _, options = text.rstrip("]").partition("[")
    return parse_format(f"{head}[{options + ',' if options else ''}method=mse]")


def errors(codec: Any, source: torch.Tensor) -> torch.Tensor:
    """Squared error of each group, in float64."""
    rows, cols = source.shape
    size = getattr(codec, "group_size", cols)
    decoded = codec.decode(codec.encode(source, (rows, cols)), (rows, cols))
    noise = (decoded.double() - source.double()).square()
    return noise.reshape(rows, -1, cols if size < 0 else size).sum(-1)


def test_plain_rounding_comes_first() -> None:
    assert CLIPS[0] == 1.0 and len(set(CLIPS)) == len(CLIPS)


@pytest.mark.parametrize("text", FORMATS)
@quick
@given(case=cases(multiple=128, low=-10, high=10))
def test_never_worse_than_rounding(text: str, case: Case) -> None:
    """Per group. 2^-20: the search adds in float32, in another order."""
    source = case.weight()
    plain, best = errors(parse_format(text), source), errors(searched(text), source)
    assert (best <= plain * (1 + 2.0**-20)).all()


@pytest.mark.parametrize("text", [text for text in FORMATS if "fp16" not in text])
@pytest.mark.parametrize("exponent", [-90, 90])
def test_magnitudes_do_not_matter(text: str, exponent: int, weight: Any, same: Any) -> None:
    """The squares of 2^-90 and 2^90 are none in float32, yet the codes are those of 2^0."""
    codec, source = searched(text), weight(32, 256)
    near = codec.encode(source, (32, 256))
    far = codec.encode(source * 2.0**exponent, (32, 256))
    name = "weight" if "weight" in near else "weight_packed"
    assert same(near[name], far[name])
    ratio = far["weight_scale"].to(torch.float32) / near["weight_scale"].to(torch.float32)
    assert torch.equal(ratio, torch.full_like(ratio, 2.0**exponent))


@pytest.mark.parametrize(
    ("text", "gain"),
    [("int4", 0.35), ("int4[group_size=32]", 0.35), ("int4[symmetric=false]", 0.3)],
)
def test_gain_on_normal_weights(text: str, gain: float) -> None:
    """Decibels over plain rounding."""
    source = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    ratio = errors(parse_format(text), source).sum() / errors(searched(text), source).sum()
    assert 10 * torch.log10(ratio) > gain


@pytest.mark.parametrize("text", FORMATS)
def test_only_codes_and_scales_change(text: str, weight: Any) -> None:
    """Not the format: another method reads it, and it counts as the same format."""
    plain, best = parse_format(text), searched(text)
    assert plain == best and plain.accepts(best) and plain.config([]) == best.config([])
    assert plain.specs(32, 256) == best.specs(32, 256)
    parts = best.encode(weight(32, 256), (32, 256))
    assert torch.equal(plain.decode(parts, (32, 256)), best.decode(parts, (32, 256)))


@pytest.mark.parametrize("text", ["int4", "int8-channel"])
def test_unknown_method(text: str) -> None:
    with pytest.raises(FormatError, match="method=best: expected rtn, mse"):
        parse_format(f"{text}[method=best]")


def store(tile: Tile, size: int) -> Callable[..., Coded]:
    """INT4 with zero points in groups of `size` columns."""

    def stored(scale: torch.Tensor, zero: torch.Tensor) -> Coded:
        codes = grid.encode_with_zeros(tile, scale, zero, size)
        return Coded("int4", codes, scale, (1, size), tile.shape[1], zero)

    return stored


@pytest.mark.parametrize("shape", [(5, 48, 16), (1, 7, 7), (40, 1, 1), (9, 100, 32)])
@pytest.mark.parametrize("torch_alone", [False, True])
def test_search_is_the_argmin(
    shape: tuple[int, int, int], torch_alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against every candidate's error, written out in float64."""
    if torch_alone:
        monkeypatch.setattr(compiled, "_loops", lambda: None)
    rows, cols, size = shape
    generator = torch.Generator().manual_seed(len(shape))
    tile = torch.randn(rows, cols, generator=generator)
    groups = rows, -(-cols // size)
    candidates = [
        (torch.rand(groups, generator=generator) + 0.1, torch.full(groups, float(zero)))
        for zero in (0, 4, 8, 11, 4, 8)
    ]
    stored, padding = store(tile, size), (0, -cols % size)
    best = search(tile, grid.amax(tile, size), iter(candidates), stored)
    squares = torch.stack([
        torch.nn.functional.pad(grid.decode(stored(*c)).double() - tile, padding).square()
        for c in candidates
    ])  # fmt: skip
    chosen = squares.unflatten(2, (-1, size)).sum(-1).argmin(0)
    for position, found in enumerate(best):
        every = torch.stack([candidate[position] for candidate in candidates])
        assert torch.equal(found, every.gather(0, chosen[None])[0])


def test_ties_keep_the_earlier_candidate() -> None:
    tile, amax = torch.tensor([[1.0, -1.0]]), torch.ones(1, 1)
    numbers = [(1.0, 8.0), (0.3, 8.0), (1.0, 9.0)]
    candidates = [tuple(torch.tensor([[number]]) for number in pair) for pair in numbers]
    scale, zero = search(tile, amax, candidates, store(tile, 2))
    assert (scale.item(), zero.item()) == (1.0, 8.0)


def test_search_leaves_its_input() -> None:
    tile = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    before, amax = tile.clone(), grid.amax(tile)
    search(tile, amax, [(torch.ones(4, 1), torch.ones(4, 1))] * 2, store(tile, 8))
    assert torch.equal(tile, before) and torch.equal(amax, grid.amax(before))
