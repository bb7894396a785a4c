"""A cache of keys and values in few bits, as transformers takes one: `QuantizedCache`, `kv_cache`, `calibrate_clips`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from arrondi.errors import DataError, SchemeError
from arrondi.formats import ActivationScheme
from arrondi.formats.kv import CacheScheme, as_cache, parse_kv
from arrondi.runtime.kv.layer import PackedLayer

AnyKind = str | CacheScheme | ActivationScheme
Clips = Mapping[int, tuple[float, float]]


class QuantizedCache(Cache):
    """Keys and values of a text that grows, in few bits: `model.generate(past_key_values=QuantizedCache(model.config, "kivi2"))`.

    What a call brings is seen by it as it is and rounded afterwards, so the first pass over a prompt gives what it would give
    without. One cache is for one text or batch; `reset()` empties it.

    Args:
        config: of the model.
        kind: a name of `arrondi.KV_KINDS`; the grammar (`"k=uint4/g64/offset,v=uint4/g64/offset,window=64"`); either with other kinds for
            some layers (`"kivi2;0-1=int8;7=full"`); or a `CacheScheme`.
        clips: layer → largest magnitudes of its keys and of its values, for stored scales; `calibrate_clips` measures them.
        lazily: for models whose attention function is "arrondi": it reads packed states where one token is computed.

    Raises:
        SchemeError: there is no such kind, the model keeps no keys and values, or a layer has no clips. Heads of a width that does not
            go with the kind are refused when the first states come.

    Layers that keep states of another kind (linear attention, convolutions) stay as they are.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        kind: AnyKind = "int8",
        *,
        clips: Clips | None = None,
        lazily: bool = False,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise SchemeError(
                f"A cache is made for a transformers config, got {type(config).__name__}. Pass model.config."
            )
        default, others = _schemes(kind)
        layers = DynamicCache(config=config).layers
        beyond = [number for number in others if number >= len(layers)]
        if beyond and layers:
            raise SchemeError(f"The cache names layer {beyond[0]}, and the model has layers 0 to {len(layers) - 1}.")
        plain = [i for i, layer in enumerate(layers) if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)]
        if not plain:
            raise SchemeError(
                f"A model of the type {config.model_type!r} keeps no keys and values that can be rounded. Leave the kind of cache out."
            )
        for i in plain:
            scheme = others.get(i, default)
            if scheme is None:
                continue
            layers[i] = PackedLayer(
                scheme, clips=_clip(scheme, i, clips), sliding=getattr(layers[i], "sliding_window", None), lazily=lazily
            )
        super().__init__(layers=layers)

    def bytes_used(self) -> int:
        """Bytes of all keys and values that are kept, packed or not, without room for tokens to come."""
        return sum(map(_bytes, self.layers))


def kv_cache(model: Any, kind: AnyKind = "int8", *, clips: Clips | None = None, lazily: bool = False) -> QuantizedCache:
    """An empty cache for a transformers model or its config; see `QuantizedCache`.

    >>> from transformers import LlamaConfig
    >>> kv_cache(LlamaConfig(num_hidden_layers=2), "kivi2")
    QuantizedCache(layers=[PackedLayer, PackedLayer])
    """
    return QuantizedCache(getattr(model, "config", model), kind, clips=clips, lazily=lazily)


@torch.no_grad()
def calibrate_clips(model: Any, batches: Iterable[torch.Tensor]) -> dict[int, tuple[float, float]]:
    """The largest magnitudes of every layer's keys and values over some text, for `int8-static`.

    Args:
        model: a decoder of transformers.
        batches: token ids (batch, tokens) each.

    Raises:
        DataError: there are no batches, or states are not finite.
    """
    found: dict[int, tuple[float, float]] = {}
    for ids in batches:
        cache = model(ids, use_cache=True, past_key_values=DynamicCache(config=model.config)).past_key_values
        for i, layer in enumerate(cache.layers):
            if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.is_initialized:
                largest = (float(layer.keys.abs().max()), float(layer.values.abs().max()))
                before = found.get(i, largest)
                found[i] = max(before[0], largest[0]), max(before[1], largest[1])
    if not found:
        raise DataError("Clips of keys and values are measured on text, and there was none. Give batches of token ids.")
    return found


def _schemes(kind: AnyKind) -> tuple[CacheScheme | None, dict[int, CacheScheme | None]]:
    if isinstance(kind, CacheScheme):
        return kind, {}
    return (as_cache(kind), {}) if isinstance(kind, ActivationScheme) else parse_kv(kind)


def _clip(scheme: CacheScheme, layer: int, clips: Clips | None) -> tuple[float, float] | None:
    if not scheme.static:
        return None
    if clips is None or layer not in clips:
        raise SchemeError(
            f"Stored scales of keys and values come from calibration, and layer {layer} has none. Use int8; in Python, arrondi.calibrate_clips measures them on text."
        )
    if not all(0 < c < float("inf") for c in clips[layer]):
        raise SchemeError(f"Clips are positive numbers, got {clips[layer]} for layer {layer}.")
    return clips[layer]


def _bytes(layer: Any) -> int:
    if isinstance(layer, PackedLayer):
        return sum(side.store.bytes_used() + side.window.states.nbytes for side in layer.sides)
    states = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(s.nbytes for s in states if isinstance(s, torch.Tensor))
