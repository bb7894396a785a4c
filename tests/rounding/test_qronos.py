"""Qronos against its definition: in every step least squares over all that is not rounded yet, column by column."""

from __future__ import annotations

import pytest
import torch

from arrondi.calibration import SecondMoment
from arrondi.errors import DataError, SchemeError, ShapeError
from arrondi.formats import parse_scheme
from arrondi.rounding import METHODS, check_options
from arrondi.rounding.gptaq import gptaq
from arrondi.rounding.gptq import gptq
from arrondi.rounding.qronos import qronos
from tests.rounding.test_gptaq import SCHEME, N, error, made


def by_definition(weight: torch.Tensor, f: torch.Tensor, x: torch.Tensor, step: torch.Tensor, order: list[int], damping: float, low: int, high: int) -> torch.Tensor:  # fmt: skip
    """The paper's two argmins for each column, with the damping as √λ I below the data; step (m, n) is every element's. Float64."""
    own = x.square().sum(0).mean() * damping
    ridge = own.sqrt() * torch.eye(x.shape[1]).double()
    x, f = torch.cat([x.double(), ridge]), torch.cat([f.double(), ridge])
    goal, current = f @ weight.double().T, weight.double().T.clone()
    for t, c in enumerate(order):
        column = x[:, c]
        rest = goal - x @ current + column[:, None] * current[c]
        best = (column @ rest) / (column @ column)
        current[c] = (best / step[:, c]).round().clamp(low, high) * step[:, c]
        later = order[t + 1 :]
        if later:
            done = order[: t + 1]
            current[later] = torch.linalg.lstsq(x[:, later], goal - x[:, done] @ current[done]).solution
    return current.T


@pytest.mark.parametrize("scheme", ["w=int3/g32", "w=int4/channel", "w=int2/g16"])
def test_it_is_what_the_paper_defines(scheme: str) -> None:
    weight, f, x, moment, cross = made()
    weight = weight[:6].double()
    wanted = parse_scheme(scheme).weights
    q = qronos(weight, wanted, moment, cross_moment=cross, damping=0.01)
    order = torch.argsort(moment.diagonal(), descending=True, stable=True).tolist()
    step = q.real_scale.double().repeat_interleave(N // q.real_scale.shape[1], 1)
    found = by_definition(weight, f, x, step, order, 0.01, wanted.format.qmin, wanted.format.qmax)
    same = (q.dequantize().double() - found).abs() < 1e-3 * step.abs()
    # A number in the middle between two levels may go either way in float32, and what follows in its row with it.
    assert float(same.double().mean()) > 0.97
    assert bool(same[:, order[0]].all()), "the first column has no rounding before it"


def test_the_output_comes_nearer_to_the_original_than_with_gptq() -> None:
    weight, f, x, moment, cross = made()
    plain, own = gptq(weight, SCHEME, moment), qronos(weight, SCHEME, moment, cross_moment=cross)
    assert error(weight, f, own.dequantize(), x) < 0.7 * error(weight, f, plain.dequantize(), x)


def test_where_the_inputs_are_those_of_the_original_it_is_gptq() -> None:
    weight, _, _, moment, _ = made()
    q = qronos(weight, SCHEME, moment, cross_moment=moment.matrix())
    assert float((q.codes == gptq(weight, SCHEME, moment).codes).float().mean()) > 0.999


def test_it_differs_from_gptaq_from_the_first_column_on() -> None:
    weight, _, _, moment, cross = made(1.0)
    scheme = parse_scheme("w=int8/g32")
    first = int(moment.diagonal().argmax())
    own = qronos(weight, scheme, moment, cross_moment=cross).dequantize()
    other = gptaq(weight, scheme, moment, cross_moment=cross).dequantize()
    assert float((own - other)[:, first].abs().mean()) > 0.001


def test_inputs_that_never_occur_are_no_trouble() -> None:
    weight, f, x, _, _ = made()
    x[:, 5] = f[:, 5] = 0
    moment = SecondMoment(N)
    moment.update(x)
    for damping in (0.0, 0.01):
        q = qronos(weight, SCHEME, moment, cross_moment=x.T @ f, damping=damping)
        assert bool(torch.isfinite(q.dequantize()).all())


def test_what_makes_no_sense_is_named() -> None:
    weight, _, _, moment, cross = made()
    with pytest.raises(DataError, match=r"^layer: qronos needs the second moment"):
        qronos(weight, SCHEME, moment, name="layer")
    with pytest.raises(ShapeError, match=r"^layer: the moments are for 64"):
        qronos(weight, SCHEME, moment, cross_moment=cross[:, :3], name="layer")
    with pytest.raises(DataError, match=r"^layer: the weights hold NaN"):
        qronos(weight * float("nan"), SCHEME, moment, cross_moment=cross, name="layer")
    with pytest.raises(SchemeError, match="Option damping of qronos takes a number"):
        check_options("qronos", METHODS["qronos"].run, {"damping": -1.0})
