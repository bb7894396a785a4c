"""The rounded cache against a plain loop over all tokens, in every chunking, and inside transformers' own generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GPT2Config, LlamaConfig, MambaConfig

import arrondi
from arrondi.errors import DataError, SchemeError, ShapeError
from arrondi.formats.kv import KV_KINDS, CacheScheme, parse_kv
from arrondi.kernels.hadamard import hadamard_matrix
from arrondi.runtime.kv import QuantizedCache, calibrate_clips, kv_cache
from arrondi.runtime.kv.layer import PackedLayer
from arrondi.tensor.nearest import fake_quantize
from tests.runtime.test_decoding import made

SMALL_KIVI = "k=uint2/b16x1/offset/float16,v=uint2/g8/offset/float16,window=32"
KINDS = ["int8", "k=int4/g8,v=uint4/g8/offset", "k=uint4/g16/offset,v=uint4/g16/offset,window=5,rotate", SMALL_KIVI]


def scheme_of(text: str) -> CacheScheme:
    found, _ = parse_kv(text)
    assert found is not None
    return found


def as_the_rules_say(x: torch.Tensor, scheme: CacheScheme, *, keys: bool) -> torch.Tensor:
    """All tokens at once: what must be rounded at this length, by a QTensor; the rest as it is."""
    tokens, together = x.shape[2], keys and scheme.key_tokens > 0
    count = tokens - tokens % scheme.window if together else max(tokens - scheme.window, 0)
    old = x[:, :, :count]
    matrix = hadamard_matrix(x.shape[-1]).float() / x.shape[-1] ** 0.5
    if keys and scheme.rotated:
        old = old @ matrix
    old = fake_quantize(old.contiguous(), (scheme.keys if keys else scheme.values).scheme)
    if keys and scheme.rotated:
        old = old @ matrix.T
    return torch.cat([old, x[:, :, count:]], dim=2)


def states(tokens: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(2, batch, 2, tokens, 16).unbind(0)
    return keys + 3 * torch.randn(16), values


def fed(text: str, keys: torch.Tensor, values: torch.Tensor, lengths: Sequence[int], **options: Any) -> PackedLayer:
    layer, at = PackedLayer(scheme_of(text), **options), 0
    for length in lengths:
        layer.update(keys[:, :, at : at + length], values[:, :, at : at + length])
        at += length
    assert at == keys.shape[2]
    return layer


@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize(
    "lengths", [[101], [1] * 101, [64, 1, 1, 35], [3, 97, 1], [32, 32, 32, 5], [31, 1, 1, 68]], ids=str
)
def test_every_chunking_keeps_what_the_rules_say(text: str, lengths: list[int]):
    keys, values = states(101)
    layer = fed(text, keys, values, lengths)
    for side, x, of_keys in zip(layer.sides, (keys, values), (True, False), strict=True):
        found = side.read(101, torch.float32)
        assert torch.allclose(found, as_the_rules_say(x, scheme_of(text), keys=of_keys), rtol=0, atol=1e-5)
        assert torch.equal(found, fed(text, keys, values, [101]).sides[not of_keys].read(101, torch.float32))


@pytest.mark.parametrize("text", KINDS)
def test_a_call_sees_its_own_states_as_they_are_and_older_ones_rounded(text: str):
    keys, values = states(40)
    layer = fed(text, keys[:, :, :37], values[:, :, :37], [37])
    seen = layer.update(keys[:, :, 37:], values[:, :, 37:])
    for found, x, of_keys in zip(seen, (keys, values), (True, False), strict=True):
        older = as_the_rules_say(x[:, :, :37], scheme_of(text), keys=of_keys)
        assert torch.allclose(found, torch.cat([older, x[:, :, 37:]], dim=2), rtol=0, atol=1e-5)
    assert layer.get_seq_length() == 40 and layer.get_mask_sizes(2) == (42, 0)


def test_a_window_that_holds_the_text_changes_nothing():
    keys, values = states(100)
    text = "k=uint2/b16x1/offset,v=uint2/g16/offset,window=112"
    layer = fed(text, keys[:, :, :60], values[:, :, :60], [50, 10])
    found = layer.update(keys[:, :, 60:], values[:, :, 60:])
    assert torch.equal(found[0], keys) and torch.equal(found[1], values)


def test_bits_are_what_the_schemes_promise():
    """Long texts: bits a number, with scales, and nothing for room that is empty."""
    wanted = {"int8": 8.25, "int4": 5.0, "int4-rotated": 5.0, "kivi4": 5.0, "kivi2": 3.0}
    keys = torch.randn(1, 2, 4096, 64)
    for name, bits in wanted.items():
        scheme = KV_KINDS[name].scheme
        assert scheme is not None
        layer = PackedLayer(scheme)
        layer.update(keys, keys)
        layer.settle()
        stores = [side.store for side in layer.sides]
        numbers = sum(64 * 2 * store.stop for store in stores)
        assert sum(store.bytes_used() for store in stores) * 8 / numbers == pytest.approx(bits, rel=0.01)
        assert sum(store.bytes_reserved() for store in stores) <= 1.15 * sum(store.bytes_used() for store in stores)
        assert all(side.window.buffer.shape[2] <= 2 * scheme.window + 64 for side in layer.sides)


def test_rows_of_the_batch_move_as_they_are():
    for text in KINDS:
        keys, values = states(70, batch=3)
        layer = fed(text, keys, values, [69, 1])
        before = [side.read(70, torch.float32) for side in layer.sides]
        rows = torch.tensor([2, 0, 0])
        layer.reorder_cache(rows)
        for side, old in zip(layer.sides, before, strict=True):
            assert torch.equal(side.read(70, torch.float32), old[rows])
        layer.batch_select_indices(torch.tensor([True, False, True]))
        layer.batch_repeat_interleave(2)
        for side, old in zip(layer.sides, before, strict=True):
            assert torch.equal(side.read(70, torch.float32), old[torch.tensor([2, 2, 0, 0])])


@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize("count", [1, 6, 40, 69, 70])
def test_cropping_forgets_the_newest(text: str, count: int):
    keys, values = states(90)
    layer = fed(text, keys[:, :, :70], values[:, :, :70], [70])
    before = [side.read(70, torch.float32) for side in layer.sides]
    layer.crop(-count)
    left = 70 - count
    assert layer.get_seq_length() == left
    for side, old in zip(layer.sides, before, strict=True):
        assert torch.allclose(side.read(left, torch.float32), old[:, :, :left], rtol=0, atol=1e-5)
    found = layer.update(keys[:, :, 70:], values[:, :, 70:])
    assert found[0].shape[2] == left + 20 and torch.equal(found[0][:, :, left:], keys[:, :, 70:])
    assert torch.allclose(found[1][:, :, :left], before[1][:, :, :left], rtol=0, atol=1e-5)
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.update(keys, values)[0].shape == keys.shape


@pytest.mark.parametrize("text", ["int8", SMALL_KIVI])
def test_a_sliding_window_gives_the_tokens_that_it_shows(text: str):
    keys, values = states(900, batch=1)
    layer, theirs, whole = (
        PackedLayer(scheme_of(text), sliding=50),
        DynamicCache(config=LlamaConfig(num_hidden_layers=1, sliding_window=50)).layers[0],
        PackedLayer(scheme_of(text)),
    )
    at = 0
    for length in (20, 1, 1, 60, 1, 1, 1, 150, 20, 600, *[1] * 45):
        parts = keys[:, :, at : at + length], values[:, :, at : at + length]
        assert layer.get_mask_sizes(length) == theirs.get_mask_sizes(length)
        found, exact, all_ = layer.update(*parts), theirs.update(*parts), whole.update(*parts)
        for a, b, c in zip(found, exact, all_, strict=True):
            assert a.shape == b.shape and torch.equal(a, c[:, :, -a.shape[2] :])
        at += length
    assert layer.get_seq_length() == theirs.get_seq_length() == at == 900
    assert layer.sides[0].store.bytes_reserved() < whole.sides[0].store.bytes_reserved() / 3
    with pytest.raises(SchemeError, match="what the window has forgotten is gone"):
        layer.crop(-1)


# ── in transformers ───────────────────────────────────────────────────────────────────────────────────────────────────

EIGHT = "k=uint8/token/offset,v=uint8/token/offset"
IDS = torch.arange(22).reshape(2, 11) * 31 % 95 + 2


def generated(model: Any, cache: Any, count: int = 40, **options: Any) -> torch.Tensor:
    given = {
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(IDS),
    } | options
    found: torch.Tensor = model.generate(IDS, past_key_values=cache, max_new_tokens=count, **given)
    return found


def rounded_by_hand(
    model: Any, ids: torch.Tensor, scheme: CacheScheme, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits of a text that is read one token at a time, the cache rounded between the tokens in a plain loop."""
    exact, logits = DynamicCache(config=model.config), []
    real: list[list[torch.Tensor]] = [[] for _ in exact.layers]
    with torch.no_grad():
        for t in range(ids.shape[1]):
            given = {} if mask is None else {"attention_mask": mask[:, : t + 1], "position_ids": (mask[:, : t + 1].sum(1) - 1).clamp(min=0)[:, None]}  # fmt: skip
            logits.append(model(ids[:, t : t + 1], past_key_values=exact, **given).logits[:, -1])
            for layer, kept in zip(exact.layers, real, strict=True):
                new = [layer.keys[:, :, -1:], layer.values[:, :, -1:]]
                kept[:] = [torch.cat([a, b], dim=2) for a, b in zip(kept, new, strict=True)] if kept else new
                layer.keys, layer.values = (
                    as_the_rules_say(x, scheme, keys=k) for x, k in zip(kept, (True, False), strict=True)
                )
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_model_reads_what_the_plain_loop_rounds(text: str, padded: bool):
    """Grouped queries, two texts at once, one of them with padding on the left."""
    model = made("llama")
    ids, mask = torch.arange(90).reshape(2, 45) * 31 % 95 + 2, torch.ones(2, 45, dtype=torch.long)
    if padded:
        mask[1, :7] = 0
    wanted = rounded_by_hand(model, ids, scheme_of(text), mask if padded else None)
    cache = kv_cache(model, text)
    found = []
    with torch.no_grad():
        for t in range(45):
            given = {"attention_mask": mask[:, : t + 1], "position_ids": (mask[:, : t + 1].sum(1) - 1).clamp(min=0)[:, None]} if padded else {}  # fmt: skip
            found.append(model(ids[:, t : t + 1], past_key_values=cache, **given).logits[:, -1])
    off = (torch.stack(found, dim=1) - wanted).abs()
    assert float(off[mask.bool()].max() / wanted.abs().max()) < 1e-4
    exact = model(
        ids, **({"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if padded else {})
    ).logits
    assert float((wanted - exact)[mask.bool()].abs().max()) > 1e-3  # rounding is seen at all


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3-windows", "gpt2", "qwen3.5", "jamba", "lfm2"])
def test_generation_with_eight_bits_goes_as_without(name: str):
    model = made(name)
    wanted = generated(model, None)
    cache = QuantizedCache(model.config, EIGHT)
    assert any(isinstance(layer, PackedLayer) for layer in cache.layers)
    found = generated(model, cache)
    assert found.shape == wanted.shape and float((found == wanted).float().mean()) > 0.8
    assert torch.equal(found[:, :12], wanted[:, :12])  # the first new token sees the prompt as it is
    assert cache.get_seq_length() == 11 + 40 - 1


def test_beams_and_sampling_go_through_the_cache():
    model = made("llama")
    for options in ({"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        wanted = generated(model, None, **options)
        window = "k=uint2/b16x1/offset,v=uint2/g16/offset,window=64"
        assert torch.equal(generated(model, kv_cache(model, window), **options), wanted)  # all is in the window
        assert generated(model, kv_cache(model, SMALL_KIVI), **options).shape == wanted.shape
    torch.manual_seed(0)
    assert generated(model, kv_cache(model, "int8"), do_sample=True).shape == (2, 51)


def test_layers_of_other_kinds():
    model = made("llama")
    cache = kv_cache(model, f"{SMALL_KIVI};1=full;2=int8")
    assert [type(layer).__name__ for layer in cache.layers] == ["PackedLayer", "DynamicLayer", "PackedLayer"]
    assert cache.layers[2].scheme == KV_KINDS["int8"].scheme
    generated(model, cache)
    used = cache.bytes_used()
    assert 0 < used < 2 * 3 * 2 * 2 * 50 * 16 * 4


def test_static_scales_come_from_text():
    model = made("llama")
    with pytest.raises(SchemeError, match="layer 0 has none"):
        kv_cache(model, "int8-static")
    with pytest.raises(DataError, match="there was none"):
        calibrate_clips(model, [])
    clips = calibrate_clips(model, [IDS, IDS.flip(1)])
    assert clips.keys() == {0, 1, 2}
    cache = kv_cache(model, "int8-static", clips=clips)
    found = generated(model, cache)
    assert float((found == generated(model, None)).float().mean()) > 0.8
    bits = cache.layers[0].sides[0].store.bytes_used() * 8 / (2 * 2 * 64 * 16)
    assert bits == 8.0
    with pytest.raises(SchemeError, match="Clips are positive numbers"):
        kv_cache(model, "int8-static", clips=dict.fromkeys(range(3), (0.0, 1.0)))


def test_bfloat16_states_stay_bfloat16():
    model = made("llama", torch.bfloat16)
    cache = kv_cache(model, "int8")
    model(IDS, past_key_values=cache)
    keys, _ = cache.layers[0].update(
        torch.zeros(2, 2, 1, 16, dtype=torch.bfloat16), torch.zeros(2, 2, 1, 16, dtype=torch.bfloat16)
    )
    assert keys.dtype == torch.bfloat16


def test_packed_states_are_an_ordinary_tensor_until_the_next_token():
    keys, values = states(40)
    lazily, plainly = (fed("int8", keys[:, :, :38], values[:, :, :38], [38], lazily=lazy) for lazy in (True, False))
    new = keys[:, :, 38:39], values[:, :, 38:39]
    found, wanted = lazily.update(*new), plainly.update(*new)
    for a, b in zip(found, wanted, strict=True):
        assert type(a) is not torch.Tensor and a.shape == b.shape and a.dtype == b.dtype
        assert (
            torch.equal(a + 0, b)
            and torch.equal(torch.cat([b, a]), torch.cat([b, b]))
            and torch.equal(a[..., 3], b[..., 3])
        )
    kept = lazily.update(keys[:, :, 39:], values[:, :, 39:])[0]
    lazily.update(keys[:, :, 39:], values[:, :, 39:])
    with pytest.raises(ShapeError, match="after the next tokens came"):
        kept + 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: QuantizedCache(LlamaConfig(num_hidden_layers=2), "int9"), "Unknown kind of key/value cache 'int9'. Did you mean"),
        (lambda: QuantizedCache(LlamaConfig(num_hidden_layers=2), "int8;2=int4"), "names layer 2, and the model has layers 0 to 1"),
        (lambda: QuantizedCache(MambaConfig(), "int8"), "type 'mamba' keeps no keys and values"),
        (lambda: QuantizedCache("model", "int8"), "made for a transformers config, got str"),
        (lambda: kv_cache(torch.nn.Linear(1, 1), "int8"), "made for a transformers config, got Linear"),
        (lambda: kv_cache(GPT2Config(n_layer=1), 8), "named by a word such as 'int8', got int"),
    ],
)  # fmt: skip
def test_what_does_not_go_is_refused(make: Any, words: str):
    with pytest.raises(SchemeError) as caught:
        make()
    assert words in str(caught.value)


def test_heads_that_do_not_fit_are_refused_with_the_first_states():
    model = made("llama")
    with pytest.raises(
        SchemeError, match=r"groups of 32 channels need heads that are a multiple of 32 wide, and these have 16"
    ):
        generated(model, kv_cache(model, "kivi2"))


def test_the_public_names():
    assert arrondi.kv_cache is kv_cache and arrondi.QuantizedCache is QuantizedCache and "kivi2" in arrondi.KV_KINDS
