"""Inputs that are rounded on stored grids, against formulas written out here and against the compressed-tensors package."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn

from arrondi.errors import DataError, SchemeError
from arrondi.formats import ActivationScheme, parse_scheme
from arrondi.kernels import KERNELS
from arrondi.native import native
from arrondi.nn import QLinear
from arrondi.tensor.nearest import quantize_tensor
from arrondi.tensor.ranges.grid import Grid
from tests.kernels.common import inputs, normal

NVFP4 = "fp4_e2m1/g16/s:(fp8_e4m3/tensor)"


def layer(text: str, grid: Grid | None, weights: str = "w=int8/channel", dtype: torch.dtype = torch.float32) -> QLinear:
    return QLinear(quantize_tensor(normal(48, 256), weights), inputs=inputs(text), input_grid=grid, dtype=dtype)


def affine(x: torch.Tensor, scale: float, zero: int, low: int, high: int) -> torch.Tensor:
    """scale · (clip(round(x / scale) + zero) - zero), in float64 from float32 quotients."""
    codes = ((x.float() / torch.tensor(scale)).round() + zero).clamp(low, high)
    return (codes - zero).double() * torch.tensor(scale).double()


@pytest.mark.parametrize(
    ("text", "scale", "zero", "low", "high"),
    [
        ("int8/tensor/static", 0.02, None, -128, 127),
        ("int8/tensor/asym/static", 0.013, -100, -128, 127),
        ("uint8/tensor/asym/static", 0.02, 7, 0, 255),
        ("uint4/tensor/asym/static", 0.3, 15, 0, 15),
    ],
)
def test_static_integers(text: str, scale: float, zero: int | None, low: int, high: int):
    """Numbers inside the range and far beyond it, ties between codes among them."""
    grid = Grid(torch.tensor(scale), None if zero is None else torch.tensor(zero))
    kinds = ("w=int8/channel", "w=int4/g32/asym", "NF4")  # whole rows, groups, floats
    for weights, dtype in itertools.product(kinds, (torch.float32, torch.bfloat16)):
        mine = layer(text, grid, weights, dtype)
        x = normal(9, 256, dtype=dtype)
        x[0, :8] = torch.tensor([1e6, -1e6, 0, -0.0, 0.5 * scale, 1.5 * scale, -2.5 * scale, 1e30]).to(dtype)
        values = affine(x, scale, zero or 0, low, high)
        if mine.meta.inputs is None:  # rounded outside the kernel, back to the type of x
            values = values.to(dtype).double()
        w = mine.unpack().dequantize(torch.float64)
        bound = values.abs() @ w.abs().T * (2.0**-20 if dtype == torch.float32 else 2.0**-7)
        assert bool(((mine(x).double() - values @ w.T).abs() <= bound + 1e-30).all()), (text, weights, dtype)


@pytest.mark.skipif(native is None, reason="arrondi was installed without its compiled kernels")
def test_static_integers_take_the_integer_product():
    assert layer("int8/tensor/static", Grid(torch.tensor(0.02))).meta.inputs is not None
    assert layer("int8/tensor/static", Grid(torch.tensor(0.02)), "w=int4/g32").direct


def test_static_fp8():
    mine = layer("fp8_e4m3/tensor/static", Grid(torch.tensor(0.01)), "w=fp8_e4m3/channel")
    x = normal(5, 256)
    x[0, 0] = 100.0
    rounded = (x / torch.tensor(0.01)).clamp(-448, 448).to(torch.float8_e4m3fn).float() * torch.tensor(0.01)
    torch.testing.assert_close(mine(x), rounded @ mine.unpack().dequantize().T, rtol=1e-5, atol=1e-4)


def test_local_scales_are_those_of_compressed_tensors():
    """NVFP4: the outer scale is stored, and its reciprocal is the package's global scale."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True, dynamic="local",
        scale_dtype=torch.float8_e4m3fn, zp_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    x = normal(7, 256) * torch.logspace(-3, 1, 7)[:, None]
    outer = torch.tensor(float(x.abs().max()) / (448 * 6))
    total = (1 / outer).reshape(1)
    scale, zero = compute_dynamic_scales_and_zp(value=x, args=args, module=nn.Linear(1, 1), global_scale=total)
    wanted = fake_quantize(x, scale, zero, args, global_scale=total)
    mine = layer(f"{NVFP4}/local", Grid(outer), "w=int8/channel")
    y, w = mine(x), mine.unpack().dequantize()
    bound = 2.0**-20 * (wanted.double().abs() @ w.double().abs().T) + 1e-30
    assert bool(((y.double() - wanted.double() @ w.double().T).abs() <= bound).all())
    # The scales follow x; the outer one does not, and saturates.
    torch.testing.assert_close(mine(x / 8), layer(f"{NVFP4}/local", Grid(outer / 8))(x / 8), rtol=0.3, atol=0.05)
    assert (mine(x * 64) - x * 64 @ w.T).norm() > 0.3 * (x * 64 @ w.T).norm()
    assert mine(torch.zeros(0, 3, 256)).shape == (0, 3, 48)
    assert not bool(mine(torch.zeros(2, 256)).any())


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_and_type(kernel: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ARRONDI_KERNEL", kernel)
    weights = "w=int4/g128" if kernel == "torch-int4" else "w=int8/channel"
    if KERNELS[kernel].refuse(parse_scheme(weights).weights, (48, 256), torch.bfloat16, torch.device("cpu")):
        pytest.skip(f"{kernel} does not run here")
    mine = layer("int8/tensor/static", Grid(torch.tensor(0.03)), weights, torch.bfloat16)
    x = normal(3, 256, dtype=torch.bfloat16)
    values = affine(x, 0.03, 0, -128, 127)
    wanted = values @ mine.unpack().dequantize(torch.float64).T
    torch.testing.assert_close(mine(x).double(), wanted, rtol=2.0**-5, atol=2.0**-4)
    torch.testing.assert_close(mine(x.float()).double(), wanted, rtol=2.0**-5, atol=2.0**-4)


def test_the_grid_is_a_buffer_that_stays_as_it_is():
    mine = layer("uint8/tensor/asym/static", Grid(torch.tensor([[0.02]]), torch.tensor([[130]])))
    x = normal(3, 256)
    wanted = mine(x)
    for same in (
        copy.deepcopy(mine),
        pickle.loads(pickle.dumps(mine)),
        copy.deepcopy(mine).half().float().double().float(),
    ):
        assert (same.input_scale.dtype, same.input_zero_point.dtype) == (torch.float32, torch.int32)
        assert torch.equal(same.input_scale, torch.tensor([0.02])) and int(same.input_zero_point) == 130
        assert torch.equal(same(x), wanted)
    assert mine.state_dict() == {}
    mine.input_scale.mul_(2)  # noticed, as everything that changes in place
    torch.testing.assert_close(mine(x).double(), affine(x, 0.04, 130, 0, 255) @ mine.unpack().dequantize(torch.float64).T, rtol=1e-4, atol=1e-4)  # fmt: skip


def test_what_is_not_finite_spoils_its_own_row():
    if native is None:
        pytest.skip("arrondi was installed without its compiled kernels")
    mine, x = layer("int8/tensor/static", Grid(torch.tensor(0.02))), normal(4, 256)
    clean = mine(x)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    y = mine(x)
    assert not bool(torch.isfinite(y[1:3]).any())
    assert torch.equal(y[[0, 3]], clean[[0, 3]])


def test_a_static_layer_is_exported():
    mine, x = layer("int8/tensor/static", Grid(torch.tensor(0.02))), normal(3, 256)
    if mine.meta.inputs is None:
        pytest.skip("rounding in PyTorch refuses NaN, which a trace cannot ask for")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(mine, (x,))
    assert torch.equal(exported.module()(x), mine(x))


@pytest.mark.parametrize(
    ("text", "grid", "error", "words"),
    [
        ("int8/tensor/static", None, SchemeError, "need a stored scale"),
        ("int8/token", Grid(torch.tensor(1.0)), SchemeError, "Drop the grid"),
        ("int8/tensor/static", Grid(torch.tensor(1.0), torch.tensor(3)), SchemeError, "parts of int8/tensor, got input_scale, input_zero"),
        ("int8/tensor/asym/static", Grid(torch.tensor(1.0)), SchemeError, "must have the parts"),
        ("int8/tensor/asym/static", Grid(torch.tensor(1.0), torch.tensor(128)), DataError, "code of int8, -128 … 127, got 128"),
        ("int8/tensor/static", Grid(torch.tensor(0.0)), DataError, "positive, got 0.0"),
        ("int8/tensor/static", Grid(torch.tensor(-1.0)), DataError, "positive"),
        ("int8/tensor/static", Grid(torch.tensor(torch.nan)), DataError, "one finite number"),
        ("int8/tensor/static", Grid(torch.ones(2)), DataError, r"shape \(2,\)"),
        (f"{NVFP4}/local", None, SchemeError, "need a stored scale"),
        ("int8/channel/static", Grid(torch.ones(4, 1)), SchemeError, "one scale for a whole tensor"),
    ],
)  # fmt: skip
def test_grids_that_do_not_go_with_the_scheme(text: str, grid: Grid | None, error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        layer(text, grid)


def test_inputs_without_weights_in_mind_are_said_in_the_repr():
    assert "inputs=int8/tensor/static" in repr(layer("int8/tensor/static", Grid(torch.tensor(1.0))))
    assert isinstance(inputs("int8/token"), ActivationScheme)
