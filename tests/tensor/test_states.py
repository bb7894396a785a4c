"""Keys and values in packed form against plain loops, and the directions of KIVI's paper."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from arrondi.errors import DataError
from arrondi.formats import ActivationScheme, parse_scheme
from arrondi.formats.kv import CacheScheme, parse_kv
from arrondi.kernels.hadamard import hadamard
from arrondi.tensor.nearest import quantize_tensor
from arrondi.tensor.states import Lanes, real_states, round_states


def scheme_of(text: str) -> CacheScheme:
    found, _ = parse_kv(text)
    assert found is not None
    return found


def states(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, tokens, width, generator=generator) * 2 + 0.5


def kivi_loop(x: np.ndarray, bits: int, kept: type) -> np.ndarray:
    """One group as the paper writes it. Kept in few digits, the steps lie around the middle: no end is further off than the other."""
    low, top = x.min(), x.max()
    step = np.float32(kept((top - low) / (2**bits - 1))) or np.float32(1)
    least = low if kept is np.float32 or low == top else (low + top) / 2 - step * (2**bits - 1) / 2
    least = np.float32(kept(least))
    return np.clip(np.round((x - least) / step), 0, 2**bits - 1) * step + least


def restored(
    x: torch.Tensor, how: ActivationScheme, *, keys: bool, clip: float | None = None, at: int = 0
) -> torch.Tensor:
    """There and back through the packed buffers, at an odd place."""
    lanes = Lanes.of(how, x.shape[-1], keys=keys)
    blocks = -(-(x.shape[2] + at) // lanes.block)
    buffer = torch.full((*x.shape[:2], *lanes.codes_shape(blocks)), 0xA5, dtype=torch.uint8)
    rounded = round_states(x, how, clip)
    lanes.write(buffer, rounded.codes, at)
    found: list[Any] = []
    for part in (rounded.scale, rounded.offset):
        if part is None:
            found.append(None)
            continue
        shape = lanes.scale_shape(blocks)
        assert shape is not None
        scales = torch.zeros(*x.shape[:2], *shape, dtype=lanes.stored)
        lanes.write_scale(scales, part, at)
        found.append(lanes.read_scale(scales, at, at + x.shape[2]))
    scale = clip / how.scheme.format.qmax if clip is not None else found[0]
    return real_states(lanes.read(buffer, at, at + x.shape[2]), lanes.lowest, scale, found[1])


@pytest.mark.parametrize("kept", [np.float32, np.float16])
@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_s_keys_are_rounded_by_channel_and_its_values_by_token(bits: int, kept: type):
    exact = f"k=uint{bits}/b32x1/offset,v=uint{bits}/g32/offset,window=128"
    scheme, x = scheme_of(f"kivi{bits}" if kept is np.float16 else exact), states(64, 64)
    x[0, 1, :32, 5] = 3.25  # a group of equal numbers
    keys, values = restored(x, scheme.keys, keys=True), restored(x, scheme.values, keys=False)
    for index in np.ndindex(2, 3):
        data = x[index].numpy()
        for g in range(0, 64, 32):
            for i in range(64):
                assert np.allclose(
                    keys[index][g : g + 32, i], kivi_loop(data[g : g + 32, i], bits, kept), rtol=2e-6, atol=2e-6
                )
                assert np.allclose(
                    values[index][i, g : g + 32], kivi_loop(data[i, g : g + 32], bits, kept), rtol=2e-6, atol=2e-6
                )


@pytest.mark.parametrize(
    "text", ["int8", "int4", "k=int4/g8,v=uint2/g16/offset/bfloat16", "k=uint8/token/offset,v=int2/token"]
)
@pytest.mark.parametrize("at", [0, 1, 7, 35])
def test_packing_loses_nothing(text: str, at: int):
    """What is read back from any place is what a QTensor reads."""
    scheme, x = scheme_of(text), states(41, 48 if "g32" not in str(scheme_of(text)) else 64)
    for how, keys in ((scheme.keys, True), (scheme.values, False)):
        wanted = quantize_tensor(x, how.scheme).dequantize()
        assert torch.equal(restored(x, how, keys=keys, at=at), wanted)


def test_writing_beside_codes_leaves_them_alone():
    lanes = Lanes.of(scheme_of("kivi2").values, 32, keys=False)
    buffer = torch.zeros(1, 1, *lanes.codes_shape(1), dtype=torch.uint8)
    codes = torch.randint(0, 4, (1, 1, 32, 32), dtype=torch.uint8)
    for t in torch.randperm(32).tolist():
        lanes.write(buffer, codes[:, :, t : t + 1], t)
    assert torch.equal(lanes.read(buffer, 0, 32), codes)


def test_lightseq_s_static_grid():
    scheme = scheme_of("int8-static")
    x, clip = states(9, 32), 2.5
    wanted = (127 * x / clip).round().clamp(-127, 127) * (clip / 127)
    assert torch.allclose(restored(x, scheme.keys, keys=True, clip=clip), wanted, atol=1e-6)
    assert bool((x.abs() > clip).any())


def test_eight_bits_are_close():
    for bits8 in ("int8", "k=uint8/b32x1/offset/float16,v=uint8/g32/offset/float16,window=32"):
        scheme, x = scheme_of(bits8), torch.randn(1, 2, 64, 128)
        assert float((restored(x, scheme.keys, keys=True) - x).abs().max()) < 2e-2
        assert float((restored(x, scheme.keys, keys=True) - x).norm() / x.norm()) < 1e-2
        assert float((restored(x, scheme.values, keys=False) - x).norm() / x.norm()) < 1e-2


def keys_with_large_channels() -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of 128 channels, six of which are far from zero in every token, and queries."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 512, 128, generator=generator)
    offsets = torch.tensor([8.0, -10, 12, -9, 11, -8])
    k[..., torch.tensor([3, 20, 41, 66, 90, 120])] += offsets
    return k, torch.randn(1, 1, 64, 128, generator=generator)


def logit_error(text: str, rotate: bool = False) -> float:
    k, q = keys_with_large_channels()
    scheme = scheme_of(text)
    found = restored(hadamard(k) if rotate else k, scheme.keys, keys=True)
    wanted = q @ k.mT
    return float(((hadamard(q) if rotate else q) @ found.mT - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("bits", "channels", "tokens"), [(4, 0.029, 0.118), (2, 0.143, 0.748)])
def test_keys_with_large_channels_want_scales_by_channel(bits: int, channels: float, tokens: float):
    """The errors of logits that were measured with such keys elsewhere, within a factor of two."""
    by_channel = logit_error(f"k=uint{bits}/b32x1/offset,v=int8/token,window=32")
    by_token = logit_error(f"k=uint{bits}/g32/offset,v=int8/token")
    assert by_channel < by_token / 2
    assert channels / 2 < by_channel < channels * 2 and tokens / 2 < by_token < tokens * 2


@pytest.mark.parametrize("bits", [2, 4])
def test_a_rotation_spreads_large_channels(bits: int):
    text = f"k=uint{bits}/g32/offset,v=int8/token"
    assert logit_error(text, rotate=True) < 0.7 * logit_error(text)


def test_states_that_are_no_numbers_are_named():
    x = states(2, 32)
    x[0, 0, 0, 0] = float("nan")
    for how in (scheme_of("int4").keys, scheme_of("int8").values):
        with pytest.raises(DataError, match=r"a key or value: .*NaN"):
            round_states(x, how)


def test_schemes_of_layers_round_as_the_kinds_do():
    assert parse_scheme("w=int8,kv=int8/token/float16").kv == scheme_of("int8").keys
