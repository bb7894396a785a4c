"""Transformer layers that train in LightSeq's int8 and are exported to integer inference.

Owns: `LightSeqEncoderLayer`, `LightSeqDecoderLayer`, `use_lightseq_layers`. They compute what PyTorch's layers of these names do, with other
products; the same modules run after `export`, on codes in place of weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from arrondi.errors import SchemeError
from arrondi.training.lightseq.attention import LightSeqAttention, Mask, combined_mask, int8_linear
from arrondi.training.lightseq.cache import DecoderState
from arrondi.training.lightseq.integer import IntegerLinear, clips_of, to_integers
from arrondi.training.lightseq.method import LightseqOptions

if TYPE_CHECKING:
    from typing_extensions import Self


class _Block(nn.Module):
    """What both kinds of layers have: norms before or after, and two products with an activation between."""

    origin: ClassVar[type[nn.TransformerEncoderLayer | nn.TransformerDecoderLayer]]
    """What it is made from."""

    def __init__(self, layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> None:
        super().__init__()
        self.norm_first: bool = layer.norm_first
        self.activation: Callable[[torch.Tensor], torch.Tensor] = copy.deepcopy(layer.activation)
        self.linear1 = int8_linear(layer.linear1.weight, layer.linear1.bias, LightseqOptions())
        # Codes of the offset form would waste a byte of output on the offset; without one, sums are kept all the same.
        inputs = LightseqOptions("int32", "unsigned" if _is_relu(self.activation) else "signed")
        self.linear2 = int8_linear(layer.linear2.weight, layer.linear2.bias, inputs)
        self.dropout = copy.deepcopy(layer.dropout)
        self.train(layer.training)

    @classmethod
    def from_torch(cls, layer: Any) -> Self:
        """A layer with copies of the weights of PyTorch's.

        Raises:
            SchemeError: it is another module.
        """
        if not isinstance(layer, cls.origin):
            raise SchemeError(f"{cls.__name__} is made from nn.{cls.origin.__name__}, got {type(layer).__name__}.")
        return cls(layer)

    def export(self) -> Self:
        """A copy for inference, with codes in place of weights; its outputs are the same. Run a batch first."""
        found = copy.deepcopy(self).eval()
        to_integers(found)
        return found.requires_grad_(False)

    def _added(self, x: torch.Tensor, norm: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        if self.norm_first:
            return x + change(norm(x))
        y: torch.Tensor = norm(x + change(x))
        return y

    def _fed_forward(self, x: torch.Tensor, last: nn.Module) -> torch.Tensor:
        between = self.linear1(x)
        if not _is_relu(self.activation):  # a ReLU is part of unsigned codes
            between = self.activation(between)
        y: torch.Tensor = last(self.linear2(self.dropout(between)))
        return y


class LightSeqEncoderLayer(_Block):
    """`nn.TransformerEncoderLayer` with LightSeq's int8 products (Wang et al., 2021, arXiv:2010.13887).

    The second product of the feed-forward part keeps int32 sums; after a ReLU its input has codes over the whole byte, and the
    offset of them is added after sums became numbers. The first batch sets the clips: run one before `fully_shard`.
    """

    origin = nn.TransformerEncoderLayer

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__(layer)
        self.self_attn = LightSeqAttention(layer.self_attn)
        self.norm1, self.norm2 = copy.deepcopy(layer.norm1), copy.deepcopy(layer.norm2)
        self.dropout1, self.dropout2 = copy.deepcopy(layer.dropout1), copy.deepcopy(layer.dropout2)
        self.train(layer.training)

    def forward(
        self, src: torch.Tensor, src_mask: Mask = None, src_key_padding_mask: Mask = None, is_causal: bool = False
    ) -> torch.Tensor:
        """As `nn.TransformerEncoderLayer`, with three dimensions."""
        attention = self.self_attn
        keys = src.shape[1 if attention.batch_first else 0]
        mask = combined_mask(
            src, keys, attention.batch_first, attention.heads, src_mask, src_key_padding_mask, is_causal
        )
        x = self._added(src, self.norm1, lambda v: self.dropout1(attention(v, mask=mask)))
        return self._added(x, self.norm2, lambda v: self._fed_forward(v, self.dropout2))

    def clips(self) -> torch.Tensor:
        """LightSeq's table of a layer, (12,) float32: of weights, inputs and outputs, each of the products for queries, keys and
        values, of the attention's output, and of the two feed-forward ones. The last is 0: that product has no clip of outputs."""
        return clips_of([self.self_attn.qkv, self.self_attn.out_proj, self.linear1, self.linear2])


