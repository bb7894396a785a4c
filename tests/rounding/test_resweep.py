"""Sweeps with grids fitted to what had to be rounded."""

from __future__ import annotations

import pytest
import torch

from arrondi.calibration import SecondMoment
from arrondi.repair.soft import SoftScale
from arrondi.rounding import any4, gptaq, gptq
from arrondi.tensor.qtensor import QTensor


def case(m: int = 48, n: int = 64) -> tuple[torch.Tensor, SecondMoment, torch.Tensor]:
    """A weight, the moment of correlated inputs, and that moment as a matrix."""
    x = torch.randn(400, n) @ (torch.eye(n) + 0.4 * torch.randn(n, n) / n**0.5)
    moment = SecondMoment(n)
    moment.update(x)
    return torch.randn(m, n), moment, x.T @ x


def losses(q: QTensor, w: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h))
    d = w - q.dequantize()
    return ((d @ h) * d).sum(1)


@pytest.mark.parametrize("scheme", ["w=int2/g16", "w=uint3/g32", "w=int3/channel", "w=nf4/g16", "w=uint4/g16/offset"])
def test_no_row_gets_worse_and_most_get_better(scheme: str) -> None:
    w, moment, h = case()
    once, often = losses(gptq(w, scheme, moment), w, h), losses(gptq(w, scheme, moment, sweeps=5), w, h)
    assert bool((often <= once * (1 + 1e-4)).all())
    assert float((often < 0.999 * once).float().mean()) > 0.5
    assert float(often.sum()) < 0.97 * float(once.sum())


@pytest.mark.parametrize("scheme", ["w=int4/tensor", "NVFP4", "MXFP4"])
def test_grids_that_rows_share_stay(scheme: str) -> None:
    w, moment, _ = case()
    once, often = gptq(w, scheme, moment), gptq(w, scheme, moment, sweeps=3)
    assert torch.equal(once.dequantize(), often.dequantize())


def test_gptaq_sweeps_too_and_refines_what_it_found() -> None:
    w, moment, h = case()
    cross = moment.matrix() * 1.02
    plain = gptaq(w, "w=int2/g16", moment, cross_moment=cross)
    best = gptaq(w, "w=int2/g16", moment, cross_moment=cross, sweeps=5, refine=2)
    assert float(losses(best, 1.02 * w, h).sum()) < 0.95 * float(losses(plain, 1.02 * w, h).sum())


def test_learned_tables_take_refinement_and_correction() -> None:
    w, moment, h = case()
    plain = any4(w, "w=int2/g16", moment, rows=16)
    refined = any4(w, "w=int2/g16", moment, rows=16, refine=2)
    assert torch.allclose(SoftScale.of(plain).value(), plain.dequantize(), atol=1e-6), (
        "scales over tables can be learned"
    )
    assert bool((losses(refined, w, h) <= losses(plain, w, h) * (1 + 1e-4)).all())
    assert float(losses(refined, w, h).sum()) < float(losses(plain, w, h).sum())
    corrected = any4(w, "w=int2/g16", moment, rows=16, cross_moment=moment.matrix() * 1.1)
    assert float(losses(corrected, 1.1 * w, h).sum()) < 0.95 * float(losses(plain, 1.1 * w, h).sum())
    assert torch.equal(
        any4(w, "w=int2/g16", moment, rows=16, cross_moment=moment.matrix() * 1.1, strength=0.0).codes, plain.codes
    )
