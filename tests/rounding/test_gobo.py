"""GOBO: outliers of a bell curve, one small table, and the figures of the specification."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from arrondi.errors import DataError, SchemeError, ShapeError
from arrondi.formats import Apart, LayerScheme
from arrondi.nn import QLinear
from arrondi.rounding import METHODS
from arrondi.rounding.clusters import learn
from arrondi.rounding.gobo import centroids, make_gobo, outliers, size_gobo
from arrondi.tensor.apart import Kept
from arrondi.tensor.checks import scheme_of
from arrondi.tensor.qtensor import QTensor


def bell(rows: int = 512, columns: int = 1024, sigma: float = 0.04) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal weights, and the places of 0.08 % that are far outside."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(rows * columns, generator=draw) * sigma
    places = torch.randperm(w.numel(), generator=draw)[: int(0.0008 * w.numel())]
    signs = torch.randint(2, (len(places),), generator=draw) * 2 - 1
    w[places] = signs * sigma * (6 + 4 * torch.rand(len(places), generator=draw))
    return w.reshape(rows, columns), places


def test_the_figures_of_the_specification() -> None:
    w, places = bell()
    facts: dict[str, float] = {}
    q = METHODS["gobo"].run(w, "W3A16", facts=facts)
    assert q.apart is not None
    assert set(places.tolist()) <= set(q.apart.index.tolist()), "every injected outlier is found"
    assert facts["outliers"] == pytest.approx(0.0010, abs=0.0003)
    assert 4 <= facts["iterations"] <= 11
    assert q.bits_per_weight == pytest.approx(3.066, abs=0.02)
    assert 32 / q.bits_per_weight == pytest.approx(10.4, abs=0.1)


@pytest.mark.parametrize(("sigma", "limit"), [(0.02, 3.74), (0.04, 3.55), (0.08, 3.35), (1.0, 2.48)])
def test_the_limit_follows_the_density(sigma: float, limit: float) -> None:
    w = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)) * sigma
    share = float(outliers(w).double().mean())
    assert share == pytest.approx(math.erfc(limit / math.sqrt(2)), rel=0.1)
    scaled = outliers(w, zscore=3.0)
    assert torch.equal(scaled, outliers(w * 4, zscore=3.0)), "a number of deviations does not depend on the scale"


def test_the_iteration_is_the_published_one() -> None:
    w = bell(64, 128)[0].flatten()
    # Written apart, in plain steps.
    x = w.double().sort().values
    table = torch.stack([part.mean() for part in x.tensor_split(8)])
    best, losses = table, [math.inf]
    for _ in range(50):
        nearest = (x[:, None] - table).abs().argmin(1)
        losses.append(float((x - table[nearest]).abs().sum()))
        if losses[-1] >= losses[-2]:
            break
        best = table
        table = torch.stack([x[nearest == k].mean() for k in range(8)])
    found, iterations = centroids(w, 8, 50)
    torch.testing.assert_close(found, best.float(), rtol=1e-5, atol=1e-7)
    assert iterations == len(losses) - 3
    assert all(a > b for a, b in itertools.pairwise(losses[:-1]))


def test_going_on_lowers_squares_and_raises_absolute_errors() -> None:
    w = bell(256, 512)[0].flatten()
    w = w[outliers(w[None])[0].logical_not()]
    early, _ = centroids(w, 8, 50)
    late = learn(w[None], torch.ones_like(w)[None], 8, 1000, early[None])[0]

    def losses(levels: torch.Tensor) -> tuple[float, float]:
        d = (w[:, None] - levels).abs().amin(1).double()
        return float(d.sum()), float(d.square().sum())

    assert losses(early)[0] < losses(late)[0]
    assert losses(early)[1] > losses(late)[1]


def test_outliers_read_back_to_the_last_bit_and_the_order_does_not_matter() -> None:
    w, places = bell(64, 128)
    q = METHODS["gobo"].run(w, "W3A16")
    back = q.dequantize()
    assert torch.equal(back.flatten()[places], w.flatten()[places])
    order = torch.randperm(w.numel(), generator=torch.Generator().manual_seed(5))
    other = METHODS["gobo"].run(w.flatten()[order].reshape(w.shape), "W3A16")
    torch.testing.assert_close(other.dequantize().flatten(), back.flatten()[order], rtol=1e-6, atol=0)


def test_as_many_are_kept_as_the_plan_says() -> None:
    w, _ = bell(64, 128)
    planned = size_gobo(LayerScheme(make_gobo(scheme_of("W3A16"), {})), w, {}).weights
    assert METHODS["gobo"].run(w, planned).scheme == METHODS["gobo"].run(w, "W3A16").scheme == planned
    moved = METHODS["gobo"].run(w * torch.linspace(0.5, 2, 128), planned)  # rewritten after the plan
    assert moved.apart is not None
    assert moved.apart.index.numel() == planned.apart.count


def test_weights_without_spread_or_outliers() -> None:
    q = METHODS["gobo"].run(torch.full((8, 16), 0.5), "W3A16")
    assert q.apart is None
    torch.testing.assert_close(q.dequantize(), torch.full((8, 16), 0.5))
    with pytest.raises(DataError, match=r"^w: the weights hold NaN"):
        METHODS["gobo"].run(torch.full((8, 16), torch.inf), "W3A16", name="w")


@pytest.mark.parametrize("text", ["NF4", "MXFP4", "W4A16_ASYM", "w=lut4/g32", "w=int4/g32/columns:2"])
def test_what_gobo_does_not_make_is_said(text: str) -> None:
    with pytest.raises(SchemeError, match=r"^w: gobo learns one table for a tensor"):
        METHODS["gobo"].run(bell(16, 32)[0], text, name="w")


def test_the_packed_layer_adds_its_outliers() -> None:
    w, _ = bell(48, 96)
    q = METHODS["gobo"].run(w, "W3A16")
    layer = QLinear(q, torch.randn(48))
    x = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), x @ q.dequantize().T + layer.bias)
    again = layer.unpack()
    assert again.scheme == q.scheme
    assert torch.equal(again.dequantize(), q.dequantize())


def test_what_is_kept_must_fit() -> None:
    q = METHODS["gobo"].run(bell(16, 32)[0], "W3A16", zscore=2.0)
    assert q.apart is not None
    assert q.scheme.apart == Apart("elements", q.apart.index.numel())
    with pytest.raises(ShapeError, match="is kept apart, and the index has the shape"):
        QTensor(q.codes, q.scale, None, None, q.scheme, None, q.table, Kept(q.apart.index[1:], q.apart.values[1:]))
