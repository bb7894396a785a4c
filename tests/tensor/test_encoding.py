"""Real numbers ↔ codes: every code, every float16, and every place where a rounding could go the other way.

The other side is ml_dtypes, PyTorch's and compressed-tensors' casts, gguf's decoders, or a search over all levels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from compressed_tensors.quantization.utils.fp6_utils import cast_to_fp6
from gguf.quants import MXFP4, NVFP4, Q4_0, Q8_0

from arrondi.formats import FORMATS, Format, codebook, integer
from arrondi.tensor.encoding import NATIVE, code_dtype, decode, encode, encode_float_reference, nearest, value_table

ML_DTYPES = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}
LEARNED = codebook("learned", [-3.0, -1.25, -0.1, 0.3, 0.3000001, 2.0, 11.0])
TABLED = [f for f in FORMATS.values() if f.values is not None] + [LEARNED]
SIGNED_TABLES = [f for f in TABLED if f.name != "e8m0"]


def all_codes(format: Format) -> torch.Tensor:
    return torch.arange(format.qmin, format.qmax + 1, dtype=code_dtype(format))


def proper_codes(format: Format) -> torch.Tensor:
    """The codes that mean a finite number."""
    codes = all_codes(format)
    return codes[torch.isfinite(decode(codes, format))]


def all_float16() -> np.ndarray:
    """Every finite float16, as float32: 63,488 numbers from 6e-8 to 65504 and both zeros."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    return halves[np.isfinite(halves)].astype(np.float32)


def around_midpoints(levels: np.ndarray) -> np.ndarray:
    """The float32 nearest to the middle of two neighbouring levels, and the two float32 on each side of it."""
    levels = np.unique(levels[np.isfinite(levels)])
    middle = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
    below, above = np.float32(-np.inf), np.float32(np.inf)
    one, other = np.nextafter(middle, below), np.nextafter(middle, above)
    return np.concatenate([middle, one, other, np.nextafter(one, below), np.nextafter(other, above)])


def hard_inputs(format: Format) -> np.ndarray:
    levels = np.array(format.values or range(format.qmin, format.qmax + 1), dtype=np.float64)
    special = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-38, 3.4e38, -3.4e38, format.largest, -format.largest], np.float32)
    # float16 has no numbers as small as e8m0's; its range is reached by scaling.
    spread = all_float16() if format.name != "e8m0" else all_float16().astype(np.float32) * np.float32(2.0**-110)
    return np.concatenate([around_midpoints(levels), spread, all_float16(), special]).astype(np.float32)


@pytest.mark.parametrize("format", [*FORMATS.values(), LEARNED], ids=str)
def test_every_code_is_a_fixed_point(format: Format) -> None:
    codes = proper_codes(format)
    assert torch.equal(encode(decode(codes, format), format), codes)


