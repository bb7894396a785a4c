"""The compiled attention over packed keys and values against its slow reference, on every path."""

from __future__ import annotations

import math

import pytest
import torch

from arrondi.errors import ShapeError
from arrondi.formats import ActivationScheme
from arrondi.formats.kv import KV_KINDS, CacheScheme, parse_kv
from arrondi.kernels.hadamard import hadamard
from arrondi.kernels.packed_states import (
    Packed,
    append_token,
    attend_packed,
    attend_packed_reference,
    available,
    takes_packed,
)
from arrondi.native import native
from arrondi.tensor.states import Lanes, round_states

pytestmark = pytest.mark.skipif(not available(), reason="the compiled attention is not there")

KINDS = [*(name for name, kind in KV_KINDS.items() if isinstance(kind.scheme, CacheScheme)), "k=uint2/b16x1/offset,v=uint8/g16/offset/bfloat16,window=16", "k=uint8/b64x1/offset,v=int4/token,window=64", "k=int2/g8,v=uint2/token/offset"]  # fmt: skip


def packed(
    how: ActivationScheme, x: torch.Tensor, new: torch.Tensor, *, keys: bool, first: int, spare: int = 1
) -> Packed:
    """Tokens from `first` on, with room that is still empty and holds anything."""
    clip = 3.0 if how.dynamic is False else None
    lanes, tokens = Lanes.of(how, x.shape[-1], keys=keys), x.shape[2]
    blocks = -(-tokens // lanes.block) + spare
    codes = torch.randint(0, 256, (1, x.shape[1], *lanes.codes_shape(blocks)), dtype=torch.uint8)
    shape = lanes.scale_shape(blocks)
    parts: list[torch.Tensor | None] = [None, None]
    for i in range(2 if lanes.offsets else 1):
        if shape is not None:
            parts[i] = torch.zeros(1, x.shape[1], *shape, dtype=lanes.stored)
    if tokens:
        rounded = round_states(x, how, clip)
        lanes.write(codes, rounded.codes, 0)
        for buffer, part in zip(parts, rounded[1:], strict=True):
            if buffer is not None and part is not None:
                lanes.write_scale(buffer, part, 0)
    unit = 1.0 if clip is None else clip / how.scheme.format.qmax
    return Packed(lanes, codes, parts[0], parts[1], first, tokens, unit, new)


def case(text: str, width: int, shared: int, tokens: tuple[int, int], length: int, dtype: torch.dtype, first: int = 0):
    """A query, keys of which tokens[0] are packed and values of which tokens[1] are, up to `length`."""
    scheme, _ = parse_kv(text)
    assert scheme is not None
    torch.manual_seed(length)
    heads = 2
    query = torch.randn(1, heads * shared, 1, width).to(dtype)
    sides = []
    for how, keys, count in ((scheme.keys, True, tokens[0]), (scheme.values, False, tokens[1])):
        x = torch.randn(1, heads, length, width) * (1 + torch.rand(width)) + torch.randn(width)
        count = count // scheme.key_tokens * scheme.key_tokens if keys and scheme.key_tokens else count
        new = x[:, :, count:].to(dtype)
        sides.append(packed(how, x[:, :, :count], new, keys=keys, first=first))
    return query, *sides


def check(query: torch.Tensor, keys: Packed, values: Packed, turned: torch.Tensor | None = None) -> None:
    assert takes_packed(query, keys.lanes, values.lanes)
    scale = 1 / math.sqrt(query.shape[-1])
    found = attend_packed(query, keys, values, scale, turned=turned)
    wanted = attend_packed_reference(query, keys, values, scale, turned=turned)
    assert found.shape == wanted.shape and found.dtype == query.dtype
    allowed = 2e-5 if query.dtype == torch.float32 else 2**-7
    assert float((found - wanted).abs().max() / wanted.abs().max()) < allowed


@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize(("width", "shared"), [(32, 1), (64, 7), (128, 4), (256, 2)])
def test_the_kernel_computes_what_the_reference_does(path: str, text: str, width: int, shared: int):
    for tokens, length in (((0, 0), 3), ((64, 1), 65), ((128, 77), 140), ((192, 191), 200)):
        check(*case(text, width, shared, tokens, length, torch.float32))
    check(*case(text, width, shared, (128, 100), 131, torch.bfloat16))


@pytest.mark.parametrize("text", ["int8", "kivi2", "int4-rotated"])
def test_tokens_before_the_first_are_not_seen(path: str, text: str):
    for first in (1, 31, 32, 70):
        query, keys, values = case(text, 64, 2, (128, 128), 150, torch.float32, first)
        check(query, keys, values, hadamard(query))


def test_keys_and_values_may_begin_at_different_places(path: str):
    """As they do when blocks of keys and of values have different lengths."""
    query, keys, values = case(
        "k=uint2/b64x1/offset,v=uint2/g32/offset,window=64", 64, 2, (128, 110), 150, torch.float32
    )
    check(query, keys._replace(first=40), values._replace(first=40))
    shorter = (
        values.codes[:, :, 8:].contiguous(),
        values.scale[:, :, 1:].contiguous(),
        values.offset[:, :, 1:].contiguous(),
    )
    check(
        query,
        keys._replace(first=40),
        values._replace(codes=shorter[0], scale=shorter[1], offset=shorter[2], first=8, stop=78),
    )


def test_narrow_heads_and_odd_groups_are_left_to_the_reference():
    query = torch.zeros(1, 2, 1, 48)

    def lanes(text: str, width: int = 48) -> tuple[Lanes, Lanes]:
        scheme, _ = parse_kv(text)
        assert scheme is not None
        return Lanes.of(scheme.keys, width, keys=True), Lanes.of(scheme.values, width, keys=False)

    assert takes_packed(query, *lanes("int8"))
    assert not takes_packed(query, *lanes("k=int8/token,v=int4/g8"))
    assert not takes_packed(query[..., :40], *lanes("int8", 40))
    assert not takes_packed(query.expand(2, -1, -1, -1), *lanes("int8"))
    assert not takes_packed(query.double(), *lanes("int8"))


def test_scores_that_are_no_numbers_give_none(path: str):
    query, keys, values = case("int8", 32, 2, (64, 64), 70, torch.float32)
    query[0, 1, 0, 3] = float("nan")
    found = attend_packed(query, keys, values, 0.2)
    assert bool(found[0, 0, 1].isnan().all()) and not bool(found[0, 0, [0, 2, 3]].isnan().any())


def test_operands_that_do_not_fit_are_refused():
    query, keys, values = case("kivi2", 64, 2, (64, 64), 70, torch.float32)
    for wrong in (
        keys._replace(codes=keys.codes[:, :, :-1]),
        keys._replace(new=keys.new[:, :, :-1]),
        keys._replace(new=keys.new.bfloat16()),
    ):
        with pytest.raises(ShapeError):
            attend_packed(query, wrong, values, 0.2)


@pytest.mark.skipif(not hasattr(native, "append_token"), reason="the compiled appending is not there")
@pytest.mark.parametrize("text", ["int8", "int4", "int8-static", "k=uint2/token/offset/bfloat16,v=uint2/g32/offset", "k=int2/g8,v=int4/g16/float16", "k=uint8/token,v=uint8/token/offset/float16"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_is_appended_byte_for_byte_as_the_reference_does(text: str, dtype: torch.dtype):
    scheme, _ = parse_kv(text)
    assert scheme is not None
    torch.manual_seed(0)
    x = (torch.randn(2, 3, 45, 64) * torch.rand(2, 3, 45, 1) ** 8).to(dtype)  # small scales, too
    x[0, 0, 3], x[1, 2, 7] = 0.0, 1.25
    x[0, 1, 5] *= 1e-7
    for how, keys in ((scheme.keys, True), (scheme.values, False)):
        clip, lanes = 0.5 if how.dynamic is False else None, Lanes.of(how, 64, keys=keys)
        whole, single = (
            [torch.full((2, 3, *lanes.codes_shape(2)), 0x5A, dtype=torch.uint8)]
            + [torch.zeros(2, 3, *(lanes.scale_shape(2) or (0,)), dtype=lanes.stored) for _ in range(1 + lanes.offsets)]
            for _ in range(2)
        )
        if clip is not None:
            whole, single = whole[:1], single[:1]
        rounded = round_states(x, how, clip)
        lanes.write(whole[0], rounded.codes, 11)
        for buffer, part in zip(whole[1:], rounded[1:], strict=False):
            assert part is not None
            lanes.write_scale(buffer, part, 11)
        buffers = (*single, None, None)[:3]
        assert all(append_token(x[:, :, t : t + 1], how, lanes, buffers, 11 + t, clip) for t in range(45))
        assert all(torch.equal(a, b) for a, b in zip(whole, single, strict=True))
        x[0, 0, 0, 0] = float("nan")
        assert not append_token(x[:, :, :1], how, lanes, buffers, 11, clip)
        x[0, 0, 0, 0] = 0.0
