"""Every kernel that does not refuse against a float64 product with the dequantized weight."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from arrondi.formats import FORMATS, PerChannel, PerGroup, PerTensor, Scheme, codebook, parse_scheme, tile_shape
from arrondi.kernels import KERNELS, Meta, decoded, decoded_rows, pack_weight, unpack_weight
from arrondi.native import native
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.tiling import from_tiles
from tests.kernels.common import assert_same, normal, rounded

SCHEMES = {
    name: parse_scheme(name).weights
    for name in (
        "W4A16", "W4A16_ASYM", "W3A16_ASYM", "W2A16", "W6A16", "W8A16", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "NF4",
        "T158", "BINARY", "w=int4/channel/bfloat16", "w=int4/tensor", "w=uint4/g32/offset/float16", "w=int4/b32x64",
        "w=int4/g512",
        "w=uint4/g64/asym", "w=int8/channel", "w=int8/tensor/bfloat16", "w=int8/channel/asym", "w=fp6_e3m2/g32/e8m0",
        "w=lut4/channel", "w=lut4/g32/t:float16", "w=lut3/g64/offset/t:int8:16", "w=lut2/g16/t:int8:all",
        "w=lut3/channel/t:float32:all", "w=lut2/tensor/t:bfloat16:5", "w=lut5/channel",
        "Q2_K", "Q3_K", "Q4_K", "Q5_1", "Q6_K", "IQ4_NL", "IQ4_XS",
    )
}  # fmt: skip
SCHEMES["int4-per-input"] = Scheme(FORMATS["int4"], PerChannel(axis=1))
SCHEMES["uint4-symmetric"] = Scheme(FORMATS["uint4"], PerGroup(32))
SCHEMES["nf4-double"] = Scheme(FORMATS["nf4"], PerGroup(64), scale=Scheme(FORMATS["int8"], PerGroup(4)))
SCHEMES["learned-6-levels"] = Scheme(codebook("six", (-2.0, -1.1, -0.3, 0.4, 1.0, 2.5)), PerTensor())

SHAPES = [(16, 256), (48, 320), (50, 200), (33, 1040), (100, 96), (1, 32), (64, 512)]
TOKENS = (1, 2, 5, 64, 513)
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
CPU = torch.device("cpu")


def accepted(kernel: str, name: str) -> list[tuple[tuple[int, int], torch.dtype]]:
    """The shapes and types in which a kernel takes a scheme."""
    found = itertools.product(SHAPES, ROUNDOFF)
    return [(s, d) for s, d in found if KERNELS[kernel].refuse(SCHEMES[name], s, d, CPU) is None]


PAIRS = [(kernel, name) for kernel in KERNELS for name in SCHEMES if accepted(kernel, name)]


def few(kernel: str, name: str) -> list[tuple[tuple[int, int], torch.dtype]]:
    """Every type once and every shape with some scheme, another one for each."""
    cases, turn = accepted(kernel, name), list(SCHEMES).index(name)
    types = list(dict.fromkeys(d for _, d in cases))
    chosen = []
    for i, dtype in enumerate(types):
        shapes = [s for s, d in cases if d == dtype]
        chosen.append((shapes[(turn + i) % len(shapes)], dtype))
    return chosen


def wide_weight(shape: tuple[int, int], scheme: Scheme) -> QTensor:
    return rounded(normal(*shape) * 0.1 + 0.03, scheme)


def step_of(q: QTensor) -> torch.Tensor:
    """The absolute scale of every element, (out, in) float64."""
    tile = tile_shape(q.scheme.granularity, q.shape)
    count = q.real_scale.numel()
    columns = 1
    for t in tile:
        columns *= t
    return from_tiles(q.real_scale.reshape(-1, 1).expand(count, columns), tile, q.shape).abs().double()


def parts_of(q: QTensor) -> torch.Tensor:
    """Sizes of what a weight is the sum of, float64: an offset may cancel most of it."""
    if q.offset is None:
        return q.dequantize(torch.float64).abs()
    height, width = tile_shape(q.scheme.granularity, q.shape)
    real = q.offset.dequantize() if isinstance(q.offset, QTensor) else q.offset
    offset = real.repeat_interleave(height, 0).repeat_interleave(width, 1)[: q.shape[0], : q.shape[1]].double()
    return (q.dequantize(torch.float64) - offset).abs() + offset.abs()


def check_product(kernel: str, name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """A product with the float64 weight."""
    q = wide_weight(shape, SCHEMES[name])
    exact_weight = q.dequantize(torch.float64)
    bias = normal(shape[0], seed=1).to(dtype)
    packed, meta = KERNELS[kernel].prepack(q, dtype), Meta(q.scheme, shape, dtype)
    u = ROUNDOFF[dtype]
    reach = parts_of(q)  # what the rounding of weights or scales is relative to
    if kernel == "torch-int4":
        reach = (8 if q.scheme.zero_point == "none" else 16) * step_of(q)
    for tokens in TOKENS:
        x = (normal(tokens, shape[1], seed=tokens) + 0.5).to(dtype)
        y = KERNELS[kernel].linear(x, packed, meta, bias)
        assert y.dtype == dtype
        assert y.shape == (tokens, shape[0])
        exact = x.double() @ exact_weight.T + bias.double()
        error = (y.double() - exact).abs()
        magnitude = x.double().abs() @ reach.T + bias.double().abs()
        # The compiled kernels add up spans of 64 columns, then these; PyTorch may add one column after another. Each
        # addition loses half a unit of the sum so far, and decoding a few.
        count = 64 + shape[1] / 64 if kernel == "native" else shape[1]
        if dtype == torch.float32:
            bound = (count + 16) * u * magnitude
        else:
            bound = u * (3 * (exact.abs() + bias.double().abs()) + magnitude) + shape[1] * 2.0**-24 * magnitude
        assert bool((error <= bound).all()), (shape, dtype, tokens)


def check_read_back(kernel: str, name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Multiplying by unit vectors shows each weight by itself: a wrong code or group would be off by a whole step."""
    q = wide_weight(shape, SCHEMES[name])
    packed, unit = KERNELS[kernel].prepack(q, dtype), torch.eye(shape[1], dtype=dtype)
    read = KERNELS[kernel].linear(unit, packed, Meta(q.scheme, shape, dtype), None).T.double()
    exact, step = q.dequantize(torch.float64), step_of(q)
    u = ROUNDOFF[dtype]
    if dtype == torch.float32:  # the compiled kernel counts x in steps of its largest / 8355700: a rounding or two
        u = 2 * u if kernel == "native" else 0.0
    wide = 16 * step if q.scheme.zero_point != "none" else 8 * step  # what the scale's rounding multiplies
    apart = kernel == "torch-int4" or (kernel == "native" and q.offset is not None)  # two numbers that may cancel
    slack = u * (2 * exact.abs() + (wide if apart else exact.abs())) + 2.0**-14 * u * step
    tiny = 2.0**-24 if dtype == torch.float16 else 0.0  # half a float16 denormal
    assert bool(((read - exact).abs() <= slack + tiny).all()), (shape, dtype)