@pytest.mark.parametrize("format", [*FORMATS.values(), LEARNED], ids=str)
def test_decode_gives_the_value_of_the_format_in_every_float_type(format: Format) -> None:
    codes = all_codes(format)
    wanted = torch.tensor([format.value(int(c)) for c in codes], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        got = decode(codes, format, dtype)
        assert got.dtype == dtype
        torch.testing.assert_close(got, wanted.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ML_DTYPES)
@pytest.mark.parametrize("path", [encode, encode_float_reference], ids=["encode", "reference"])
def test_floats_round_like_ml_dtypes_on_every_float16_and_around_every_tie(
    name: str, path: Callable[[torch.Tensor, Format], torch.Tensor]
) -> None:
    format = FORMATS[name]
    x = hard_inputs(format)
    limit = np.float32(format.largest)  # ml_dtypes overflows to NaN or infinity, we saturate
    theirs = np.clip(x, -limit, limit).astype(ML_DTYPES[name]).view(np.uint8)
    ours = path(torch.from_numpy(x), format).numpy()
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", NATIVE)
def test_the_native_cast_is_a_table_format_and_equals_its_slow_reference(name: str) -> None:
    x = torch.from_numpy(hard_inputs(FORMATS[name]))
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([x, torch.randn(100_000, generator=generator) * torch.exp2(torch.linspace(-20, 17, 100_000))])
    assert torch.equal(encode(x, FORMATS[name]), encode_float_reference(x, FORMATS[name]))
    bits = torch.arange(256, dtype=torch.uint8)
    table = value_table(FORMATS[name], torch.device("cpu"))
    torch.testing.assert_close(bits.view(NATIVE[name]).float(), table, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("format", [f for f in TABLED if f.kind == "codebook"], ids=str)
def test_codebooks_give_the_nearest_level(format: Format) -> None:
    assert format.values is not None
    levels = np.array([v for v in format.values if not math.isnan(v)])
    limit = np.float32(min(2 * format.largest, 3.4e38))  # far beyond the range all distances look alike in float64
    x = np.clip(hard_inputs(format), -limit, limit)
    codes = encode(torch.from_numpy(x), format).numpy()
    slack = 4 * np.finfo(np.float64).eps * np.abs(x) + 1e-50 if format.name == "e8m0" else 1e-15
    distance = np.concatenate(
        [np.abs(x[i : i + 8192, None].astype(np.float64) - levels) for i in range(0, len(x), 8192)]
    )
    assert np.all(distance[np.arange(len(x)), codes] <= distance.min(axis=1) + slack)


@pytest.mark.parametrize(
    "format", [FORMATS["binary"], FORMATS["e8m0"], codebook("dyadic", [-4.0, -1.5, -1.0, 0.25, 0.5, 8.0])], ids=str
)
def test_a_tie_between_levels_goes_to_the_lower(format: Format) -> None:
    levels = np.array([v for v in format.values or () if math.isfinite(v)])
    ties = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
    assert np.array_equal(ties.astype(np.float64), (levels[1:] + levels[:-1]) / 2), "these ties are float32 numbers"
    for x, offset in (
        (ties, 0),
        (np.nextafter(ties, np.float32(np.inf)), 1),
        (np.nextafter(ties, np.float32(-np.inf)), 0),
    ):
        np.testing.assert_array_equal(encode(torch.from_numpy(x), format).numpy(), np.arange(len(ties)) + offset)


def test_bitsandbytes_fp4_gives_the_nearest_magnitude_and_the_sign() -> None:
    format = FORMATS["fp4_bnb"]
    x = np.clip(hard_inputs(format), -2, 2)
    half = np.array(format.values[:8]) if format.values else np.empty(0)
    distance = np.abs(np.abs(x).astype(np.float64)[:, None] - half[None, :])
    best = distance.min(axis=1)
    codes = encode(torch.from_numpy(x), format).numpy()
    magnitude = codes & 7
    np.testing.assert_array_equal(distance[np.arange(len(x)), magnitude], best)
    np.testing.assert_array_equal(codes >> 3, np.signbit(x))


@pytest.mark.parametrize(
    ("tie", "value"),
    [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0), (5.1, 6.0), (99.0, 6.0)],
)
def test_the_ties_of_fp4_by_hand(tie: float, value: float) -> None:
    format = FORMATS["fp4_e2m1"]
    assert decode(encode(torch.tensor([tie, -tie]), format), format).tolist() == [value, -value]


def test_fp4_and_fp6_round_like_compressed_tensors() -> None:
    for name, cast, limit in (("fp4_e2m1", cast_to_fp4, 6.0), ("fp6_e2m3", cast_to_fp6, 7.5)):
        x = torch.from_numpy(hard_inputs(FORMATS[name])).clamp(-limit, limit)
        ours = decode(encode(x, FORMATS[name]), FORMATS[name])
        assert torch.equal(ours, cast(x.clone())), name


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_integers_round_half_to_even_and_saturate(bits: int, signed: bool) -> None:
    format = integer(bits, signed=signed)
    x = hard_inputs(format)
    wanted = np.clip(np.rint(x.astype(np.float64)), format.qmin, format.qmax)
    np.testing.assert_array_equal(encode(torch.from_numpy(x), format).numpy(), wanted)
    if bits in (2, 4):  # ml_dtypes' integers wrap, so it is given what is already saturated
        theirs = wanted.astype(getattr(ml_dtypes, format.name)).astype(np.int64)
        np.testing.assert_array_equal(encode(torch.from_numpy(x), format).numpy(), theirs)


@pytest.mark.parametrize("zero_point", [-8, -3, 0, 7])
def test_the_zero_point_is_added_after_rounding(zero_point: int) -> None:
    # ONNX's order: round(1.5) = 2 whatever the parity of the zero point; round(1.5 + 1) would be 2, not 2 + 1.
    x = torch.tensor([-2.5, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 40.0, -40.0])
    rounded = torch.tensor([-2, -2, 0, 0, 0, 2, 2, 40, -40])
    wanted = (rounded + zero_point).clamp(-8, 7).to(torch.int8)
    assert torch.equal(encode(x, integer(4), torch.tensor(zero_point)), wanted)


def test_ternary_saturates_at_one() -> None:
    codes = encode(torch.tensor([-9.0, -0.51, -0.5, 0.49, 0.5, 0.51, 9.0]), FORMATS["ternary"])
    assert codes.tolist() == [-1, -1, 0, 0, 0, 1, 1]
    assert codes.dtype == torch.int8


@pytest.mark.parametrize("format", [*FORMATS.values(), LEARNED], ids=str)
def test_encoding_keeps_the_order_of_numbers(format: Format) -> None:
    x = torch.from_numpy(np.sort(hard_inputs(format)))
    values = decode(encode(x, format), format)
    assert bool((values.diff() >= 0).all())


@pytest.mark.parametrize("format", [*FORMATS.values(), LEARNED], ids=str)
def test_anything_beyond_the_range_becomes_its_end(format: Format) -> None:
    values = decode(proper_codes(format), format)
    ends = decode(encode(torch.tensor([3.4e38, -3.4e38, math.inf, -math.inf]), format), format)
    assert ends.tolist() == [float(values.max()), float(values.min())] * 2


@pytest.mark.parametrize("format", SIGNED_TABLES, ids=str)
def test_no_finite_number_is_encoded_as_nan_or_infinity(format: Format) -> None:
    assert bool(torch.isfinite(decode(encode(torch.from_numpy(hard_inputs(format)), format), format)).all())


def test_codes_of_signed_integers_are_int8_and_all_others_uint8() -> None:
    for format in FORMATS.values():
        signed = format.kind == "integer" and not format.name.startswith("uint")
        wanted = torch.int8 if signed else torch.uint8
        assert code_dtype(format) == wanted
        assert encode(torch.zeros(3), format).dtype == wanted


def test_encode_leaves_its_input_alone() -> None:
    for format in FORMATS.values():
        x = torch.linspace(-3, 3, 50)
        before = x.clone()
        encode(x, format, torch.tensor(1) if format.kind == "integer" else None)
        assert torch.equal(x, before), format.name


@pytest.mark.parametrize("kind", ["codebook", "float"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, "meta"], ids=str)
def test_tables_made_under_other_defaults_are_the_same(kind: str, default: torch.dtype | str) -> None:
    # transformers loads models under set_default_dtype(bfloat16) and on the meta device; tables are cached for good.
    fresh = (
        codebook(f"fresh {default}", [-1.0, -0.301, 0.0, 0.299, 0.7])
        if kind == "codebook"
        else replace(FORMATS["fp6_e2m3"], name=f"fresh {default}")
    )
    x = torch.linspace(-1, 1, 1001)
    if isinstance(default, str):
        with torch.device(default):
            codes = encode(x, fresh)
            values = decode(codes, fresh)
    else:
        torch.set_default_dtype(default)
        try:
            codes = encode(x, fresh)
            values = decode(codes, fresh)
        finally:
            torch.set_default_dtype(torch.float32)
    levels = np.array(fresh.values)
    nearest = np.abs(x.numpy().astype(np.float64)[:, None] - levels).min(axis=1)
    np.testing.assert_array_equal(np.abs(x.numpy().astype(np.float64) - levels[codes.numpy()]), nearest)
    np.testing.assert_array_equal(values.numpy(), levels[codes.numpy()].astype(np.float32))


def nibbles(block_bytes: np.ndarray) -> np.ndarray:
    """gguf's order: byte j holds element j in its low nibble and element j + half in its high one."""
    return np.concatenate([block_bytes & 15, block_bytes >> 4], axis=-1)


def test_gguf_decodes_our_mxfp4_codes_under_every_scale() -> None:
    scales = np.arange(0, 253, dtype=np.uint8)  # above that, 6 · 2^E overflows float32
    packed = np.tile(np.arange(16, dtype=np.uint8) | np.arange(16, dtype=np.uint8)[::-1] << 4, (len(scales), 1))
    theirs = MXFP4.dequantize_blocks(np.concatenate([scales[:, None], packed], axis=1))
    ours = (
        decode(torch.from_numpy(nibbles(packed)), FORMATS["fp4_e2m1"])
        * decode(torch.from_numpy(scales), FORMATS["e8m0"])[:, None]
    )
    np.testing.assert_array_equal(ours.numpy(), theirs)


def test_gguf_decodes_our_nvfp4_codes_under_every_scale() -> None:
    scales = np.arange(0, 128, dtype=np.uint8)[:-1]  # 0x7F is NaN
    packed = np.tile(np.arange(8, dtype=np.uint8) | np.arange(8, 16, dtype=np.uint8) << 4, (len(scales), 4))
    theirs = NVFP4.dequantize_blocks(np.concatenate([np.repeat(scales[:, None], 4, axis=1), packed], axis=1))
    codes = nibbles(packed.reshape(len(scales), 4, 8)).reshape(len(scales), 64)
    ours = (
        decode(torch.from_numpy(codes), FORMATS["fp4_e2m1"])
        * decode(torch.from_numpy(scales), FORMATS["fp8_e4m3"])[:, None]
    )
    np.testing.assert_array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize(("kind", "bits"), [(Q4_0, 4), (Q8_0, 8)], ids=["Q4_0", "Q8_0"])
def test_gguf_decodes_our_integer_codes(kind: type, bits: int) -> None:
    format = integer(bits)
    scale = np.float16(0.37)
    codes = all_codes(format).numpy()
    for chunk in np.array_split(codes, max(len(codes) // 32, 1)):
        chunk = np.resize(chunk, 32)
        body = (
            (chunk + 8)[:16].astype(np.uint8) | (chunk + 8)[16:].astype(np.uint8) << 4
            if bits == 4
            else chunk.view(np.uint8)
        )
        block = np.concatenate([np.array([scale]).view(np.uint8), body])[None]
        ours = decode(torch.from_numpy(chunk), format) * float(scale)
        np.testing.assert_array_equal(kind.dequantize_blocks(block)[0], ours.numpy())


def test_gguf_sizes_agree_with_bits() -> None:
    for name, bits in (("MXFP4", 4.25), ("NVFP4", 4.5), ("Q4_0", 4.5), ("Q8_0", 8.5)):
        elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        assert size * 8 / elements == bits


def test_e8m0_exponents_are_powers_of_two_in_order() -> None:
    values = decode(torch.arange(255, dtype=torch.uint8), FORMATS["e8m0"], torch.float64)
    for previous, following in itertools.pairwise(values.tolist()):
        assert following == 2 * previous
    assert float(values[127]) == 1.0


@pytest.mark.parametrize("format", TABLED, ids=str)
def test_nearest_is_encode_and_decode_at_once(format: Format) -> None:
    levels = np.array(format.values, dtype=np.float64)
    x = torch.from_numpy(np.concatenate([all_float16(), around_midpoints(levels), -around_midpoints(levels)]))
    assert torch.equal(nearest(x, format), decode(encode(x, format), format))
