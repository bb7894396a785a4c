"""Which kernel is taken, and what a user is told when it cannot be."""

from __future__ import annotations

import pytest
import torch

from arrondi.errors import SchemeError
from arrondi.formats import parse_scheme
from arrondi.kernels import FORCE, KERNELS, choose, explain, native_linear, torch_ops

W4 = parse_scheme("W4A16").weights
W8 = parse_scheme("w=int8/channel").weights


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FORCE, raising=False)
    monkeypatch.setattr(torch_ops, "_vectorised", lambda: True)


def test_reference_is_last_and_refuses_no_matrix():
    assert list(KERNELS)[-1] == "reference"
    assert [name for name, kernel in KERNELS.items() if kernel.name != name] == []
    for text in ("W4A16", "NVFP4A16", "FP8_BLOCK", "T158", "w=uint3/g50/offset"):
        assert dict(explain(parse_scheme(text).weights, (10, 77), torch.float16))["reference"] is None


@pytest.mark.parametrize(
    ("scheme", "dtype", "name"),
    [
        (W4, torch.bfloat16, "torch-int4"),
        (W8, torch.bfloat16, "torch-int8"),
        (W4, torch.float32, "reference"),
        (W8, torch.float16, "reference"),
    ],
)
@pytest.mark.parametrize("compiled", [True, False])
def test_the_first_that_does_not_refuse(
    scheme, dtype: torch.dtype, name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(native_linear, "available", lambda: compiled)
    name = "native" if compiled else name
    assert choose(scheme, (64, 256), dtype).name == name
    reasons = explain(scheme, (64, 256), dtype)
    assert [n for n, _ in reasons] == list(KERNELS)
    assert next(n for n, reason in reasons if reason is None) == name


def test_a_weight_that_is_not_plain_goes_to_the_reference():
    assert choose(W4, (64, 256), torch.bfloat16, plain=False).name == "reference"
    reasons = dict(explain(W4, (64, 256), torch.bfloat16, plain=False))
    assert reasons["reference"] is None
    assert "contiguous groups" in (reasons["torch-int4"] or "")


def test_the_environment_names_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FORCE, "reference")
    assert choose(W4, (64, 256), torch.bfloat16).name == "reference"


def test_the_environment_names_one_that_cannot(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FORCE, "torch-int8")
    with pytest.raises(
        SchemeError,
        match=r"Kernel torch-int8 cannot run int4/g128 of shape \(64, 256\).*symmetric int8.*ARRONDI_KERNEL",
    ):
        choose(W4, (64, 256), torch.bfloat16)
    with pytest.raises(SchemeError, match="contiguous groups"):
        choose(W8, (64, 256), torch.bfloat16, plain=False)


def test_the_environment_names_none_of_ours(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FORCE, "torch-int5")
    with pytest.raises(SchemeError, match=r"ARRONDI_KERNEL.*Did you mean 'torch-int[48]'"):
        choose(W4, (64, 256), torch.bfloat16)


def test_nothing_can_multiply_by_three_axes():
    with pytest.raises(SchemeError, match=r"matrices \(out, in\)"):
        choose(W4, (2, 64, 256), torch.float32)
    with pytest.raises(SchemeError, match="floating"):
        choose(W4, (64, 256), torch.int32)
