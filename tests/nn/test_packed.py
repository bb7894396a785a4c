"""What code finds that asks a packed layer for its weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from arrondi.errors import SchemeError
from arrondi.nn import PackedWeight, QEmbedding, QLinear
from arrondi.tensor.nearest import quantize_tensor
from tests.kernels.common import normal

Q = quantize_tensor(normal(6, 16), "w=int8/channel")


def holders() -> list[nn.Module]:
    return [QLinear(Q), QEmbedding(Q)]


@pytest.mark.parametrize("layer", holders(), ids=["linear", "embedding"])
def test_facts(layer: nn.Module):
    weight = layer.weight
    assert isinstance(weight, PackedWeight)
    assert (weight.shape, weight.dtype, weight.device) == ((6, 16), torch.float32, torch.device("cpu"))
    assert (weight.ndim, weight.dim(), weight.size(), weight.size(1), weight.numel()) == (2, 2, (6, 16), 16, 96)
    assert not weight.requires_grad


def test_everything_else_is_one_sentence():
    for name in ("div_", "data", "T", "t", "grad", "float", "to", "copy_", "untyped_storage"):
        for name in ("div_", "data", "T", "t", "grad", "float", "to", "copy_", "untyped_storage"):
            weight = QLinear(Q).weight
            with pytest.raises(
                SchemeError,
                match=rf"'{name}' of a weight that is packed \(int8/channel of shape \(6, 16\)\).*unquantized",
            ):
                getattr(weight, name)
            assert not hasattr(weight, name)


def test_nothing_is_written_to_a_copy_in_silence():
    weight = QLinear(Q).weight
    for write in (
        lambda: torch.zero_(weight),
        lambda: nn.init.zeros_(weight),
        lambda: torch.neg(normal(6, 16), out=weight),
    ):
        with pytest.raises(SchemeError, match="packed"):
            write()


def test_a_copy_of_the_facts_is_none_of_the_weight():
    assert copy.copy(QLinear(Q).weight).shape == (6, 16)
