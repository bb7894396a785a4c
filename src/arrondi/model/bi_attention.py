"""Attention of one-bit queries, keys, values and weights: transformers finds it under the names in `NAMES`.

Owns: `bi_attention`, its variant that keeps half of every row, their names, and `stored_attention`, by which a config.json says that a
model was trained with one of them.

Source: Qin et al. 2022, arXiv:2203.06390 (BiBERT). The sign of a softmax is +1 everywhere and says nothing; the scores' own signs are
+1 about half of the time, which is the most that a bit can say.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from arrondi.nn.straight import sign, step, straight

NAME: Final = "arrondi-bi"
HALF: Final = "arrondi-bi-half"
NAMES: Final = (NAME, HALF)
"""Attention implementations that are BiBERT's: weights are the scores that are not negative, or the larger half of each row."""

WINDOW: Final = 1.0
"""Gradients pass queries, keys, values and scores of at most this size."""


def bi_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """bool(sign(Q) sign(K)ᵀ / √d) sign(V), as transformers' attention functions.

    Args:
        module: not looked at, but for whether it is trained.
        query: (batch, heads, tokens, width).
        key, value: the same, or of fewer heads, each of which serves several queries.
        attention_mask: (batch, 1 or heads, tokens, tokens of the keys), added to the scores, or bool: True where a key is seen.
        options: `scaling` (None: 1/√width) and `dropout` of the weights; others are not looked at.

    Returns:
        (batch, tokens, heads, width), whole numbers, and the weights, 0 or 1, (batch, heads, tokens, tokens of the keys).
    """
    return _attention(module, query, key, value, attention_mask, False, **options)


def half_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`bi_attention` whose weights are 1 for the larger half of the scores of every row, by rank; of equal ones the first."""
    return _attention(module, query, key, value, attention_mask, True, **options)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    half: bool,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    if (shared := query.shape[1] // key.shape[1]) > 1:
        key, value = (t.repeat_interleave(shared, dim=1) for t in (key, value))
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = sign(query, WINDOW) @ sign(key, WINDOW).transpose(2, 3) * factor
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = _larger_half(scores) if half else step(scores, WINDOW)
    weights = torch.nn.functional.dropout(weights, dropout, module.training)
    return (weights @ sign(value, WINDOW)).transpose(1, 2).contiguous(), weights


def _larger_half(scores: torch.Tensor) -> torch.Tensor:
    """1 for the larger half of what a row sees, rounded up; gradients pass near the last of them."""
    seen = scores.detach() > torch.finfo(scores.dtype).min / 2
    order = scores.detach().sort(dim=-1, descending=True, stable=True)
    count = (seen.sum(-1, keepdim=True) + 1) // 2
    rank = torch.empty_like(order.indices).scatter_(
        -1, order.indices, torch.arange(scores.shape[-1], device=scores.device).expand_as(order.indices)
    )
    last = order.values.gather(-1, (count - 1).clamp(min=0))
    return straight(scores - last, ((rank < count) & seen).to(scores.dtype), WINDOW)


def stored_attention(config: Any) -> dict[str, str]:
    """What config.json says of a model whose attention is one of these; nothing of others."""
    name = getattr(config, "_attn_implementation", None)
    return {"attn_implementation": name} if name in NAMES else {}


AttentionInterface.register(NAME, bi_attention)
AttentionInterface.register(HALF, half_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
AttentionMaskInterface.register(HALF, sdpa_mask)
