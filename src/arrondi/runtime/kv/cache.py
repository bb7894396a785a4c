"""A cache of keys and values in few bits, as transformers takes one: `QuantizedCache`, `kv_cache`, `calibrate_clips`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig

from arrondi.checkpoint.states_file import KIND
from arrondi.errors import DataError, SchemeError
from arrondi.formats.kv import AnyCache, AnyKind, schemes_of
from arrondi.formats.spectral import SpectralCache
from arrondi.model.states import StateWatch, rounded_layers, watching_states
from arrondi.runtime.kv.layer import Clip, PackedLayer
from arrondi.tensor.spectrum import Basis

Clips = Mapping[int, tuple[Clip, Clip]]


class QuantizedCache(Cache):
    """Keys and values of a text that grows, in few bits: `model.generate(past_key_values=QuantizedCache(model.config, "kivi2"))`.

    What a call brings is seen by it as it is and rounded afterwards, so the first pass over a prompt gives what it would give
    without. One cache is for one text or batch; `reset()` empties it.

    Args:
        config: of the model.
        kind: a name of `arrondi.KV_KINDS`; the grammar (`"k=uint4/g64/offset,v=uint4/g64/offset,window=64"`); either with other kinds for
            some layers (`"kivi2;0-1=int8;7=full"`); or a `CacheScheme`.
        clips: layer → what is known of its keys and of its values: largest magnitudes for stored scales, directions for `pca2`;
            `calibrate_cache` measures them.
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
        layers, rounded = rounded_layers(config, kind)
        for i, scheme in rounded.items():
            layers[i] = PackedLayer(
                scheme, clips=_clip(scheme, i, clips), sliding=getattr(layers[i], "sliding_window", None), lazily=lazily
            )
        super().__init__(layers=layers)

    def bytes_used(self) -> int:
        """Bytes of all keys and values that are kept, packed or not, without room for tokens to come."""
        return sum(map(_bytes, self.layers))


def kv_cache(
    model: Any, kind: AnyKind | None = None, *, clips: Clips | None = None, lazily: bool = False
) -> QuantizedCache:
    """An empty cache for a transformers model or its config; see `QuantizedCache`.

    Without a kind it is the one that the model was quantized for, else int8; what calibration found for it is used.

    >>> from transformers import LlamaConfig
    >>> kv_cache(LlamaConfig(num_hidden_layers=2), "kivi2")
    QuantizedCache(layers=[PackedLayer, PackedLayer])
    """
    config = getattr(model, "config", model)
    stored, known = stored_kind(model) or "int8", getattr(model, KNOWN, {})
    if kind is None:
        kind = stored
    if clips is None and known:
        ours, theirs = schemes_of(kind), schemes_of(stored)
        clips = {i: c for i, c in known.items() if ours[1].get(i, ours[0]) == theirs[1].get(i, theirs[0])}
    return QuantizedCache(config, kind, clips=clips, lazily=lazily)


KNOWN = "arrondi_kv_known"
"""Attribute of a loaded model: layer → what calibration knows of its keys and values."""


def stored_kind(model: Any) -> str | None:
    """The kind of cache that a loaded model was quantized for; None if it says none."""
    found = getattr(getattr(model, "config", model), KIND, None)
    return found if isinstance(found, str) else None


@torch.no_grad()
def calibrate_cache(model: Any, kind: AnyKind, batches: Iterable[torch.Tensor]) -> dict[int, tuple[Clip, Clip]]:
    """What a kind of cache has to know of a model's keys and values: `kv_cache(model, kind, clips=calibrate_cache(…))`.

    Args:
        model: a decoder of transformers.
        kind: see `QuantizedCache`.
        batches: token ids (batch, tokens) each, the texts from their beginning and without padding.

    Returns:
        layer → of its keys and of its values, the largest magnitude or the directions; only layers whose kind needs it.

    Raises:
        DataError: there are no batches or too few tokens, or states are not finite.
    """
    watch = StateWatch(kind, model)
    empty = True
    with watching_states(model, watch.see):
        for ids in batches:
            empty = False
            model(ids, use_cache=False)
    if empty:
        raise DataError("Clips of keys and values are measured on text, and there was none. Give batches of token ids.")
    return watch.known()


def calibrate_clips(model: Any, batches: Iterable[torch.Tensor]) -> dict[int, tuple[Clip, Clip]]:
    """`calibrate_cache` for `int8-static`."""
    return calibrate_cache(model, "int8-static", batches)


def _clip(scheme: AnyCache, layer: int, clips: Clips | None) -> tuple[Clip, Clip] | None:
    if not scheme.static:
        return None
    spectral = isinstance(scheme, SpectralCache)
    if clips is None or layer not in clips:
        what, kind = ("Directions", "pca2") if spectral else ("Stored scales", "int8-static")
        raise SchemeError(
            f"{what} of keys and values come from calibration, and layer {layer} has none. Use int8, or quantize with --kv {kind} --calibration TEXT; in Python, arrondi.calibrate_cache measures them."
        )
    found = clips[layer]
    if spectral != all(isinstance(c, Basis) for c in found):
        raise SchemeError(f"What calibration says of layer {layer} is for another kind of cache than {scheme}.")
    if not spectral and not all(isinstance(c, float) and 0 < c < float("inf") for c in found):
        raise SchemeError(f"Clips are positive numbers, got {found} for layer {layer}.")
    return found


def _bytes(layer: Any) -> int:
    if isinstance(layer, PackedLayer):
        return sum(side.store.bytes_used() + side.window.states.nbytes for side in layer.sides)
    states = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(s.nbytes for s in states if isinstance(s, torch.Tensor))
