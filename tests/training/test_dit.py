"""The diffusion transformer of the benchmark: an identity at first, ternary or not; its modulation normed; packed without a change."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import dit
from arrondi.nn import QLinear
from arrondi.training.models import make_latent


@pytest.mark.parametrize("normed", [False, True])
def test_a_ternary_block_begins_as_the_identity_and_learns(normed: bool) -> None:
    model = make_latent(dit.DiT(32, 2, 4, normed), "terdit", targets=dit.TERNARY)
    block, x, c = model.blocks[0], torch.randn(3, 49, 32), torch.randn(3, 32)
    assert torch.equal(block(x, c), x)
    assert {type(m).__name__ for m in block.children()} >= {"LatentLinear"}
    block(x, c).square().sum().backward()
    assert bool(block.modulation.weight.grad.abs().sum() > 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        six = block.modulation_norm(block.modulation(torch.nn.functional.silu(c)))
        if normed:
            raw = six / block.modulation_norm.weight
            torch.testing.assert_close(raw.square().mean(-1), torch.ones(3), rtol=1e-3, atol=0)
    loaded, size, gap = dit.deployed(model, dit.DiT(32, 2, 4, normed))
    assert gap < 1e-5 and size > 0
    assert isinstance(loaded.blocks[1].modulation, QLinear) and isinstance(loaded.last, torch.nn.Linear)


def test_samples_follow_the_direction() -> None:
    y = torch.arange(3)

    class Straight(torch.nn.Module):
        """The direction to noise from a picture that is 0.25 everywhere: where the way is straight, one number of steps is as good as another."""

        def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            return (x - 0.25) / (t[:, None, None, None] / dit.NOISES)

    for steps in (1, 7):
        torch.testing.assert_close(dit.drawn(Straight(), y, steps), torch.full((3, 1, 28, 28), 0.25), rtol=0, atol=1e-5)


def test_distance_of_pictures() -> None:
    judge = dit.Judge()
    a = torch.randn(200, 1, 28, 28)
    assert judge.distance(a, a) == pytest.approx(0, abs=1e-6)
    assert judge.distance(a, a + 1) > judge.distance(a, a + 0.1) > 0