class LightSeqDecoderLayer(_Block):
    """`nn.TransformerDecoderLayer` with LightSeq's int8 products; queries, keys and values of its own sequence have one learned clip
    more, of the cache. See `LightSeqEncoderLayer`.
    """

    origin = nn.TransformerDecoderLayer

    def __init__(self, layer: nn.TransformerDecoderLayer) -> None:
        super().__init__(layer)
        self.self_attn = LightSeqAttention(layer.self_attn, cached=True)
        self.multihead_attn = LightSeqAttention(layer.multihead_attn, cross=True)
        for i in (1, 2, 3):
            for part in (f"norm{i}", f"dropout{i}"):
                setattr(self, part, copy.deepcopy(getattr(layer, part)))
        self.train(layer.training)

    norm1: nn.Module
    norm2: nn.Module
    norm3: nn.Module
    dropout1: nn.Module
    dropout2: nn.Module
    dropout3: nn.Module

    def forward(
        self,
        tgt: torch.Tensor,
        memory: torch.Tensor,
        tgt_mask: Mask = None,
        memory_mask: Mask = None,
        tgt_key_padding_mask: Mask = None,
        memory_key_padding_mask: Mask = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> torch.Tensor:
        """As `nn.TransformerDecoderLayer`, with three dimensions."""
        own, other = self.self_attn, self.multihead_attn
        first, heads, axis = own.batch_first, own.heads, 1 if own.batch_first else 0
        mask = combined_mask(tgt, tgt.shape[axis], first, heads, tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        across = combined_mask(
            tgt, memory.shape[axis], first, heads, memory_mask, memory_key_padding_mask, memory_is_causal
        )
        x = self._added(tgt, self.norm1, lambda v: self.dropout1(own(v, mask=mask)))
        x = self._added(x, self.norm2, lambda v: self.dropout2(other(v, memory, across)))
        return self._added(x, self.norm3, lambda v: self._fed_forward(v, self.dropout3))

    def begin(self, memory: torch.Tensor, memory_key_padding_mask: Mask = None) -> DecoderState:
        """What `step` needs of the other sequence, and room for keys and values, all in bytes.

        Args:
            memory: as in `forward`.
            memory_key_padding_mask: (batch, keys).

        Raises:
            SchemeError: the layer was not exported.
        """
        if not isinstance(self.linear1, IntegerLinear):
            raise SchemeError("Only an exported layer decodes token by token: call export() first.")
        memory = memory if self.self_attn.batch_first else memory.transpose(0, 1)
        heads = self.multihead_attn.heads
        mask = combined_mask(memory, memory.shape[1], True, heads, None, memory_key_padding_mask, False)
        return DecoderState(self, memory, mask)

    @torch.no_grad()
    def step(self, x: torch.Tensor, state: DecoderState) -> torch.Tensor:
        """The next token, which sees those before it: what `forward` gives for it in a whole text with a causal mask.

        Args:
            x: (batch, 1, width), or (1, batch, width) where the layer is not `batch_first`.
            state: from `begin`; it is changed.
        """
        first = self.self_attn.batch_first
        x = x if first else x.transpose(0, 1)
        x = self._added(x, self.norm1, state.own)
        x = self._added(x, self.norm2, state.other)
        x = self._added(x, self.norm3, lambda v: self._fed_forward(v, self.dropout3))
        return x if first else x.transpose(0, 1)

    def clips(self) -> torch.Tensor:
        """LightSeq's table of a layer, (19,) float32: of weights, inputs and outputs, each of the products for queries, keys and
        values, of the attention's output, for queries across, of that attention's output, and of the two feed-forward ones (the
        last one's outputs have none: 0); then the clip of the cache. Keys and values across, which LightSeq computes for all
        layers at once, have their own: `memory_clips`."""
        own, other = self.self_attn, self.multihead_attn
        linears = [own.qkv, own.out_proj, other.q, other.out_proj, self.linear1, self.linear2]
        assert own.states is not None
        return torch.cat((clips_of(linears), own.states.clip.detach().float()))

    def memory_clips(self) -> torch.Tensor:
        """Of the product for keys and values across: weight, input, output, (3,) float32."""
        return clips_of([self.multihead_attn.kv])


def use_lightseq_layers(model: nn.Module) -> list[str]:
    """Put LightSeq's layers into the places of PyTorch's Transformer layers, in place; returns the names of those replaced.

    Raises:
        SchemeError: the model has none, or is one itself.
    """
    if isinstance(model, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        raise SchemeError("The model is such a layer itself: take LightSeqEncoderLayer.from_torch, or of the decoder.")
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
    ]
    if not found:
        raise SchemeError("The model has no nn.TransformerEncoderLayer or nn.TransformerDecoderLayer.")
    for name, module in found:
        encoder = isinstance(module, nn.TransformerEncoderLayer)
        kind: Any = LightSeqEncoderLayer if encoder else LightSeqDecoderLayer
        model.set_submodule(name, kind.from_torch(module))
    return [name for name, _ in found]


def _is_relu(activation: Any) -> bool:
    return activation in (F.relu, torch.relu, "relu") or isinstance(activation, nn.ReLU)
