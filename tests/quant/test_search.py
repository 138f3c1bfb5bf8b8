"""`method=mse`: the best of the candidates, per group, and never worse than plain rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given

from requant.errors import FormatError
from requant.quant import parse_format
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


def restore(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    codes = (groups / scale[..., None] + zero[..., None]).round_().clamp_(0, 3)
    return codes.sub_(zero[..., None]).mul_(scale[..., None])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(5, 3, 16), (1, 7), (40, 1)])
def test_search_is_the_argmin(shape: tuple[int, ...], weighted: bool) -> None:
    """Against every candidate's error, written out in float64."""
    generator = torch.Generator().manual_seed(len(shape))
    groups = torch.randn(shape, generator=generator)
    importance = torch.rand(shape[-1], generator=generator) if weighted else None
    candidates = [
        (torch.rand(shape[:-1], generator=generator) + 0.1, torch.full(shape[:-1], float(zero)))
        for zero in (0, 1, 2, 3, 1, 2)
    ]
    best = search(groups, iter(candidates), restore, importance)
    squares = torch.stack([(restore(groups, *c) - groups).double().square() for c in candidates])
    chosen = (squares * (1 if importance is None else importance)).sum(-1).argmin(0)
    for position, found in enumerate(best):
        every = torch.stack([candidate[position] for candidate in candidates])
        assert torch.equal(found, every.gather(0, chosen[None])[0])


def test_ties_keep_the_earlier_candidate() -> None:
    groups = torch.tensor([[1.0, -1.0]])
    candidates = [(torch.tensor([scale]), torch.ones(1)) for scale in (1.0, 0.5, 1.0)]
    candidates[2] = (torch.tensor([1.0]), torch.tensor([2.0]))
    scale, zero = search(groups, candidates, restore)
    assert (scale.item(), zero.item()) == (1.0, 1.0)


def test_search_leaves_its_input() -> None:
    groups = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    before = groups.clone()
    search(groups, [(torch.ones(4), torch.ones(4))] * 2, restore)
    assert torch.equal(groups, before)