def check_unpack(kernel: str, name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """What a kernel packed comes back to the bit."""
    q = wide_weight(shape, SCHEMES[name])
    assert_same(KERNELS[kernel].unpack(KERNELS[kernel].prepack(q, dtype), Meta(q.scheme, shape, dtype)), q)


@pytest.mark.parametrize(("kernel", "name"), PAIRS)
def test_every_scheme(kernel: str, name: str):
    for i, (shape, dtype) in enumerate(few(kernel, name)):
        check_product(kernel, name, shape, dtype)
        check_unpack(kernel, name, shape, dtype)
        if i == 0 or kernel == "native":
            check_read_back(kernel, name, shape, dtype)


@pytest.mark.full
@pytest.mark.parametrize("check", [check_product, check_read_back, check_unpack])
@pytest.mark.parametrize(("kernel", "name"), PAIRS)
def test_every_scheme_in_every_shape_and_type(kernel: str, name: str, check: Callable[..., None]):
    for shape, dtype in accepted(kernel, name):
        check(kernel, name, shape, dtype)


def test_the_operators_are_tested_here():
    """The cases above are those that a kernel accepts: where it can work at all there must be some."""
    from arrondi.kernels.torch_ops import _vectorised

    names = {kernel for kernel, _ in PAIRS}
    for kernel in names & {"native", "reference"}:
        assert {shape for k, n in PAIRS if k == kernel for shape, _ in few(kernel, n)} == set(SHAPES)
    cpu = {"native": native is not None, "torch-int4": _vectorised(), "torch-int8": _vectorised(), "reference": True}
    there = cpu | {"triton": False, "signs": False, "trellis": False}  # they have tests of their own
    assert names == {name for name in KERNELS if there[name]}


def test_packing_is_lossless_in_any_chunks():
    for name in SCHEMES:
        for shape in ((50, 200), (7, 33), (130, 64), (1, 1)):
            q = wide_weight(shape, SCHEMES[name])
            packed = pack_weight(q)
            assert_same(unpack_weight(packed, q.scheme, shape), q)
            whole = q.dequantize()
            assert torch.equal(decoded(packed, q.scheme, shape, torch.bfloat16), whole.bfloat16())
            own = q.scheme.table  # rows that share a table stay together too
            heights = (tile_shape(q.scheme.granularity, shape)[0], 1 if own is None else own.rows)
            block = max((h for h in heights if h < shape[0]), default=1)
            for chunk in (1, 3 * shape[1], 10**6):
                rows = list(decoded_rows(packed, q.scheme, shape, torch.float32, chunk))
                assert torch.equal(torch.cat([values for _, values in rows]), whole)
                assert [r for part, _ in rows for r in range(shape[0])[part]] == list(range(shape[0]))
                limit = max(chunk, shape[1]) if block in (1, shape[0]) else max(chunk, shape[1]) + block * shape[1]
                assert max(values.numel() for _, values in rows) <= limit


def test_nothing_larger_is_kept_alive():
    """Tensors cut out of a larger one, as the pieces of fused weights are, must not hold on to it."""
    whole = wide_weight((64, 256), SCHEMES["W4A16_ASYM"])
    assert whole.zero_point is not None
    q = replace(whole, codes=whole.codes[:8], scale=whole.real_scale[:8], zero_point=whole.zero_point[:8])
    for kernel, dtype in (("reference", torch.float32), ("torch-int4", torch.bfloat16), ("native", torch.float32)):
        if KERNELS[kernel].refuse(q.scheme, q.shape, dtype, CPU):
            continue
        for name, tensor in KERNELS[kernel].prepack(q, dtype).items():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), (kernel, name)


