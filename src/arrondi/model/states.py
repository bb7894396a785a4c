"""The keys and values that a model's attention is given: `watching_states`, `StateWatch`, and `turns_of`, its rotary embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from arrondi.calibration.states import StateStatistics
from arrondi.errors import SchemeError
from arrondi.formats.kv import AnyKind, schemes_of
from arrondi.tensor.spectrum import Basis, Turn

_NAME: Final = "arrondi_watched"
See = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Called with a layer's number in the cache, and its queries, keys and values (batch, heads, tokens, width)."""
_watchers: list[See] = []


def _attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any) -> Any:  # fmt: skip
    number = getattr(module, "layer_idx", None)
    if number is not None:
        for see in _watchers:
            see(number, query.detach(), key.detach(), value.detach())
    return sdpa_attention_forward(module, query, key, value, *args, **options)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@contextmanager
def watching_states(model: Any, see: See) -> Iterator[None]:
    """Inside, every attention of a decoder that uses `sdpa` shows its queries, keys and values as a cache would be given them; others show none."""
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    if before != "sdpa":
        yield
        return
    config._attn_implementation = _NAME
    _watchers.append(see)
    try:
        yield
    finally:
        _watchers.remove(see)
        config._attn_implementation = before


def turns_of(model: Any) -> list[Turn]:
    """The rotary embeddings that keys may have been turned by: every set of frequencies of a model, pairs lying in each of the known ways."""
    found: dict[tuple[float, ...], torch.Tensor] = {}
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dim() == 1 and not buffer.is_meta:
            found.setdefault(tuple(buffer.tolist()), buffer.detach().float().cpu())
    return [Turn(f, neighbours, last) for f in found.values() for neighbours in (False, True) for last in (False, True)]


def rounded_layers(config: Any, kind: AnyKind) -> tuple[list[Any], dict[int, Any]]:
    """The layers of transformers' own cache for a model, and layer → scheme of those whose keys and values are rounded.

    Raises:
        SchemeError: there is no such kind, it names a layer that is not there, or the model keeps no keys and values.
    """
    default, others = schemes_of(kind)
    layers = DynamicCache(config=config).layers
    beyond = [number for number in others if number >= len(layers)]
    if beyond and layers:
        raise SchemeError(
            f"The cache names layer {beyond[0]}, and the model has layers 0 to {len(layers) - 1}. Name those."
        )
    plain = [i for i, layer in enumerate(layers) if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)]
    if not plain:
        raise SchemeError(
            f"A model of the type {config.model_type!r} keeps no keys and values that can be rounded. Leave the kind of cache out."
        )
    return layers, {i: scheme for i in plain if (scheme := others.get(i, default)) is not None}


class StateWatch:
    """What a kind of cache has to know of every layer, summed as keys and values come by.

    Args:
        kind: see `arrondi.runtime.kv.QuantizedCache`.
        model: whose rotary embeddings are tried.
    """

    def __init__(self, kind: AnyKind, model: Any) -> None:
        self.default, self.others = schemes_of(kind)
        self.needed = any(s is not None and s.static for s in (self.default, *self.others.values()))
        self.turns = turns_of(model)
        self.seen: dict[int, StateStatistics] = {}

    def see(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add queries, keys and values (batch, heads, tokens, width) of texts that begin here."""
        scheme = self.others.get(layer, self.default)
        if scheme is not None and scheme.static:
            self.seen.setdefault(layer, StateStatistics(scheme, self.turns)).see(queries, keys, values)

    def known(self) -> dict[int, tuple[float | Basis, float | Basis]]:
        """Layer → what is known of its keys and of its values.

        Raises:
            SchemeError: no attention showed any.
        """
        if self.needed and not self.seen:
            raise SchemeError(
                "Keys and values cannot be calibrated here: no attention of this model is transformers' sdpa. Use --kv int8, int4 or kivi2."
            )
        return {i: statistics.known() for i, statistics in sorted(self.seen.items())}
