"""One token after another from a transformers model: the loop, its cache and its attention.

Owns: `tokens`, which yields what a model continues with. What makes it quick: keys and values go to room that is already
there instead of being copied at every token; attention of one token is compiled (`arrondi.kernels.tokens`); and while
single tokens are computed PyTorch's own threads rest, since its operators are too small for them and would keep a core
from the kernels, which use all threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from arrondi.kernels.tokens import attend, takes_attention
from arrondi.native import kernel_threads

_ROOM = 256
"""Tokens for which room is made at a time."""


def tokens(model: Any, ids: list[int], count: int, *, temperature: float, stop: set[int]) -> Iterator[int]:
    """The model's continuation.

    Args:
        model: a causal language model of transformers.
        ids: the prompt.
        count: tokens at most.
        temperature: 0 takes the likeliest; above, torch's generator draws from the tempered distribution.
        stop: tokens after which it ends; the last one is yielded too.
    """
    cache = _growing_cache(model)
    inputs = torch.tensor([ids])
    with _own_attention(model):
        for i in range(count):
            with torch.no_grad(), kernel_threads(alone=i > 0):
                output = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
                logits = output.logits[0, -1].float()
                if temperature > 0:
                    chosen = int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1))
                else:
                    chosen = int(logits.argmax())
            cache = output.past_key_values
            yield chosen
            if chosen in stop:
                return
            inputs = torch.tensor([[chosen]])


class _GrowingLayer(DynamicLayer):
    """Keys and values as the front part of larger buffers."""

    keys: torch.Tensor
    values: torch.Tensor
    room: list[torch.Tensor]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if not self.is_initialized or after > self.room[0].shape[-2]:
            old = (self.keys, self.values) if before else None
            self.lazy_initialization(key_states, value_states)
            self.room = [_larger(s, after) for s in (key_states, value_states)]
            if old is not None:
                for room, part in zip(self.room, old, strict=True):
                    room[..., :before, :] = part
        self.keys, self.values = (room[..., :after, :] for room in self.room)
        self.keys[..., before:, :] = key_states
        self.values[..., before:, :] = value_states
        return self.keys, self.values


def _larger(states: torch.Tensor, length: int) -> torch.Tensor:
    shape = list(states.shape)
    shape[-2] = (length // _ROOM + 2) * _ROOM
    return states.new_empty(shape)


def _growing_cache(model: Any) -> Any:
    """A cache whose plain layers grow in place; None, the model's own choice, where it has others (states, windows)."""
    cache = DynamicCache(config=model.config)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [_GrowingLayer() for _ in cache.layers]
    return cache


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa`, with the attention of one token to all others compiled."""
    plain = attention_mask is None and all(options.get(name) is None for name in ("position_bias", "softcap", "s_aux"))
    if plain and not options.get("dropout") and takes_attention(query, key, value):
        scale = options.get("scaling")
        return attend(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


@contextmanager
def _own_attention(model: Any) -> Iterator[None]:
    """Models that use `sdpa` use `_attention` inside."""
    if model.config._attn_implementation != "sdpa":
        yield
        return
    AttentionInterface.register("arrondi", _attention)
    AttentionMaskInterface.register("arrondi", sdpa_mask)
    model.config._attn_implementation = "arrondi"
    try:
        yield
    finally:
        model.config._attn_implementation = "sdpa"