def test_the_reference_keeps_what_a_file_would():
    for name, scheme in SCHEMES.items():
        q = wide_weight((48, 320), scheme)
        # A zero point takes a byte.
        spare = 0 if q.zero_point is None else (8 - scheme.format.bits) * q.zero_point.numel()
        assert sum(t.numel() * t.element_size() for t in pack_weight(q).values()) * 8 == q.stored_bits + spare, name


def by_hand() -> dict[str, QTensor]:
    """Weights that no rounding makes: parts that do not fit their storage, codes that are no numbers, scales that the scheme
    would have rounded in turn."""
    bfloat, asym, fp8 = (
        wide_weight((50, 256), SCHEMES[n]) for n in ("w=int4/channel/bfloat16", "W4A16_ASYM", "FP8_BLOCK")
    )
    nested = wide_weight((50, 256), SCHEMES["NVFP4A16"])
    assert asym.zero_point is not None and isinstance(nested.scale, QTensor)
    odd = replace(nested.scale, codes=nested.scale.codes.clone())
    odd.codes[3, 2], odd.codes[4, 0] = 0, 0x7F  # a scale of zero, and one that is NaN
    spoiled = fp8.codes.clone()
    spoiled[5, 9] = 0x7F
    tiny = wide_weight((50, 256), SCHEMES["NF4"])
    level = replace(wide_weight((50, 256), parse_scheme("w=fp4_e2m1/g32").weights))
    lut = wide_weight((50, 256), SCHEMES["w=lut4/channel"])
    blocks, both = (wide_weight((50, 256), SCHEMES[n]) for n in ("Q6_K", "Q2_K"))
    assert lut.table is not None and isinstance(blocks.scale, QTensor) and isinstance(both.offset, QTensor)
    return {
        "scale beyond bfloat16": replace(bfloat, scale=bfloat.real_scale * 1.001),
        "plain scale of a nested scheme": replace(nested, scale=nested.real_scale * 1.001),
        "zero points beyond a byte": replace(asym, zero_point=asym.zero_point + 1000),
        "zero and NaN among quantized scales": replace(nested, scale=odd),
        "NaN among codes": replace(fp8, codes=spoiled),
        "negative scales": replace(tiny, scale=-tiny.real_scale),
        "subnormal scales": replace(level, scale=torch.full_like(level.real_scale, 1.4e-45)),
        "entries of tables that are no steps": replace(lut, table=lut.table * 0.999),
        "subnormal scales of tables": replace(lut, scale=torch.full_like(lut.real_scale, 1.4e-45)),
        "plain scale of a super-block": replace(blocks, scale=blocks.real_scale * 1.001),
        "plain offset of a super-block": replace(both, offset=both.offset.dequantize() * 1.001),
        "a unit of NaN": replace(blocks, scale=replace(blocks.scale, scale=blocks.scale.scale * torch.nan)),
        "a scale of NaN": replace(tiny, scale=tiny.real_scale * torch.tensor(torch.nan)),
    }


