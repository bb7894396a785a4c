"""Rotations: orthogonal, fast as the dense product, and they do to outliers what QuaRot says."""

from __future__ import annotations

import pytest
import torch

from arrondi.errors import SchemeError, ShapeError
from arrondi.formats import FORMATS, PerToken, Scheme
from arrondi.kernels.hadamard import hadamard_matrix
from arrondi.rewrite.rotation import Rotation, block_of, factors_of, turn
from arrondi.rewrite.spread import best_block, check_block, spread, spread_weight, unspread
from arrondi.tensor.nearest import fake_quantize

ORDERS = (1, 2, 7, 12, 16, 45, 52, 90, 172, 344)
"""Sylvester's, both of Paley's over primes and prime powers (52 needs a field of 25, 344 one of 343), and what has none."""


@pytest.mark.parametrize("ones", [False, True], ids=["any", "ones"])
@pytest.mark.parametrize("n", ORDERS)
def test_a_rotation_is_orthogonal_and_spreads_every_channel(n: int, ones: bool) -> None:
    matrix = Rotation(n, 5, ones).matrix()
    assert float((matrix @ matrix.T - torch.eye(n)).abs().max()) < 1e-13
    if ones:
        assert float((matrix.sum(1) - 1).abs().max()) < 1e-13 and float((matrix.sum(0) - 1).abs().max()) < 1e-13
    elif factors_of(n)[-1] == 1:
        assert torch.allclose(matrix.abs(), torch.full((n, n), n**-0.5, dtype=torch.float64))
    x = torch.randn(3, 2, n, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(Rotation(n, 5, ones).apply(x), x.double() @ matrix, atol=1e-12)


def test_the_signs_are_those_of_the_seed() -> None:
    one, same, other = (Rotation(16, seed).matrix() for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert set((one / hadamard_matrix(16).double()).flatten().tolist()) == {0.25, -0.25}
    assert torch.equal((one / hadamard_matrix(16)).sum(1).abs(), torch.full((16,), 4.0, dtype=torch.float64)), "of rows"


def test_factors_are_the_best_there_are() -> None:
    assert factors_of(4096) == (4096, 1) and factors_of(11008) == (11008, 1), "344 · 32"
    assert factors_of(90) == (2, 45) and factors_of(45) == (45,)
    assert factors_of(92) == (4, 23), "no construction here has 92"
    assert all(torch.Size(factors_of(n)).numel() == n for n in range(1, 200))
    product = torch.kron(hadamard_matrix(12), hadamard_matrix(4))
    assert torch.equal(product.int() @ product.int().T, 48 * torch.eye(48, dtype=torch.int32)), "H_a ⊗ H_b is one"
    assert block_of(92) == 4 and best_block(90) == 0 and best_block(96) == 96
    with pytest.raises(ShapeError, match="at least 1, got 0"):
        Rotation(0)


def test_layer_norm_commutes_with_a_rotation_that_keeps_the_ones() -> None:
    x = torch.randn(5, 24, dtype=torch.float64) + 3
    norm = torch.nn.functional.layer_norm
    keeps, turns = Rotation(24, 1, True), Rotation(24, 1)
    assert torch.allclose(norm(keeps.apply(x), (24,)), keeps.apply(norm(x, (24,))), atol=1e-12)
    assert not torch.allclose(norm(turns.apply(x), (24,)), turns.apply(norm(x, (24,))), atol=1e-2)


@pytest.mark.parametrize("shape, axis", [((6, 24), 1), ((24, 6), 0), ((2, 5, 24), 2), ((2, 24, 5), 1), ((24,), 0)])
def test_turning_a_weight_is_a_product_with_every_group(shape: tuple[int, ...], axis: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    rotation, channels = Rotation(12, 2), torch.arange(24).reshape(12, 2).T.contiguous()  # not neighbours
    expected = weight.clone().movedim(axis, -1)
    for group in channels:
        expected[..., group] = (expected[..., group].double() @ rotation.matrix()).float()
    turn(weight, axis, channels, rotation)
    assert torch.allclose(weight.movedim(axis, -1), expected, atol=1e-6)


def outliers(tokens: int = 256, n: int = 1024) -> torch.Tensor:
    """Hidden states of which a few channels stand out."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, n, generator=generator)
    x[:, torch.randperm(n, generator=generator)[:4]] *= 60
    return x


def error(x: torch.Tensor) -> float:
    """Of int4 per token, relative."""
    return float((fake_quantize(x, Scheme(FORMATS["int4"], PerToken())) - x).norm() / x.norm())


def kurtosis(x: torch.Tensor) -> float:
    return float(((x / x.std()) ** 4).mean())


def test_outliers_are_gone_afterwards() -> None:
    """The directions of §5.2 of the paper's experiments; more channels in a block help more."""
    x = outliers()
    turned = Rotation(1024, 1).apply(x).float()
    assert kurtosis(x) > 100 and 2.5 < kurtosis(turned) < 3.5
    ratio = [float((t.abs().amax(1) / t.square().mean(1).sqrt()).mean()) for t in (x, turned)]
    assert ratio[0] > 4 * ratio[1] and ratio[1] < 5
    errors = [error(spread(x, block)) for block in (1, 16, 64, 256, 1024)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[-1]
    rest = torch.ones(1024, dtype=torch.bool)
    rest[x.abs().amax(0) > 30] = False
    plain = Scheme(FORMATS["int4"], PerToken())
    lost = [(fake_quantize(x, plain) - x), unspread(fake_quantize(spread(x, 1024), plain), 1024) - x]
    assert float(lost[0][:, rest].norm()) > 2 * float(lost[1][:, rest].norm()), "of the other channels"


@pytest.mark.parametrize("n, block", [(96, 96), (96, 12), (64, 64), (52, 52)])
def test_spreading_is_undone_by_the_weight(n: int, block: int) -> None:
    x, weight = torch.randn(7, n), torch.randn(5, n)
    stored = weight.clone()
    spread_weight(stored, block)
    assert torch.allclose(spread(x, block) @ stored.T, x @ weight.T, atol=1e-4)
    assert torch.allclose(unspread(spread(x, block), block), x, atol=1e-5)
    assert spread(x.bfloat16(), block).dtype == torch.bfloat16


def test_a_constant_is_spread_too() -> None:
    """What a plain Hadamard matrix gathers in one channel, after ReLU for example."""
    flat = spread(torch.ones(1, 256), 256)
    assert torch.allclose(flat.abs(), torch.ones(1, 256)), "Rudin and Shapiro: |r H| is constant"
    assert float(spread(torch.ones(1, 768), 768).abs().max()) < 5


def test_blocks_that_cannot_be() -> None:
    check_block(96, 0)
    for n, block in ((96, 64), (92, 92)):
        with pytest.raises(SchemeError, match=f"{n} channels cannot be spread in blocks of {block}"):
            check_block(n, block)
