"""What the tests of kernels and modules share: weights, numbers, and a few cases out of a product of axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from arrondi.formats import FORMATS, ActivationScheme, LayerScheme, Scheme, parse_scheme
from arrondi.kernels import Meta
from arrondi.kernels import native_linear as module
from arrondi.native import native
from arrondi.tensor.nearest import quantize_tensor
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import Grid
from arrondi.tensor.tables import round_table
from tests.cases import pairwise as pairwise

PATHS = [] if native is None else [name for name, missing in native.paths() if missing is None]
"""Paths of the compiled kernels that run here."""


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight(scheme: str | Scheme | LayerScheme, shape: Sequence[int], seed: int = 0) -> QTensor:
    """Numbers of mean 0.01 and deviation 0.05, rounded."""
    return rounded(normal(*shape, seed=seed) * 0.05 + 0.01, scheme)


def rounded(x: torch.Tensor, scheme: str | Scheme | LayerScheme) -> QTensor:
    """x on its grid; where values are learned, codes of NF4 that mean the entries of random tables, no two alike."""
    scheme = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    scheme = scheme.weights if isinstance(scheme, LayerScheme) else scheme
    if scheme.table is None:
        return quantize_tensor(x, scheme)
    q, levels = quantize_tensor(x, replace(scheme, format=FORMATS["nf4"], table=None)), scheme.format.levels
    values = round_table(normal(scheme.table.count(x.shape[0]), levels, seed=7).clamp(-1, 1), scheme.table)
    return replace(q, codes=q.codes % levels, scheme=scheme, table=values.sort(dim=1).values)


def inputs(text: str) -> ActivationScheme:
    found = parse_scheme(f"w=int8,a={text}").inputs
    assert found is not None
    return found


def packed(
    q: QTensor, dtype: torch.dtype = torch.float32, rounding: ActivationScheme | None = None, grid: Grid | None = None
) -> tuple[dict[str, torch.Tensor], Meta]:
    """The tensors and facts of a compiled weight, with a static grid of its inputs."""
    tensors = module.prepack(q, dtype)
    if grid is not None:
        tensors["input_scale"] = grid.scale.reshape(1)
        if grid.zero_point is not None:
            tensors["input_zero_point"] = grid.zero_point.reshape(1).int()
    return tensors, Meta(q.scheme, (q.shape[0], q.shape[1]), dtype, rounding)


def assert_same(found: QTensor, wanted: QTensor) -> None:
    """Codes, scales, zero points, offsets, tables and scheme to the bit; nested scales too."""
    assert found.scheme == wanted.scheme
    for name in ("codes", "scale", "zero_point", "offset", "group_index", "table"):
        a, b = getattr(found, name), getattr(wanted, name)
        if isinstance(b, QTensor):
            assert_same(a, b)
        elif b is None:
            assert a is None, name
        else:
            assert a.dtype == b.dtype and a.shape == b.shape, name
            assert torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0)), name
