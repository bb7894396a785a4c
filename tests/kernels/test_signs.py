"""Products of signs behind a layer: the reference's numbers, exactly where scales allow, and chosen only where inputs are signs."""

from __future__ import annotations

import pytest
import torch

from arrondi import DataError, parse_scheme, quantize_tensor
from arrondi.kernels import FORCE, KERNELS, choose, explain
from arrondi.native import available
from arrondi.nn import QLinear
from arrondi.tensor.ranges.grid import Grid

SCHEME = parse_scheme("w=binary/channel,a=binary/tensor/static")
pytestmark = pytest.mark.skipif(not available(), reason="needs the compiled kernels")


@pytest.mark.parametrize("shape", [(1, 1), (17, 31), (40, 32), (130, 257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_it_is_the_reference(
    shape: tuple[int, int], dtype: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, grid = quantize_tensor(torch.randn(shape), SCHEME), Grid(torch.tensor([[scale]]))
    bias = torch.randn(shape[0])
    layer = QLinear(q, bias, inputs=SCHEME.inputs, input_grid=grid, dtype=dtype)
    assert layer.kernel == "signs"
    assert torch.equal(layer.unpack().codes, q.codes) and torch.equal(layer.unpack().real_scale, q.real_scale)
    monkeypatch.setenv(FORCE, "reference")
    slow = QLinear(q, bias, inputs=SCHEME.inputs, input_grid=grid, dtype=torch.float32)
    x = torch.randn(2, 3, shape[1]).to(dtype)
    x[0, 0] = 0  # a sign as well
    torch.testing.assert_close(
        layer(x).float(),
        slow(x.float()),
        rtol=1e-5 if dtype == torch.float32 else 0.02,
        atol=1e-4 if dtype == torch.float32 else 0.05,
    )
    x[1, 1, 0] = torch.nan
    for one in (layer, slow):
        with pytest.raises(DataError, match="NaN"):
            one(x)


def test_it_is_chosen_for_signs_alone() -> None:
    weights = SCHEME.weights
    assert choose(weights, (8, 64), torch.float32).name == "native"
    assert choose(weights, (8, 64), torch.float32, inputs=SCHEME.inputs).name == "signs"
    assert choose(weights, (8, 64), torch.float32, inputs=parse_scheme("W8A8").inputs).name == "native"
    assert choose(parse_scheme("BINARY").weights, (8, 256), torch.float32, inputs=SCHEME.inputs).name == "native"
    assert "signs of inputs" in (dict(explain(weights, (8, 64), torch.float32))["signs"] or "")
    assert "plain scales" in (
        KERNELS["signs"].refuse(
            parse_scheme("w=binary/channel/e8m0").weights, (8, 64), torch.float32, torch.device("cpu")
        )
        or ""
    )
