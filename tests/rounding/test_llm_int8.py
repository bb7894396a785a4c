"""LLM.int8(): outlier features in floating point, all others in integers; the oracle of the specification."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from arrondi.errors import SchemeError, ShapeError
from arrondi.formats import ActivationScheme, Apart, LayerScheme, parse_scheme
from arrondi.nn import QLinear, RoundedInputs
from arrondi.rounding import METHODS
from arrondi.rounding.llm_int8 import foresees_llm_int8, size_llm_int8

LOUD = torch.tensor([3, 77, 200, 301, 444])


def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs of which five features are thirty times as large as the others."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 512, generator=draw)
    x[:, LOUD] *= 30
    return torch.randn(256, 512, generator=draw) / 512**0.5, x


def mixed(x: torch.Tensor, w: torch.Tensor, tau: float, exact: bool) -> torch.Tensor:
    """The decomposition written apart: outlier features times their columns, all others in int8; sums in float64."""
    loud = (x.abs() >= tau).any(0)
    regular, kept = torch.where(loud, 0.0, x), torch.where(loud & exact, 0.0, w)
    sx, sw = (v.abs().amax(1, keepdim=True) / 127.5 for v in (regular, kept))
    sx, sw = (torch.where(s == 0, 1.0, s) for s in (sx, sw))
    qx, qw = (torch.round(v / s).clamp(-128, 127).double() for v, s in ((regular, sx), (kept, sw)))
    columns = w.double() if exact else qw * sw
    return (qx @ qw.T) * sx * sw.T + x[:, loud].double() @ columns[:, loud].T


def packed(tau: float, static: bool) -> QLinear:
    w, x = layer()
    scheme = parse_scheme("W8A8")
    if not static:
        scheme = size_llm_int8(scheme, w, {"threshold": tau})
        return QLinear(METHODS["llm-int8"].run(w, scheme.weights), inputs=scheme.inputs)
    absmax = x.abs().amax(0)
    count = int((absmax >= tau).sum())
    wanted = replace(scheme.weights, apart=Apart("columns", count) if count else None)
    return QLinear(METHODS["llm-int8"].run(w, wanted, absmax=absmax), inputs=scheme.inputs)


@pytest.mark.parametrize("static", [True, False])
def test_errors_fall_with_the_threshold(static: bool) -> None:
    w, x = layer()
    truth = x @ w.T
    errors = [float((packed(tau, static)(x) - truth).norm() / truth.norm()) for tau in (1e30, 12.0, 6.0, 3.0, 0.0)]
    assert all(a >= b for a, b in itertools.pairwise(errors))
    # Dynamic outliers meet columns of int8; with those in floating point the figures are the specification's, which does not say
    # of how many tokens and features they are.
    wanted = (0.0388, 0.0028, 0.0025, 0.0007) if static else (0.0388,)
    for found, figure in zip(errors, wanted, strict=False):
        assert found == pytest.approx(figure, rel=0.4)
    if static:
        assert errors[-1] < 1e-6, "with every feature an outlier the product is exact"


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("tau", [1e30, 12.0, 3.0, 0.0])
def test_the_product_is_the_one_written_apart(tau: float, static: bool) -> None:
    w, x = layer()
    found = packed(tau, static)(x)
    wanted = mixed(x, w, tau, exact=static)
    assert float((found - wanted).norm() / wanted.norm()) < 2e-6


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 1024])
def test_the_simulation_agrees_with_the_packed_layer(tokens: int, static: bool) -> None:
    x = layer()[1][:tokens]
    run = packed(6.0, static)
    plain = torch.nn.Linear(512, 256, bias=False)
    plain.weight.data = run.dequantize()
    kept = run.unpack().apart
    hook = RoundedInputs(run.inputs, None, None if kept is None else kept.index[0])
    plain.register_forward_pre_hook(hook, with_kwargs=True)
    torch.testing.assert_close(run(x), plain(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", ["W4A16", "w=uint3/g64/offset", "NF4", "MXFP4A16"])
def test_static_columns_beside_any_scheme(text: str) -> None:
    w, x = layer()
    scheme = size_llm_int8(parse_scheme(text), w, {}).weights
    assert scheme.apart == Apart("columns", 5, "float16")
    q = METHODS["llm-int8"].run(w, scheme, absmax=x.abs().amax(0))
    assert q.apart is not None
    assert q.apart.index.tolist() == [LOUD.tolist()]
    assert torch.equal(q.dequantize()[:, LOUD], w[:, LOUD].half().float())
    run = QLinear(q)
    torch.testing.assert_close(run(x), x @ q.dequantize().T, rtol=1e-4, atol=1e-3)
    assert torch.equal(run.unpack().dequantize(), q.dequantize())
    rest = replace(scheme, apart=None)
    bits = METHODS["rtn"].run(w, rest).stored_bits
    assert q.stored_bits == bits + 5 * 32 + 5 * 256 * 16


def test_what_the_options_mean() -> None:
    w, x = layer()
    eight, four = parse_scheme("W8A8"), parse_scheme("W4A16")
    assert size_llm_int8(eight, w, {}).inputs == replace(eight.inputs, outliers=6.0)
    assert size_llm_int8(eight, w, {"outliers": "static"}).weights.apart == Apart("columns", 5, "float16")
    assert size_llm_int8(four, w, {"outliers": "dynamic"}).weights.apart is not None, "nothing dynamic without inputs"
    loud = x.abs().amax(0)
    assert size_llm_int8(four, w, {}, loud).weights.apart == Apart("columns", 5, "float16"), "those that reach 6"
    assert size_llm_int8(four, w, {"threshold": 1e30}, loud) == four
    assert size_llm_int8(four, w, {"threshold": 0.0}, loud).weights.apart == Apart("columns", 512, "float16")
    assert size_llm_int8(four, w, {}, torch.stack([loud / 30, loud])).weights.apart == Apart("columns", 5, "float16")
    assert size_llm_int8(four, w, {"share": 0.02}, loud).weights.apart == Apart("columns", 10, "float16")
    asks = [
        foresees_llm_int8(s, o)
        for s, o in ((four, {}), (eight, {}), (eight, {"outliers": "static"}), (four, {"share": 0.1}))
    ]
    assert asks == [True, False, True, False]
    assert size_llm_int8(four, w.bfloat16(), {}).weights.apart == Apart("columns", 5, "bfloat16")
    facts: dict[str, int] = {}
    METHODS["llm-int8"].run(w, "W4A16", outliers="static", absmax=x.abs().amax(0), facts=facts)
    assert facts == {"outlier_features": 5}


def test_what_cannot_be() -> None:
    w, _ = layer()
    with pytest.raises(SchemeError, match="llm-int8 rounds to nearest beside the columns"):
        METHODS["llm-int8"].run(w, "w=lut4/g128")
    with pytest.raises(ShapeError, match="a size for each of its n inputs"):
        METHODS["llm-int8"].run(w, "W4A16", absmax=torch.ones(3))
    with pytest.raises(SchemeError, match="go with dynamic scales"):
        replace(parse_scheme("W8A8_STATIC").inputs, outliers=6.0)
    scheme = parse_scheme("w=int8,a=int8/token/outliers:0.125")
    assert isinstance(scheme, LayerScheme)
    assert isinstance(scheme.inputs, ActivationScheme)
    assert scheme.inputs.outliers == 0.125
    assert parse_scheme(str(scheme)) == scheme
