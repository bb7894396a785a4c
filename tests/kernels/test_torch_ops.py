"""What PyTorch's operators must not be asked to do."""

from __future__ import annotations

import pytest
import torch

from arrondi.formats import parse_scheme
from arrondi.kernels import KERNELS, Meta, torch_ops
from arrondi.tensor.nearest import quantize_tensor

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fast_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(torch_ops, "_vectorised", lambda: True)


REFUSED = [
    ("torch-int4", "W4A16", (64, 256), torch.float32, "bfloat16"),
    ("torch-int4", "W4A16", (64, 256), torch.float16, "bfloat16"),
    ("torch-int4", "w=int5/g128", (64, 256), torch.bfloat16, "at most 4 bits"),
    ("torch-int4", "NF4", (64, 256), torch.bfloat16, "integers"),
    ("torch-int4", "w=int4/g16", (64, 256), torch.bfloat16, "multiple of 32"),
    ("torch-int4", "W4A16", (64, 200), torch.bfloat16, "multiple of 32"),
    ("torch-int4", "w=int4/channel", (64, 40), torch.bfloat16, "multiple of 32"),
    ("torch-int4", "W4A16", (2**16, 2**15), torch.bfloat16, "too many"),
    ("torch-int4", "W4A16", (0, 128), torch.bfloat16, "not empty"),
    ("torch-int8", "w=int8/channel", (64, 200), torch.bfloat16, "16 columns"),
    ("torch-int8", "w=int8/channel", (64, 256), torch.float32, "bfloat16"),
    ("torch-int8", "w=int8/g128", (64, 256), torch.bfloat16, "whole row"),
    ("torch-int8", "w=int8/channel/asym", (64, 256), torch.bfloat16, "symmetric"),
    ("torch-int8", "w=uint8/channel", (64, 256), torch.bfloat16, "symmetric int8"),
    ("torch-int8", "w=int7/channel", (64, 256), torch.bfloat16, "symmetric int8"),
    ("torch-int8", "w=int8/channel", (2**16, 2**15), torch.bfloat16, "too many"),
]


def test_refuses_with_a_sentence():
    for kernel, scheme, shape, dtype, word in REFUSED:
        reason = KERNELS[kernel].refuse(parse_scheme(scheme).weights, shape, dtype, CPU)
        assert reason is not None, (kernel, scheme)
        assert word in reason
        assert reason.endswith(".")


@pytest.mark.parametrize(("kernel", "scheme"), [("torch-int4", "W4A16"), ("torch-int8", "w=int8/channel")])
def test_refuses_other_devices_and_machines(kernel: str, scheme: str, monkeypatch: pytest.MonkeyPatch):
    weights = parse_scheme(scheme).weights
    assert KERNELS[kernel].refuse(weights, (64, 256), torch.bfloat16, CPU) is None
    assert "cuda" in (KERNELS[kernel].refuse(weights, (64, 256), torch.bfloat16, torch.device("cuda", 0)) or "")
    monkeypatch.setattr(torch_ops, "_vectorised", lambda: False)
    assert "this machine" in (KERNELS[kernel].refuse(weights, (64, 256), torch.bfloat16, CPU) or "")


@pytest.mark.parametrize(("kernel", "scheme"), [("torch-int4", "W4A16_ASYM"), ("torch-int8", "w=int8/channel")])
def test_activations_anywhere_in_memory(kernel: str, scheme: str):
    """The 8-bit operator loads 32 aligned bytes at a time: an odd address used to end the process."""
    q = quantize_tensor(torch.randn(24, 128), parse_scheme(scheme).weights)
    packed, meta = KERNELS[kernel].prepack(q, torch.bfloat16), Meta(q.scheme, (24, 128), torch.bfloat16)
    x = torch.randn(3, 128).bfloat16()
    odd = torch.zeros(3 * 128 + 1, dtype=torch.bfloat16)[1:].view(3, 128)
    odd.copy_(x)
    assert odd.data_ptr() % 4 == 2
    assert torch.equal(KERNELS[kernel].linear(odd, packed, meta, None), KERNELS[kernel].linear(x, packed, meta, None))


@pytest.mark.parametrize(("kernel", "scheme"), [("torch-int4", "W4A16_ASYM"), ("torch-int8", "w=int8/channel")])
def test_many_tokens_are_split_below_the_offset_limit(kernel: str, scheme: str, monkeypatch: pytest.MonkeyPatch):
    q = quantize_tensor(torch.randn(24, 128), parse_scheme(scheme).weights)
    packed, meta = KERNELS[kernel].prepack(q, torch.bfloat16), Meta(q.scheme, (24, 128), torch.bfloat16)
    x, bias = torch.randn(11, 128).bfloat16(), torch.randn(24).bfloat16()
    whole = KERNELS[kernel].linear(x, packed, meta, bias)
    monkeypatch.setattr(torch_ops, "_OFFSET_LIMIT", 4 * 128)
    assert [len(part) for part in torch_ops._row_blocks(x, 24)] == [4, 4, 3]
    torch.testing.assert_close(KERNELS[kernel].linear(x, packed, meta, bias), whole)


def test_packing_some_rows_at_a_time_does_not_show(monkeypatch: pytest.MonkeyPatch):
    q = quantize_tensor(torch.randn(150, 256), parse_scheme("W4A16_ASYM").weights)
    whole = KERNELS["torch-int4"].prepack(q, torch.bfloat16)
    monkeypatch.setattr(torch_ops, "_PACKED_ROWS", 64)
    parts = KERNELS["torch-int4"].prepack(q, torch.bfloat16)
    assert whole.keys() == parts.keys() == {"codes", "grid", "rest", "kept_scale", "kept_zero_point"}
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("scheme", ["w=uint4/g128/asym/bfloat16", "w=int4/g128/asym", "w=uint4/g32/offset"])
def test_what_the_rounding_of_a_grid_loses_is_given_back(scheme: str):
    """Activations with a mean add up an error that a whole group shares; the reference, which rounds each weight, has none.

    Weights of mean 0 on a skewed grid: the sum over the group cancels in y but not in the error.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(64, 1024).exponential_(generator=generator) - 1
    q = quantize_tensor(weight, parse_scheme(scheme).weights)
    x = (torch.randn(8, 1024, generator=generator) + 3).bfloat16()
    exact = x.double() @ q.dequantize(torch.float64).T
    meta = Meta(q.scheme, (64, 1024), torch.bfloat16)

    def error(kernel: str, without: str = "") -> float:
        packed = KERNELS[kernel].prepack(q, torch.bfloat16)
        packed.pop(without, None)
        return float((KERNELS[kernel].linear(x, packed, meta, None).double() - exact).square().mean().sqrt())

    assert error("torch-int4") <= 1.2 * error("reference")
    assert error("torch-int4", without="rest") > 1.5 * error("torch-int4")


def test_a_symmetric_grid_needs_nothing_given_back():
    q = quantize_tensor(torch.randn(64, 256), parse_scheme("W4A16").weights)
    assert set(KERNELS["torch-int4"].prepack(q, torch.bfloat16)) == {"codes", "grid", "kept_scale"}
