"""The block codec against plain loops, and the limits that its docstring promises."""

from __future__ import annotations

import itertools
import struct

import pytest
import torch

from arrondi.errors import DataError, SchemeError, ShapeError
from arrondi.tensor import quantizers
from arrondi.tensor.blocks import BlockCodec

SIDES = ("float32", "bfloat16", "float16")
CODECS = [
    BlockCodec(bits, 64, symmetric, side=side) for bits in (2, 4, 8) for symmetric in (True, False) for side in SIDES
]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Heavy tails, blocks of very different size, a block of zeros."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) ** 3
    x = x * torch.linspace(-9, 2, x.shape[-1]).exp()
    x[..., 64:128] = 0
    return x


def scales(codec: BlockCodec, x: torch.Tensor) -> torch.Tensor:
    """The scale of every element, as fine as float32 has it: from a loop over blocks."""
    levels = 2 ** (codec.bits - 1) - 1 if codec.symmetric else 2**codec.bits - 1
    out = torch.empty_like(x, dtype=torch.float64)
    for start in range(0, len(x), codec.block):
        part = x[start : start + codec.block].double()
        span = part.abs().max() if codec.symmetric else part.max() - part.min()
        out[start : start + codec.block] = span / levels
    return out


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("count", [1, 63, 64, 1000])
def test_half_a_scale_is_the_largest_error(codec: BlockCodec, count: int) -> None:
    x = numbers(1000)[:count]
    message = codec.encode(x)
    assert message.shape == (codec.nbytes(count),) and message.dtype == torch.uint8
    error = (codec.decode(message, count).double() - x.double()).abs()
    wide = scales(codec, x)
    low = 0.0 if codec.symmetric else x.abs().double()
    # A stored scale is at most one unit of its type larger, and so is the lowest number.
    unit = {"float32": 2.0**-22, "bfloat16": 2.0**-7, "float16": 2.0**-10}[codec.side]
    tiny = 2.0**-24 if codec.side == "float16" else 0
    assert bool((error <= wide / 2 * (1 + unit) + low * unit + tiny).all())
    if count > 128:
        assert not codec.decode(message, count)[64:128].any()


def test_bytes_of_a_message_written_by_hand() -> None:
    codec = BlockCodec(bits=4, block=4, side="float32")
    message = codec.encode(torch.tensor([7.0, -7.0, 0.0, 3.0, 2.0]))
    # Codes -7 … 7 are counted from -7, the first in the low half of its byte.
    assert bytes(message.tolist()) == bytes([14 | 0 << 4, 7 | 10 << 4, 14]) + struct.pack("<2f", 1.0, 2 / 7)


def test_stochastic_rounding_has_the_mean_and_twice_the_error() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    for symmetric, side in itertools.product((True, False), ("float32", "bfloat16")):
        codec = BlockCodec(4, 64, symmetric, "stochastic", side)
        draws = codec.decode(codec.encode(x.expand(20000, 64), generator), 64)
        scale = scales(codec, x).max()
        assert float((draws.mean(dim=0) - x).abs().max()) < 5 * scale * 0.5 / 20000**0.5
        assert float((draws - x).abs().max()) < scale * 1.02
    wide = torch.randn(1 << 16, generator=generator)
    nearest, noisy = BlockCodec(4, 64), BlockCodec(4, 64, rounding="stochastic")
    energies = [float((c.decode(c.encode(wide, generator), len(wide)) - wide).square().sum()) for c in (nearest, noisy)]
    assert 1.9 < energies[1] / energies[0] < 2.3  # 2.15 was measured, 2 is the law for uniform remainders


