"""Searched grids of super-blocks and small groups: errors of llama.cpp's own encoders as bounds, and what may be stored."""

from __future__ import annotations

import pytest
import torch

from arrondi.errors import DataError
from arrondi.formats import PRESETS, PerGroup, Scheme, parse_scheme
from arrondi.formats.ggml import GGML
from arrondi.native import native
from arrondi.rounding import gptq, imatrix, rtn
from arrondi.tensor.nearest import quantize_tensor, quantize_with
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges import superblocks
from arrondi.tensor.ranges.squares import Weighed, best_grids, best_grids_reference, laid, stepped
from arrondi.tensor.ranges.superblocks import is_superblock, superblock_parts
from arrondi.tensor.rows import pick_rows, rows_of, rowwise, stack_rows
from tests.rounding.test_gptq import make_layer

THEIRS = {
    "Q4_0": 0.00739, "Q4_1": 0.00612, "Q5_0": 0.00182, "Q5_1": 0.00143, "Q8_0": 2.9e-5, "Q2_K": 0.0880, "Q3_K": 0.0228, "Q4_K": 0.00509,
    "Q5_K": 0.00130, "Q6_K": 0.00031, "IQ4_NL": 0.00579, "IQ4_XS": 0.00588,
}  # fmt: skip
"""Squared error over squared weight of llama.cpp's encoders without importance, Gaussian weights."""
SUPER = [name for name in GGML if is_superblock(GGML[name])]


def gaussian(rows: int = 64, columns: int = 1024, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def error(x: torch.Tensor, q: QTensor, columns: torch.Tensor | float = 1.0) -> float:
    return float(((q.dequantize() - x).square() * columns).sum() / (x.square() * columns).sum())


def test_which_schemes_are_searched_how() -> None:
    assert SUPER == ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]
    assert [name for name in GGML if stepped(GGML[name])] == ["Q8_0", "IQ4_NL"]
    for text in ("NVFP4A16", "NF4_DQ", "W4A16", "MXFP4A16", "w=int4/g32/asym", "w=int4/g32/s:(fp8/g8)", "w=lut4/g32"):
        scheme = parse_scheme(text).weights
        assert not is_superblock(scheme) and not stepped(scheme), text


@pytest.mark.parametrize("name", THEIRS)
def test_no_error_is_above_that_of_llama_cpp(name: str) -> None:
    x = gaussian()
    assert error(x, rtn(x, GGML[name])) < THEIRS[name]
    if name in SUPER:
        assert torch.equal(quantize_tensor(x, name).dequantize(), rtn(x, GGML[name]).dequantize())


@pytest.mark.parametrize("name", THEIRS)
def test_importance_moves_the_error_to_where_it_matters_less(name: str) -> None:
    x = gaussian(32)
    columns = torch.exp(torch.randn(x.shape[1], generator=torch.Generator().manual_seed(1)))
    columns = (columns / columns.double().mean()).float()  # as `imatrix` does
    without, within = rtn(x, GGML[name]), imatrix(x, GGML[name], importance=columns, magnitude=False)
    bound = {"Q8_0": 1.0, "Q4_0": 0.92, "Q5_0": 0.92}.get(name, 0.9)
    assert error(x, within, columns) < bound * error(x, without, columns)
    if name in SUPER:
        scaled = quantize_with(x, GGML[name], superblock_parts(x, GGML[name], columns * 8))
        assert torch.equal(scaled.codes, within.codes), "only its proportions count"


