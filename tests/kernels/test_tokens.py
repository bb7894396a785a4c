"""Dense products, attention of few tokens and rotary positions against PyTorch's own operators in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from arrondi.errors import ShapeError
from arrondi.kernels.tokens import attend, dense_linear, rotate, takes_attention, takes_dense
from arrondi.native import kernel_threads, native, threads
from arrondi.nn import DenseLinear

pytestmark = [
    pytest.mark.skipif(native is None, reason="arrondi was installed without its compiled kernels"),
    pytest.mark.usefixtures("path"),
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_dense_products():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows in (1, 2, 3, 4):
            for n, k in ((1, 1), (7, 15), (33, 64), (130, 1037)):
                x, weight, bias = random(rows, k).to(dtype), random(n, k, seed=1).to(dtype), random(n, seed=2).to(dtype)
                assert takes_dense(x, weight)
                exact = x.double() @ weight.double().T + bias.double()
                bound = x.double().abs() @ weight.double().abs().T + bias.double().abs()
                roundoff = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
                assert bool(((dense_linear(x, weight, bias).double() - exact).abs() <= roundoff * bound).all())


@torch.no_grad()
def test_a_view_of_a_weight_and_what_is_left_to_pytorch():
    weight = random(8, 96)[:, :64]
    x = random(1, 64)
    torch.testing.assert_close(dense_linear(x, weight, None), x @ weight.T)
    assert not takes_dense(random(5, 64), weight)
    assert not takes_dense(x.double(), weight.double())
    assert not takes_dense(x, random(64, 8).T)
    assert not takes_dense(random(1, 63), weight)
    with torch.enable_grad():
        assert not takes_dense(x.requires_grad_(), weight)


def test_layers_are_adopted_in_place():
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))
    x = random(2, 32)
    wanted = model(x)
    DenseLinear.adopt(model)
    assert [type(m).__name__ for m in model] == ["DenseLinear", "ReLU", "DenseLinear"]
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted.detach(), rtol=1e-5, atol=1e-6)
    model(x).sum().backward()
    assert model[0].weight.grad is not None


def test_attention_of_one_token():
    for dtype in (torch.float32, torch.bfloat16):
        for heads, key_heads, width, length in ((1, 1, 16, 1), (4, 2, 64, 17), (6, 6, 128, 300), (8, 1, 256, 33)):
            query = (random(1, heads, 1, width) * 3).to(dtype)
            room = (random(2, 1, key_heads, length + 5, width, seed=1)).to(dtype)
            key, value = room[0][:, :, :length], room[1][:, :, :length]
            assert takes_attention(query, key, value)
            shared = heads // key_heads
            exact = nn.functional.scaled_dot_product_attention(
                query.double(), key.double().repeat_interleave(shared, 1), value.double().repeat_interleave(shared, 1)
            ).transpose(1, 2)
            y = attend(query, key, value, width**-0.5)
            assert y.shape == (1, 1, heads, width)
            tolerance = 1e-5 if dtype == torch.float32 else 2.0**-8
            torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)


def test_attention_far_below_the_largest_score_vanishes():
    key = torch.zeros(1, 1, 40, 16)
    key[0, 0, 7] = 100.0
    value = random(1, 1, 40, 16)
    y = attend(torch.ones(1, 1, 1, 16), key, value, 1.0)
    torch.testing.assert_close(y[0, 0, 0], value[0, 0, 7], rtol=1e-6, atol=1e-6)


def test_attention_to_what_is_not_finite_is_pytorchs():
    """NaN and infinities in each operand, first and last key, an odd and an even length."""
    for dtype in (torch.float32, torch.bfloat16):
        for length, where, bad in itertools.product((1, 2, 5, 16, 33), range(3), (torch.nan, torch.inf, -torch.inf)):
            for at in (0, length - 1):
                given = [random(1, 4, 1, 32), random(1, 2, length, 32, seed=1), random(1, 2, length, 32, seed=2)]
                given[where][0, 1, 0 if where == 0 else at, 3] = bad
                given = [g.to(dtype) for g in given]
                wide = [given[0].double(), *(g.double().repeat_interleave(2, 1) for g in given[1:])]
                scores = wide[0] @ wide[1].transpose(2, 3) * 0.3
                exact = (scores.softmax(dim=-1) @ wide[2]).transpose(1, 2)
                tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
                y = attend(*given, 0.3).double()
                torch.testing.assert_close(y, exact, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_shapes_that_attention_leaves_to_pytorch():
    query, key = random(1, 4, 1, 64), random(1, 2, 9, 64)
    assert not takes_attention(random(1, 4, 2, 64), key, key)
    assert not takes_attention(random(1, 3, 1, 64), key, key)
    assert not takes_attention(random(1, 4, 1, 40), random(1, 2, 9, 40), random(1, 2, 9, 40))
    assert not takes_attention(query, key[:, :, :0], key[:, :, :0])
    assert not takes_attention(query, key, key.bfloat16())
    assert native is not None
    with pytest.raises(ValueError, match="heads must share"):
        native.attend(3, 2, 64, 9, 1, 1, 0, 0, 1, 0, 0, 1, 0, 1.0, 1)


def test_threads_of_pytorch_rest_and_come_back():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with kernel_threads(alone=True):
            assert (torch.get_num_threads(), threads()) == (1, 2)
            with kernel_threads(alone=True):
                assert threads() == 2
        assert (torch.get_num_threads(), threads()) == (2, 2)
        with kernel_threads(alone=False):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_rotary_positions_are_those_of_transformers(normed: bool):
    for dtype in (torch.float32, torch.bfloat16):
        eps = 0.5  # next to a mean square of one
        heads_of = ((1, 4, 2), (5, 3, 3), (11, 6, 1), (1, 1, 0))
        for width, (rows, heads, key_heads) in itertools.product((2, 16, 20, 64, 80, 128, 256), heads_of):
            turned = (heads + key_heads) * width
            x = random(rows, turned + key_heads * width + 5).to(dtype)
            angle = random(rows, width // 2, seed=1) * 100
            cos, sin = (f(torch.cat((angle, angle), dim=1)).to(dtype) for f in (torch.cos, torch.sin))
            weights = [1 + 0.3 * random(width, seed=seed) for seed in (2, 3)]
            parts = x[:, :turned].double().unflatten(1, (-1, width)).transpose(0, 1).split((heads, key_heads))
            if normed:
                parts = [
                    nn.functional.rms_norm(p, (width,), w.double(), eps) for p, w in zip(parts, weights, strict=True)
                ]
            exact, sizes = (
                torch.cat(apply_rotary_pos_emb(q, k, c.double(), s.double(), unsqueeze_dim=0))
                .transpose(0, 1)
                .flatten(1)
                for (q, k), c, s in (
                    (parts, cos, sin),
                    ([p.abs() for p in parts], cos.abs(), _signed_by_half(sin.abs())),
                )
            )
            got = x.clone()
            if normed:
                rotate(got, heads, key_heads, cos, sin, norm=weights[0], key_norm=weights[1], eps=eps)
            else:
                rotate(got, heads, key_heads, cos, sin)
            # A sum of squares in 16 lanes, the roundings of two products and their sum; then one to the type.
            bound = (width / 16 * 2.0**-25 + 2.0**-21) * sizes
            bound += exact.abs() * (2.0**-23 if dtype == torch.float32 else 2.0**-8)
            assert bool(((got[:, :turned].double() - exact).abs() <= bound).all()), (width, rows, heads, key_heads)
            assert torch.equal(got[:, turned:], x[:, turned:])


def _signed_by_half(sin: torch.Tensor) -> torch.Tensor:
    """With it, the rotation of sizes adds up the sizes of its parts."""
    half = sin.shape[1] // 2
    return torch.cat((-sin[:, :half], sin[:, half:]), dim=1)


def test_rotary_positions_leave_what_lies_between_rows():
    room = random(4, 100)
    x = room.clone()
    cos, sin = random(4, 20, seed=1), random(4, 20, seed=2)
    rotate(x[:, 10:90], 2, 1, cos, sin)
    apart = room[:, 10:90].contiguous()
    rotate(apart, 2, 1, cos, sin)
    assert torch.equal(x[:, 10:90], apart)
    assert torch.equal(x[:, :10], room[:, :10]) and torch.equal(x[:, 70:], room[:, 70:])


def test_rotary_positions_of_heads_that_are_too_wide_or_odd():
    for width in (15, 258):
        with pytest.raises(ShapeError, match="even width of up to 256"):
            rotate(random(1, width), 1, 0, random(1, width), random(1, width))


@pytest.mark.parametrize("strange", [None, "x", [1.0], torch.ones(1, 2, 1, 16).to_sparse()], ids=str)
def test_what_is_no_ordinary_tensor_is_named(strange: Any) -> None:
    q, x, angles = torch.ones(1, 2, 1, 16), torch.ones(1, 64), torch.ones(1, 16)
    with pytest.raises(ShapeError, match="query must be"):
        attend(strange, q, q, 1.0)
    with pytest.raises(ShapeError, match="value must be"):
        attend(q, q, strange, 1.0)
    with pytest.raises(ShapeError, match="sin must be"):
        rotate(x, 2, 2, angles, strange)
    with pytest.raises(ShapeError, match="weight must be"):
        dense_linear(x, strange, None)
