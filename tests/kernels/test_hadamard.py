"""Hadamard matrices by their law, and the fast transform against the product with them, on every compiled path."""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from arrondi.errors import ShapeError
from arrondi.kernels.hadamard import hadamard, hadamard_matrix, hadamard_reference
from arrondi.native import native
from tests.kernels.common import PATHS as COMPILED
from tests.kernels.common import normal, pairwise

MODULE = importlib.import_module("arrondi.kernels.hadamard")  # the package gives the function that name
PATHS = ["torch", *COMPILED]
SIZES = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 64, 96, 128, 344, 512, 576, 1024, 4096)
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """One compiled path after the other, and the reference in PyTorch's operators."""
    if request.param == "torch":
        monkeypatch.setattr(MODULE, "available", lambda: False)
        yield request.param
        return
    assert native is not None
    before = native.path()
    native.use_path(request.param)
    yield request.param
    native.use_path(before)


def allowed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Both sides add up n numbers whose squares sum to |x|², and round a result of that size once."""
    length = x.double().norm(dim=-1, keepdim=True)
    wide = ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
    return length * (4 * wide * x.shape[-1] ** 0.5 + 2 * ROUNDOFF[dtype]) + 1e-7 * (dtype == torch.float16)


# Sylvester; Paley's first with 11, 27, 43 …; his second with 13, 17, 25 and 81; 344 needs the field of 7³.
ORDERS = (
    1, 2, 4, 12, 20, 24, 28, 36, 40, 44, 52, 60, 76, 96, 100, 108, 140, 148, 164, 244, 252, 312, 344,
)  # fmt: skip


def test_rows_are_orthogonal() -> None:
    for n in ORDERS:
        matrix = hadamard_matrix(n)
        assert matrix.dtype == torch.int8
        assert matrix.abs().min() == 1
        assert torch.equal(matrix.double() @ matrix.double().T, n * torch.eye(n, dtype=torch.float64)), n


def test_small_matrices_by_hand() -> None:
    assert hadamard_matrix(1).tolist() == [[1]]
    assert hadamard_matrix(4).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    # Paley's first with q = 11, whose squares are 1, 3, 4, 5 and 9: row 1 holds χ(0 - j) + [j = 0] after its border.
    assert hadamard_matrix(12)[1].tolist() == [-1, 1, -1, 1, -1, -1, -1, 1, 1, 1, -1, 1]


def test_products_of_orders_are_kronecker_products() -> None:
    assert torch.equal(hadamard_matrix(96), torch.kron(hadamard_matrix(12), hadamard_matrix(8)))


def test_model_widths_have_the_smallest_base() -> None:
    for n, base in ((5632, 44), (14336, 28), (11008, 344), (18944, 148), (13824, 108)):
        first = hadamard(torch.eye(1, n), scale=1.0)[0]
        assert torch.equal(first.abs(), torch.ones(n))
        assert torch.equal(first, hadamard_matrix(base)[0].float().repeat_interleave(n // base))


def check_transform(n: int, dtype: torch.dtype, transposed: bool) -> None:
    for rows in (1, 3, 17):
        x = normal(rows, n, dtype=dtype)
        y = hadamard(x, transposed=transposed)
        assert y.dtype == dtype
        error = (y.double() - hadamard_reference(x, transposed=transposed).double()).abs()
        assert (error <= allowed(x, dtype)).all(), (n, rows)


def test_transform_is_the_product(path: str) -> None:
    for dtype in ROUNDOFF:
        for i, n in enumerate(SIZES):
            check_transform(n, dtype, transposed=bool((i + len(path)) % 2))


@pytest.mark.full
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ROUNDOFF)
@pytest.mark.parametrize("n", SIZES)
def test_transform_of_every_size_is_the_product(n: int, dtype: torch.dtype, transposed: bool, path: str) -> None:
    check_transform(n, dtype, transposed)


@pytest.mark.parametrize(("n", "path"), [
    pytest.param(n, path, marks=() if n == 11008 or path == "torch" else pytest.mark.full)
    for n in (5632, 11008, 14336) for path in PATHS
], indirect=["path"])  # fmt: skip
def test_wide_rows(n: int, path: str) -> None:
    x = normal(2, n)
    y = hadamard(x)
    rows = [0, 1, n // 3, n - 1]
    wanted = x.double() @ hadamard_matrix(n)[:, rows].double() / n**0.5
    assert ((y[:, rows].double() - wanted).abs() <= allowed(x, torch.float32)).all()
    assert torch.allclose(hadamard(y, transposed=True), x, atol=2e-5)


def test_integers_are_exact(path: str) -> None:
    for n in (8, 20, 64, 2048):
        x = torch.randint(-8, 8, (5, n), generator=torch.Generator().manual_seed(0)).float()
        assert torch.equal(hadamard(x, scale=1.0), x @ hadamard_matrix(n).float()), n


def test_many_rows_over_threads(path: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for rows, n in ((1, 11008), (3, 5632), (700, 96)):
            x = normal(rows, n)
            one = torch.cat([hadamard(row) for row in x.split(1)])
            assert torch.allclose(hadamard(x), one, atol=1e-6)
    finally:
        torch.set_num_threads(before)


def test_any_strides(path: str) -> None:
    for n in (12, 256):
        x = normal(6, 4, 2 * n)
        views = (x[:, 1, ::2], x.transpose(0, 1)[:, :, n:], x[::2, :, :n], x[0, 0, :n], x[:1, :1, :n].expand(3, 5, n))
        for view in views:
            before = view.clone()
            assert torch.equal(hadamard(view), hadamard(view.clone(memory_format=torch.contiguous_format)))
            assert torch.equal(view, before)
            assert hadamard(view).shape == view.shape


def test_no_rows(path: str) -> None:
    assert hadamard(torch.zeros(3, 0, 64)).shape == (3, 0, 64)
    assert hadamard(torch.zeros(0, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "path"), pairwise((torch.float32, torch.bfloat16), PATHS), indirect=["path"])
def test_nan_and_infinity_spread_over_their_row(dtype: torch.dtype, path: str) -> None:
    x = normal(3, 48, dtype=dtype)
    x[1, 5] = torch.nan
    x[2, 7] = torch.inf
    x[2, 8] = torch.inf
    y = hadamard(x)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
    odd = torch.full((1, 32), -1, dtype=torch.int32).view(torch.float32).to(dtype)  # a NaN with all bits set
    assert hadamard(odd).isnan().all()


def test_orthonormal_transform_keeps_lengths_and_flattens_outliers(path: str) -> None:
    x = torch.zeros(2, 4096)
    x[:, 77] = 100
    y = hadamard(x)
    assert torch.allclose(y.abs(), torch.full_like(y, 100 / 64))
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1))


def test_operator_passes_pytorchs_own_checks() -> None:
    for x in (normal(3, 24), normal(2, 3, 16, dtype=torch.bfloat16), normal(4, 12).requires_grad_()):
        torch.library.opcheck(torch.ops.arrondi.hadamard, (x, None, False))
        torch.library.opcheck(torch.ops.arrondi.hadamard, (x, 0.5, True))


def test_gradient_is_the_transpose() -> None:
    x = normal(3, 20).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: hadamard(t, scale=0.3), x)
    assert torch.autograd.gradgradcheck(lambda t: hadamard(t, transposed=True), x)


def test_it_is_traced_as_one_operator() -> None:
    class Rotated(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return hadamard(x * 2) + 1

    x = normal(3, 24)
    graph = torch.export.export(copy.deepcopy(Rotated()), (x,))
    targets = [node.target for node in graph.graph.nodes]
    assert torch.ops.arrondi.hadamard.default in targets
    assert torch.equal(graph.module()(x), Rotated()(x))


def test_orders_that_do_not_exist() -> None:
    for n in (0, -4, 3, 6, 30, 92, 156):
        with pytest.raises(ShapeError, match=f"order {n} .*[Nn]earest orders? (is|are) "):
            hadamard_matrix(n)


def test_bad_input_is_named_with_its_shape() -> None:
    with pytest.raises(ShapeError, match=r"\(2, 30\).*28 and 32"):
        hadamard(torch.zeros(2, 30))
    with pytest.raises(ShapeError, match=r"\(2, 32\) in torch.int8"):
        hadamard(torch.zeros(2, 32, dtype=torch.int8))
    with pytest.raises(ShapeError, match=r"\(\)"):
        hadamard(torch.tensor(1.0))
    with pytest.raises(ShapeError, match=r"\(2, 0\)"):
        hadamard(torch.zeros(2, 0))


def test_another_device_takes_the_fake_or_the_reference() -> None:
    assert hadamard(torch.zeros(2, 12, device="meta")).device.type == "meta"


def test_default_device_does_not_matter(path: str) -> None:
    x = normal(2, 24)
    with torch.device("meta"):
        assert torch.equal(
            hadamard_matrix(12) @ hadamard_matrix(12).T, 12 * torch.eye(12, dtype=torch.int8, device="cpu")
        )
        assert hadamard(x).device.type == "cpu"


def test_the_matrix_is_the_callers_own() -> None:
    hadamard_matrix(12).zero_()
    assert hadamard_matrix(12).abs().min() == 1


def test_without_the_extension() -> None:
    code = (
        "import torch; from arrondi.kernels.hadamard import hadamard, hadamard_reference; from arrondi.native import native;"
        "assert native is None; x = torch.randn(3, 96); assert torch.allclose(hadamard(x), hadamard_reference(x), atol=1e-5)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=os.environ | {"ARRONDI_CPU": "none", "PATH": ""},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
