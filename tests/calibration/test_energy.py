"""Sums of squares of two halves, and how far they are apart."""

from __future__ import annotations

import pytest
import torch

from arrondi.calibration import Energy, SecondMoment, half_of
from arrondi.errors import ShapeError


def test_importance_is_the_diagonal_of_the_second_moment_over_tokens() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 2, 3, 100, 0.01, 0])
    energy, moment = Energy(6), SecondMoment(6)
    for j, rows in enumerate(x.split(7)):
        energy.add(rows, half_of(j))
        moment.update(rows)
    torch.testing.assert_close(energy.importance, moment.matrix().diagonal() / 50, rtol=1e-5, atol=0)
    assert energy.tokens == [28, 22]


def test_halves_that_are_alike_and_halves_that_are_not() -> None:
    same, other = Energy(3), Energy(2)
    rows = torch.tensor([[1.0, -2.0, 0.0], [3.0, 0.0, 0.0]])
    for half in (0, 1, 1):  # means, not sums: another number of tokens changes nothing
        same.add(rows, half)
    assert same.moved == (0.0, 0.0)
    other.add(torch.tensor([[3.0, 0.0]]), 0)
    assert other.moved is None and other.importance.tolist() == [9.0, 0.0]
    other.add(torch.tensor([[0.0, 1.0]]), 1)
    assert other.moved == pytest.approx((2.0, 1.0))  # nothing in common
    scaled = Energy(1)
    scaled.add(torch.tensor([[2.0]]), 0)
    scaled.add(torch.tensor([[1.0]]), 1)
    assert scaled.moved == pytest.approx((2 * 3 / 5, 0.5))


def test_what_does_not_fit_is_refused() -> None:
    for rows, half in ((torch.ones(2, 3), 0), (torch.ones(2, 2), 2), (torch.ones(2), 0)):
        with pytest.raises(ShapeError, match=r"rows \(tokens, 2\) and the half"):
            Energy(2).add(rows, half)
