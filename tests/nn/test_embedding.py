"""Rows looked up in a packed table are the rows of the dequantized one."""

from __future__ import annotations

import pytest
import torch

from arrondi.errors import DataError, ShapeError
from arrondi.formats import parse_scheme
from arrondi.nn import QEmbedding
from arrondi.tensor.nearest import quantize_tensor
from tests.kernels.common import assert_same


@pytest.mark.parametrize(
    "text", ["W4A16", "W3A16_ASYM", "W8A16", "NF4", "T158", "w=uint4/g32/offset", "w=int4/tensor", "Q4_K", "Q6_K"]
)
def test_rows_are_those_of_the_dequantized_table(text: str):
    for dtype in (torch.float32, torch.bfloat16):
        q = quantize_tensor(torch.randn(50, 96), parse_scheme(text).weights)
        table = QEmbedding(q, dtype=dtype)
        for ids in (
            torch.tensor(7),
            torch.tensor([[3, 49], [0, 3]]),
            torch.zeros(0, dtype=torch.int64),
            torch.arange(50),
        ):
            assert torch.equal(table(ids), q.dequantize(dtype)[ids])
        assert torch.equal(table.half()(torch.tensor([1])), q.dequantize(dtype)[[1]])
        assert_same(table.unpack(), q)


def test_mistakes_are_named():
    table = QEmbedding(quantize_tensor(torch.randn(50, 96), parse_scheme("W4A16").weights))
    with pytest.raises(DataError, match=r"0 … 49, got 3 … 50 in shape \(2,\)"):
        table(torch.tensor([3, 50]))
    with pytest.raises(DataError, match=r"integers, got torch\.float32"):
        table(torch.ones(2))
    with pytest.raises(ShapeError, match="matrix"):
        QEmbedding(quantize_tensor(torch.randn(2, 4, 32), parse_scheme("W4A16").weights))
    for shared in ("w=int4/b32x32", "NVFP4A16"):
        with pytest.raises(ShapeError, match="scales of their own"):
            QEmbedding(quantize_tensor(torch.randn(64, 64), parse_scheme(shared).weights))
