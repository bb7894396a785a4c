"""The attention function of our decoding: transformers' `sdpa`, with the attention of one token compiled.

Owns: its name in transformers' table, `own_attention`, which makes a model use it for a while, and `IMPLEMENTATIONS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from arrondi.kernels.tokens import attend, takes_attention
from arrondi.runtime.kv.attend import attend_states
from arrondi.runtime.kv.lazy import PackedStates

NAME: Final = "arrondi"
IMPLEMENTATIONS: Final = ("sdpa", NAME)
"""Attention functions that ignore which module calls them: fused blocks call them with what the block would."""
_SPECIAL: Final = ("position_bias", "softcap", "s_aux", "cache")
"""Options that change what `sdpa` computes."""


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' attention functions: query, key, value (batch, heads, tokens, width) → (batch, tokens, heads, width)."""
    plain = attention_mask is None and not options.get("dropout") and all(options.get(n) is None for n in _SPECIAL)
    scale = options.get("scaling")
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(key, PackedStates) and isinstance(value, PackedStates):
        if plain and (found := attend_states(query, key, value, factor)) is not None:
            return found, None
        key, value = key.restored(), value.restored()
    if plain and takes_attention(query, key, value):
        return attend(query, key, value, factor), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def uses_own_attention(model: Any) -> bool:
    """Whether `own_attention` changes anything for a model, or has done so."""
    return model.config.get_text_config(decoder=True)._attn_implementation in IMPLEMENTATIONS


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """A language model, or the language part of a model, that uses `sdpa` uses `attention` inside."""
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation != "sdpa":
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
