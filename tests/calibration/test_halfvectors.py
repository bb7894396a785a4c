"""Half-vectors against their definition and the identities of Magnus and Neudecker."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arrondi.calibration import unvech, vech
from arrondi.errors import ShapeError
from tests.cases import each_once

SIZES = [1, 2, 7, 255, 256, 257, 600]  # around and across the panels of 256 rows


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def symmetric(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    a = torch.randn(n, n, generator=generator(seed), dtype=dtype)
    return a + a.T


def test_vech_lists_the_lower_triangle_row_by_row():
    a = torch.tensor([[1.0, -1, -1], [2, 3, -1], [4, 5, 6]])
    assert vech(a).tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("n", SIZES)
def test_entry_i_j_is_at_i_i_plus_1_over_2_plus_j(n):
    a = symmetric(n)
    packed = vech(a)
    i, j = np.tril_indices(n)
    np.testing.assert_array_equal(packed.numpy(), a.numpy()[i, j])
    np.testing.assert_array_equal(packed.numpy()[i * (i + 1) // 2 + j], a.numpy()[i, j])


@pytest.mark.parametrize(
    ("n", "dtype"), each_once(SIZES, [torch.float32, torch.float64, torch.bfloat16, torch.int64]), ids=str
)
def test_unpack_of_pack_is_the_identity_bit_for_bit(n, dtype):
    a = (symmetric(n) * 100).to(dtype)
    restored = unvech(vech(a))
    assert restored.dtype == dtype and torch.equal(restored, a) and torch.equal(restored, restored.T)
    assert torch.equal(vech(restored), vech(a))


def test_unpack_keeps_negative_zeros_and_nan_payloads():
    packed = torch.tensor([0.0, -0.0, 0.0, -0.0, math.nan, -0.0])
    bits = packed.view(torch.int32)
    assert torch.equal(vech(unvech(packed)).view(torch.int32), bits)
    full = unvech(packed)
    assert torch.equal(full.T.contiguous().view(torch.int32), full.view(torch.int32))


def test_batches_are_packed_matrix_by_matrix():
    batch = torch.stack([symmetric(5, seed) for seed in range(6)]).reshape(2, 3, 5, 5)
    packed = vech(batch)
    assert packed.shape == (2, 3, 15)
    assert torch.equal(packed[1, 2], vech(batch[1, 2]))
    assert torch.equal(unvech(packed), batch)


def test_duplication_matrix_identities():
    """vec A = D vech A; D'D = 1 on diagonal entries, 2 elsewhere; D D⁺ = (I + K)/2 (Magnus and Neudecker 1980)."""
    n, m = 6, 21
    duplication = torch.stack([unvech(e).reshape(-1) for e in torch.eye(m, dtype=torch.float64)], dim=1)
    weights = vech(torch.full((n, n), 2.0, dtype=torch.float64) - torch.eye(n, dtype=torch.float64))
    a = symmetric(n, dtype=torch.float64)
    assert torch.equal(duplication @ vech(a), a.reshape(-1))
    assert torch.equal(duplication.T @ duplication, torch.diag(weights))
    commutation = torch.eye(n * n, dtype=torch.float64).reshape(n, n, n * n).transpose(0, 1).reshape(n * n, n * n)
    expected = (torch.eye(n * n, dtype=torch.float64) + commutation) / 2
    assert torch.allclose(duplication @ torch.linalg.pinv(duplication), expected, atol=1e-12)


@settings(deadline=None)
@given(n=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_packed_dot_is_the_frobenius_product(n, seed):
    a, b = symmetric(n, seed, torch.float64), symmetric(n, seed + 1, torch.float64)
    weights = vech(2 - torch.eye(n, dtype=torch.float64))  # off-diagonal entries count twice
    assert torch.allclose((weights * vech(a) * vech(b)).sum(), (a * b).sum(), rtol=1e-12, atol=1e-12)
    assert torch.allclose((weights.sqrt() * vech(a)).norm(), a.norm(), rtol=1e-12)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 2, 3)])
def test_vech_refuses_what_is_not_square(shape):
    with pytest.raises(ShapeError, match=r"square matrix, got shape \("):
        vech(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(), (2,), (5, 4)])
def test_unvech_refuses_lengths_that_are_not_triangular(shape):
    with pytest.raises(ShapeError, match=r"n\(n\+1\)/2 entries"):
        unvech(torch.zeros(shape))
