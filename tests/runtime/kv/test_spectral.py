"""Keys and values along their principal directions."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from arrondi.errors import DataError, SchemeError
from arrondi.formats.kv import parse_kv
from arrondi.formats.spectral import SpectralCache
from arrondi.runtime.kv import calibrate_cache, kv_cache
from arrondi.runtime.kv.measure import compare_caches
from arrondi.tensor.spectrum import Moments, Turn, basis_of, decode, encode, energies
from tests.runtime.kv.test_cache import IDS, generated
from tests.runtime.test_decoding import made

TEXT = torch.arange(128).reshape(2, 64) * 31 % 95 + 2


def turned(x: torch.Tensor, start: int) -> torch.Tensor:
    """By transformers' own rotary embedding."""
    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=32, num_attention_heads=2, head_dim=16))
    cos, sin = rotary(x, torch.arange(start, start + x.shape[2])[None])
    found: torch.Tensor = apply_rotary_pos_emb(x, x, cos, sin)[0]
    return found


def flat_states(tokens: int = 400) -> torch.Tensor:
    """States (1, 2, tokens, 16) that vary in three directions and hardly in others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, tokens, 3, generator=generator) @ torch.randn(2, 3, 16, generator=generator)
    return x + 0.01 * torch.randn(x.shape, generator=generator) + torch.arange(16) / 4


def test_a_turn_is_the_rotary_embedding_and_goes_back():
    x = flat_states(30)
    turn = Turn(1e4 ** -(torch.arange(0, 16, 2) / 16))
    torch.testing.assert_close(turn.apply(x, 7), turned(x, 7), rtol=0, atol=2e-5)
    for other in (turn, Turn(turn.frequencies[:4], True), Turn(turn.frequencies[:4], False, True)):
        torch.testing.assert_close(other.apply(other.apply(x, 5), 5, back=True), x, rtol=0, atol=2e-5)


@pytest.mark.parametrize("bits", [1.0, 2.0, 2.5, 4.0])
def test_bits_go_where_states_vary(bits: float):
    x = flat_states()
    basis, left = basis_of(Moments.of(x), bits)
    packed = encode(x, basis, 0)
    assert packed.shape == (1, 2, 400, basis.bytes) and basis.bytes * 8 <= bits * 16
    error = float((decode(packed, basis, 0) - x).square().sum(-1).mean())
    spread = float((x - x.mean(2, keepdim=True)).square().sum(-1).mean())
    assert error < {1.0: 0.03, 2.0: 0.0006, 2.5: 0.0006, 4.0: 0.0006}[bits] * spread
    assert left / 2 == pytest.approx(error, rel=1.0)


def test_errors_count_as_the_queries_make_them():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 2, 400, 16, generator=generator) @ torch.randn(2, 16, 16, generator=generator)
    queries = torch.randn(300, 16, generator=generator) * torch.logspace(-2, 1, 16)
    weight = energies(queries.double().square().mean(0).expand(2, -1), None).sqrt()
    errors = []
    for one in (None, weight):
        basis, left = basis_of(Moments.of(x), 2.0, None, one)
        off = (decode(encode(x, basis, 0), basis, 0) - x) @ queries.T
        errors.append(float(off.square().sum(1).mean()))  # of both heads
    assert errors[1] < 0.3 * errors[0]
    assert left == pytest.approx(errors[1], rel=0.5)


@pytest.mark.parametrize("turn", [Turn(torch.ones(4)), Turn(torch.ones(4), True), Turn(torch.ones(4), False, True), Turn(torch.ones(4), True, True)])  # fmt: skip
def test_the_two_of_a_pair_share_what_they_meet(turn: Turn):
    """Whatever angle they are turned by: the sum of both is what stays."""
    q = torch.randn(2, 50, 10, dtype=torch.float64)
    found = energies(q.square().sum(1), turn)
    torch.testing.assert_close(found, energies(turn.apply(q, 3).square().sum(1), turn))
    torch.testing.assert_close(found.sum(-1), q.square().sum((1, 2)))


def test_one_call_or_many_give_the_same_bytes():
    x = turned(flat_states(100), 0)
    basis, _ = basis_of(Moments.of(x), 3.0, Turn(1e4 ** -(torch.arange(0, 16, 2) / 16)))
    at_once = encode(x, basis, 0)
    parts = [encode(x[:, :, i : i + 7], basis, i) for i in range(0, 100, 7)]
    assert float((torch.cat(parts, dim=2) != at_once).float().mean()) < 1e-3  # but where a product is rounded otherwise


def test_the_rotary_embedding_of_a_model_is_found():
    model = made("llama")
    known = calibrate_cache(model, "pca2", [TEXT])
    assert known.keys() == {0, 1, 2}
    for keys, values in known.values():
        assert keys.turn is not None and not keys.turn.neighbours and values.turn is None  # type: ignore[union-attr]


def test_more_bits_cost_less_and_the_window_is_exact():
    model = made("llama")
    wanted = generated(model, None)
    known = calibrate_cache(model, "k=pca4,v=pca4", [TEXT])
    assert torch.equal(generated(model, kv_cache(model, "k=pca4,v=pca4,window=64", clips=known)), wanted)
    costs = []
    for bits in (2, 4, 8):
        kind = f"k=pca{bits},v=pca{bits}"
        clips = calibrate_cache(model, kind, [TEXT])
        costs.append(compare_caches(model, model, [TEXT], lambda k=kind, c=clips: kv_cache(model, k, clips=c), chunk=4).summary().kl_mean)  # fmt: skip
    assert costs[0] > 4 * costs[1] > 16 * costs[2] > 0


def test_what_transformers_asks_of_a_cache():
    model = made("llama")
    known = calibrate_cache(model, "k=pca4,v=pca4", [TEXT])
    cache = kv_cache(model, "k=pca4,v=pca4,window=4,first=2", clips=known)
    with torch.no_grad():
        model(TEXT, past_key_values=cache)
        layer = cache.layers[0]
        length = cache.get_seq_length()
        before = [side.read(length, torch.float32) for side in layer.sides]
        cache.crop(9)
        after = [side.read(length - 9, torch.float32) for side in layer.sides]
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[:, :, : length - 9], b)
        cache.reorder_cache(torch.tensor([1, 1]))
        assert torch.equal(layer.sides[0].read(5, torch.float32)[0], layer.sides[0].read(5, torch.float32)[1])
    side = layer.sides[1]
    assert side.store.exact.shape[2] == 2 and side.store.bytes_used() < side.store.stop * 2 * 2 * 16
    assert cache.bytes_used() > 0


def test_the_grammar_goes_both_ways():
    scheme, layers = parse_kv("k=pca2.5,v=pca2,window=64,first=1;0=int8")
    assert scheme == SpectralCache(2.5, 2, 64, 1) and parse_kv(str(scheme))[0] == scheme and 0 in layers


@pytest.mark.parametrize(
    "kind", ["k=pca2,v=int8", "k=pca9,v=pca2", "k=pca2,v=pca2,rotate", "k=int8,v=int8,first=2", "pca7"]
)
def test_other_words_are_refused(kind: str):
    with pytest.raises(SchemeError):
        parse_kv(kind)


def test_what_is_missing_is_said():
    model = made("llama")
    with pytest.raises(SchemeError, match="come from calibration, and layer 0 has none"):
        kv_cache(model, "pca2")
    with pytest.raises(DataError, match="16 channels need 32 tokens"):
        calibrate_cache(model, "pca2", [IDS[:1, :9]])
    other = calibrate_cache(model, "int8-static", [IDS])
    with pytest.raises(SchemeError, match="another kind of cache"):
        kv_cache(model, "pca2", clips=other)
    known = calibrate_cache(model, "pca2", [TEXT])
    x = torch.full((1, 2, 3, 16), float("nan"))
    with pytest.raises(DataError, match="NaN or infinite"):
        encode(x, known[0][0], 0)  # type: ignore[arg-type]