@pytest.mark.parametrize("name", SUPER)
def test_what_is_stored_can_be_stored(name: str) -> None:
    x = gaussian(12, 512)
    x[0] = 0
    x[1] = 1e-7
    x[2, :300] = 0
    x[3] += 1  # nothing below zero
    x[4] -= 1
    x[5, 100] = 50
    scheme = GGML[name]
    q = rtn(x, scheme)
    for part in (q.scale, q.offset):
        if part is None:
            continue
        assert isinstance(part, QTensor) and isinstance(part.scale, torch.Tensor)
        assert torch.equal(part.scale.half().float(), part.scale) and bool((part.scale != 0).all())
        assert part.codes.shape == q.codes[:, :: 512 // part.codes.shape[1]].shape
    if name != "IQ4_XS":  # whose table has no zero
        assert bool((q.real_scale != 0).all()), "the finest grid has all that none has"
    assert q.real_offset is None or bool((q.real_offset <= 0).all())
    back = q.dequantize()
    assert bool((back[0] == 0).all()) and bool((back[2, :256] == 0).all())
    assert error(x[3:6], rows_of(q, 3, 3)) < 0.2
    with pytest.raises(DataError, match="overflows float16"):
        rtn(x * 1e9, scheme)
    with pytest.raises(DataError, match="NaN or infinity"):
        rtn(torch.where(x == 50, torch.nan, x), scheme)


@pytest.mark.parametrize("columns", [100, 272, 513])
def test_rows_that_end_within_a_super_block(columns: int) -> None:
    x = gaussian(5, columns)
    for name in ("Q2_K", "IQ4_XS"):
        q = quantize_tensor(x, PRESETS[name])
        assert q.shape == x.shape
        assert error(x, q) < 1.2 * THEIRS[name]


@pytest.mark.parametrize("name", ["IQ4_NL", "IQ4_XS"])
def test_zeros_of_a_table_without_zero(name: str) -> None:
    x = gaussian(2, 512)
    x[0, 32:64], x[1] = 0, 0
    back = rtn(x, GGML[name]).dequantize()
    assert float(back[0, 32:64].abs().max()) < 1e-7 and float(back[1].abs().max()) < 1e-7


@pytest.mark.skipif(native is None, reason="arrondi was installed without its compiled kernels")
@pytest.mark.parametrize("name", [*SUPER, "Q8_0", "IQ4_NL"])
def test_the_compiled_search_finds_what_its_reference_finds(name: str, path: str) -> None:
    scheme = GGML[name]
    assert isinstance(scheme.granularity, PerGroup)
    span = (
        scheme.scale.granularity.size
        if isinstance(scheme.scale, Scheme) and isinstance(scheme.scale.granularity, PerGroup)
        else 1
    )
    x = gaussian(33, 1000)
    x[:, ::7] *= 10
    x[3], x[4, :40], x[5], x[6] = 0, 0, x[5].abs(), -x[6].abs()
    for importance, magnitude, columns in ((False, 0.0, 1000), (True, 0.0, 768), (True, 0.5, 512), (False, 1.0, 1000)):
        weights = torch.rand(columns, generator=torch.Generator().manual_seed(1)) if importance else None
        for numbers in laid(x[:, :columns], weights, magnitude, scheme.granularity.size, span):
            if name in SUPER:
                found, wanted = superblocks.search(numbers, scheme), superblocks.search_reference(numbers, scheme)
            else:
                options = {"offset": False, "signed": scheme.signed_scales}
                found = best_grids(numbers, scheme.format, **options)
                wanted = best_grids_reference(Weighed.of(numbers), scheme.format, **options)
            for one, other in zip(found, wanted, strict=True):
                assert (one is None) == (other is None) and (one is None or other is None or torch.equal(one, other))


def test_rows_are_rounded_one_by_one() -> None:
    x = gaussian(6, 512)
    for name in SUPER:
        assert rowwise(GGML[name])
        whole, halves = rtn(x, GGML[name]), [rtn(part, GGML[name]) for part in x.split(3)]
        assert torch.equal(stack_rows(halves).dequantize(), whole.dequantize())
        other = quantize_tensor(x, GGML[name], rule="full")
        mixed = pick_rows(whole, other, torch.tensor([True, False] * 3)).dequantize()
        assert torch.equal(mixed[::2], whole.dequantize()[::2]) and torch.equal(mixed[1::2], other.dequantize()[1::2])
    assert not rowwise(parse_scheme("NVFP4A16").weights) and not rowwise(parse_scheme("NF4_DQ").weights)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "IQ4_XS"])
def test_gptq_rounds_into_the_grids(name: str) -> None:
    layer = make_layer(n=512, m=24)
    hessian = layer.moment.matrix(torch.float64)

    def loss(q: QTensor) -> float:
        d = (q.dequantize() - layer.weight).double()
        return float((d @ hessian * d).sum())

    plain = loss(rtn(layer.weight, GGML[name]))
    once = gptq(layer.weight, GGML[name], layer.moment)
    assert once.scheme == GGML[name] and loss(once) < 0.8 * plain
    assert loss(gptq(layer.weight, GGML[name], layer.moment, sweeps=3)) <= loss(once) * (1 + 1e-6)
