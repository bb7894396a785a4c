"""Learned tables: clusters on a line, k-means and any4, and what a QTensor with tables is."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from arrondi.calibration import SecondMoment
from arrondi.errors import DataError, SchemeError, ShapeError
from arrondi.formats import LayerScheme, Table, parse_scheme
from arrondi.nn import QLinear
from arrondi.rounding import METHODS, gptq, rtn
from arrondi.rounding.clusters import Line, exact, learn, spread
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.rows import rows_of, split_rows, stack_rows


def weight(rows: int = 32, columns: int = 96, seed: int = 0) -> torch.Tensor:
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return 0.02 * made * made.abs().sqrt()  # heavier tails than normal


def moment(columns: int = 96) -> SecondMoment:
    draw = torch.Generator().manual_seed(1)
    mix = torch.randn(columns, columns, generator=draw) / columns**0.5 + torch.eye(columns)
    made = SecondMoment(columns)
    made.update(torch.randn(400, columns, generator=draw) @ mix * torch.logspace(-1, 1, columns))
    return made


def squares(x: torch.Tensor, weights: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Written apart: every number to the nearest of all levels."""
    return ((x[:, :, None] - levels[:, None, :]).square().amin(2) * weights).sum(1)


def test_exact_clusters_are_the_best_of_all_ways_to_cut_a_line() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weights = torch.randn(1, 9, generator=draw), torch.rand(1, 9, generator=draw)
    ordered, order = x.sort(dim=1)
    w = weights.gather(1, order)
    best = float("inf")
    for cuts in itertools.combinations(range(1, 9), 2):
        cost = 0.0
        for a, b in itertools.pairwise((0, *cuts, 9)):
            mean = (ordered[0, a:b] * w[0, a:b]).sum() / w[0, a:b].sum()
            cost += float(((ordered[0, a:b] - mean).square() * w[0, a:b]).sum())
        best = min(best, cost)
    found = exact(Line(x, weights), 3)
    assert float(squares(x, weights, found)[0]) == pytest.approx(best, rel=1e-5)


def test_lloyd_never_gets_worse_and_ends_near_the_best() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weights = torch.randn(40, 200, generator=draw), torch.rand(40, 200, generator=draw)
    line = Line(x, weights)
    best = squares(x, weights, exact(line, 8))
    losses = [squares(x, weights, spread(line, 8))] + [
        squares(x, weights, learn(x, weights, 8, n)) for n in (1, 5, 100)
    ]
    for before, after in itertools.pairwise(losses):
        assert bool((after <= before * (1 + 1e-5)).all())
    assert float((losses[-1] / best).mean()) < 1.02
    alone = learn(x[3:4], weights[3:4], 8, 100)
    assert torch.equal(alone, learn(x, weights, 8, 100)[3:4]), "a set does not see the others"


def test_as_many_values_as_levels_are_kept() -> None:
    values = torch.tensor([-0.5, -0.25, 0.125, 0.96875]) * 0.5
    w = values[torch.randint(4, (8, 64), generator=torch.Generator().manual_seed(2))]
    q = METHODS["kmeans"].run(w, "w=int2/channel", entries="float32")
    torch.testing.assert_close(q.dequantize(), w, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["kmeans", "any4"])
def test_learned_values_are_better_than_given_ones(method: str) -> None:
    scheme = "w=int4/channel" if method == "kmeans" else "w=int4/g32"
    plain = rtn(weight(), scheme, moment())
    found = METHODS[method].run(weight(), scheme, moment(), feedback=False)
    importance = moment().diagonal()

    def cost(q: QTensor) -> float:
        return float(((q.dequantize() - weight()).square() * importance).sum())

    assert cost(found) < 0.75 * cost(plain)


def test_more_rows_to_a_table_cost_fewer_bits_and_more_error() -> None:
    found = [METHODS["any4"].run(weight(), "w=int3/g32", rows=rows) for rows in (1, 8, 0)]
    errors = [float((q.dequantize() - weight()).square().sum()) for q in found]
    assert errors == sorted(errors)
    for q, tables in zip(found, (32, 4, 1), strict=True):
        assert q.table is not None
        assert q.table.shape == (tables, 8)
        assert q.stored_bits == 32 * 96 * 3 + 32 * 3 * 32 + tables * 8 * 8


