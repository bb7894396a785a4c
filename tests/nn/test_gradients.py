"""Gradients through packed layers, against the dequantized weight in ordinary layers and against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from arrondi.formats import PRESETS, parse_scheme
from arrondi.nn import QConv, QLinear, conv_matrix, conv_weight
from arrondi.rewrite.spread import unspread
from arrondi.rounding import METHODS
from arrondi.tensor.nearest import quantize_tensor
from tests.kernels.common import normal
from tests.nn.test_conv import CONVOLUTIONS, built
from tests.nn.test_linear import scattered

SCHEMES = ["W4A16", "NF4_DQ", "W8A16", "W8A8", "FP8_DYNAMIC", "MXFP4", "NVFP4A16", "w=int2/g32/asym", "w=int4/g32,a=int8/g32", "w=int4/g64,a=int8/token/h128"]  # fmt: skip


def layer_of(name: str, dtype: torch.dtype = torch.float32, rows: int = 48) -> QLinear:
    asked = PRESETS[name] if name in PRESETS else parse_scheme(name)
    q = quantize_tensor(normal(rows, 128, seed=1), asked.weights)
    return QLinear(q, normal(rows, seed=2), inputs=asked.inputs, dtype=dtype)


def dense_of(layer: QLinear) -> torch.Tensor:
    """The weight of the unspread input."""
    weight = layer.unpack().dequantize()
    return unspread(weight, layer.spread) if layer.spread else weight


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_the_dequantized_weight(name: str, dtype: torch.dtype) -> None:
    layer = layer_of(name, dtype)
    assert layer.bias is not None
    layer.bias.requires_grad_()
    for training in (True, False):
        layer.train(training)
        layer.bias.grad = None
        x = normal(2, 5, 128, seed=3).to(dtype).requires_grad_()
        grad = normal(2, 5, 48, seed=4).to(dtype)
        y = layer(x)
        assert torch.equal(y.detach(), layer(x.detach()).detach()) or dtype is torch.bfloat16
        y.backward(grad)
        assert x.grad is not None and x.grad.dtype is dtype
        wanted = grad.float() @ dense_of(layer)
        assert (x.grad.float() - wanted).norm() < (1e-6 if dtype is torch.float32 else 2**-7) * wanted.norm()
        torch.testing.assert_close(layer.bias.grad, grad.float().sum((0, 1)), rtol=1e-2, atol=1e-5)


def test_finite_differences_once_and_twice() -> None:
    q = quantize_tensor(normal(4, 64), PRESETS["NF4"].weights)
    layer = QLinear(q, normal(4), dtype=torch.float64)
    x = normal(1, 64).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(lambda t: layer(t).pow(3), x)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    conv, x = built(name)
    matrix = quantize_tensor(normal(*_matrix(conv)), "w=int4/channel")
    packed = QConv(matrix, conv)
    conv.weight = nn.Parameter(conv_weight(matrix.dequantize(), conv))
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    if packed.bias is not None:
        packed.bias.requires_grad_()
    y = packed(found)
    grad = normal(*y.shape, seed=5)
    y.backward(grad)
    conv(wanted).backward(grad)
    torch.testing.assert_close(found.grad, wanted.grad)
    if packed.bias is not None:
        torch.testing.assert_close(packed.bias.grad, conv.bias.grad, rtol=1e-5, atol=1e-4)


def _matrix(conv: nn.Module) -> tuple[int, int]:
    return tuple(conv_matrix(conv.weight.detach(), conv).shape)


def test_nothing_of_the_weight_is_kept_between_the_passes() -> None:
    for name in SCHEMES:
        layer, kept = layer_of(name), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            layer(normal(4, 128).requires_grad_()).sum()
        assert not kept, name


def test_a_bias_alone_learns() -> None:
    layer = layer_of("W4A16")
    layer.bias.requires_grad_()
    layer(normal(3, 128)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((48,), 3.0))


def test_under_autocast_and_recomputed() -> None:
    layer = layer_of("NF4_DQ")
    x = normal(3, 128).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        checkpoint(layer, x, use_reentrant=False).float().pow(2).sum().backward()
    y = layer(x.detach())
    wanted = 2 * y @ dense_of(layer)
    torch.testing.assert_close(x.grad, wanted, rtol=1e-4, atol=1e-3)


def test_weights_with_something_kept_apart_and_in_another_order() -> None:
    weight = normal(48, 128, seed=1)
    weight[3, 5] = 40.0
    q = METHODS["gobo"].run(weight, "W3A16")
    assert q.apart is not None
    layer = QLinear(q)
    x = normal(3, 128, seed=3).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, q.dequantize().sum(0).expand(3, 128), rtol=1e-4, atol=1e-4)
    ordered = scattered(quantize_tensor(weight, "w=int4/g32/asym"))
    other = QLinear(ordered)
    assert other.order is not None
    x.grad = None
    other(x).sum().backward()
    torch.testing.assert_close(x.grad, ordered.dequantize().sum(0).expand(3, 128), rtol=1e-4, atol=1e-4)
