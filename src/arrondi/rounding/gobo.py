"""GOBO: a table of a few values for a whole matrix, and its outliers as they are.

Owns: `gobo`, `outliers` (which weights are no part of the bell curve), `make_gobo`, `size_gobo` (how many there are, for the plan) and
`refuse_gobo`.

Weights of a layer are taken for a normal distribution; those of which it says ln p < -4 are stored as they are. The others fall
into 2^b bins of equal population, and means and nearest means alternate, as in k-means, until the sum of |w - ŵ| no longer falls: stopping
there is meant, for going on lowers squares and raises absolute errors.

Source: Zadeh, Edo, Awad, Moshovos 2020, "GOBO", arXiv:2005.03842.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Final

import torch

from arrondi.arguments import Between, check_arguments
from arrondi.calibration import SecondMoment
from arrondi.errors import DataError, SchemeError
from arrondi.formats import Apart, LayerScheme, PerTensor, Scheme, Table, look_up
from arrondi.tensor.apart import kept_of
from arrondi.tensor.checks import SchemeLike, check_tensor, named, scheme_of
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.tables import nearest

THRESHOLD: Final = -4.0
"""A weight whose log-density is below is an outlier."""


def make_gobo(scheme: Scheme, options: Mapping[str, Any]) -> Scheme:
    """The scheme that `gobo` makes of the one asked for: its bits, one table of float32 for the tensor. Outliers: `size_gobo`."""
    if scheme.format.learned:
        return scheme
    return Scheme(look_up(scheme.format.bits), PerTensor(), table=Table(0, "float32"))


def size_gobo(
    scheme: LayerScheme, weight: torch.Tensor, options: Mapping[str, Any], absmax: torch.Tensor | None = None
) -> LayerScheme:
    """The same for one weight (m, n): how many of its elements are kept apart."""
    count = int(outliers(weight, float(options.get("zscore", 0.0))).sum())
    return replace(scheme, weights=replace(scheme.weights, apart=Apart("elements", count) if count else None))


def refuse_gobo(scheme: Scheme, options: Mapping[str, Any]) -> str | None:
    """Why no weight can be rounded so; None if it can."""
    format, made = scheme.format, scheme.table
    if scheme.apart is not None and (made is None or scheme.apart.what != "elements"):
        made = None
    elif format.kind == "integer" and format.levels == 2**format.bits and scheme.symmetric:
        return None
    if made == Table(0, "float32") and scheme.granularity == PerTensor():
        return None
    return f"gobo learns one table for a tensor, of as many values as symmetric integers have (W4A16, W3A16, W2A16), got {scheme}."


def gobo(
    weight: torch.Tensor,
    scheme: SchemeLike,
    moment: SecondMoment | None = None,
    *,
    zscore: Annotated[float, Between(0, 100)] = 0.0,
    iterations: Annotated[int, Between(0, 10_000)] = 50,
    name: str = "weight",
    facts: dict[str, Any] | None = None,
) -> QTensor:
    """Round to a few values for the whole tensor, and keep outliers.

    Args:
        weight: (m, n), any float dtype, finite.
        scheme: symmetric integers, whose bits count; or what `make_gobo` and `size_gobo` made of them: where it keeps elements apart,
            as many as it says are kept, the furthest from the mean.
        moment: not used; accepted so that every method is called alike.
        zscore: outliers are further than so many standard deviations from the mean; 0: the published rule, whose limit depends on the
            scale of the weights (3.74 deviations of 0.02, 2.48 of 1).
        iterations: at most.
        name: for messages.
        facts: receives `outliers` (their share) and `iterations`.

    Raises:
        SchemeError: no table can be learned in the place of the scheme.
        DataError: NaN or infinity in the weight.
    """
    with named(name):
        check_arguments(gobo, {**locals(), "weight": check_tensor(weight, name), "scheme": scheme_of(scheme)})
    asked = scheme_of(scheme)
    if (reason := refuse_gobo(asked, {})) is not None:
        raise SchemeError(f"{name}: {reason}")
    work = weight.detach().float()
    if work.ndim != 2:
        raise SchemeError(f"{name}: gobo rounds matrices, got shape {tuple(work.shape)}. Pass each matrix of a stack.")
    if not bool(torch.isfinite(work).all()):
        raise DataError(f"{name}: the weights hold NaN or infinity. Repair or exclude the tensor.")
    made = make_gobo(asked, {})
    if not asked.format.learned:
        made = size_gobo(LayerScheme(made), work, {"zscore": zscore}).weights
    index = _furthest(work, made.apart.count if made.apart else 0)
    inside = torch.ones(work.numel(), dtype=torch.bool, device=work.device)
    inside[index.long()] = False
    levels, taken = centroids(work.flatten()[inside], made.format.levels, iterations)
    codes = nearest(work.reshape(1, -1), levels[None]).reshape(work.shape)
    kept = None if made.apart is None else kept_of(work, index, made.apart)
    if facts is not None:
        facts |= {"outliers": len(index) / max(work.numel(), 1), "iterations": taken}
    scale = torch.ones(1, 1, device=work.device)
    return QTensor(codes, scale, None, None, made, None, levels[None], kept)


def outliers(weight: torch.Tensor, zscore: float = 0.0) -> torch.Tensor:
    """Which elements are no part of the normal distribution that has the weight's mean and deviation; bool like the weight."""
    work = weight.detach().float()
    # Blockwise sums in float32 would decide borderline elements by the number of threads.
    mean = work.double().mean() if work.numel() else work.new_zeros((), dtype=torch.float64)
    sigma = float((work.double() - mean).square().mean().sqrt()) if work.numel() else 0.0
    if sigma == 0:
        return torch.zeros_like(work, dtype=torch.bool)
    room = 2 * (-THRESHOLD - math.log(sigma * math.sqrt(2 * math.pi)))
    limit = zscore or math.sqrt(max(room, 0.0))
    return (work - mean.float()).abs() > limit * sigma


