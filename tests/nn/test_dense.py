"""DenseLinear in bfloat16 on CPUs without products of it. Few rows, and how layers are adopted: tests/kernels/test_tokens.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from arrondi.nn import DenseLinear

ROWS = 8
"""More than the kernel for few rows takes."""


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arrondi.nn.dense.multiplies_bfloat16", lambda: False)


def layer(bias: bool, dtype: torch.dtype = torch.bfloat16) -> DenseLinear:
    generator = torch.Generator().manual_seed(0)
    made = DenseLinear(96, 40, bias=bias)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made.to(dtype)


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_it_is_the_float32_product_rounded_once(without: None, bias: bool):
    linear, x = layer(bias), numbers(2, ROWS // 2, 96)
    y = linear(x)
    added = None if linear.bias is None else linear.bias.float()
    assert y.dtype == torch.bfloat16 and y.shape == (2, ROWS // 2, 40)
    assert torch.equal(y, nn.functional.linear(x.float(), linear.weight.float(), added).bfloat16())
    exact = nn.functional.linear(x.double(), linear.weight.double(), None if added is None else added.double())
    sizes = x.double().abs() @ linear.weight.double().abs().T + (0 if added is None else added.double().abs())
    assert bool(((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + 2.0**-20 * sizes).all())


def test_only_bfloat16_on_such_a_cpu_takes_the_way_round(monkeypatch: pytest.MonkeyPatch):
    seen: list[torch.dtype] = []
    plain = nn.functional.linear

    def noted(x: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        seen.append(x.dtype)
        return plain(x, *rest)

    monkeypatch.setattr(nn.functional, "linear", noted)
    for has, dtype in ((False, torch.bfloat16), (True, torch.bfloat16), (False, torch.float32), (False, torch.float16)):
        monkeypatch.setattr("arrondi.nn.dense.multiplies_bfloat16", lambda has=has: has)
        assert layer(True, dtype)(numbers(ROWS, 96, dtype=dtype)).dtype == dtype
    assert seen == [torch.float32, torch.bfloat16, torch.float32, torch.float16]


def test_gradients_pass(without: None):
    linear, x = layer(True), numbers(ROWS, 96).requires_grad_()
    linear(x).float().square().sum().backward()
    twin, same = layer(True, torch.float32), x.detach().float().requires_grad_()
    twin(same).square().sum().backward()
    pairs = ((x.grad, same.grad), (linear.weight.grad, twin.weight.grad), (linear.bias.grad, twin.bias.grad))
    for found, wanted in pairs:
        assert found is not None and wanted is not None and found.dtype == torch.bfloat16
        # y is rounded to 8 bits before it is squared, and the gradient at the end.
        assert float((found.float() - wanted).norm()) <= 2 * 2.0**-8 * float(wanted.norm())


def test_types_that_do_not_go_together_are_refused_as_ever(without: None):
    with pytest.raises(RuntimeError, match=r"same dtype|expected .* but"):
        layer(True)(numbers(ROWS, 96, dtype=torch.float32))
