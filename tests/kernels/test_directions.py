"""The compiled attention along principal directions against numbers that are unpacked, on every path."""

from __future__ import annotations

import pytest
import torch

from arrondi.kernels import directions
from arrondi.kernels.directions import SPARE, Angles, Prepared, Stretch, attend_along, available, takes_along
from arrondi.tensor.spectrum import Basis, Moments, Turn, basis_of, decode, encode

pytestmark = pytest.mark.skipif(not available(), reason="the compiled attention is not there")

TURNS = {
    "none": None,
    "halves": Turn(1e4 ** -(torch.arange(0, 64, 2) / 64)),
    "neighbours, part": Turn(1e4 ** -(torch.arange(0, 40, 2) / 40), True),
    "last, part": Turn(1e4 ** -(torch.arange(0, 24, 2) / 24), False, True),
}


def states(tokens: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0.5, -1.5, width)
    mixed = torch.linalg.qr(torch.randn(2, width, width, generator=generator))[0]
    return (torch.randn(1, 2, tokens, width, generator=generator) * spread) @ mixed + 0.3


def packed(x: torch.Tensor, bits: float, turn: Turn | None, position: int) -> tuple[Basis, torch.Tensor]:
    """Codes of states from a position on, and behind them bytes that mean nothing."""
    weight = torch.logspace(-0.5, 0.5, x.shape[-1], dtype=torch.float64).expand(2, -1)
    basis, _ = basis_of(Moments.of(x), bits, turn, weight)
    codes = encode(x, basis, position)
    noise = torch.full((1, 2, -(-SPARE // basis.bytes), basis.bytes), 0xA5, dtype=torch.uint8)
    return basis, torch.cat([codes, noise], dim=2)


def wanted(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    grouped = query[0, :, 0].double().unflatten(0, (2, -1))
    shares = (grouped @ keys[0].double().mT * scale).softmax(-1)
    return (shares @ values[0].double()).reshape(1, 1, -1, query.shape[3])


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize(("bits", "shared", "tokens"), [(2.0, 4, 77), (3.3, 3, 1), (1.2, 1, 130)])
def test_it_is_attention_to_the_unpacked_numbers(path: str, turn: str, bits: float, shared: int, tokens: int):
    width = 80 if turn == "last, part" else 64
    of_keys, at = packed(states(tokens + 3, width, 1), bits, TURNS[turn], 37)
    of_values, there = packed(states(tokens + 3, width, 2), bits + 0.5, None, 37)
    query = torch.randn(1, 2 * shared, 1, width, generator=torch.Generator().manual_seed(3))
    new_keys, new_values = states(5, width, 4), states(5, width, 5)
    first, stop = 2, 2 + tokens
    keys, values = Prepared.of(of_keys), Prepared.of(of_values)
    assert takes_along(query, keys, values)
    got = attend_along(
        query, (keys, Stretch(at, first, stop, new_keys)), (values, Stretch(there, first, stop, new_values)), 37 + first, 0.3
    )  # fmt: skip
    real = [
        torch.cat([decode(codes[:, :, first:stop], basis, 37 + first), new], dim=2)
        for codes, basis, new in ((at, of_keys, new_keys), (there, of_values, new_values))
    ]
    torch.testing.assert_close(got.double(), wanted(query, *real, 0.3), rtol=2e-5, atol=2e-5)


def test_a_text_in_parts_is_the_text(path: str, monkeypatch: pytest.MonkeyPatch):
    of_keys, at = packed(states(101, 64, 1), 2.0, TURNS["halves"], 0)
    of_values, there = packed(states(101, 64, 2), 2.0, None, 0)
    query = 3 * torch.randn(1, 4, 1, 64, generator=torch.Generator().manual_seed(3))
    none = query.new_zeros(1, 2, 0, 64)
    sides = [(Prepared.of(b), Stretch(c, 0, 101, none)) for b, c in ((of_keys, at), (of_values, there))]
    whole = attend_along(query, *sides, 0, 1.0)
    monkeypatch.setattr(directions, "_PART", 1)
    monkeypatch.setattr(directions, "threads", lambda: 14)
    torch.testing.assert_close(attend_along(query, *sides, 0, 1.0), whole, rtol=1e-5, atol=1e-6)


def test_angles_are_right_at_far_positions():
    angles = Angles((1.0, 0.3, 1e-4))
    starts = angles.upto(130_000)
    for position in (0, 31, 32, 4095, 129_999):
        (c0, s0), (c1, s1) = starts[position // 32], angles.steps[position % 32]
        exact = position * angles.frequencies
        torch.testing.assert_close((c0 * c1 - s0 * s1)[:3].double(), exact.cos(), rtol=0, atol=3e-7)
        torch.testing.assert_close((s0 * c1 + c0 * s1)[:3].double(), exact.sin(), rtol=0, atol=3e-7)


def test_bytes_that_may_not_be_read_are_asked_for():
    basis, codes = packed(states(20, 64, 1), 2.0, None, 0)
    prepared, query = Prepared.of(basis), torch.randn(1, 2, 1, 64)
    side = prepared, Stretch(codes[:, :, :20].contiguous(), 0, 20, query.new_zeros(1, 2, 0, 64))
    with pytest.raises(ValueError, match="16 bytes must follow"):
        attend_along(query, side, side, 0, 1.0)


def test_scores_that_are_no_numbers_give_none(path: str):
    basis, codes = packed(states(20, 64, 1), 2.0, None, 0)
    side = Prepared.of(basis), Stretch(codes, 0, 20, torch.zeros(1, 2, 0, 64))
    query = torch.full((1, 2, 1, 64), torch.nan)
    assert attend_along(query, side, side, 0, 1.0).isnan().all()
