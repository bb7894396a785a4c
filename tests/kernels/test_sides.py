"""Sides of integer products: compiled against the slow reference, and exact sums."""

from __future__ import annotations

import pytest
import torch

from arrondi.errors import ShapeError
from arrondi.kernels import sides

SHAPES = [(1, 1), (3, 15), (40, 16), (65, 200), (7, 1030)]


def factors(rows: int, columns: int, which: int) -> dict[str, torch.Tensor]:
    made = {"row": 0.5 + torch.rand(rows), "column": 0.5 + torch.rand(columns)}
    return {name: value for i, (name, value) in enumerate(made.items()) if which >> i & 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", range(4))
def test_compiled_is_the_reference(dtype: torch.dtype, which: int) -> None:
    torch.manual_seed(which)
    for rows, columns in SHAPES:
        x = (40 * torch.randn(rows, columns + 3)).to(dtype)[:, :columns]
        by = factors(rows, columns, which)
        for by_column in (False, True):
            assert torch.equal(
                sides.extremes(x, **by, by_column=by_column), sides.extremes_reference(x, **by, by_column=by_column)
            )
        for seed in (None, 0, 123456789, 2**32 - 1):
            given = {**by, "lowest": -127, "highest": 100, "seed": seed}
            assert torch.equal(sides.round_codes(x, **given), sides.round_codes_reference(x, **given))
        sums = torch.randint(-(2**20), 2**20, (rows, columns), dtype=torch.int32)
        for result in (torch.float32, torch.bfloat16):
            for bias in (None, torch.randn(columns)):
                parts = (sums, by.get("row"), by.get("column"), bias, result)
                expected = sides.scaled_reference(*parts)
                assert torch.equal(sides.scaled(sums.clone(), *parts[1:]), expected)


def test_stochastic_rounding_has_no_bias_and_keeps_whole_numbers() -> None:
    x = torch.linspace(-3, 3, 61).repeat(4000, 1)
    codes = sides.round_codes(x, seed=5).float()
    whole = x == x.round()
    assert torch.equal(codes[whole], x[whole])
    share = x[0] - x[0].floor()
    spread = (share * (1 - share) / 4000).sqrt()
    assert ((codes.mean(0) - x[0]).abs() <= 4.5 * spread + 2e-5).all()
    error = (codes - x).square().mean() / (x.round() - x).square().mean()
    assert error > 1.5  # twice the energy for values all over a step
    other = sides.round_codes(x, seed=6).float()
    assert (codes != other).any()


def test_what_is_not_finite_is_seen() -> None:
    x = torch.tensor([[1.0, float("nan")], [float("inf"), 2.0], [3.0, -4.0]])
    rows, columns = sides.extremes(x), sides.extremes(x, by_column=True)
    assert rows[0].isnan() and rows[1].isinf() and rows[2] == 4
    assert columns[0].isinf() and columns[1].isnan()


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 2000, 7), (33, 64, 65)])
def test_sums_are_exact(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    for codes in (torch.randint(-128, 128, (m + n, k)), torch.full((m + n, k), -128), torch.full((m + n, k), 127)):
        a, b = codes[:m].to(torch.int8), codes[m:].to(torch.int8)
        expected = (a.double() @ b.double().T).to(torch.int32)
        assert torch.equal(sides.integer_product(a, b), expected)
        assert torch.equal(sides.integer_product_reference(a, b), expected)
        assert torch.equal(sides.integer_product(a.T.contiguous().T, b), expected)
        left, right = sides.filled(a, b)  # what CUDA takes
        assert len(left) > 16 and left.shape[1] % 8 == 0 and len(right) % 8 == 0
        assert torch.equal(sides.integer_product(left, right)[:m, :n], expected)


def test_bad_sides_are_refused() -> None:
    codes = torch.zeros(2, 3, dtype=torch.int8)
    with pytest.raises(ShapeError, match="A product of codes"):
        sides.integer_product(codes, codes.T)
    with pytest.raises(ShapeError, match="matrix"):
        sides.round_codes(torch.zeros(3))
    with pytest.raises(ShapeError, match="row must be"):
        sides.extremes(torch.zeros(2, 3), row=torch.zeros(3))
    with pytest.raises(ShapeError, match="split"):
        long = torch.zeros(1, 2**17, dtype=torch.int8)
        sides.integer_product(long, long)
