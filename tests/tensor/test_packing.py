"""Codes ↔ bytes: all pairs, all widths, all lengths; a bit stream in plain Python; compressed-tensors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from arrondi.errors import ShapeError
from arrondi.formats import FORMATS
from arrondi.tensor.encoding import decode
from arrondi.tensor.packing import pack, packed_width, unpack
from tests.cases import each_once

BITS = range(1, 9)
LENGTHS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100]


def random_codes(shape: tuple[int, ...], bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))


def stream(codes: list[int], bits: int, word_bytes: int) -> list[int]:
    """The bytes of one row, from one big number: code j at bit j·bits."""
    number = sum(code << (j * bits) for j, code in enumerate(codes))
    used = -(-len(codes) * bits // 8)
    return list(number.to_bytes(-(-used // word_bytes) * word_bytes, "little"))


def test_4_bits_are_lossless_for_every_pair_of_codes() -> None:
    pairs = torch.tensor(list(itertools.product(range(16), repeat=2)), dtype=torch.uint8)
    packed = pack(pairs, 4)
    assert sorted(packed.flatten().tolist()) == list(range(256))
    assert torch.equal(unpack(packed, 4, 2), pairs)


def test_the_first_code_is_in_the_lowest_bits() -> None:
    assert pack(torch.tensor([[1, 8, 15, 7]], dtype=torch.uint8), 4).tolist() == [[0x81, 0x7F]]
    assert pack(torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8), 2).tolist() == [[0b00_11_10_01]]
    assert pack(torch.tensor([[1, 0, 0, 0, 0, 0, 0, 1, 1]], dtype=torch.uint8), 1).tolist() == [[0b1000_0001, 1]]
    # 3 bits: 1, 2, 3 are 001, 010, 011; the third code crosses the byte: 11|010|001 and its top bit, 0, in the next.
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 3).tolist() == [[0b11_010_001, 0b0]]
    assert pack(torch.tensor([[1, 2, 7]], dtype=torch.uint8), 3).tolist() == [[0b11_010_001, 0b1]]


@pytest.mark.parametrize(("bits", "word_bytes"), each_once(BITS, [1, 2, 4]))
def test_every_width_and_length_is_the_bit_stream(bits: int, word_bytes: int) -> None:
    for length in LENGTHS:
        codes = random_codes((3, length), bits)
        packed = pack(codes, bits, word_bytes=word_bytes)
        assert packed.dtype == torch.uint8
        assert packed.is_contiguous()
        assert packed.shape == (3, packed_width(length, bits, word_bytes))
        assert packed.tolist() == [stream(row, bits, word_bytes) for row in codes.tolist()], length
        assert torch.equal(unpack(packed, bits, length), codes), length


@pytest.mark.parametrize(
    ("bits", "shape"),
    each_once(BITS, [(16,), (13,), (2, 3, 16), (2, 3, 13), (0, 16), (0, 13), (4, 0), (2, 0, 8), (1, 1)]),
    ids=str,
)
def test_any_shape_round_trips(bits: int, shape: tuple[int, ...]) -> None:
    codes = random_codes(shape, bits)
    packed = pack(codes, bits)
    assert packed.shape == (*shape[:-1], packed_width(shape[-1], bits))
    assert torch.equal(unpack(packed, bits, shape[-1]), codes)


@pytest.mark.parametrize("bits", BITS)
def test_views_pack_like_copies(bits: int) -> None:
    whole = random_codes((9, 24), bits)
    for view in (whole.T, whole[:, ::2], whole[1:, 1:], whole.flatten()[1:17], whole[3], whole[:1].expand(5, 24)):
        assert torch.equal(pack(view, bits), pack(view.clone(memory_format=torch.contiguous_format), bits))
        packed = pack(view, bits)
        wider = torch.cat([packed, packed], dim=-1)[..., : packed.shape[-1]]
        assert torch.equal(unpack(wider, bits, view.shape[-1]), view)


@pytest.mark.parametrize("bits", BITS)
def test_the_result_shares_no_memory_with_the_codes(bits: int) -> None:
    codes = random_codes((2, 16), bits)
    before = codes.clone()
    packed = pack(codes, bits)
    unpacked = unpack(packed, bits, 16)
    copy = packed.clone()
    unpacked.fill_(0)
    packed.fill_(255)
    assert torch.equal(codes, before)
    assert torch.equal(unpack(copy, bits, 16), before)


@pytest.mark.parametrize("bits", BITS)
def test_padding_is_zero_bits(bits: int) -> None:
    full = torch.full((1, 5), 2**bits - 1, dtype=torch.uint8)
    packed = pack(full, bits, word_bytes=8)
    assert int.from_bytes(bytes(packed[0].tolist()), "little") == 2 ** (5 * bits) - 1


@pytest.mark.parametrize(
    ("columns", "bits", "word_bytes", "width"),
    [
        (100, 4, 1, 50),
        (100, 3, 1, 38),
        (100, 3, 4, 40),
        (1, 1, 1, 1),
        (9, 1, 1, 2),
        (0, 5, 4, 0),
        (32, 7, 4, 28),
        (33, 7, 4, 32),
    ],
)
def test_packed_width(columns: int, bits: int, word_bytes: int, width: int) -> None:
    assert packed_width(columns, bits, word_bytes) == width


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    bits=st.integers(1, 8),
    codes=st.lists(st.integers(0, 255), max_size=80),
    word_bytes=st.sampled_from([1, 2, 4, 8]),
    extra=st.integers(0, 5),
)
def test_unpack_reverses_pack_also_of_longer_rows(bits: int, codes: list[int], word_bytes: int, extra: int) -> None:
    row = torch.tensor([[code % 2**bits for code in codes]], dtype=torch.uint8)
    packed = pack(row, bits, word_bytes=word_bytes)
    longer = torch.cat([packed, torch.full((1, extra), 0xA5, dtype=torch.uint8)], dim=-1)
    assert torch.equal(unpack(longer, bits, len(codes)), row)


@pytest.mark.parametrize("bits", BITS)
def test_int32_words_are_those_of_compressed_tensors(bits: int) -> None:
    half = 2 ** (bits - 1)
    for columns in (1, 3, 8, 31, 32, 33, 64, 97):
        signed = (random_codes((6, columns), bits).int() - half).to(torch.int8)
        theirs = pack_to_int32(signed, bits)
        unsigned = (signed.int() + half).to(torch.uint8)
        ours = pack(unsigned, bits, word_bytes=4).view(torch.int32)
        assert torch.equal(ours, theirs), columns
        assert torch.equal(unpack_from_int32(ours, bits, torch.Size((6, columns))), signed)
        assert torch.equal(unpack(theirs.view(torch.uint8), bits, columns), unsigned)


@pytest.mark.parametrize("bits", BITS)
def test_int32_words_packed_along_the_rows(bits: int) -> None:
    # Zero points of compressed-tensors: the same stream, down the columns.
    half = 2 ** (bits - 1)
    signed = (random_codes((45, 3), bits).int() - half).to(torch.int8)
    unsigned = (signed.int() + half).to(torch.uint8)
    ours = pack(unsigned.T.contiguous(), bits, word_bytes=4).view(torch.int32).T.contiguous()
    assert torch.equal(ours, pack_to_int32(signed, bits, packed_dim=0))


def test_fp4_bytes_are_those_of_compressed_tensors() -> None:
    pairs = torch.tensor(list(itertools.product(range(16), repeat=2)), dtype=torch.uint8)
    values = decode(pairs, FORMATS["fp4_e2m1"], torch.bfloat16)
    packed = pack(pairs, 4)
    assert torch.equal(packed, pack_fp4_to_uint8(values))
    theirs = unpack_fp4_from_uint8(packed, 256, 2)
    np.testing.assert_array_equal(theirs.float().numpy(), values.float().numpy())
    assert torch.equal(torch.signbit(theirs), torch.signbit(values))


@pytest.mark.parametrize("bits", [-1, 0, 9])
def test_codes_have_one_to_eight_bits(bits: int) -> None:
    for use in (lambda x: pack(x, bits), lambda x: unpack(x, bits, 1)):
        with pytest.raises(ShapeError, match=f"1 to 8 bits, got {bits}"):
            use(torch.zeros(1, 8, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float32, torch.bool])
def test_only_unsigned_bytes_are_packed(dtype: torch.dtype) -> None:
    for use in (lambda x: pack(x, 4), lambda x: unpack(x, 4, 1)):
        with pytest.raises(ShapeError, match=r"unsigned bytes, got torch\.\w+\. Call quantize\(\) first"):
            use(torch.zeros(1, 8, dtype=dtype))


def test_a_scalar_has_no_rows() -> None:
    with pytest.raises(ShapeError, match="got a scalar"):
        pack(torch.tensor(3, dtype=torch.uint8), 4)


@pytest.mark.parametrize(("bits", "columns", "need"), [(4, 9, 5), (3, 11, 5), (8, 5, 5), (1, 33, 5)])
def test_too_few_bytes_are_refused(bits: int, columns: int, need: int) -> None:
    with pytest.raises(ShapeError, match=f"{columns} codes of {bits} bits need {need} bytes a row, got 4"):
        unpack(torch.zeros(2, 4, dtype=torch.uint8), bits, columns)
    assert unpack(torch.zeros(2, 5, dtype=torch.uint8), bits, columns).shape == (2, columns)