@pytest.mark.parametrize(("bits", "gain"), [(4, 0.95), (3, 0.95), (2, 0.9)])
def test_with_feedback_the_output_is_better_than_gptqs(bits: int, gain: float) -> None:
    hessian = moment().matrix()

    def error(q: QTensor) -> float:
        d = weight() - q.dequantize()
        return float(((d @ hessian) * d).sum())

    scheme = f"w=int{bits}/g32"
    ours = error(METHODS["any4"].run(weight(), scheme, moment(), rows=0))
    assert ours < gain * error(gptq(weight(), scheme, moment()))
    assert ours <= error(METHODS["any4"].run(weight(), scheme, moment(), rows=0, sweeps=1))
    assert ours < error(METHODS["any4"].run(weight(), scheme, moment(), rows=0, feedback=False))


def test_rows_of_a_tensor_with_tables() -> None:
    whole = METHODS["any4"].run(weight(), "w=int3/g32")
    one, two = split_rows(whole, [12, 20])
    assert torch.equal(stack_rows([one, two]).dequantize(), whole.dequantize())
    assert torch.equal(rows_of(whole, 5, 7).dequantize(), whole.dequantize()[5:12])
    shared = METHODS["any4"].run(weight(), "w=int3/g32", rows=8)
    assert torch.equal(rows_of(shared, 8, 16).dequantize(), shared.dequantize()[8:24])


@pytest.mark.parametrize("rows", [1, 8, 0])
def test_the_packed_layer_computes_with_its_tables(rows: int) -> None:
    q = METHODS["any4"].run(weight(), "w=int4/g32", rows=rows)
    layer = QLinear(q)
    again = layer.unpack()
    assert again.scheme == q.scheme
    assert torch.equal(again.dequantize(), q.dequantize())
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(layer(x), x @ q.dequantize().T)


@pytest.mark.parametrize("entries", ["int8", "float16", "bfloat16", "float32"])
def test_entries_are_as_they_are_stored(entries: str) -> None:
    q = METHODS["kmeans"].run(weight(), "W4A16", entries=entries)
    assert q.table is not None
    stored = q.table * 128 if entries == "int8" else q.table.to(getattr(torch, entries)).float()
    assert torch.equal(stored, stored.round() if entries == "int8" else q.table)
    assert q.scheme == replace(parse_scheme("w=lut4/channel").weights, table=Table(1, entries))


@pytest.mark.parametrize("text", ["NF4", "MXFP4", "W4A16_ASYM", "FP8_BLOCK", "TERNARY", "w=int4/tensor"])
def test_what_cannot_become_a_table_is_said(text: str) -> None:
    with pytest.raises(
        SchemeError, match=r"^w: Tables are learned in place of symmetric integers .*W4A16, W3A16, W2A16"
    ):
        METHODS["any4"].run(weight(), text, name="w")


def test_methods_without_tables_say_so() -> None:
    for method in ("rtn", "gptq"):
        with pytest.raises(SchemeError, match=r"the values of lut4 are learned"):
            METHODS[method].run(weight(), "w=lut4/g32", moment())


def test_a_sweep_whose_loss_overflows_still_gives_tables() -> None:
    huge = SecondMoment(32)
    huge.update(1e15 * torch.randn(64, 32))
    q = METHODS["any4"].run(1e20 * torch.randn(8, 32), "w=lut4/channel", huge)
    assert bool(torch.isfinite(q.dequantize()).all())


def test_bad_weights_and_moments() -> None:
    with pytest.raises(ShapeError, match="second moment is for 96 inputs, the weight has 64"):
        METHODS["kmeans"].run(weight(4, 64), "W4A16", moment())
    with pytest.raises(ShapeError, match="tables belong to matrices"):
        METHODS["kmeans"].run(weight()[None], "W4A16")
    with pytest.raises(DataError, match=r"^w: the weights hold NaN"):
        METHODS["kmeans"].run(torch.full((4, 8), torch.nan), "W4A16", name="w")


def test_tables_that_do_not_fit_are_refused() -> None:
    q = METHODS["kmeans"].run(weight(), "W4A16")
    with pytest.raises(ShapeError, match=r"Tables of .* are float32 \(32, 16\), got .* \(31, 16\)"):
        replace(q, table=q.table[1:])
    with pytest.raises(ShapeError, match="if and only if"):
        replace(q, table=None)


@pytest.mark.parametrize(
    "text", ["w=lut4/g128", "w=lut3/channel/bfloat16/t:float16:16", "w=lut2/tensor/t:float32:all/elements:7"]
)
def test_the_grammar_reads_what_it_writes(text: str) -> None:
    scheme = parse_scheme(text)
    assert isinstance(scheme, LayerScheme)
    assert parse_scheme(str(scheme)) == scheme
