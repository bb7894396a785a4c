"""Trellis codes with error feedback: nearer than integers of more bits, the asymmetric target, edges, refusals."""

from __future__ import annotations

import pytest
import torch

from arrondi.calibration import SecondMoment
from arrondi.errors import DataError, SchemeError, ShapeError
from arrondi.formats import PRESETS, Scheme, parse_scheme
from arrondi.rounding import METHODS
from arrondi.rounding.gptaq import corrected
from arrondi.rounding.gptq import gptq
from arrondi.rounding.rtn import rtn
from arrondi.rounding.trellis import trellis
from arrondi.tensor.qtensor import QTensor

M, N = 256, 128
SCHEME = parse_scheme("w=tcq2-l10/channel/float16/rht128").weights


def made() -> tuple[torch.Tensor, torch.Tensor, SecondMoment]:
    """A weight with rows of unlike size and outliers, its inputs, which depend on each other, and their moment."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(M, N, generator=generator) * torch.rand(M, 1, generator=generator)
    weight[::37, ::11] *= 6
    x = torch.randn(3000, N, generator=generator)
    x += 2 * torch.randn(3000, 6, generator=generator) @ torch.randn(6, N, generator=generator)
    moment = SecondMoment(N)
    moment.update(x)
    return weight, x, moment


def lost(weight: torch.Tensor, x: torch.Tensor, q: QTensor) -> float:
    return float(((weight - q.dequantize()) @ x.T).square().sum() / (weight @ x.T).square().sum())


def test_two_bits_lose_half_of_what_integers_lose_with_more() -> None:
    weight, x, moment = made()
    fed, blind = trellis(weight, SCHEME, moment), trellis(weight, SCHEME)
    integers = gptq(weight, PRESETS["W2A16"].with_group_size(64).weights, moment)
    assert fed.bits_per_weight < integers.bits_per_weight
    assert lost(weight, x, fed) < 0.6 * lost(weight, x, integers)
    assert lost(weight, x, fed) < 0.5 * lost(weight, x, blind)
    assert torch.equal(rtn(weight, SCHEME).codes, blind.codes), "without data it is what rounding to nearest means here"


@pytest.mark.parametrize(
    "text", ["w=tcq1-l8/channel", "w=tcq2.5-l10/channel/bfloat16/rht64:9", "w=tcq4-l10/channel/float16/rht128"]
)
def test_more_bits_lose_less_in_every_form(text: str) -> None:
    weight, x, moment = made()
    scheme = parse_scheme(text).weights
    q = trellis(weight, scheme, moment)
    assert q.scheme == scheme
    rate = scheme.format.rate
    assert lost(weight, x, q) < 0.9 * 4.0**-rate
    assert q.codes.shape == weight.shape


def test_inputs_of_the_original_are_followed() -> None:
    weight, f, _ = made()
    generator = torch.Generator().manual_seed(8)
    x = f @ (torch.eye(N) + 0.2 * torch.randn(N, N, generator=generator) / N**0.5)
    moment = SecondMoment(N)
    moment.update(x)

    def error(q: QTensor) -> float:
        return float((weight @ f.T - q.dequantize() @ x.T).square().sum())

    fine = parse_scheme("w=tcq4-l10/channel/float16/rht128").weights
    own = trellis(weight, fine, moment, cross_moment=x.T @ f)
    assert error(own) < 0.7 * error(trellis(weight, fine, moment))
    by_hand = trellis(corrected(weight, moment, x.T @ f, 0.01), fine, moment)
    assert torch.equal(own.codes, by_hand.codes)


def test_the_last_scales_are_the_best_for_their_codes() -> None:
    weight, x, moment = made()
    q = trellis(weight, SCHEME, moment)
    for factor in (0.98, 1.02):
        other = QTensor(q.codes, q.scale * factor, None, None, q.scheme)
        # Scales are fitted in the turned basis, with λ: rows there are sums of rows here.
        assert lost(weight, x, q) < lost(weight, x, other)


@pytest.mark.parametrize("rows", [40, 257, 600])
def test_any_number_of_rows_and_columns(rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(rows, 51, generator=generator), torch.randn(400, 51, generator=generator)
    x[:, 7] = 0
    moment = SecondMoment(51)
    moment.update(x)
    q = trellis(weight, SCHEME, moment)
    assert lost(weight, x, q) < 0.12
    assert torch.equal(trellis(weight, SCHEME, moment).codes, q.codes)
    assert bool(torch.isfinite(trellis(torch.zeros(rows, 51), SCHEME, moment).dequantize()).all())


@pytest.mark.parametrize("fed", [False, True])
def test_rows_of_zeros_take_no_part_in_the_errors_of_their_block(fed: bool) -> None:
    """Where the scales of rows are in the sides, rows of a block of 128 share what they lose."""
    weight, _, moment = made()
    weight = weight * 0.01
    weight[3] = 0
    scheme = parse_scheme("w=tcq2-l8-mul1-tile/tensor/rht128:sides").weights
    back = trellis(weight, scheme, moment if fed else None).dequantize()
    assert not back[3].any()
    assert float((back - weight).square().sum() / weight.square().sum()) < 0.2
    assert not trellis(torch.zeros(M, N), scheme, moment if fed else None).dequantize().any()


def test_refusals_are_sentences() -> None:
    weight, _, moment = made()
    with pytest.raises(SchemeError, match="Use a trellis such as TCQ2"):
        trellis(weight, PRESETS["W4A16"].weights, moment)
    with pytest.raises(ShapeError, match="less than a state"):
        trellis(weight[:3], SCHEME, moment)
    with pytest.raises(ShapeError, match="128 inputs, the weight has 64"):
        trellis(weight[:, :64], SCHEME, moment)
    with pytest.raises(DataError, match="NaN or infinity"):
        trellis(weight.clone().index_fill_(0, torch.tensor([3]), float("nan")), SCHEME, moment)
    for name, method in METHODS.items():
        if name not in ("trellis", "trellis-yaqa", "rtn") and (reason := method.refuse(SCHEME, {})) is None:
            raise AssertionError(f"{name} says that it can make {SCHEME}: {reason}")
    assert isinstance(SCHEME, Scheme)


def outputs_known(rows: int) -> torch.Tensor:
    """Σ g gᵀ of outputs that hang together: a few directions, and a little of all."""
    generator = torch.Generator().manual_seed(9)
    few = torch.randn(rows, 6, generator=generator)
    return few @ few.T + 0.1 * torch.eye(rows)


def loss_lost(weight: torch.Tensor, x: torch.Tensor, g: torch.Tensor, q: QTensor) -> float:
    d = (weight - q.dequantize()) @ x.T
    return float((d * (g @ d)).sum())


@pytest.mark.parametrize("text", ["w=tcq2-l8-square/channel/rht64", "w=tcq2.5-l8-square/channel", "w=tcq2-l8-mul1-tile/tensor/rht128:sides"])  # fmt: skip
def test_rows_make_up_for_each_other(text: str) -> None:
    weight, x, moment = made()
    scheme, g = parse_scheme(text).weights, outputs_known(M)
    alone = trellis(weight, scheme, moment)
    parts = (g[:128, :128].contiguous(), g[128:, 128:].contiguous())  # nothing is known between blocks
    together = trellis(weight, scheme, moment, output_moments=parts)
    whole = torch.block_diag(*parts)
    assert loss_lost(weight, x, whole, together) < 0.8 * loss_lost(weight, x, whole, alone)


def test_rows_whose_outputs_count_alike_make_up_for_nothing() -> None:
    weight, _, moment = made()
    scheme = parse_scheme("w=tcq2-l8-square/channel/rht64").weights
    alone, same = (trellis(weight, scheme, moment, output_moments=g) for g in (None, [torch.eye(M)]))
    assert torch.equal(alone.codes, same.codes)
    torch.testing.assert_close(alone.real_scale, same.real_scale, rtol=2e-3, atol=1e-6)


def test_scales_are_the_best_for_all_rows_together() -> None:
    weight, x, moment = made()
    scheme, g = parse_scheme("w=tcq2-l8-square/channel/float32").weights, outputs_known(M) + 5 * torch.eye(M)
    q = trellis(weight, scheme, moment, output_moments=[g], damping=1e-6, output_damping=1e-6)
    for row in (0, 100, M - 1):
        for factor in (0.97, 1.03):
            scale = q.real_scale.clone()
            scale[row] *= factor
            other = QTensor(q.codes, scale, None, None, q.scheme)
            assert loss_lost(weight, x, g, q) < loss_lost(weight, x, g, other)


def test_gradients_of_other_outputs_are_refused() -> None:
    weight, _, moment = made()
    with pytest.raises(ShapeError, match="for 128 outputs, the weight has 256"):
        trellis(weight, SCHEME, moment, output_moments=[torch.eye(128)])
