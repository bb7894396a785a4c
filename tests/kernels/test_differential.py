"""Every kernel that does not refuse against a float64 product with the dequantized weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from arrondi.formats import FORMATS, PerChannel, PerGroup, PerTensor, Scheme, codebook, parse_scheme, tile_shape
from arrondi.kernels import KERNELS, Meta, decoded, decoded_rows, pack_weight
from arrondi.native import native
from arrondi.tensor.qtensor import QTensor, quantize_tensor
from arrondi.tensor.tiling import from_tiles

SCHEMES = {
    name: parse_scheme(name).weights
    for name in (
        "W4A16", "W4A16_ASYM", "W3A16_ASYM", "W2A16", "W6A16", "W8A16", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "NF4",
        "T158", "BINARY", "w=int4/channel/bfloat16", "w=int4/tensor", "w=uint4/g32/offset/float16", "w=int4/b32x64",
        "w=int4/g512",
        "w=uint4/g64/asym", "w=int8/channel", "w=int8/tensor/bfloat16", "w=int8/channel/asym", "w=fp6_e3m2/g32/e8m0",
    )
}  # fmt: skip
SCHEMES["int4-per-input"] = Scheme(FORMATS["int4"], PerChannel(axis=1))
SCHEMES["uint4-symmetric"] = Scheme(FORMATS["uint4"], PerGroup(32))
SCHEMES["nf4-double"] = Scheme(FORMATS["nf4"], PerGroup(64), scale=Scheme(FORMATS["int8"], PerGroup(4)))
SCHEMES["learned-6-levels"] = Scheme(codebook("six", (-2.0, -1.1, -0.3, 0.4, 1.0, 2.5)), PerTensor())

SHAPES = [(16, 256), (48, 320), (50, 200), (33, 1040), (100, 96), (1, 32), (64, 512)]
TOKENS = (1, 2, 5, 64, 513)
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

CASES = [
    pytest.param(kernel, name, shape, dtype, id=f"{kernel}-{name}-{shape[0]}x{shape[1]}-{str(dtype)[6:]}")
    for kernel in KERNELS
    for name in SCHEMES
    for shape in SHAPES
    for dtype in ROUNDOFF
    if KERNELS[kernel].refuse(SCHEMES[name], shape, dtype, torch.device("cpu")) is None
]


def weight(shape: tuple[int, int], scheme: Scheme, seed: int = 0) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    return quantize_tensor(torch.randn(shape, generator=generator) * 0.1 + 0.03, scheme)


def step_of(q: QTensor) -> torch.Tensor:
    """The absolute scale of every element, (out, in) float64."""
    tile = tile_shape(q.scheme.granularity, q.shape)
    count = q.real_scale.numel()
    columns = 1
    for t in tile:
        columns *= t
    return from_tiles(q.real_scale.reshape(-1, 1).expand(count, columns), tile, q.shape).abs().double()


@pytest.mark.parametrize(("kernel", "name", "shape", "dtype"), CASES)
def test_product_is_within_the_stated_error(kernel: str, name: str, shape: tuple[int, int], dtype: torch.dtype):
    q = weight(shape, SCHEMES[name])
    exact_weight = q.dequantize(torch.float64)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    packed = KERNELS[kernel].prepack(q, dtype)
    meta = Meta(q.scheme, shape, dtype)
    u = ROUNDOFF[dtype]
    reach = exact_weight.abs()  # what the rounding of weights or scales is relative to
    if kernel == "torch-int4":
        reach = (8 if q.scheme.zero_point == "none" else 16) * step_of(q)
    for tokens in TOKENS:
        x = (torch.randn(tokens, shape[1], generator=generator) + 0.5).to(dtype)
        y = KERNELS[kernel].linear(x, packed, meta, bias)
        assert y.dtype == dtype
        assert y.shape == (tokens, shape[0])
        exact = x.double() @ exact_weight.T + bias.double()
        error = (y.double() - exact).abs()
        magnitude = x.double().abs() @ reach.T + bias.double().abs()
        if dtype == torch.float32:
            plain = torch.nn.functional.linear(x, q.dequantize(), bias)
            allowed = 2 * ((plain.double() - exact).abs() / magnitude).max() + 2 * u
            assert (error / magnitude).max() <= allowed, tokens
        else:
            accumulation = shape[1] * 2.0**-24 * magnitude
            assert bool((error <= u * (3 * (exact.abs() + bias.double().abs()) + magnitude) + accumulation).all()), (
                tokens
            )


@pytest.mark.parametrize(("kernel", "name", "shape", "dtype"), CASES)
def test_every_weight_is_read_back(kernel: str, name: str, shape: tuple[int, int], dtype: torch.dtype):
    """Multiplying by unit vectors shows each weight by itself: a wrong code or group would be off by a whole step."""
    q = weight(shape, SCHEMES[name])
    packed = KERNELS[kernel].prepack(q, dtype)
    read = (
        KERNELS[kernel].linear(torch.eye(shape[1], dtype=dtype), packed, Meta(q.scheme, shape, dtype), None).T.double()
    )
    exact, step = q.dequantize(torch.float64), step_of(q)
    u = ROUNDOFF[dtype]
    if dtype == torch.float32:  # the compiled kernel counts x in steps of its largest / 8355700: a rounding or two
        u = 2 * u if kernel == "native" else 0.0
    wide = 16 * step if q.scheme.zero_point != "none" else 8 * step  # what the scale's rounding multiplies
    apart = kernel == "torch-int4" or (kernel == "native" and q.offset is not None)  # two numbers that may cancel
    slack = u * (2 * exact.abs() + (wide if apart else exact.abs())) + 2.0**-14 * u * step
    tiny = 2.0**-24 if dtype == torch.float16 else 0.0  # half a float16 denormal
    assert bool(((read - exact).abs() <= slack + tiny).all())


def test_the_operators_are_tested_here():
    """The cases above are those that a kernel accepts: where it can work at all there must be some."""
    from arrondi.kernels.torch_ops import _vectorised

    names = {case.values[0] for case in CASES}
    there = {"native": native is not None, "torch-int4": _vectorised(), "torch-int8": _vectorised(), "reference": True}
    assert names == {name for name in KERNELS if there[name]}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(50, 200), (7, 33), (130, 64), (1, 1)], ids=str)
def test_packing_is_lossless_in_any_chunks(name: str, shape: tuple[int, int]):
    q = weight(shape, SCHEMES[name])
    packed = pack_weight(q)
    whole = q.dequantize()
    assert torch.equal(decoded(packed, q.scheme, shape, torch.float32), whole)
    assert torch.equal(decoded(packed, q.scheme, shape, torch.bfloat16), whole.bfloat16())
    block = tile_shape(q.scheme.granularity, shape)[0]
    for chunk in (1, 3 * shape[1], 10**6):
        rows = list(decoded_rows(packed, q.scheme, shape, torch.float32, chunk))
        assert torch.equal(torch.cat([values for _, values in rows]), whole)
        assert [r for part, _ in rows for r in range(shape[0])[part]] == list(range(shape[0]))
        limit = max(chunk, shape[1]) if block in (1, shape[0]) else max(chunk, shape[1]) + block * shape[1]
        assert max(values.numel() for _, values in rows) <= limit


def test_nothing_larger_is_kept_alive():
    """Tensors cut out of a larger one, as the pieces of fused weights are, must not hold on to it."""
    whole = weight((64, 256), SCHEMES["W4A16_ASYM"])
    assert whole.zero_point is not None
    q = replace(whole, codes=whole.codes[:8], scale=whole.real_scale[:8], zero_point=whole.zero_point[:8])
    for kernel, dtype in (("reference", torch.float32), ("torch-int4", torch.bfloat16)):
        for name, tensor in KERNELS[kernel].prepack(q, dtype).items():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), (kernel, name)


@pytest.mark.parametrize("name", [n for n, s in SCHEMES.items() if s.zero_point == "none"])
def test_the_twin_keeps_what_a_file_would(name: str):
    q = weight((48, 320), SCHEMES[name])
    assert sum(t.numel() * t.element_size() for t in pack_weight(q).values()) * 8 == q.stored_bits


@pytest.mark.parametrize("name", [n for n, s in SCHEMES.items() if s.zero_point == "integer"])
def test_zero_points_take_a_byte_each(name: str):
    q = weight((48, 320), SCHEMES[name])
    assert q.zero_point is not None
    spare = (8 - q.scheme.format.bits) * q.zero_point.numel()
    assert sum(t.numel() * t.element_size() for t in pack_weight(q).values()) * 8 == q.stored_bits + spare


def test_scales_that_do_not_fit_their_storage_type_are_kept_whole():
    q = weight((16, 256), SCHEMES["w=int4/channel/bfloat16"])
    odd = replace(q, scale=q.real_scale * 1.001)
    assert torch.equal(decoded(pack_weight(odd), odd.scheme, odd.shape, torch.float32), odd.dequantize())
    plain = QTensor(
        q.codes, q.real_scale, None, None, replace(q.scheme, scale=Scheme(FORMATS["fp8_e4m3"], PerTensor()))
    )
    assert torch.equal(decoded(pack_weight(plain), plain.scheme, plain.shape, torch.float32), q.dequantize())


def test_zero_points_beyond_a_byte_survive():
    q = weight((16, 256), SCHEMES["W4A16_ASYM"])
    assert q.zero_point is not None
    far = replace(q, zero_point=q.zero_point + 1000)
    assert torch.equal(decoded(pack_weight(far), far.scheme, far.shape, torch.float32), far.dequantize())


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_tokens_and_many_axes(kernel: str):
    scheme = SCHEMES["w=int8/channel" if kernel == "torch-int8" else "W4A16"]
    dtype = torch.float32 if kernel == "reference" else torch.bfloat16
    q = weight((20, 128), scheme)
    packed, meta = KERNELS[kernel].prepack(q, dtype), Meta(scheme, (20, 128), dtype)
    assert KERNELS[kernel].linear(torch.empty(0, 3, 128, dtype=dtype), packed, meta, None).shape == (0, 3, 20)
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    flat = KERNELS[kernel].linear(x.reshape(6, 128), packed, meta, None)
    torch.testing.assert_close(KERNELS[kernel].linear(x, packed, meta, None), flat.reshape(2, 3, 20))
    turned = KERNELS[kernel].linear(x.transpose(0, 1), packed, meta, None)  # not contiguous
    torch.testing.assert_close(turned, flat.reshape(2, 3, 20).transpose(0, 1))
