"""Schemes of key/value caches: names, the grammar, and what is refused in which words."""

from __future__ import annotations

import pytest

from arrondi.errors import SchemeError
from arrondi.formats import parse_scheme
from arrondi.formats.kv import KV_KINDS, CacheScheme, as_cache, parse_kv

KINDS = [name for name, kind in KV_KINDS.items() if kind.scheme is not None]


@pytest.mark.parametrize("name", KINDS)
def test_the_text_of_a_kind_means_the_kind(name: str):
    scheme = KV_KINDS[name].scheme
    assert parse_kv(str(scheme)) == (scheme, {}) == parse_kv(name.upper())


def test_kivi_is_what_its_paper_says():
    scheme = KV_KINDS["kivi2"].scheme
    assert isinstance(scheme, CacheScheme)
    assert (scheme.key_tokens, scheme.window, scheme.rotated) == (32, 128, False)
    assert str(scheme.keys) == "uint2/b32x1/offset/float16/o:float16"
    assert str(scheme.values) == "uint2/g32/offset/float16/o:float16"


def test_layers_may_differ():
    default, layers = parse_kv("kivi2; 0-1,5=int8 ;7=full")
    assert default == KV_KINDS["kivi2"].scheme and layers[7] is None
    assert {n: layers[n] for n in (0, 1, 5)} == dict.fromkeys((0, 1, 5), KV_KINDS["int8"].scheme)


def test_offsets_are_stored_as_scales_are():
    default, _ = parse_kv("k=uint4/g16/offset/bfloat16,v=int8/token,window=32,rotate")
    assert str(default) == "k=uint4/g16/offset/bfloat16/o:bfloat16,v=int8/token,window=32,rotate"


def test_kv_of_a_layer_scheme_is_for_keys_and_values():
    kv = parse_scheme("w=int8,kv=int8/token").kv
    assert kv is not None
    cache = as_cache(kv)
    assert str(cache) == "k=int8/token,v=int8/token"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kivi3", "Unknown kind of key/value cache 'kivi3'. Did you mean 'kivi4'?"),
        ("", "Unknown kind of key/value cache ''"),
        ("int8;x=int4", "Cannot read 'x=int4'"),
        ("int8;3", "Cannot read '3'"),
        ("k=int8/token", "optionally 'window=…' and 'rotate'"),
        ("k=int8/token,v=int8/token,window=-1", "optionally 'window=…'"),
        ("k=int8/token,v=int8/token,rotate=1", "Cannot read 'rotate=1'"),
        ("k=int8/token,k=int8/token,v=int8/token", "Cannot read 'k=int8/token'"),
        ("k=int3/token,v=int8/token", "integers of 2, 4 or 8 bits, got int3"),
        ("k=fp8/token,v=int8/token", "integers of 2, 4 or 8 bits, got fp8_e4m3"),
        ("k=uint4/g32/asym,v=int8/token", "Use 'offset' instead of 'asym'"),
        ("k=int8/token/e8m0,v=int8/token", "stored as float32, bfloat16 or float16"),
        ("k=int8/token,v=uint2/b32x1/offset", "values of a cache share scales by 'token', 'g32' or"),
        ("k=uint2/b8x1/offset,v=int8/token,window=32", "a multiple of 16 tokens"),
        ("k=uint2/b32x1/offset,v=int8/token", "must be a multiple of 32, got window=0. Use window=32."),
        ("k=uint2/b32x1/offset,v=int8/token,window=100", "Use window=96."),
        ("k=int8/tensor,v=int8/token", "symmetric and stored, 'tensor/static', got int8/tensor"),
        ("k=ternary/token,v=int8/token", "got ternary"),
    ],
)
def test_what_no_cache_can_be_is_refused(text: str, words: str):
    with pytest.raises(SchemeError) as caught:
        parse_kv(text)
    assert words in str(caught.value)


def test_heads_that_do_not_fit_are_told_what_does():
    scheme = KV_KINDS["int4"].scheme
    assert isinstance(scheme, CacheScheme)
    assert scheme.refuse_width(64) is None
    reason = scheme.refuse_width(80)
    assert reason is not None and "these have 80" in reason
    offered = reason.rpartition(": ")[2].removesuffix(".")
    other, _ = parse_kv(offered)
    assert other is not None and other.refuse_width(80) is None
