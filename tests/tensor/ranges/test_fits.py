"""How wide the grid is laid: every rule against its definition, against compressed-tensors and against gguf."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize as their_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from gguf.quants import MXFP4, Q4_0, Q8_0

from arrondi.errors import DataError, SchemeError
from arrondi.formats import FORMATS, Format, PerGroup, PerTensor, Scheme, codebook, integer
from arrondi.tensor.encoding import decode, encode
from arrondi.tensor.nearest import quantize_tensor, quantize_with
from arrondi.tensor.ranges.fits import FITS, fit
from arrondi.tensor.ranges.grid import SMALLEST, STORED, Grid, round_scale
from tests.cases import each_once

GROUP = PerGroup(32)
MX_FORMATS = ["fp4_e2m1", "fp6_e3m2", "fp6_e2m3", "fp8_e4m3", "fp8_e5m2", "int8", "int4"]


def gaussian(rows: int, columns: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def mx(name: str) -> Scheme:
    return Scheme(FORMATS[name], GROUP, scale="e8m0")


def reach(name: str) -> float:
    """Largest positive number of a format, before scaling."""
    format = FORMATS[name]
    return float(format.qmax) if format.kind == "integer" else format.largest


def every_magnitude() -> torch.Tensor:
    """(n, 2): tiles whose absmax runs through powers of two, their neighbours and what lies between, 2^-149 … 2^127."""
    powers = np.ldexp(1.0, np.arange(-149, 128)).astype(np.float32)
    some = np.concatenate([powers, np.nextafter(powers[1:], np.float32(0)), np.nextafter(powers, np.float32(np.inf))])
    # Where rounding by half a quantum of m mantissa bits carries: 2 - 2^-(m+1), and just below.
    carries = [2 - 2.0 ** -(m + 1) for m in range(8)]
    factors = [*carries, *(c - 2.0**-20 for c in carries), 1.25, 1.51, 1.76, 1.99]
    between = np.concatenate([powers[30:-3] * np.float32(f) for f in factors])
    top = torch.from_numpy(np.concatenate([some, between]))
    return torch.stack([-top, top / 3], dim=1)


# Symmetric scales of integers.


@pytest.mark.parametrize(
    ("rule", "name", "row", "scale"),
    [
        ("full", "int4", [1.0, -15.0], 2.0),
        ("full", "int8", [255.0, -1.0], 2.0),
        ("full", "uint4", [30.0, 1.0], 2.0),
        ("narrow", "int4", [1.0, -14.0], 2.0),
        ("narrow", "int2", [0.5, -3.0], 3.0),
        ("narrow", "uint8", [510.0, 3.0], 2.0),
        ("narrow", "fp4_e2m1", [1.0, -12.0], 2.0),
        ("narrow", "nf4", [1.0, -2.0], 2.0),
        ("narrow", "fp8_e4m3", [896.0, -1.0], 2.0),
        ("extreme", "int4", [1.0, -16.0], 2.0),
        ("extreme", "int4", [16.0, 1.0], -2.0),
        ("absmean", "ternary", [1.0, -3.0, 0.0, 4.0], 2.0),
        ("least-squares", "binary", [1.0, -3.0, 0.0, 4.0], 2.0),
        ("least-squares", "ternary", [3.0, -3.0, 0.1, 0.0], 3.0),
    ],
)
def test_scales_by_hand(rule: str, name: str, row: list[float], scale: float) -> None:
    grid = fit(torch.tensor([row]), Scheme(FORMATS[name]), rule)
    assert grid.scale.tolist() == [[scale]]
    assert grid.zero_point is None
    assert grid.offset is None


@pytest.mark.parametrize(
    ("name", "storage", "rule"),
    [
        ("int4", "float32", "full"),
        ("uint4", "float32", "narrow"),
        ("fp4_e2m1", "float32", "narrow"),
        ("nf4", "float32", "narrow"),
        ("ternary", "float32", "least-squares"),
        ("binary", "float32", "least-squares"),
        ("fp4_e2m1", "e8m0", "floor"),
    ],
)
def test_the_automatic_rule(name: str, storage: str, rule: str) -> None:
    scheme = Scheme(FORMATS[name], GROUP, scale=storage)
    tiles = gaussian(50)
    assert torch.equal(fit(tiles, scheme).scale, fit(tiles, scheme, rule).scale)


def test_the_automatic_rule_of_a_small_learned_codebook_is_its_range() -> None:
    # Two or three levels do not make a format binary or ternary: these are not at -1, 0, 1.
    tiles = gaussian(20).abs()
    for levels in ([0.0, 1.0], [-1.0, 0.0, 2.0], [0.5, 1.0, 2.0]):
        scheme = Scheme(codebook("learned", levels), GROUP)
        assert torch.equal(fit(tiles, scheme).scale, tiles.amax(dim=1, keepdim=True) / max(levels))


@pytest.mark.parametrize("rule", ["full", "narrow", "extreme"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_an_integer_grid_spans_the_data(rule: str, bits: int) -> None:
    tiles = gaussian(200, seed=bits)
    format = integer(bits)
    scale = fit(tiles, Scheme(format, GROUP), rule).scale
    steps = tiles / scale
    overshoot = {"full": 0.5, "narrow": 0.0, "extreme": 1.0}[rule]  # where the far end may lie, in steps past the codes
    assert float(steps.max()) <= (format.qmax + overshoot) * (1 + 1e-6)
    assert float(steps.min()) >= -(format.qmax + 0.5 if rule == "full" else -format.qmin) * (1 + 1e-6)
    if rule == "extreme":
        signed = tiles.gather(1, tiles.abs().argmax(dim=1, keepdim=True))
        torch.testing.assert_close(scale * format.qmin, signed)


def test_the_ternary_scale_has_the_least_squared_error_of_all() -> None:
    tiles = torch.cat([gaussian(40, 12), gaussian(40, 12, seed=1) ** 3])
    scale = fit(tiles, Scheme(FORMATS["ternary"]), "least-squares").scale
    ours = (tiles.double() - torch.round(tiles / scale).clamp(-1, 1).double() * scale.double()).square().sum(dim=1)
    best = torch.full((80,), torch.inf, dtype=torch.float64)
    magnitudes = tiles.abs().double()
    for chosen in itertools.product([False, True], repeat=12):  # all 4096 choices of the weights that are not zero
        mask = torch.tensor(chosen)
        if mask.any():
            mean = magnitudes[:, mask].mean(dim=1, keepdim=True)
            best = torch.minimum(best, (magnitudes - mask * mean).square().sum(dim=1))
    torch.testing.assert_close(ours, best, rtol=1e-6, atol=1e-12)


def test_the_binary_scale_has_the_least_squared_error() -> None:
    tiles = gaussian(50).double()
    scale = fit(tiles.float(), Scheme(FORMATS["binary"])).scale.double()

    def error(s: torch.Tensor) -> torch.Tensor:
        return (tiles - torch.sign(tiles) * s).square().sum(dim=1)

    for factor in (0.99, 1.01):
        assert bool((error(scale) < error(scale * factor)).all())


def test_shrink_narrows_the_range() -> None:
    tiles = gaussian(5)
    each = torch.tensor([1.0, 0.9, 0.5, 0.25, 0.125])[:, None]
    for scheme in (
        Scheme(integer(4)),
        Scheme(integer(4), zero_point="integer"),
        Scheme(integer(4), zero_point="float"),
        Scheme(FORMATS["nf4"]),
    ):
        whole = fit(tiles, scheme).scale
        torch.testing.assert_close(fit(tiles, scheme, shrink=0.5).scale, whole * 0.5)
        torch.testing.assert_close(fit(tiles, scheme, shrink=each).scale, whole * each)


# Asymmetric grids.


@pytest.mark.parametrize("name", ["int2", "int4", "uint4", "int8", "uint8"])
def test_an_integer_zero_point_is_a_code_and_means_exactly_zero(name: str) -> None:
    format = FORMATS[name]
    tiles = torch.cat([gaussian(100), gaussian(50).abs() + 3, -gaussian(50).abs() - 3, torch.zeros(1, 32)])
    grid = fit(tiles, Scheme(format, GROUP, "integer"))
    assert grid.zero_point is not None
    assert grid.zero_point.dtype == torch.int32
    assert int(grid.zero_point.min()) >= format.qmin
    assert int(grid.zero_point.max()) <= format.qmax
    low, high = tiles.amin(1, keepdim=True).clamp(max=0), tiles.amax(1, keepdim=True).clamp(min=0)
    ends = ((format.qmin - grid.zero_point) * grid.scale, (format.qmax - grid.zero_point) * grid.scale)
    half = 0.5001 * grid.scale
    assert bool((ends[0] <= low + half).all())
    assert bool((ends[1] >= high - half).all())
    assert bool((grid.scale[:-1] <= (high - low)[:-1] / (format.levels - 1) * (1 + 1e-6)).all()), "no wider than needed"


def test_a_float_zero_point_puts_the_end_codes_on_the_ends_of_the_data() -> None:
    tiles = torch.cat([gaussian(100), gaussian(50) + 100, gaussian(50) - 7])
    for format in (integer(4), integer(4, signed=False), integer(2), integer(8)):
        grid = fit(tiles, Scheme(format, GROUP, "float"))
        assert grid.offset is not None
        step = grid.scale
        torch.testing.assert_close(format.qmin * step + grid.offset, tiles.amin(1, keepdim=True), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(format.qmax * step + grid.offset, tiles.amax(1, keepdim=True), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-45, 0.001, -3.7, 1e30, 3e38, -3e38])
@pytest.mark.parametrize("name", ["int4", "uint4"])
def test_a_tile_of_equal_numbers_is_exact_with_a_float_zero_point(value: float, name: str) -> None:
    tiles = torch.full((2, 32), value)
    grid = fit(tiles, Scheme(FORMATS[name], GROUP, "float"))
    assert grid.offset is not None
    codes = encode((tiles - grid.offset) / grid.scale, FORMATS[name])
    assert torch.equal(decode(codes, FORMATS[name]) * grid.scale + grid.offset, tiles)


# Scales rounded to what is stored.


@pytest.mark.parametrize("storage", STORED)
def test_scales_are_rounded_as_stored(storage: str) -> None:
    scale = gaussian(100).abs() * 0.01 + 0.001
    stored = round_scale(scale, storage)
    assert stored.dtype == torch.float32
    assert torch.equal(stored, scale.to(STORED[storage]).float())
    assert torch.equal(round_scale(stored, storage), stored)


@pytest.mark.parametrize("storage", STORED)
def test_a_stored_scale_is_never_zero_and_may_be_subnormal(storage: str) -> None:
    least = SMALLEST[storage]
    scale = torch.tensor([0.0, 1e-45, -1e-45, 1.4 * least, -3 * least], dtype=torch.float64).float()
    assert round_scale(scale, storage).tolist() == [1.0, least, -least, least, -3 * least]


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_every_number_near_the_smallest_is_rounded_to_the_nearest_that_there_is(storage: str) -> None:
    """Against exact arithmetic: subnormal numbers are the multiples of the smallest one."""
    least, count = SMALLEST[storage], 1200
    wanted = [max(round(Fraction(k, 7)), 1) * least for k in range(1, count)]
    values = torch.tensor([k / 7 * least for k in range(1, count)], dtype=torch.float64)
    assert round_scale(values.float(), storage).tolist() == wanted
    x = torch.stack((values, -values), dim=1).float() * 127.5  # one group each, of which the scale is the value
    q = quantize_tensor(x, Scheme(integer(8), PerGroup(2), scale=storage))
    assert q.real_scale.flatten().tolist() == wanted


def test_zero_scales_that_are_quantized_in_turn_do_not_widen_the_range_of_their_peers() -> None:
    inner = Scheme(FORMATS["fp8_e4m3"], PerTensor())
    assert 0 < float(round_scale(torch.tensor([0.0, 0.5]), inner)[0]) < 1e-37
    x = gaussian(4, 64) * 1e-8
    x[2] = 0.0
    nvfp4 = Scheme(FORMATS["fp4_e2m1"], PerGroup(16), scale=inner)
    q = quantize_tensor(x, nvfp4)
    assert float((q.dequantize() - x).norm() / x.norm()) < 0.12  # 0.095 is NVFP4's on Gaussians
    assert torch.equal(q.dequantize()[2], torch.zeros(64))


@pytest.mark.parametrize(("storage", "value"), [("float16", 1e6), ("bfloat16", 3.4e38)])
def test_a_scale_too_large_for_its_storage_is_refused(storage: str, value: float) -> None:
    with pytest.raises(DataError, match=rf"overflows {storage}. Store scales as"):
        round_scale(torch.tensor([1.0, value]), storage)


# Power-of-two scales.


@pytest.mark.parametrize(("name", "rule"), each_once(MX_FORMATS, ["floor", "ceil", "even", "best"]))
def test_exponent_scales_are_powers_of_two_that_e8m0_can_store(name: str, rule: str) -> None:
    scale = fit(every_magnitude(), mx(name), rule).scale
    codes = encode(scale, FORMATS["e8m0"])
    assert torch.equal(decode(codes, FORMATS["e8m0"]), scale)


@pytest.mark.parametrize("name", MX_FORMATS)
def test_floor_is_the_rule_of_the_specification(name: str) -> None:
    # OCP MX 1.0, 6.3: the exponent is floor(log2(absmax)) - emax, emax the exponent of the largest element.
    tiles = every_magnitude()
    emax = {"fp4_e2m1": 2, "fp6_e3m2": 4, "fp6_e2m3": 2, "fp8_e4m3": 8, "fp8_e5m2": 15, "int8": 6, "int4": 2}[name]
    wanted = [math.ldexp(1.0, max(math.frexp(a)[1] - 1 - emax, -127)) for a in tiles.abs().amax(1).tolist()]
    assert fit(tiles, mx(name), "floor").scale.flatten().tolist() == wanted


@pytest.mark.parametrize("name", MX_FORMATS)
def test_ceil_is_the_smallest_power_that_clips_nothing(name: str) -> None:
    tiles = every_magnitude()
    scale = fit(tiles, mx(name), "ceil").scale.double()
    top = tiles.double().abs().amax(1, keepdim=True)
    assert bool((top <= scale * reach(name) * (1 + 2**-23)).all())
    assert bool(((top > scale / 2 * reach(name)) | (scale == 2.0**-127)).all())


@pytest.mark.parametrize(
    ("name", "mantissa"),
    [("fp4_e2m1", 1), ("fp6_e2m3", 3), ("fp6_e3m2", 2), ("fp8_e4m3", 3), ("fp8_e5m2", 2), ("int8", 6)],
)
def test_even_rounds_the_absmax_by_half_a_quantum_of_the_element(name: str, mantissa: int) -> None:
    tiles = every_magnitude()
    tiles = tiles[tiles.abs().amax(1) >= 2.0**-100]
    emax = math.frexp(reach(name))[1] - 1
    wanted = []
    for a in tiles.abs().amax(1).tolist():
        rounded = a + math.ldexp(0.5, math.frexp(a)[1] - 1 - mantissa)
        wanted.append(math.ldexp(1.0, min(math.frexp(rounded)[1] - 1 - emax, 127)))
    assert fit(tiles, mx(name), "even").scale.flatten().tolist() == wanted


@pytest.mark.parametrize(("name", "bits"), [("fp4_e2m1", 4), ("fp6_e2m3", 6)])
def test_even_is_the_rule_of_compressed_tensors(name: str, bits: int) -> None:
    tiles = every_magnitude()
    tiles = tiles[tiles.abs().amax(1) >= 2.0**-120]
    theirs = generate_mx_scales(tiles.abs().amax(1), bits)
    ours = encode(fit(tiles, mx(name), "even").scale, FORMATS["e8m0"]).flatten()
    assert torch.equal(ours.float(), theirs)


@pytest.mark.parametrize("name", MX_FORMATS)
def test_best_has_the_least_error_of_three_neighbours(name: str) -> None:
    tiles = torch.cat([gaussian(300), gaussian(300, seed=1) ** 3])

    def error(scale: torch.Tensor) -> torch.Tensor:
        format = FORMATS[name]
        return (decode(encode(tiles / scale, format), format) * scale - tiles).square().sum(1)

    best = error(fit(tiles, mx(name), "best").scale)
    floor = fit(tiles, mx(name), "floor").scale
    assert torch.equal(best, torch.minimum(torch.minimum(error(floor / 2), error(floor)), error(floor * 2)))


@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "best"])
def test_shrinking_a_power_of_two_scale_gives_another_power_of_two(rule: str) -> None:
    tiles = gaussian(200)
    for shrink in (0.4, 0.77, 0.98, 2.0, torch.linspace(0.3, 1.5, 200)[:, None]):
        scale = fit(tiles, mx("fp4_e2m1"), rule, shrink).scale
        assert bool((torch.frexp(scale).mantissa == 0.5).all())
        assert torch.equal(scale, fit(tiles * shrink, mx("fp4_e2m1"), rule).scale)


def test_mxfp4_blocks_are_those_of_gguf() -> None:
    x = gaussian(500)
    blocks = MXFP4.quantize_blocks(x.numpy())
    q = quantize_tensor(x, mx("fp4_e2m1"), rule="floor")
    np.testing.assert_array_equal(encode(q.scale, FORMATS["e8m0"]).flatten().numpy(), blocks[:, 0])
    np.testing.assert_array_equal(q.dequantize().numpy(), MXFP4.dequantize_blocks(blocks))


# Peers for integer scales.


def test_int4_symmetric_is_that_of_compressed_tensors() -> None:
    x = gaussian(64, 128)
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    groups = x.unflatten(-1, (-1, 32))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    q = quantize_tensor(x, Scheme(integer(4), GROUP))
    assert torch.equal(q.real_scale, scale)
    assert torch.equal(q.codes, their_quantize(x, scale, zero, args, dtype=torch.int8))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_integers_are_those_of_compressed_tensors(bits: int) -> None:
    x = gaussian(64, 128) + torch.linspace(-2, 2, 64)[:, None]
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=False, strategy="group", group_size=32)
    groups = x.unflatten(-1, (-1, 32))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    scheme = Scheme(integer(bits), GROUP, "integer")
    q = quantize_tensor(x, scheme)
    assert q.zero_point is not None
    torch.testing.assert_close(q.real_scale, scale, rtol=2**-22, atol=0)
    assert torch.equal(q.zero_point, zero.int())
    ours = quantize_with(x, scheme, Grid(scale, zero.int())).codes
    assert torch.equal(ours, their_quantize(x, scale, zero, args, dtype=torch.int8))


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp4_e2m1"])
def test_float_scales_are_those_of_compressed_tensors(name: str) -> None:
    x = gaussian(64, 128)
    args = QuantizationArgs(num_bits=FORMATS[name].bits, type="float", symmetric=True, strategy="channel")
    scale, zero = calculate_qparams(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), args)
    q = quantize_tensor(x, Scheme(FORMATS[name]))
    assert torch.equal(q.real_scale, scale)
    theirs = their_quantize(x, scale, zero, args).float()
    assert torch.equal(decode(q.codes, FORMATS[name]), theirs)


def test_the_signed_extreme_rule_is_q4_0_of_gguf() -> None:
    x = gaussian(500)
    blocks = Q4_0.quantize_blocks(x.numpy())
    q = quantize_tensor(x, Scheme(integer(4), GROUP), rule="extreme")
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(int) - 8
    # gguf multiplies by 1/d and rounds halves up; Gaussian numbers hit no tie.
    np.testing.assert_array_equal(q.codes.numpy(), codes)
    np.testing.assert_array_equal(q.real_scale.half().numpy().view(np.uint8), blocks[:, :2])


def test_the_narrow_rule_is_q8_0_of_gguf() -> None:
    x = gaussian(500)
    blocks = Q8_0.quantize_blocks(x.numpy())
    q = quantize_tensor(x, Scheme(integer(8), GROUP), rule="narrow")
    np.testing.assert_array_equal(q.codes.numpy(), blocks[:, 2:].view(np.int8))
    np.testing.assert_array_equal(q.real_scale.half().numpy().view(np.uint8), blocks[:, :2])


# What is refused.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("zero", ["none", "integer", "float"])
def test_nan_and_infinity_are_refused(bad: float, zero: str) -> None:
    tiles = gaussian(3)
    tiles[1, 5] = bad
    with pytest.raises(DataError, match="NaN or infinity"):
        fit(tiles, Scheme(integer(4), GROUP, zero))


@pytest.mark.parametrize("rule", FITS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_every_rule_refuses_nan_and_infinity(rule: str, bad: float) -> None:
    tiles = gaussian(3)
    tiles[1, 5] = bad
    powers = rule in ("floor", "ceil", "even", "best")
    scheme = mx("fp4_e2m1") if powers else Scheme(FORMATS["ternary"], GROUP)
    with pytest.raises(DataError, match="NaN or infinity"):
        fit(tiles, scheme, rule)


@pytest.mark.parametrize(
    ("scheme", "rule", "words"),
    [
        (Scheme(integer(4)), "ful", "Unknown fit 'ful'. Did you mean 'full'"),
        (Scheme(integer(4)), "floor", "does not go with float32 scales"),
        (mx("fp4_e2m1"), "narrow", "does not go with e8m0 scales"),
        (Scheme(integer(4), zero_point="integer"), "narrow", "is for symmetric schemes"),
        (Scheme(integer(4), zero_point="float"), "best", "is for symmetric schemes"),
        (Scheme(FORMATS["nf4"]), "extreme", "needs an integer format"),
        (Scheme(integer(4), signed=False), "extreme", "gives negative scales"),
        (Scheme(integer(4), scale=Scheme(FORMATS["fp8_e4m3"])), "extreme", "gives negative scales"),
        (Scheme(integer(4)), "least-squares", "is for ternary and binary"),
    ],
)
def test_rules_that_do_not_fit_the_scheme(scheme: Scheme, rule: str, words: str) -> None:
    with pytest.raises(SchemeError) as caught:
        fit(gaussian(2), scheme, rule)
    assert words in str(caught.value)


def test_rules_have_no_favourite_device_or_default_dtype() -> None:
    tiles = gaussian(4)
    wanted: dict[Format, torch.Tensor] = {FORMATS[name]: fit(tiles, mx(name)).scale for name in MX_FORMATS}
    torch.set_default_dtype(torch.bfloat16)
    try:
        for format, scale in wanted.items():
            assert torch.equal(fit(tiles, mx(format.name)).scale, scale)
    finally:
        torch.set_default_dtype(torch.float32)
