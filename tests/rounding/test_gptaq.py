"""GPTAQ: the weight that makes up for changed inputs, against least squares; and refinement within a format."""

from __future__ import annotations

import pytest
import torch

from arrondi.calibration import SecondMoment
from arrondi.errors import DataError, ShapeError
from arrondi.formats import PRESETS, Scheme, parse_scheme
from arrondi.rounding.gptaq import corrected, gptaq
from arrondi.rounding.gptq import gptq
from arrondi.rounding.refine import refined, row_losses

M, N, TOKENS = 24, 64, 4000
SCHEME = PRESETS["W3A16"].with_group_size(32).weights


def made(noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SecondMoment, torch.Tensor]:
    """Weight, inputs of the original, those of the quantized model, and their moments."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(16, N, generator=generator)
    f = torch.randn(TOKENS, 16, generator=generator) @ mix + 0.5 * torch.randn(TOKENS, N, generator=generator)
    # Rounding before has rotated and shrunk the inputs a little, the same for every token, and added noise.
    turn = torch.eye(N) + noise * torch.randn(N, N, generator=generator) / N**0.5
    x = f @ turn + 0.1 * torch.randn(TOKENS, N, generator=generator)
    weight = torch.randn(M, N, generator=generator) * 0.02
    moment = SecondMoment(N)
    moment.update(x)
    return weight, f, x, moment, x.T @ f


def error(weight: torch.Tensor, f: torch.Tensor, restored: torch.Tensor, x: torch.Tensor) -> float:
    return float((f @ weight.T - x @ restored.T).square().sum())


def test_the_correction_is_the_least_squares_solution() -> None:
    weight, f, x, moment, cross = made()
    wanted = torch.linalg.lstsq(x.double(), f.double() @ weight.double().T).solution.T
    found = corrected(weight, moment, cross, damping=1e-9)
    assert torch.allclose(found.double(), wanted, atol=2e-5)


def test_the_output_comes_nearer_to_the_original_than_with_gptq() -> None:
    weight, f, x, moment, cross = made()
    plain, own = gptq(weight, SCHEME, moment), gptaq(weight, SCHEME, moment, cross_moment=cross)
    assert error(weight, f, own.dequantize(), x) < 0.7 * error(weight, f, plain.dequantize(), x)


def test_without_a_difference_it_is_gptq() -> None:
    weight, _, x, moment, _ = made()
    for options in ({"cross_moment": moment.matrix()}, {"cross_moment": x.T @ x * 3, "strength": 0.0}):
        q = gptaq(weight, SCHEME, moment, **options)
        assert torch.equal(q.codes, gptq(weight, SCHEME, moment).codes)


def test_inputs_that_never_occur_are_no_trouble() -> None:
    weight, f, x, _, _ = made()
    x[:, 5] = f[:, 5] = 0
    moment = SecondMoment(N)
    moment.update(x)
    q = gptaq(weight, SCHEME, moment, cross_moment=x.T @ f)
    assert bool(torch.isfinite(q.dequantize()).all())


def test_what_is_missing_or_of_another_size_is_named() -> None:
    weight, _, _, moment, cross = made()
    with pytest.raises(DataError, match=r"^layer: gptaq needs the second moment"):
        gptaq(weight, SCHEME, moment, name="layer")
    with pytest.raises(ShapeError, match=r"^layer: the moments are for 64"):
        gptaq(weight, SCHEME, moment, cross_moment=cross[:, :3], name="layer")


@pytest.mark.parametrize(
    "scheme", ["w=int3/g32/bfloat16", "w=uint3/g32/asym/bfloat16", "w=nf4/g32", "w=fp4_e2m1/g32/e8m0", "w=uint2/g32/offset", "NVFP4A16"]
)  # fmt: skip
def test_refinement_never_raises_the_error_of_a_row(scheme: str) -> None:
    weight, _, _, moment, _ = made()
    wanted: Scheme = parse_scheme(scheme).weights
    hessian = moment.matrix()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    q = gptq(weight, wanted, moment)
    better = refined(q, weight, hessian, 2)
    before, after = row_losses(q, weight, hessian), row_losses(better, weight, hessian)
    assert bool((after <= before).all())
    assert float(after.sum()) < 0.97 * float(before.sum())
    assert better.scheme == wanted


def test_refined_codes_are_a_local_optimum() -> None:
    weight, _, _, moment, _ = made()
    weight, hessian = weight[:4], moment.matrix()
    q = refined(gptq(weight, SCHEME, moment), weight, hessian, 50)
    best = row_losses(q, weight, hessian)
    step = q.real_scale.repeat_interleave(32, 1)
    for c in range(0, N, 7):
        for move in (-1, 1):
            changed = q.dequantize()
            allowed = (q.codes[:, c] + move).clamp(-4, 3) == q.codes[:, c] + move
            changed[:, c] += move * step[:, c]
            d = weight - changed
            loss = ((d @ hessian) * d).sum(1)
            assert bool((loss[allowed] >= best[allowed] * (1 - 1e-5)).all())
