"""The numbers behind the verdict, on logits and weights whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch

from requant.verify.difference import Difference, squares
from requant.verify.metrics import LogitSums, compare_logits


def test_kl_of_a_case_solved_by_hand() -> None:
    # p = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2).
    p, q = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[1.0, 1.0]]).log()
    sums = compare_logits(p, q, torch.tensor([0]))
    # The logs were rounded to float32.
    assert sums.mean_kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert sums.perplexities[0] == pytest.approx(4 / 3, rel=1e-6)
    assert sums.perplexities[1] == pytest.approx(2.0)


def test_the_direction_is_source_then_output() -> None:
    p, q = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[1.0, 1.0]]).log()
    reverse = compare_logits(q, p, torch.tensor([-1])).mean_kl
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert reverse == pytest.approx(expected, rel=1e-6)


def test_positions_without_a_next_token_do_not_count_for_perplexity() -> None:
    logits = torch.tensor([[0.0, 0.0], [9.0, 0.0]])
    sums = compare_logits(logits, logits, torch.tensor([1, -1]))
    assert (sums.positions, sums.predicted) == (2, 1)
    assert sums.perplexities == (2.0, 2.0)
    assert sums.mean_kl == 0
    assert sums.top1_agreement == 1


def test_agreement_counts_positions() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    b = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert compare_logits(a, b, torch.full((4,), -1)).top1_agreement == 0.75


def test_nan_is_no_number_and_never_below_a_limit() -> None:
    nan = torch.tensor([[torch.nan, 1.0]])
    sums = compare_logits(torch.zeros(1, 2), nan, torch.tensor([0]))
    assert sums.mean_kl is None
    assert sums.perplexities[1] is None
    assert LogitSums().mean_kl is None


def test_sqnr_of_a_case_solved_by_hand() -> None:
    assert Difference(signal=100.0, noise=1.0).sqnr_db == pytest.approx(20.0)
    assert Difference(signal=1.0, noise=2.0).sqnr_db == pytest.approx(-3.0103)
    assert Difference(signal=1.0, noise=0.0).sqnr_db is None
    assert Difference(signal=0.0, noise=1.0).sqnr_db is None
    assert Difference(signal=math.nan, noise=1.0).sqnr_db is None


@pytest.mark.parametrize("value", [1e-30, 1.5, 1e30])
def test_squares_beyond_the_range_of_float32_are_summed(value: float) -> None:
    tensor = torch.full((3, 5), value)
    assert squares(tensor) == pytest.approx(15 * value**2, rel=1e-6, abs=0)


def test_a_value_that_is_not_finite_makes_the_sum_so() -> None:
    for value in (math.inf, -math.inf, math.nan):
        assert not math.isfinite(squares(torch.tensor([[1.0, value]])))
    assert squares(torch.zeros(2, 2)) == 0
