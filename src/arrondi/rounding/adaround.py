"""AdaRound: to which side each weight is rounded is learned on the layer's output, with scales as they are.

Owns: `adaround`. A weight is s (⌊w / s⌋ + h) with h between 0 and 1: a sigmoid stretched a little over both ends and cut there, so that it
can end on either. The error of the layer's output is minimised together with Σ 1 - |2 h - 1|^β, which for falling β drives every h
to an end. That error is quadratic in the weight: for inputs x of the quantized and f of the original model it needs Σ x xᵀ and Σ x fᵀ alone, so
a step sees all of the text and draws no batches. Every row is in units of what rounding to nearest leaves of it, or the share of the regulariser
would depend on the size of a layer's weights and inputs. (So the paper's weight of the regulariser, 0.01, is not that of these units: there
three quarters of the weights reach no end, and what they learned is lost when they are rounded.)

Source: Nagel, Amjad, van Baalen, Louizos, Blankevoort 2020, arXiv:2004.10568 (without an activation after the layer).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Final, Literal

import torch

from arrondi.arguments import Between, check_arguments
from arrondi.calibration import SecondMoment
from arrondi.errors import SchemeError
from arrondi.formats import Scheme, tile_shape
from arrondi.rounding.autoround import refuse_autoround
from arrondi.rounding.gptaq import check_moments, corrected
from arrondi.rounding.gptq import checked
from arrondi.rounding.options import Damping
from arrondi.rounding.rtn import rtn
from arrondi.tensor.checks import SchemeLike, check_tensor, named, scheme_of
from arrondi.tensor.encoding import code_dtype
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.tiling import from_tiles, to_tiles

GAMMA, ZETA = -0.1, 1.1
"""Ends of the stretched sigmoid."""
_FIRST, _LAST = 20.0, 2.0
"""β falls in a line from the first to the last."""
_WARM: Final = 0.2
"""Share of the iterations without the regulariser."""


def refuse_adaround(scheme: Scheme, options: Mapping[str, Any]) -> str | None:
    """Why rounding cannot be learned in a scheme; None if it can."""
    reason = refuse_autoround(scheme, options)
    return reason and reason.replace("AutoRound", "AdaRound")


def rectified(v: torch.Tensor) -> torch.Tensor:
    """h(V) = clip((ζ - γ) sigmoid(V) + γ, 0, 1)."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def unrectified(share: torch.Tensor) -> torch.Tensor:
    """The V for which h(V) is this share, 0 … 1."""
    return -torch.log((ZETA - GAMMA) / (share - GAMMA) - 1)


def beta_of(step: int, iterations: int) -> float:
    """β of the regulariser; infinite (no regulariser) at first."""
    start = _WARM * iterations
    if step < start:
        return math.inf
    return _LAST + (_FIRST - _LAST) * max(0.0, 1 - (step - start) / (iterations - start))