@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_made_by_hand_come_back(kernel: str):
    for dtype, (name, q) in itertools.product((torch.float32, torch.bfloat16), by_hand().items()):
        if KERNELS[kernel].refuse(q.scheme, q.shape, dtype, CPU) is None:
            tensors, meta = KERNELS[kernel].prepack(q, dtype), Meta(q.scheme, (50, 256), dtype)
            assert_same(KERNELS[kernel].unpack(tensors, meta), q)
            if kernel == "reference":
                read = decoded(tensors, q.scheme, (50, 256), torch.float32)
                torch.testing.assert_close(read, q.dequantize(), rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_tokens_and_many_axes(kernel: str):
    scheme = SCHEMES["w=int8/channel" if kernel == "torch-int8" else "W4A16"]
    dtype = torch.float32 if kernel == "reference" else torch.bfloat16
    if reason := KERNELS[kernel].refuse(scheme, (20, 128), dtype, CPU):
        pytest.skip(f"{kernel}: {reason}")
    q = wide_weight((20, 128), scheme)
    packed, meta = KERNELS[kernel].prepack(q, dtype), Meta(scheme, (20, 128), dtype)
    assert KERNELS[kernel].linear(torch.empty(0, 3, 128, dtype=dtype), packed, meta, None).shape == (0, 3, 20)
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    flat = KERNELS[kernel].linear(x.reshape(6, 128), packed, meta, None)
    torch.testing.assert_close(KERNELS[kernel].linear(x, packed, meta, None), flat.reshape(2, 3, 20))
    turned = KERNELS[kernel].linear(x.transpose(0, 1), packed, meta, None)  # not contiguous
    torch.testing.assert_close(turned, flat.reshape(2, 3, 20).transpose(0, 1))
