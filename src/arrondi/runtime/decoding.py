"""One token after another from a transformers model: the loop.

Owns: `tokens`, which yields what a model continues with, and `refuse_decoding`. What makes it quick: keys and values go to room that is
already there instead of being copied at every token (`arrondi.runtime.cache`); attention of one token is compiled
(`arrondi.runtime.attention`); and while single tokens are computed PyTorch's own threads rest, since its operators are too small for them
and would keep a core from the kernels, which use all threads.

What a model keeps from one token to the next (keys and values, states) is whatever its forward returns and takes again. Models that return
nothing of the kind read the whole text at every token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch

from arrondi.errors import SchemeError
from arrondi.native import kernel_threads
from arrondi.runtime.attention import own_attention, uses_own_attention
from arrondi.runtime.cache import growing_cache
from arrondi.runtime.kv import kv_cache
from arrondi.runtime.kv.cache import stored_kind


def refuse_decoding(model: Any) -> str | None:
    """Why a model does not continue a text, in one sentence; None if it does."""
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        return f"A {kind} turns one sequence into another with an encoder and a decoder. Use a decoder-only language model."
    if not model.can_generate() or "input_ids" not in _parameters(model):
        return f"A {kind} does not generate text. Use a decoder-only language model."
    return None


def tokens(
    model: Any, ids: list[int], count: int, *, temperature: float, stop: set[int], kv: str | None = None
) -> Iterator[int]:
    """The model's continuation.

    Args:
        model: a decoder-only language model of transformers.
        ids: the prompt.
        count: tokens at most.
        temperature: 0 takes the likeliest; above, torch's generator draws from the tempered distribution.
        stop: tokens after which it ends; the last one is yielded too.
        kv: what keys and values become, see `arrondi.runtime.kv.QuantizedCache`; None: what the model was quantized for;
            "none": they stay.

    Raises:
        SchemeError: there is no such kind, or it does not go with the model.
    """
    known = _parameters(model)
    cache = _cache(model, kv) if "past_key_values" in known else None
    kept: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
    options: dict[str, Any] = {
        name: value for name, value in {"use_cache": True, "logits_to_keep": 1}.items() if name in known
    }
    text, unread = list(ids), list(ids)
    where = device_of(model)
    with own_attention(model):
        for _ in range(count):
            with torch.no_grad(), kernel_threads(alone=len(unread) == 1):
                output = model(torch.tensor([unread], device=where), **kept, **options)
                chosen = _choose(output.logits[0, -1].float(), temperature)
            yield chosen
            if chosen in stop:
                return
            text.append(chosen)
            kept = {n: v for n, v in output.items() if n in known and n not in _RECORDED and v is not None}
            unread = [chosen] if kept else list(text)
            if not kept and "use_cache" in options:
                options["use_cache"] = False
            if "position_ids" in known and not _knows_length(kept, len(text) - 1):
                options["position_ids"] = torch.arange(len(text) - len(unread), len(text), device=where)[None]


def device_of(model: Any) -> torch.device:
    """Where a model lies as a whole."""
    return next(chain(model.parameters(), model.buffers())).device


def check_cache(model: Any, kv: str, token: int) -> None:
    """Send one token through a model whose keys and values are rounded.

    Raises:
        SchemeError: there is no such kind of cache, or it does not go with the model.
    """
    if kv.strip().lower() in ("full", "none"):
        return
    if "past_key_values" not in _parameters(model):
        raise SchemeError(f"A {type(model).__name__} keeps no keys and values that can be rounded. Drop --kv.")
    with torch.no_grad():
        model(torch.tensor([[token]], device=device_of(model)), past_key_values=kv_cache(model, kv), use_cache=True)


def _cache(model: Any, kv: str | None) -> Any:
    kv = stored_kind(model) if kv is None else kv
    if kv is None or kv.strip().lower() in ("full", "none"):
        return growing_cache(model)
    return kv_cache(model, kv, lazily=uses_own_attention(model))


_RECORDED = frozenset({"hidden_states", "attentions"})
"""What an output holds for whoever asked to see it."""


def _knows_length(kept: dict[str, Any], length: int) -> bool:
    """Whether caches tell the model at which position the text goes on. Some look at a layer that keeps no tokens."""
    return all(value.get_seq_length() == length for value in kept.values() if hasattr(value, "get_seq_length"))


def _choose(logits: torch.Tensor, temperature: float) -> int:
    if temperature > 0:
        return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1))
    return int(logits.argmax())


def _parameters(model: Any) -> frozenset[str]:
    """Names of the arguments of a model's forward."""
    return frozenset(inspect.signature(type(model).forward).parameters)
