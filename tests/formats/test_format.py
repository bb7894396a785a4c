"""Every code of every named format against somebody else's table: ml_dtypes, PyTorch, SciPy, bitsandbytes."""

from __future__ import annotations

import copy
import math
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch
from gguf.quants import IQ4_NL
from scipy.stats import norm

from arrondi.errors import SchemeError
from arrondi.formats import FORMATS, Format, codebook, get_format, integer

ML_DTYPES = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
    "e8m0": ml_dtypes.float8_e8m0fnu,
}


def values(format: Format) -> np.ndarray:
    """The value of every code, ascending codes."""
    return np.array([format.value(code) for code in range(format.qmin, format.qmax + 1)])


def same_floats(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Equal as numbers, NaN where NaN, and the sign of every zero."""
    return np.array_equal(ours, theirs, equal_nan=True) and np.array_equal(
        np.signbit(ours)[~np.isnan(ours)], np.signbit(theirs)[~np.isnan(theirs)]
    )


@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_float_code_means_what_ml_dtypes_says(name: str) -> None:
    format = FORMATS[name]
    patterns = np.arange(2**format.bits, dtype=np.uint8)
    assert same_floats(values(format), patterns.view(ML_DTYPES[name]).astype(np.float64))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2), ("e8m0", torch.float8_e8m0fnu)],
)
def test_every_8_bit_float_code_means_what_torch_says(name: str, dtype: torch.dtype) -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(dtype).float().double().numpy()
    assert same_floats(values(FORMATS[name]), theirs)


@pytest.mark.parametrize(
    ("name", "largest", "least_normal", "least_subnormal"),
    [
        ("fp8_e4m3", 448.0, 2**-6, 2**-9),
        ("fp8_e5m2", 57344.0, 2**-14, 2**-16),
        ("fp6_e3m2", 28.0, 2**-2, 2**-4),
        ("fp6_e2m3", 7.5, 1.0, 2**-3),
        ("fp4_e2m1", 6.0, 1.0, 0.5),
    ],
)
def test_the_specified_limits_of_small_floats(
    name: str, largest: float, least_normal: float, least_subnormal: float
) -> None:
    # OCP 8-bit Floating Point 1.0 and Microscaling 1.0, element format tables.
    format = FORMATS[name]
    assert format.largest == largest
    positive = sorted(v for v in format.values or () if 0 < v < math.inf)
    assert positive[0] == least_subnormal
    assert least_normal in positive
    steps = np.diff([0.0, *positive])
    assert np.all(steps[: positive.index(least_normal) + 1] == least_subnormal), "subnormals are evenly spaced"


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_integer_formats_hold_every_number_of_their_bits(bits: int, signed: bool) -> None:
    format = integer(bits, signed=signed)
    assert FORMATS[format.name] == format
    assert values(format).tolist() == [
        float(i) for i in range(-(2**bits) // 2 * signed, 2**bits - 2**bits // 2 * signed)
    ]
    assert format.levels == 2**bits
    assert format.bits == bits
    if bits in (2, 4):
        info = ml_dtypes.iinfo(getattr(ml_dtypes, format.name))
        assert (format.qmin, format.qmax) == (info.min, info.max)


def test_nf4_is_made_of_normal_quantiles() -> None:
    # Dettmers et al. 2023: 8 positive quantiles, 7 negative ones, and zero; divided by the largest.
    delta = 1 - (1 / 32 + 1 / 30) / 2
    positive = norm.ppf(np.linspace(delta, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(delta, 0.5, 8)[:-1])
    derived = np.sort([*positive, *negative, 0.0]) / positive.max()
    # The authors round delta to seven digits and compute in float32.
    np.testing.assert_allclose(values(FORMATS["nf4"]), derived, rtol=0, atol=3e-7)
    assert values(FORMATS["nf4"])[7] == 0.0


def test_nf4_levels_are_float32_numbers() -> None:
    levels = values(FORMATS["nf4"])
    np.testing.assert_array_equal(levels, levels.astype(np.float32).astype(np.float64))


def test_fp4_of_bitsandbytes_code_by_code() -> None:
    # Its decoder is a tree: the sign bit, then a magnitude by three bits, as fractions of the block's absmax.
    magnitudes = [0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 0.5, 2 / 12, 0.25]
    assert values(FORMATS["fp4_bnb"]).tolist() == magnitudes + [-v for v in magnitudes]


def test_log8_has_sixteen_steps_an_octave() -> None:
    """Codes as the chip's formula has them: z = 16 log2 c - 127, ±2^((q + z) / 16), a byte of sign and q, 0x80 for zero."""
    c = 2.0 ** (37 / 16)
    z = 37 - 127
    wanted = sorted(
        {*(2.0 ** ((q + z) / 16) for q in range(128)), *(-(2.0 ** ((q + z) / 16)) for q in range(1, 128)), 0.0}
    )
    found = np.array(values(FORMATS["log8"])) * c
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert FORMATS["log8"].levels == 256
    x = np.geomspace(2.0 ** ((z + 1) / 16), c, 10_001)
    nearest = found[np.abs(x[:, None] - found).argmin(1)]
    assert np.max(np.abs(nearest - x) / x) <= 2 ** (1 / 32) - 1 + 1e-9


def test_dynamic8_follows_its_published_construction() -> None:
    # bitsandbytes' create_dynamic_map(signed=True, max_exponent_bits=7, total_bits=8), rewritten.
    data = [0.0, 1.0]
    for i in range(7):
        boundaries = np.linspace(0.1, 1, 2**i + 1)
        means = (boundaries[:-1] + boundaries[1:]) / 2.0
        data += ((10 ** (i - 6)) * means).tolist() + (-(10 ** (i - 6)) * means).tolist()
    np.testing.assert_allclose(values(FORMATS["dynamic8"]), np.sort(data), rtol=1e-6)
    assert all(np.float32(v) == v for v in FORMATS["dynamic8"].values or ())
    assert FORMATS["dynamic8"].levels == 256


def test_the_smallest_formats() -> None:
    assert values(FORMATS["binary"]).tolist() == [-1.0, 1.0]
    assert FORMATS["binary"].bits == 1
    assert values(FORMATS["ternary"]).tolist() == [-1.0, 0.0, 1.0]
    assert FORMATS["ternary"].bits == 2


@pytest.mark.parametrize("name", FORMATS)
def test_codes_fit_their_bits_and_the_table_has_one_value_for_each(name: str) -> None:
    format = FORMATS[name]
    assert format.name == name == str(format)
    assert format.levels <= 2**format.bits
    assert format.levels > 2 ** (format.bits - 1), "one bit less would do"
    if format.values is not None:
        assert (format.qmin, format.qmax) == (0, len(format.values) - 1)


@pytest.mark.parametrize(("count", "bits"), [(2, 1), (3, 2), (4, 2), (5, 3), (16, 4), (17, 5), (256, 8)])
def test_a_codebook_takes_as_few_bits_as_its_levels_need(count: int, bits: int) -> None:
    made = codebook("mine", range(count))
    assert (made.bits, made.levels, made.largest) == (bits, count, count - 1.0)


@pytest.mark.parametrize(
    "levels",
    [[], [1.0], range(257), [0.0, 0.0, 1.0], [1.0, 0.0], [0.0, math.nan], [-math.inf, 0.0]],
    ids=["none", "one", "257", "repeated", "descending", "nan", "inf"],
)
def test_a_codebook_refuses(levels: list[float]) -> None:
    with pytest.raises(SchemeError, match="'mine'"):
        codebook("mine", levels)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9])
