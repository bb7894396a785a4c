"""Keys and values of a text that grows by one token at a time: `growing_cache`."""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM: Final = 256
"""Tokens for which room is made at a time."""


def growing_cache(model: Any) -> Any:
    """A cache whose plain layers grow in place; None, the model's own choice, where it has others (states, windows)."""
    cache = DynamicCache(config=model.config)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [_GrowingLayer() for _ in cache.layers]
    return cache


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
