"""Scattered groups sorted into contiguous ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from arrondi.formats import parse_scheme
from arrondi.kernels import contiguous_groups, decoded, pack_weight
from arrondi.tensor.nearest import quantize_tensor
from arrondi.tensor.qtensor import QTensor


def scattered(shape: tuple[int, int], scheme: str = "w=int4/g32/asym") -> QTensor:
    q = quantize_tensor(torch.randn(shape, generator=torch.Generator().manual_seed(0)), parse_scheme(scheme).weights)
    shuffle = torch.randperm(shape[1], generator=torch.Generator().manual_seed(1))
    return replace(q, codes=q.codes[:, shuffle], group_index=(shuffle // 32).int())


@pytest.mark.parametrize("columns", [128, 100])
def test_sorting_changes_no_product(columns: int):
    q = scattered((8, columns))
    found = contiguous_groups(q)
    assert found is not None
    plain, order = found
    assert plain.group_index is None
    assert torch.equal(plain.dequantize(), q.dequantize()[:, order])
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(2)).double()
    torch.testing.assert_close(x[:, order] @ plain.dequantize(torch.float64).T, x @ q.dequantize(torch.float64).T)


def test_groups_of_unequal_size_stay_scattered():
    q = scattered((8, 128))
    assert q.group_index is not None
    index = q.group_index.clone()
    index[(index == 0).nonzero()[0]] = 1
    assert contiguous_groups(replace(q, group_index=index)) is None


def test_the_twin_reads_scattered_groups():
    q = scattered((50, 100))
    packed = pack_weight(q)
    assert torch.equal(decoded(packed, q.scheme, (50, 100), torch.float32), q.dequantize())