def test_integers_have_two_to_eight_bits(bits: int) -> None:
    with pytest.raises(SchemeError, match=f"got {bits}"):
        integer(bits)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("int4", "int4"),
        ("INT4", "int4"),
        ("i3", "int3"),
        ("fp8", "fp8_e4m3"),
        ("FP4", "fp4_e2m1"),
        ("nf4", "nf4"),
        ("fp6", "fp6_e3m2"),
    ],
)
def test_formats_are_found_by_their_usual_names(text: str, name: str) -> None:
    assert get_format(text) is FORMATS[name]


@pytest.mark.parametrize(
    ("text", "near"), [("int1", "int"), ("nf5", "nf4"), ("fp8_e4m4", "fp8_e4m3"), ("tern", "ternary")]
)
def test_an_unknown_format_names_the_nearest(text: str, near: str) -> None:
    with pytest.raises(SchemeError, match=rf"Unknown number format '{text}'\. Did you mean '{near}.*Known: .*nf4"):
        get_format(text)


@pytest.mark.parametrize("name", FORMATS)
def test_a_copied_or_unpickled_format_is_the_same_format(name: str) -> None:
    format = FORMATS[name]
    for other in (copy.deepcopy(format), pickle.loads(pickle.dumps(format))):
        assert other == format
        assert hash(other) == hash(format)


def test_the_codebook_of_ggml_is_ggufs() -> None:
    assert tuple(values(FORMATS["iq4_nl"])) == tuple(IQ4_NL.kvalues)
