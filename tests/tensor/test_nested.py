"""Scales and offsets that are quantized in turn, negative scales, offsets of codebooks: decoded by gguf and by the formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.quants import Q4_K, Q6_K

from arrondi.calibration import SecondMoment
from arrondi.errors import SchemeError
from arrondi.formats import FORMATS, PerGroup, Scheme, parse_scheme
from arrondi.rounding import gptq, hqq, rtn
from arrondi.tensor.nearest import quantize_tensor, store_grid
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.fits import fit
from arrondi.tensor.tiling import to_tiles

Q4 = parse_scheme("w=uint4/g32/offset/s:(uint6/g8/float16)/o:(uint6/g8/float16)").weights
Q6 = parse_scheme("w=int6/g16/s:(int8/g16/float16)/signed").weights
PLAIN4, PLAIN6 = parse_scheme("w=uint4/g32/offset").weights, parse_scheme("w=int6/g16").weights


def weight(rows: int = 6, columns: int = 512, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05 + 0.01


def error(x: torch.Tensor, q: QTensor) -> float:
    return float((q.dequantize() - x).square().sum() / x.square().sum())


def halves(q: object) -> np.ndarray:
    """The outer scales as float16, (blocks, 2) bytes."""
    assert isinstance(q, QTensor)
    outer = q.real_scale.reshape(-1, 1).numpy()
    assert np.array_equal(outer.astype(np.float16).astype(np.float32), outer), "stored exactly"
    return outer.astype(np.float16).view(np.uint8)


def as_q4_k(q: QTensor) -> np.ndarray:
    """The bytes of GGUF's Q4_K: d, dmin, eight 6-bit scales and minima in 12 bytes, 4-bit codes in pairs 32 apart."""
    assert isinstance(q.scale, QTensor) and isinstance(q.offset, QTensor)
    scales = q.scale.codes.reshape(-1, 8).numpy()
    minima = q.offset.codes.reshape(-1, 8).numpy()
    packed = np.zeros((len(scales), 12), np.uint8)
    packed[:, 0:4] = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    packed[:, 4:8] = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    packed[:, 8:12] = (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4
    codes = q.codes.reshape(-1, 4, 2, 32).numpy()
    pairs = (codes[:, :, 0] | codes[:, :, 1] << 4).reshape(len(scales), 128)
    dmin = halves(q.offset).copy()
    dmin[:, 1] ^= 0x80  # GGUF subtracts the minimum
    return np.concatenate([halves(q.scale), dmin, packed, pairs], axis=1)


def as_q6_k(q: QTensor) -> np.ndarray:
    """The bytes of GGUF's Q6_K: low halves, high pairs, sixteen int8 scales, d."""
    assert isinstance(q.scale, QTensor)
    codes = (q.codes.reshape(-1, 2, 4, 32).numpy() + 32).astype(np.uint8)
    low = np.stack([codes[:, :, i] & 15 | (codes[:, :, i + 2] & 15) << 4 for i in (0, 1)], axis=2).reshape(-1, 128)
    high = sum((codes[:, :, i] >> 4) << 2 * i for i in range(4)).reshape(-1, 64)
    return np.concatenate([low, high, q.scale.codes.reshape(-1, 16).numpy().view(np.uint8), halves(q.scale)], axis=1)


def test_a_scheme_with_quantized_offsets_is_ggufs_q4_k() -> None:
    for x in (weight(), weight() - 0.03, weight().abs()):
        q = quantize_tensor(x, Q4)
        theirs = Q4_K.dequantize_blocks(as_q4_k(q)).reshape(x.shape)
        assert np.allclose(theirs, q.dequantize().numpy(), rtol=1e-5, atol=1e-7)
        assert q.bits_per_weight == 4.5
        assert error(x, q) < 1.3 * error(x, quantize_tensor(x.clamp(max=10), PLAIN4))
        assert q.real_offset is not None and bool((q.real_offset <= 0).all())


def test_a_scheme_with_signed_scales_is_ggufs_q6_k() -> None:
    x = weight()
    for q in (quantize_tensor(x, Q6), rtn(x, Q6, range="search")):
        theirs = Q6_K.dequantize_blocks(as_q6_k(q)).reshape(x.shape)
        assert np.allclose(theirs, q.dequantize().numpy(), rtol=1e-5, atol=1e-7)
        assert q.bits_per_weight == 6.5625
        assert error(x, q) < 1.05 * error(x, quantize_tensor(x, PLAIN6))
    assert bool((q.real_scale < 0).any()), "the search used the sign"
    assert bool((quantize_tensor(x, Q6, rule="extreme").real_scale < 0).any())


def test_scales_that_may_not_be_negative_are_not() -> None:
    unsigned = parse_scheme("w=int4/g16/unsigned").weights
    x = weight()
    assert bool((rtn(x, parse_scheme("w=int4/g16").weights, range="search").real_scale < 0).any())
    assert bool((rtn(x, unsigned, range="search").real_scale > 0).all())
    assert bool((rtn(x, parse_scheme("w=int4/g16/s:(fp8/tensor)").weights, range="search").real_scale > 0).all())
    with pytest.raises(SchemeError, match="gives negative scales"):
        quantize_tensor(x, unsigned, rule="extreme")


@pytest.mark.parametrize("signed", [False, True])
def test_no_stored_scale_is_zero(signed: bool) -> None:
    x = torch.zeros(2, 256)
    x[0, 0], x[0, 16], x[0, 33] = 1.0, -1e-6, 1e-6
    scheme = Scheme(FORMATS["int6"], PerGroup(16), scale=Scheme(FORMATS["int8"], PerGroup(16)), signed=signed)
    q = quantize_tensor(x, scheme, rule="extreme" if signed else "auto")
    assert bool((q.real_scale != 0).all())
    assert torch.equal(q.dequantize()[1], x[1])
    assert abs(float(q.dequantize()[0, 0]) - 1) < 0.02
    if signed:
        assert float(q.real_scale[0, 0]) < 0 < float(q.real_scale[0, 1]), "the sign is that of the scale before"


@pytest.mark.parametrize("text", ["nf4/g32/offset", "fp4/g32/offset", "binary/g32/offset", "ternary/g32/offset", "dynamic8/g32/offset/float16/o:float16"])  # fmt: skip
def test_offsets_of_codebooks(text: str) -> None:
    scheme, x = parse_scheme(f"w={text}").weights, weight() + 0.2
    q = quantize_tensor(x, scheme)
    assert q.offset is not None and isinstance(q.offset, torch.Tensor) and isinstance(q.scale, torch.Tensor)
    if scheme.format.values is not None:
        table = torch.tensor(scheme.format.values)[q.codes.long()]
    else:
        table = q.codes.float()
    scale, offset = (p.repeat_interleave(32, dim=1) for p in (q.scale, q.offset))
    assert torch.allclose(q.dequantize(), scale * table + offset)
    known = sorted({v for v in scheme.format.values or (-1.0, 0.0, 1.0) if np.isfinite(v)})
    levels = scale.unsqueeze(-1) * torch.tensor(known) + offset.unsqueeze(-1)
    best = (levels - x.unsqueeze(-1)).abs().amin(-1)
    assert torch.allclose((q.dequantize() - x).abs(), best, atol=1e-6), "the nearest level, found by trying all"
    span = x.reshape(6, -1, 32)
    assert torch.allclose(levels.amin(-1).reshape(span.shape)[..., 0], span.amin(-1), atol=2e-4)
    assert torch.allclose(levels.amax(-1).reshape(span.shape)[..., 0], span.amax(-1), atol=2e-4)
    constant = torch.full((1, 32), 0.7)
    assert torch.allclose(quantize_tensor(constant, scheme).dequantize(), constant, rtol=1e-3)


def test_offsets_are_rounded_to_their_storage() -> None:
    for storage in ("float16", "bfloat16"):
        q = quantize_tensor(weight(), parse_scheme(f"w=uint4/g32/offset/o:{storage}").weights)
        assert isinstance(q.offset, torch.Tensor)
        assert torch.equal(q.offset.to(getattr(torch, storage)).float(), q.offset)
        assert q.bits_per_weight == 4 + (32 + 16) / 32
    exact = quantize_tensor(weight(), PLAIN4)
    assert error(weight(), q) < 1.02 * error(weight(), exact)


@pytest.mark.parametrize("order", ["static", "dynamic", "none"])
@pytest.mark.parametrize("scheme", [Q4, Q6], ids=["q4_k", "q6_k"])
def test_gptq_keeps_scales_and_offsets_as_the_scheme_stores_them(scheme: Scheme, order: str) -> None:
    x = weight()
    moment = SecondMoment(512)
    moment.update(torch.randn(600, 512, generator=torch.Generator().manual_seed(3)) @ torch.randn(512, 512) * 0.1)
    q = gptq(x, scheme, moment, order=order, range="absmax")
    assert isinstance(q.scale, QTensor) and isinstance(q.offset, QTensor) == (scheme is Q4)
    if order != "dynamic":
        grid = fit(to_tiles(x, (1, scheme.granularity.size)), scheme)
        parts = store_grid(grid, scheme, (6, 512))
        assert torch.equal(parts.grid.scale, q.real_scale), (
            "the unrounded weight's grid: all scales of a block are needed at once"
        )
    difference = (q.dequantize() - x).double()
    blind = (quantize_tensor(x, scheme).dequantize() - x).double()
    hessian = moment.matrix(torch.float64)
    assert float((difference @ hessian * difference).sum()) < 0.8 * float((blind @ hessian * blind).sum())


def test_hqq_says_that_it_moves_plain_scales_only() -> None:
    for scheme in (Q4, Q6):
        with pytest.raises(SchemeError, match="plain scales"):
            hqq(weight(), scheme)
