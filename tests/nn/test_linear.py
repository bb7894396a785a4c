"""QLinear against nn.Linear with the dequantized weight."""

from __future__ import annotations

import copy
import itertools
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from arrondi.errors import SchemeError, ShapeError
from arrondi.kernels import FORCE, KERNELS
from arrondi.nn import QLinear, joined_product
from arrondi.nn import linear as linear_module
from arrondi.tensor.nearest import fake_quantize, quantize_tensor
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import Grid
from tests.kernels.common import assert_same, inputs


@pytest.fixture(autouse=True)
def same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.delenv(FORCE, raising=False)


def weight(shape: tuple[int, int] = (48, 256), scheme: str = "W4A16") -> QTensor:
    return quantize_tensor(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1, scheme)


def scattered(q: QTensor) -> QTensor:
    """Columns in another order, each with the number of its group of 32."""
    shuffle = torch.randperm(q.shape[1], generator=torch.Generator().manual_seed(1))
    return replace(q, codes=q.codes[:, shuffle], group_index=(shuffle // 32).int())


def float_layer(q: QTensor, bias: torch.Tensor | None, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(q.shape[1], q.shape[0], bias=bias is not None, dtype=dtype)
    layer.weight.data = q.dequantize(dtype)
    if bias is not None:
        layer.bias.data = bias.to(dtype)
    return layer


@pytest.mark.parametrize("scheme", ["W4A16", "W3A16_ASYM", "w=int8/channel", "NVFP4A16", "NF4", "T158", "FP8_BLOCK"])
def test_is_the_float_layer(scheme: str):
    q = weight(scheme=scheme)
    for dtype, bias in itertools.product((torch.float32, torch.bfloat16), (torch.randn(48), None)):
        x = torch.randn(2, 5, 256).to(dtype)
        y, expected = QLinear(q, bias, dtype=dtype)(x), float_layer(q, bias, dtype)(x).detach()
        assert y.dtype == dtype
        relative = float((y.double() - expected.double()).norm() / expected.double().norm())
        assert relative <= (1e-6 if dtype == torch.float32 else 2 * 2.0**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_can_be_read_back(dtype: torch.dtype):
    q = weight()
    layer = QLinear(q, torch.randn(48), dtype=dtype)
    read = layer.dequantize()
    assert read.dtype == dtype
    assert read.shape == (48, 256)
    roundoff = 2.0**-24 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(read.float(), q.dequantize(), rtol=4.1 * roundoff, atol=0)
    assert (layer.in_features, layer.out_features) == (256, 48)
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device.type) == ((48, 256), dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_take_less_than_a_third_of_bfloat16(dtype: torch.dtype):
    layer = QLinear(weight((512, 1024)), dtype=dtype)
    held = sum(b.numel() * b.element_size() for b in [*layer.buffers(), *layer.parameters()])
    assert held == layer.weight_nbytes
    assert held < 0.30 * (512 * 1024 * 2)
    reached = sum(v.numel() * v.element_size() for v in vars(layer).values() if isinstance(v, torch.Tensor))
    assert reached == 0  # nothing hides beside the buffers


def test_other_numbers_than_its_own_are_cast():
    q = weight()
    layer = QLinear(q, dtype=torch.float32)
    x = torch.randn(3, 256).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.float()).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casting_the_model_leaves_the_weight_alone(dtype: torch.dtype):
    model = nn.Sequential(QLinear(weight(), torch.randn(48), dtype=dtype))
    x = torch.randn(3, 256)
    before = model(x)
    kept = {n: b.clone() for n, b in model.named_buffers()}
    model.to(torch.float16).double()
    assert all(torch.equal(b, kept[n]) and b.dtype == kept[n].dtype for n, b in model.named_buffers())
    assert model[0].bias.dtype == torch.float64
    step = 2.0**-10 if dtype == torch.float32 else 2.0**-7  # of the bias, cast to float16, and of the result
    torch.testing.assert_close(model(x), before, rtol=step, atol=4 * step)


def test_a_copy_is_independent_and_files_hold_only_the_bias():
    layer = QLinear(weight(), torch.randn(48))
    other = copy.deepcopy(layer)
    x = torch.randn(3, 256)
    assert torch.equal(other(x), layer(x))
    other._buffers["packed_codes"].zero_()
    assert not torch.equal(other(x), layer(x))
    assert list(layer.state_dict()) == ["bias"]


@pytest.mark.parametrize("text", ["int8/token", "fp8_e4m3/g128", "int8/tensor", "uint8/g64/asym"])
def test_inputs_are_rounded_first(text: str):
    q, rounding, x = weight(scheme="w=int8/channel"), inputs(text), torch.randn(4, 256)
    y = QLinear(q, inputs=rounding)(x)
    torch.testing.assert_close(y, nn.functional.linear(fake_quantize(x, rounding.scheme), q.dequantize()))
    assert not torch.allclose(y, QLinear(q)(x), rtol=1e-5)


def test_gpt2s_layer_is_a_linear_one_of_the_transpose():
    from transformers.pytorch_utils import Conv1D

    q = weight((256, 96))
    float_layer = Conv1D(256, 96)
    float_layer.weight.data, float_layer.bias.data = q.dequantize().T.contiguous(), torch.randn(256)
    x = torch.randn(2, 3, 96)
    torch.testing.assert_close(QLinear(q, float_layer.bias)(x), float_layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_act_order_keeps_the_fast_kernel(dtype: torch.dtype):
    q = scattered(weight(scheme="w=int4/g32/asym"))
    layer = QLinear(q, dtype=dtype)
    assert layer.order is not None
    assert layer.kernel == QLinear(weight(scheme="w=int4/g32/asym"), dtype=dtype).kernel
    x = torch.randn(3, 256).to(dtype)
    relative = (layer(x).float() - x.float() @ q.dequantize().T).norm() / (x.float() @ q.dequantize().T).norm()
    assert relative < (1e-6 if dtype == torch.float32 else 2 * 2.0**-8)
    torch.testing.assert_close(
        layer.dequantize().float(), q.dequantize(), rtol=0, atol=1e-6 if dtype == torch.float32 else 0.004
    )


def test_groups_that_cannot_be_sorted_go_to_the_reference():
    q = weight(scheme="w=int4/g32")
    layer = QLinear(replace(q, group_index=torch.zeros(256, dtype=torch.int32)), dtype=torch.bfloat16)
    assert (layer.kernel, layer.order) == ("reference", None)
    x = torch.randn(2, 256)
    wanted = x @ (q.codes * q.real_scale[:, :1]).T
    torch.testing.assert_close(layer(x), wanted, rtol=2.0**-7, atol=0.05)


def test_gradients_reach_the_input():
    q = weight()
    x = torch.randn(3, 256, requires_grad=True)
    QLinear(q)(x).sum().backward()
    torch.testing.assert_close(x.grad, q.dequantize().sum(dim=0).expand(3, 256))


def test_a_forced_kernel_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FORCE, "torch-int8")
    with pytest.raises(SchemeError, match="torch-int8 cannot run int4/g128"):
        QLinear(weight())
    monkeypatch.setenv(FORCE, "reference")
    assert QLinear(weight(), dtype=torch.bfloat16).kernel == "reference"


def test_moving_where_the_kernel_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch):
    layer = QLinear(weight())
    old = KERNELS[layer.kernel]
    fixed = replace(old, refuse=lambda *_: "It stays here.")
    monkeypatch.setattr(linear_module, "KERNELS", {old.name: fixed})
    with pytest.raises(SchemeError, match="It stays here"):
        layer.to("cpu")


def test_mistakes_are_named():
    with pytest.raises(ShapeError, match="QStack"):
        QLinear(quantize_tensor(torch.randn(2, 4, 32), "W4A16"))
    with pytest.raises(ShapeError, match="each of 48 outputs"):
        QLinear(weight(), torch.zeros(256))


def test_repr_says_what_runs():
    layer = QLinear(weight(), torch.zeros(48), inputs=inputs("int8/token"))
    shape = "in_features=256, out_features=48, bias=True"
    assert repr(layer) == f"QLinear({shape}, weight=int4/g128, inputs=int8/token, kernel={layer.kernel})"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_may_change_between_calls(dtype: torch.dtype):
    layer = QLinear(weight(), torch.zeros(48), dtype=dtype)
    layer.bias.data = layer.bias.data.to(dtype)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = layer(x)
    with torch.no_grad():
        layer.bias.add_(64.0)
    assert torch.allclose(layer(x), before + 64.0, atol=0.5)
    for size in (-64.0, 100.0, 30.0):
        layer.bias = None  # the next may come to lie where it was
        layer.bias = nn.Parameter(torch.full((48,), size, dtype=dtype), requires_grad=False)
        assert torch.allclose(layer(x), before + size, atol=0.5)


@pytest.mark.parametrize("text", ["int8/token", "int8/g64/asym", "int8/tensor/static"])
def test_inputs_are_grouped_in_the_order_in_which_they_come(text: str):
    q = scattered(weight(scheme="w=int4/g32/asym"))
    grid = Grid(torch.tensor(0.02)) if text.endswith("static") else None
    rounding = inputs(text)
    x = torch.randn(3, q.shape[1], generator=torch.Generator().manual_seed(0))
    wanted = fake_quantize(x, rounding.scheme, grid) @ q.dequantize().T
    assert torch.allclose(QLinear(q, inputs=rounding, input_grid=grid)(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("order", ["plain", "scattered"])
def test_the_weight_comes_back_to_the_bit(kernel: str, order: str, monkeypatch: pytest.MonkeyPatch):
    """Every kernel, groups in any order; after casts, copies and pickles."""
    q = weight(scheme="w=int8/channel" if kernel == "torch-int8" else "w=int4/g32/asym")
    if order == "scattered":
        if kernel == "torch-int8":
            pytest.skip("torch-int8 has one scale a row, and no groups to scatter")
        q = scattered(q)
    monkeypatch.setenv(FORCE, kernel)
    if KERNELS[kernel].refuse(q.scheme, q.shape, torch.bfloat16, torch.device("cpu")):
        pytest.skip(f"{kernel} does not run here")
    layer = QLinear(q, torch.randn(48), dtype=torch.bfloat16)
    for same in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).half().double()):
        assert_same(same.unpack(), q)
        assert torch.equal(same.dequantize(), q.dequantize(torch.bfloat16))


def test_joined_layers_give_each_its_own_weight_back():
    weights = [weight((n, 256), "NVFP4A16") for n in (48, 16, 32)]
    layers = [QLinear(q) for q in weights]
    if isinstance(joined_product(layers), str):
        pytest.skip("the compiled kernels are not there")
    for layer, q in zip(layers, weights, strict=True):
        assert_same(layer.unpack(), q)
        assert_same(copy.deepcopy(layer).unpack(), q)
