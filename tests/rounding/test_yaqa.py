"""YAQA: its loss against the Kronecker product written out, the plain sweep where outputs count alike, and rows in any order."""

from __future__ import annotations

import pytest
import torch

from arrondi.calibration import OutputMoment, SecondMoment
from arrondi.errors import DataError, SchemeError, ShapeError
from arrondi.rounding import gptaq, yaqa
from arrondi.rounding.gptq_factor import root_factor
from arrondi.tensor.qtensor import QTensor

M, N, TOKENS = 48, 64, 3000


def made() -> tuple[torch.Tensor, SecondMoment, torch.Tensor, torch.Tensor]:
    """Weight, moments of the inputs, and a correlated moment of gradients."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(TOKENS, N, generator=generator) @ torch.randn(N, N, generator=generator)
    f = x + 0.2 * torch.randn(TOKENS, N, generator=generator)
    g = torch.randn(TOKENS, 12, generator=generator) @ torch.randn(12, M, generator=generator)
    g += 0.3 * torch.randn(TOKENS, M, generator=generator)
    moment = SecondMoment(N)
    moment.update(x)
    return torch.randn(M, N, generator=generator) * 0.02, moment, x.T @ f, g.T @ g


def loss(weight: torch.Tensor, q: QTensor, moment: SecondMoment, outputs: torch.Tensor) -> float:
    """vec(D)ᵀ (H ⊗ G) vec(D), written out."""
    d = (weight - q.dequantize()).double().T.reshape(-1)
    return float(d @ torch.kron(moment.matrix().double(), outputs.double()) @ d)


@pytest.mark.parametrize("scheme", ["w=int3/g32", "w=uint3/g32/asym"])
def test_rows_make_up_for_each_other(scheme: str) -> None:
    weight, moment, _, outputs = made()
    same = moment.matrix()
    plain = loss(weight, gptaq(weight, scheme, moment, cross_moment=same, damping=0.05), moment, outputs)
    found = [
        loss(weight, yaqa(weight, scheme, moment, cross_moment=same, output_moments=[outputs], rows=r), moment, outputs)
        for r in (48, 16, 1)
    ]
    assert found[2] < found[1] < found[0] == pytest.approx(plain), "smaller blocks of rows see more of each other"
    assert found[2] < 0.5 * plain


@pytest.mark.parametrize("given", [None, [torch.eye(M)], [torch.eye(16) * 3, torch.eye(32)]])
def test_outputs_that_count_alike_leave_gptaq(given: list[torch.Tensor] | None) -> None:
    weight, moment, cross, _ = made()
    options = {"cross_moment": cross, "damping": 0.05, "sweeps": 2, "refine": 1}
    expected = gptaq(weight, "w=int3/g32", moment, **options)
    found = yaqa(weight, "w=int3/g32", moment, output_moments=given, **options)
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scale, expected.scale)


def test_spans_know_nothing_of_each_other() -> None:
    weight, moment, cross, outputs = made()
    parts = [outputs[:16, :16], outputs[16:, 16:]]
    both = yaqa(weight, "w=int3/g32", moment, cross_moment=cross, output_moments=parts)
    for rows, part in ((slice(0, 16), parts[0]), (slice(16, None), parts[1])):
        alone = yaqa(weight[rows], "w=int3/g32", moment, cross_moment=cross, output_moments=[part])
        assert torch.equal(both.codes[rows], alone.codes) and torch.equal(both.scale[rows], alone.scale)


def test_a_row_is_rounded_for_what_the_rows_before_it_left() -> None:
    """The first two rows of the visit, by the formula."""
    weight, moment, _, outputs = made()
    order = outputs.diagonal().argsort(descending=True)
    q = yaqa(weight, "w=int3/g64", moment, cross_moment=moment.matrix(), output_moments=[outputs], rows=1)
    factor, _ = root_factor(outputs.double(), 0.05, order)
    first, second = order[0], order[1]
    left = weight[first] - q.dequantize()[first]
    due = weight[second] + (factor[0, 1] / factor[1, 1]).float() * left
    expected = gptaq(due[None], "w=int3/g64", moment, cross_moment=moment.matrix(), damping=0.05)
    assert torch.equal(q.codes[second], expected.codes[0])


def test_bad_input() -> None:
    weight, moment, cross, outputs = made()
    with pytest.raises(ShapeError, match=r"^layer: the gradients' moments are for 16 outputs, the weight has 48"):
        yaqa(weight, "w=int3/g32", moment, cross_moment=cross, output_moments=[outputs[:16, :16]], name="layer")
    with pytest.raises(DataError, match="yaqa needs the second moment"):
        yaqa(weight, "w=int3/g32", moment)
    with pytest.raises(SchemeError, match="rows"):
        yaqa(weight, "w=int3/g32", moment, cross_moment=cross, rows=0)


def test_moments_of_gradients_are_blocks_of_the_plain_sum() -> None:
    generator = torch.Generator().manual_seed(1)
    found, batches = OutputMoment(widest=5), [torch.randn(2, 7, 12, generator=generator) for _ in range(3)]
    for g in batches:
        found.add(g)
    whole = sum(g.flatten(0, 1).T @ g.flatten(0, 1) for g in batches)
    assert [len(b) for b in found.blocks] == [5, 5, 2]
    for i, block in enumerate(found.blocks):
        assert torch.allclose(block, whole[5 * i : 5 * i + 5, 5 * i : 5 * i + 5], rtol=1e-5, atol=1e-5)