def adaround(
    weight: torch.Tensor,
    scheme: SchemeLike,
    moment: SecondMoment | None = None,
    *,
    cross_moment: torch.Tensor | None = None,
    iterations: Annotated[int, Between(1, 1_000_000)] = 1000,
    rate: Annotated[float, Between(0, 10)] = 0.03,
    regular: Annotated[float, Between(0, 1e6)] = 10.0,
    damping: Damping = 0.01,
    range: Literal["absmax", "search"] = "search",
    name: str = "weight",
    facts: dict[str, Any] | None = None,
) -> QTensor:
    """Learn for every weight whether it is rounded up or down.

    A row that rounding to nearest serves better is rounded to nearest.

    Args:
        weight: (m, n), any float dtype, finite.
        scheme: integers with plain scales.
        moment: Σ x xᵀ of the layer's inputs in the quantized model.
        cross_moment: Σ x fᵀ (n, n), with the inputs f that the original has for the same tokens.
        iterations: of Adam, each on all of the text.
        rate: of Adam; of h, this is about a third.
        regular: weight of the regulariser, beside the error in units of what rounding to nearest leaves, per weight.
        damping: of Σ x xᵀ, as a fraction of its mean diagonal.
        range: of the scales, see `rtn`: "search" for those of least squared error, "absmax" for whole ranges.
        name: for messages.
        facts: receives `rounded_away`, the share of weights that are not rounded to the nearest level, and `undecided`, that of
            those that the regulariser had not brought to either side in the end: more iterations would.

    Raises:
        ShapeError: the weight is not a matrix, or a moment has another size.
        SchemeError: the scheme is no integers with plain scales, or an option is out of range.
        DataError: a moment is missing, or NaN.
    """
    with named(name):
        check_arguments(adaround, {**locals(), "weight": check_tensor(weight, name), "scheme": scheme_of(scheme)})
    wanted = scheme_of(scheme)
    if (reason := refuse_adaround(wanted, {})) is not None:
        raise SchemeError(f"{name}: {reason}")
    moment, cross = check_moments("adaround", weight, moment, cross_moment, name)
    work, moment = checked("adaround", weight, wanted, moment, name)
    work = work.float()
    goal = corrected(work, moment, cross, damping)
    hessian = moment.matrix().to(work.device)
    hessian.diagonal().add_(damping * float(hessian.diagonal().mean()))
    nearest = rtn(work, wanted, None, range=range, name=name)
    learned, undecided = _learned(nearest, work, goal, hessian, iterations, rate, regular)
    better = _losses(learned.dequantize() - goal, hessian) < _losses(nearest.dequantize() - goal, hessian)
    codes = torch.where(better[:, None], learned.codes, nearest.codes)
    if facts is not None:
        facts["rounded_away"] = float((codes != nearest.codes).float().mean())
        facts["undecided"] = undecided
    return replace(nearest, codes=codes)


def _learned(
    q: QTensor, weight: torch.Tensor, goal: torch.Tensor, hessian: torch.Tensor, iterations: int, rate: float, regular: float
) -> tuple[QTensor, float]:  # fmt: skip
    """The codes to which V has led, on the grid of q, and the share of h that has reached no end."""
    tile, format = tile_shape(q.scheme.granularity, q.shape), q.scheme.format
    scale = _spread(q.real_scale, q, tile)
    zero = 0.0 if q.zero_point is None else _spread(q.zero_point.float(), q, tile)
    floor = torch.floor(weight / scale)
    v = unrectified(weight / scale - floor)
    # A sum of every row's error in units of its nearest one, times its weights: as large as the regulariser's sum.
    units = weight.shape[1] / _losses(q.dequantize() - goal, hessian).clamp(min=1e-30)
    first, second = torch.zeros_like(v), torch.zeros_like(v)
    for step in range(iterations):
        h = rectified(v)
        levels = floor + h + zero
        clipped = levels.clamp(format.qmin, format.qmax)
        error = (clipped - zero) * scale - goal
        slope = 2 * units[:, None] * (error @ hessian) * scale * (levels == clipped)
        beta = beta_of(step, iterations)
        if beta < math.inf:
            away = 2 * h - 1
            slope = slope - regular * 2 * beta * away.abs() ** (beta - 1) * away.sign()
        s = torch.sigmoid(v)
        slope = slope * (ZETA - GAMMA) * s * (1 - s) * ((h > 0) & (h < 1))
        first.mul_(0.9).add_(slope, alpha=0.1)
        second.mul_(0.999).addcmul_(slope, slope, value=0.001)
        size = (second / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-8)
        v.sub_(rate / (1 - 0.9 ** (step + 1)) * first / size)
    codes = (floor + (v >= 0) + zero).clamp(format.qmin, format.qmax).to(code_dtype(format))
    h = rectified(v)
    return replace(q, codes=codes), float(((h > 0.01) & (h < 0.99)).float().mean())


def _losses(error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """(m,): the output error of every row."""
    return ((error @ hessian) * error).sum(1)


def _spread(part: torch.Tensor, q: QTensor, tile: tuple[int, ...]) -> torch.Tensor:
    """One number for every group → one for every weight (m, n)."""
    whole = to_tiles(torch.zeros(q.shape, device=part.device), tile)
    return from_tiles(whole + part.reshape(-1, 1), tile, q.shape)