def test_stochastic_rounding_never_clips() -> None:
    """The largest number of a block is a grid point or below one, so every draw of it lies within a scale."""
    x = torch.full((64,), 1.0)
    x[1::2] = -1.0039  # just beside what bfloat16 has
    codec = BlockCodec(8, 64, side="bfloat16", rounding="stochastic")
    draws = codec.decode(codec.encode(x.expand(4000, 64), torch.Generator().manual_seed(0)), 64)
    assert float((draws.mean(dim=0) - x).abs().max()) < 5 * (1 / 127) * 0.5 / 4000**0.5


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetries(bits: int) -> None:
    codec, x = BlockCodec(bits, 64), numbers(512)
    message = codec.encode(x)
    y = codec.decode(message, 512)
    width = 512 * bits // 8
    assert torch.equal(codec.encode(y)[:width], message[:width])
    assert torch.equal(codec.decode(codec.encode(-x), 512), -y)
    assert torch.equal(codec.decode(codec.encode(x * 2**-7), 512), y * 2**-7)
    assert torch.equal(codec.decode(codec.encode(x.reshape(4, 128)), 128).flatten(), y)


def test_one_bit_keeps_signs_and_mean_magnitudes() -> None:
    codec, x = BlockCodec(1, 64), numbers(200)
    y = codec.decode(codec.encode(x), 200)
    for start in range(0, 200, 64):
        part = x[start : start + 64]
        wanted = torch.where(part >= 0, part.abs().mean(), -part.abs().mean())
        assert torch.allclose(y[start : start + 64], wanted)
    # ‖p‖₁/d is the least-squares scale; errors by the specification, of which the last is a vector with one entry.
    assert codec.nbytes(200) == 25 + 4 * 4
    flat = torch.randn(1 << 16, generator=torch.Generator().manual_seed(3))
    one = BlockCodec(1, 4096)
    assert float(
        (one.decode(one.encode(flat), len(flat)) - flat).square().sum() / flat.square().sum()
    ) == pytest.approx(1 - 2 / torch.pi, abs=0.01)


def test_32_bits_pass_through() -> None:
    codec, x = BlockCodec(32), numbers(100)
    message = codec.encode(x)
    assert len(message) == codec.nbytes(100) == 400
    assert torch.equal(codec.decode(message, 100), x)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite(bits: int, bad: float) -> None:
    x = numbers(300)
    x[200] = bad
    if bits == 32:
        codec = BlockCodec(bits)
        assert torch.equal(codec.decode(codec.encode(x), 300).isfinite(), x.isfinite())
        return
    with pytest.raises(DataError, match="NaN or infinity"):
        BlockCodec(bits, 64).encode(x)
    codec = BlockCodec(bits, 64, propagate=True)
    y = codec.decode(codec.encode(x), 300)
    assert bool(y[192:256].isnan().all()) and bool(y[:192].isfinite().all()) and bool(y[256:].isfinite().all())


def test_bad_input() -> None:
    x = torch.randn(100)
    with pytest.raises(SchemeError, match="Generator"):
        BlockCodec(4, rounding="stochastic").encode(x)
    with pytest.raises(DataError, match="float16"):
        BlockCodec(2, side="float16").encode(x * 1e30)
    with pytest.raises(ShapeError, match="same codec"):
        BlockCodec(4).decode(BlockCodec(8).encode(x), 100)
    with pytest.raises(ShapeError, match="scalar"):
        BlockCodec(4).encode(torch.tensor(1.0))
    with pytest.raises(DataError, match="floating-point"):
        BlockCodec(4).encode(torch.ones(3, dtype=torch.int32))
    with pytest.raises(SchemeError, match="bits"):
        BlockCodec(3)
    with pytest.raises(SchemeError, match="One bit"):
        BlockCodec(1, rounding="stochastic")


@pytest.mark.parametrize("codec", [*CODECS, BlockCodec(1, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_compiled_path_and_torch_agree(
    codec: BlockCodec, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = numbers(3, 200).to(dtype)
    message = codec.encode(x)
    values = codec.decode(message, 200, dtype)
    monkeypatch.setattr(quantizers, "native", None)
    assert torch.equal(codec.encode(x), message)
    assert torch.equal(codec.decode(message, 200, dtype), values)
    assert values.dtype == dtype


def test_empty() -> None:
    codec = BlockCodec(4)
    assert codec.nbytes(0) == 0
    assert codec.decode(codec.encode(torch.empty(3, 0)), 0).shape == (3, 0)
