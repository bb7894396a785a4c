"""The int8 cache of a decoder layer that was exported.

Owns: `DecoderState`. Keys and values of the layer's own sequence are codes with its learned clip, in the buffers of arrondi's static
int8 cache; those of the other sequence are the codes that left their product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from arrondi.formats.kv import CacheScheme, schemes_of
from arrondi.kernels.packed_states import Packed, attend_packed, takes_packed
from arrondi.training.lightseq.method import positive

if TYPE_CHECKING:
    from arrondi.runtime.kv.store import Store


class DecoderState:
    """Tokens so far, and the other sequence, of one batch.

    Args:
        layer: an exported `LightSeqDecoderLayer`.
        memory: (batch, keys, width).
        mask: added to scores across, or None.
    """

    def __init__(self, layer: Any, memory: torch.Tensor, mask: torch.Tensor | None) -> None:
        self.attention, self.across, self.mask = layer.self_attn, layer.multihead_attn, mask
        self.codes, self.unsound = self.across.kv.product(memory)
        self.stores: tuple[Store, Store] | None = None

    @property
    def tokens(self) -> int:
        """How many came so far."""
        return 0 if self.stores is None else self.stores[0].stop

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """The attention of the next token, (batch, 1, width), to itself and those before."""
        q, k, v = self.attention.projected(x)
        if self.stores is None:
            from arrondi.runtime.kv.store import Store  # it brings transformers, which training does not need

            how, clip = schemes_of("int8-static")[0], float(positive(self.attention.states.clip))
            assert isinstance(how, CacheScheme)
            self.stores = Store(how.keys, k, keys=True, clip=clip), Store(how.values, v, keys=False, clip=clip)
        keys, values = self.stores
        keys.append(k)
        values.append(v)
        if takes_packed(q, keys.lanes, values.lanes):
            scale = q.shape[-1] ** -0.5
            seen = attend_packed(q, _packed(keys, q), _packed(values, q), scale).transpose(1, 2)
            y: torch.Tensor = self.attention.joined(seen)
            return y
        whole = [s.read(0, s.stop).to(q.dtype) for s in self.stores]
        y = self.attention.attend(q, *whole, None)
        return y

    def other(self, x: torch.Tensor) -> torch.Tensor:
        """Its attention to the other sequence."""
        pair = self.across.kv.numbers(self.codes, self.unsound, x.dtype)
        k, v = (self.across.split(part) for part in pair.chunk(2, -1))
        y: torch.Tensor = self.across.attend(self.across.split(self.across.q(x)), k, v, self.mask)
        return y

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order: what a beam search does with bytes."""
        count = len(self.codes)
        self.codes = self.codes.index_select(0, rows)
        self.unsound = self.unsound.reshape(count, -1).index_select(0, rows).flatten()
        if self.mask is not None and len(self.mask) == count:
            self.mask = self.mask.index_select(0, rows)
        for store in self.stores or ():
            store.select(rows)

    def bytes_used(self) -> int:
        """Bytes of keys and values, of both sequences."""
        return self.codes.nbytes + sum(store.bytes_used() for store in self.stores or ())


def _packed(store: Store, query: torch.Tensor) -> Packed:
    """All tokens of a store, with none behind it."""
    none = query.new_zeros((*query.shape[:2], 0, query.shape[3]))
    return Packed(store.lanes, store.codes, None, None, 0, store.stop, store.unit, none)
