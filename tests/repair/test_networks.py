"""What stands in for a layer's codes while they are learned, and scales by cosine, on matrices alone."""

from __future__ import annotations

import torch

from arrondi.formats import parse_scheme
from arrondi.nn.conv import given, multiplied, positions
from arrondi.repair.cosine import best_input_scale, best_weight_scales, codes_at
from arrondi.repair.layer import LayerLoss, LayerRows, descend, product
from arrondi.repair.sides import SoftSides
from arrondi.rounding import gptq, rtn

SCHEME = parse_scheme("w=int4/channel").weights


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sides_begin_at_the_weight_or_at_the_codes() -> None:
    from arrondi.calibration import SecondMoment

    weight = normal(6, 20)
    q = rtn(weight, SCHEME, range="absmax")
    reached = torch.clamp(weight, -8 * q.real_scale, 7 * q.real_scale)
    assert torch.allclose(SoftSides.of(q, weight).value(), reached, atol=1e-3 * float(q.real_scale.max()))
    moment = SecondMoment(20)
    moment.update(normal(100, 20, seed=1) @ normal(20, 20, seed=2))
    other = gptq(weight, SCHEME, moment)
    assert torch.equal(SoftSides.at(q, weight).hard().codes, q.codes)
    near = (other.codes - torch.floor(weight / other.real_scale)).float()
    kept = (near >= 0) & (near <= 1)
    assert torch.equal(SoftSides.at(other, weight).hard().codes[kept], other.codes[kept])


def test_learned_sides_stay_within_a_step_and_beat_the_nearest() -> None:
    weight, x = normal(16, 32), torch.relu(normal(600, 32, seed=1) @ normal(32, 32, seed=2))
    q = rtn(weight, SCHEME, range="absmax")
    rows = LayerRows(x[:, None], x @ weight.T)
    loss, soft = LayerLoss(torch.relu, lambda x: x), SoftSides.of(q, weight)
    nearest = float(loss(rows, q.dequantize(), None))
    descend(
        lambda chosen, step: loss(LayerRows(rows.x[chosen], rows.y[chosen]), soft.value(), None) / nearest + soft.undecided(2.0),
        [(soft.v, 0.03)], 600, batch=128, iterations=300, falls=False,
    )  # fmt: skip
    learned = soft.hard()
    assert float(loss(rows, learned.dequantize(), None)) < 0.7 * nearest
    assert bool(((learned.codes - weight / q.real_scale).abs() < 1 + 1e-5).all())


def test_the_best_iterate_is_kept() -> None:
    p = torch.tensor([1.0], requires_grad=True)
    best = descend(lambda chosen, step: -p.sum(), [(p, 1.0)], 4, batch=2, iterations=10, falls=False, judge=lambda: float(p.detach() ** 2))  # fmt: skip
    assert best == 1.0 and p.item() == 1.0


def test_scales_by_cosine_are_never_worse_and_may_stay() -> None:
    weight, x = normal(8, 24), torch.relu(normal(300, 24, seed=1))
    rows = LayerRows(x[:, None], x @ weight.T)
    start = weight.abs().amax(1, keepdim=True) / 7
    same, first = best_weight_scales(weight, rows, start, 7, torch.ones(1))
    assert torch.equal(same, start)
    scale, cosine = best_weight_scales(weight, rows, start, 7, torch.linspace(0.5, 2, 40))
    assert bool((codes_at(weight, scale, 63).abs() <= 63).all())
    given = product(rows.x, codes_at(weight, scale, 7) * scale)
    direct = torch.nn.functional.cosine_similarity(given, rows.y, dim=0)
    assert torch.allclose(direct, cosine, atol=1e-5)
    lengths = given.norm(dim=0) / rows.y.norm(dim=0)
    assert bool(((cosine >= first - 1e-6) | ((lengths - 1).abs() > 0.0)).all()) and float(cosine.mean()) >= float(
        first.mean()
    )
    step = float(x.max()) / 15

    def rounds(values: torch.Tensor, share: float) -> torch.Tensor:
        return (values / (step / share)).round().clamp(0, 15) * (step / share)

    share, best = best_input_scale(rows, weight, rounds, torch.linspace(0.5, 2, 31))
    plain = torch.nn.functional.cosine_similarity(product(rounds(rows.x, 1.0), weight).flatten(), rows.y.flatten(), dim=0)  # fmt: skip
    assert best >= float(plain) - 1e-6 and 0.5 <= share <= 2


def test_rows_of_convolutions_give_what_the_convolutions_do() -> None:
    for conv in (
        torch.nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 1), (1, 2)),
        torch.nn.Conv2d(4, 8, 3, groups=2),
        torch.nn.Conv1d(4, 4, 3, padding=2, groups=4),
        torch.nn.Linear(4, 6),
    ):
        x = normal(3, 4, 9) if isinstance(conv, torch.nn.Conv1d) else normal(3, 4, 9, 8)
        x = normal(3, 9, 4) if isinstance(conv, torch.nn.Linear) else x
        with torch.no_grad():
            y = conv(x)
            chosen = torch.randperm(positions(y, conv))[:20]
            rows = multiplied(x, conv, chosen)
            found = product(rows, conv.weight.flatten(1)) + conv.bias
        assert torch.allclose(found, given(y, conv, chosen), atol=1e-5)
