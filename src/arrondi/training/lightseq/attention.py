"""Attention between int8 products.

Owns: `LightSeqAttention`, `combined_mask`. Scores and weights stay in floating point; queries, keys and values of a decoder are
rounded to one clip first, so that a cache of bytes loses nothing more.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from arrondi.errors import SchemeError, ShapeError
from arrondi.training.lightseq.method import LIGHTSEQ, LightseqOptions
from arrondi.training.lightseq.states import StatesClip
from arrondi.training.modules import become

Mask = torch.Tensor | None


def int8_linear(weight: torch.Tensor, bias: torch.Tensor | None, options: LightseqOptions) -> nn.Linear:
    """A linear layer with copies of these that trains by `lightseq`.

    Args:
        weight: (out, in).
        bias: (out,) or None.
    """
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    become(made, LIGHTSEQ, options)
    return made


class LightSeqAttention(nn.Module):
    """`nn.MultiheadAttention` with int8 products.

    Args:
        attention: whose weights are copied.
        cross: keys and values come from another sequence.
        cached: queries, keys and values are rounded to the codes of a cache.

    Raises:
        SchemeError: it has keys or values of their own width, or adds some to every sequence.
    """

    def __init__(self, attention: nn.MultiheadAttention, *, cross: bool = False, cached: bool = False) -> None:
        super().__init__()
        if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
            raise SchemeError(
                "LightSeq's attention has one width and adds no keys of its own: build the layer without kdim, vdim, add_bias_kv and add_zero_attn."
            )
        self.heads, self.batch_first, self.dropout = attention.num_heads, attention.batch_first, attention.dropout
        width, weight, bias = attention.embed_dim, attention.in_proj_weight, attention.in_proj_bias
        if cross:
            self.q = int8_linear(weight[:width], None if bias is None else bias[:width], LightseqOptions())
            self.kv = int8_linear(weight[width:], None if bias is None else bias[width:], LightseqOptions())
        else:
            self.qkv = int8_linear(weight, bias, LightseqOptions())
        out = attention.out_proj
        self.out_proj = int8_linear(out.weight, out.bias, LightseqOptions())
        self.states = StatesClip(weight) if cached else None

    def projected(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of (batch, tokens, width), each (batch, heads, tokens, head)."""
        q, k, v = (self.split(part) for part in self.qkv(x).chunk(3, -1))
        if self.states is not None:
            q, k, v = self.states(q, k, v)
        return q, k, v

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None, mask: Mask = None) -> torch.Tensor:
        """x and, across, memory as `batch_first` says; mask as `combined_mask` gives it → like x."""
        if not self.batch_first:
            x = x.transpose(0, 1)
        if memory is None:
            q, k, v = self.projected(x)
            y = self.attend(q, k, v, mask)
        else:
            pair = self.kv(memory if self.batch_first else memory.transpose(0, 1))
            k, v = (self.split(part) for part in pair.chunk(2, -1))
            y = self.attend(self.split(self.q(x)), k, v, mask)
        return y if self.batch_first else y.transpose(0, 1)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
        """(batch, heads, tokens, head) each → (batch, tokens, width)."""
        share = self.dropout if self.training else 0.0
        mask = None if mask is None else mask.to(q.dtype)
        return self.joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=share))

    def joined(self, y: torch.Tensor) -> torch.Tensor:
        """(batch, heads, tokens, head) → (batch, tokens, width), through the last projection."""
        joined: torch.Tensor = self.out_proj(y.transpose(1, 2).flatten(2))
        return joined

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width) → (batch, heads, tokens, head)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def combined_mask(
    x: torch.Tensor, keys: int, batch_first: bool, heads: int, mask: Mask, padding: Mask, causal: bool
) -> Mask:
    """PyTorch's masks of attention as one that is added to scores.

    Args:
        x: the queries' input, of three dimensions.
        keys: length of the other sequence.
        batch_first, heads: of the attention.
        mask: (tokens, keys) or (batch · heads, tokens, keys); bool, True where nothing is seen, or floating.
        padding: (batch, keys); the same.
        causal: without a mask, nothing is seen that comes later.

    Returns:
        (batch or 1, heads or 1, tokens or 1, keys) floating, or None.

    Raises:
        ShapeError: x or a mask has another shape.
    """
    if x.dim() != 3:
        raise ShapeError(
            f"A Transformer layer takes three dimensions here, got {tuple(x.shape)}: add one for the batch."
        )
    batch, tokens = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
    if mask is None and causal:
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=x.device).triu(1)
    total: Mask = None
    if mask is not None:
        if tuple(mask.shape) not in ((tokens, keys), (batch * heads, tokens, keys)):
            raise ShapeError(
                f"A mask of attention is ({tokens}, {keys}) or ({batch * heads}, {tokens}, {keys}), got {tuple(mask.shape)}."
            )
        total = _added(mask, x).reshape(*((1, 1) if mask.dim() == 2 else (batch, heads)), tokens, keys)
    if padding is not None:
        if tuple(padding.shape) != (batch, keys):
            raise ShapeError(f"A mask of padding is ({batch}, {keys}), got {tuple(padding.shape)}.")
        more = _added(padding, x)[:, None, None]
        total = more if total is None else total + more
    return total


def _added(mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask.to(x.dtype)
    return torch.zeros(mask.shape, dtype=x.dtype, device=mask.device).masked_fill(mask, float("-inf"))