def centroids(values: torch.Tensor, count: int, iterations: int) -> tuple[torch.Tensor, int]:
    """The table of the published iteration: means of bins of equal population, then means of the nearest while Σ |w - c| falls.

    Args:
        values: (n,) float32.
        count: of entries.
        iterations: at most.

    Returns:
        (entries (count,) float32 ascending, iterations that made it better).
    """
    if not values.numel():
        return torch.linspace(-1, 1, count, device=values.device), 0
    x = values.sort().values.contiguous()
    sums = torch.nn.functional.pad(x.double().cumsum(0), (1, 0))
    steps = torch.linspace(0, 1, count + 1, dtype=torch.float64, device=x.device)
    found = _means(sums, (steps * len(x)).round().long(), x[((steps[:-1] * len(x)).long()).clamp(max=len(x) - 1)])
    best, taken = math.inf, 0
    kept = found
    for taken in range(iterations + 1):
        borders = _borders(x, found)
        loss = _absolute(x, sums, borders, found)
        if not loss < best:
            return kept, taken - 1
        best, kept = loss, found
        found = _means(sums, borders, found)
    return kept, taken


def _borders(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    inner = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2, right=True)
    return torch.cat([inner.new_zeros(1), inner, inner.new_tensor([len(x)])])


def _means(sums: torch.Tensor, borders: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    counts, totals = borders.diff(), sums[borders].diff()
    return torch.where(counts > 0, totals / counts, otherwise.double()).float()


def _absolute(x: torch.Tensor, sums: torch.Tensor, borders: torch.Tensor, levels: torch.Tensor) -> float:
    """Σ |x - level| over all clusters, from running sums: those below a level, and those above it."""
    middle = torch.minimum(torch.maximum(torch.searchsorted(x, levels), borders[:-1]), borders[1:])
    low, high, c = borders[:-1], borders[1:], levels.double()
    below = c * (middle - low) - (sums[middle] - sums[low])
    above = (sums[high] - sums[middle]) - c * (high - middle)
    return float((below + above).sum())


def _furthest(weight: torch.Tensor, count: int) -> torch.Tensor:
    """Flat places of the elements that are furthest from the mean, ascending; of equal ones the first."""
    if not count:
        return torch.empty(0, dtype=torch.int32, device=weight.device)
    distance = (weight.flatten() - weight.double().mean().float()).abs()
    return distance.sort(descending=True, stable=True).indices[:count].sort().values.to(torch.int32)
