"""The attention of one token to keys and values that are still packed: `attend_states`."""

from __future__ import annotations

from typing import Any

import torch

from arrondi.kernels.directions import Stretch, attend_along, takes_along
from arrondi.kernels.hadamard import hadamard
from arrondi.kernels.packed_states import attend_packed, takes_packed
from arrondi.runtime.kv.lazy import PackedStates
from arrondi.runtime.kv.spectral import SpectralStore


def attend_states(query: torch.Tensor, keys: PackedStates, values: PackedStates, scale: float) -> torch.Tensor | None:
    """softmax(scale · q Kᵀ) V, (1, 1, heads, width); None if no kernel takes it.

    Args:
        query: (1, heads, 1, width).
    """
    if keys.tokens != values.tokens:
        return None
    if isinstance(keys.side.store, SpectralStore):
        return _along(query, keys, values, scale)
    sides = keys.side, values.side
    if not takes_packed(query, sides[0].store.lanes, sides[1].store.lanes):
        return None
    turned = hadamard(query.float()) if sides[0].rotated and sides[0].store.stop else None
    return attend_packed(query, sides[0].packed(keys.tokens), sides[1].packed(keys.tokens), scale, turned=turned)


def _along(query: torch.Tensor, keys: PackedStates, values: PackedStates, scale: float) -> torch.Tensor | None:
    store: SpectralStore = keys.side.store
    old = keys.tokens - len(keys.side.window)
    first = max(store.stop - old, store.exact.shape[2])
    if first >= store.stop or not takes_along(query, store.prepared, values.side.store.prepared):
        return None
    of_keys, of_values = (_stretch(side.side, old, first) for side in (keys, values))
    return attend_along(query, (store.prepared, of_keys), (values.side.store.prepared, of_values), first, scale)


def _stretch(side: Any, old: int, first: int) -> Stretch:
    """Packed tokens from `first` on, and beside them those at the beginning and in the window."""
    store: SpectralStore = side.store
    kept = store.exact[:, :, store.stop - old :]
    return Stretch(
        store.codes, first - store.begin, store.stop - store.begin, torch.cat([kept, side.window.states], dim=2)
    )
