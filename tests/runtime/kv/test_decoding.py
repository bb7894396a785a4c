"""Our own decoding with rounded keys and values: packed or unpacked, fused or not, it says the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from arrondi.errors import SchemeError
from arrondi.kernels import packed_states
from arrondi.native import native
from arrondi.runtime import attention, decoding
from arrondi.runtime.attention import own_attention
from arrondi.runtime.decoding import check_cache, tokens
from arrondi.runtime.kv import calibrate_cache, kv_cache
from tests.runtime.small import fused
from tests.runtime.test_decoding import PROMPT, made

KINDS = ["int8", "k=uint4/g16/offset/float16,v=uint4/g16/offset/float16,rotate", "k=uint2/b16x1/offset/float16,v=uint2/g16/offset/float16,window=32", "k=pca2,v=pca3,window=0,first=4"]  # fmt: skip


def logits_of(model: Any, ids: torch.Tensor, kind: str, clips: Any, *, lazily: bool) -> torch.Tensor:
    """Of a prompt and then one token after another."""
    cache = kv_cache(model, kind, clips=clips, lazily=lazily)
    with torch.no_grad(), own_attention(model):
        found = [model(ids[:, :40], past_key_values=cache).logits[:, -1:]]
        found += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(40, ids.shape[1])]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "make",
    [lambda: made("llama"), lambda: fused("llama"), lambda: fused("qwen3-head-norms")],
    ids=["llama", "fused", "fused-norms"],
)
def test_packed_states_give_what_unpacked_ones_give(
    make: Any, kind: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    if native is None and "fused" in request.node.callspec.id:
        pytest.skip("blocks are fused by the compiled kernels")
    model = make()
    ids = torch.arange(100)[None] * 31 % 95 + 2
    called: list[int] = []
    kernel = attention.attend_states

    def counted(*args: Any) -> torch.Tensor | None:
        found = kernel(*args)
        called.append(found is not None)
        return found

    monkeypatch.setattr(attention, "attend_states", counted)
    words = torch.arange(256).reshape(2, 128) * 37 % 95 + 2
    clips = calibrate_cache(model, kind, [words])
    found = logits_of(model, ids, kind, clips, lazily=True)
    assert len(called) == 60 * len(model.model.layers) and all(called) == packed_states.available()
    wanted = logits_of(model, ids, kind, clips, lazily=False)
    off = (found - wanted).abs().amax(-1)[0] / wanted.abs().max()
    assert float(off[:5].max()) < 1e-4
    assert float(off.max()) < 1e-3, (
        "sums in another order move a number beside a tie to its other code, which all later tokens read"
    )


@pytest.mark.parametrize("name", ["mistral-window", "gemma3-windows", "gemma2-soft-caps", "gpt2", "qwen3.5"])
def test_other_models_decode_through_the_cache(name: str):
    """Windows, attention that is computed by somebody else, states of another kind."""
    model = made(name)
    eight = "k=uint8/token/offset,v=uint8/token/offset"
    wanted, rounded, kept = (
        list(tokens(model, PROMPT.tolist(), 30, temperature=0.0, stop=set(), kv=kv))
        for kv in (None, eight, f"{eight},window=64")
    )
    assert kept == wanted and rounded[:4] == wanted[:4]


def test_full_is_what_it_was():
    model = made("llama")
    found, wanted = (
        list(tokens(model, PROMPT.tolist(), 20, temperature=0.0, stop=set(), kv=kv)) for kv in ("full", None)
    )
    assert found == wanted


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("mamba", "int8", "keeps no keys and values that can be rounded"),
        ("openai-gpt-no-cache", "int8", "keeps no keys and values that can be rounded"),
        ("falcon-h1", "int8", "keeps no keys and values that can be rounded"),
        ("llama", "kivi2", "these have 16"),
        ("llama", "int7", "Unknown kind"),
    ],
)
def test_what_does_not_go_is_said_before_the_text_begins(name: str, kind: str, words: str):
    with pytest.raises(SchemeError, match=words):
        check_cache(made(name), kind, 3)


def test_decoding_asks_for_the_packed_form_only_where_somebody_reads_it():
    model = made("llama")
    model.set_attn_implementation("eager")
    assert not decoding._cache(model, "int8").layers[0].lazily
    assert list(tokens(model, PROMPT.tolist(), 5, temperature=0.0, stop=set(), kv="int8"))
