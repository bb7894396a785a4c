"""Parts as they are stored: every code and every storage type there and back, against NumPy's own arithmetic."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from arrondi.formats import FORMATS
from arrondi.tensor.encoding import code_dtype
from arrondi.tensor.storage import load_scale, signed, store_scale, unsigned


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_is_counted_from_the_smallest(name: str) -> None:
    format = FORMATS[name]
    codes = torch.arange(format.qmin, format.qmax + 1).to(code_dtype(format))
    counted = unsigned(codes, format)
    assert counted.dtype == torch.uint8
    assert counted.tolist() == list(range(format.levels))
    assert torch.equal(signed(counted, format), codes)


def test_powers_of_two_are_kept_as_their_exponent() -> None:
    stored = torch.arange(255, dtype=torch.uint8)
    values = load_scale(stored)
    theirs = stored.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(values.numpy(), theirs)
    assert torch.equal(store_scale(values, "e8m0"), stored)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16"])
def test_scales_that_were_rounded_survive(storage: str) -> None:
    dtype = getattr(torch, storage)
    scale = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    stored = store_scale(scale, storage)
    assert stored.dtype == dtype
    assert torch.equal(load_scale(stored), scale)
