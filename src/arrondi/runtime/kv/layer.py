"""One layer of a rounded cache: `PackedLayer` for transformers, made of two `Side`s, keys and values.

The rule (Liu et al. 2024, arXiv:2402.02750): what a call brings is seen by that call as it is. Afterwards keys whose scales run along
the tokens are rounded `window` tokens at a time, everything else token by token as it leaves the window, or, along directions, in lots.
So what is rounded at a length of T tokens depends on T alone, not on how they came: of such keys the first T - T mod R, of everything
else all but the last R and what has not filled a lot.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from arrondi.errors import SchemeError
from arrondi.formats.kv import AnyCache, CacheScheme
from arrondi.formats.spectral import SpectralCache
from arrondi.kernels.hadamard import hadamard, hadamard_matrix
from arrondi.kernels.packed_states import Packed
from arrondi.runtime.kv.lazy import PackedStates
from arrondi.runtime.kv.spectral import LOT, SpectralStore
from arrondi.runtime.kv.store import Store, Window
from arrondi.tensor.spectrum import Basis

Clip = float | Basis
"""What calibration knows of the keys, or of the values, of a layer."""


class Side:
    """Keys or values: a store of rounded tokens, and behind it the window.

    Args:
        store: for tokens that left the window.
        like: states that tell batch, heads, width, type and device.
        window: the newest tokens that stay.
        together: tokens are rounded in lots of `window`, not one by one.
        rotated: rounded after a Hadamard transform.
        lot: what is rounded one by one waits until there are so many.
    """

    def __init__(
        self,
        store: Any,
        like: torch.Tensor,
        *,
        window: int,
        together: bool = False,
        rotated: bool = False,
        lot: int = 1,
    ) -> None:
        self.size, self.together, self.rotated, self.lot = window, together, rotated, lot
        self.store = store
        self.window = Window(like)

    @property
    def length(self) -> int:
        """Tokens that came so far."""
        return self.store.stop + len(self.window)

    def settle(self) -> None:
        """Round what is due."""
        count = len(self.window)
        due = count // self.size * self.size if self.together else max(count - self.size, 0) // self.lot * self.lot
        if due:
            taken = self.window.take(due)
            self.store.append(hadamard(taken) if self.rotated else taken)
            self.window.shrink()

    def read(self, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """The last `tokens`, (batch, heads, tokens, width)."""
        recent = self.window.states.to(dtype)
        old = tokens - recent.shape[2]
        if old <= 0:
            return recent[:, :, -old:]
        stop = self.store.stop
        states = self.store.read(stop - old, stop)
        if self.rotated:
            states = hadamard(states, transposed=True)
        return torch.cat([states.to(dtype), recent], dim=2)

    def packed(self, tokens: int) -> Packed:
        """The last `tokens` as the compiled attention takes them."""
        store, recent = self.store, self.window.states
        old = max(tokens - recent.shape[2], 0)
        first, stop = store.stop - old - store.begin, store.stop - store.begin
        return Packed(
            store.lanes,
            store.codes,
            store.scale,
            store.offset,
            first,
            stop,
            store.unit,
            recent[:, :, -(tokens - old) :],
        )

    def cut(self, length: int) -> None:
        """Forget tokens from `length` on. What is left of a lot that was rounded together goes back to the window."""
        gone = self.length - length
        self.window.cut(min(gone, len(self.window)))
        if length >= self.store.stop:
            return
        block = self.store.lanes.block if self.together else 1
        whole = max(length // block * block, self.store.first)
        if whole < length:
            states = self.store.read(whole, length)
            self.window.put_before(hadamard(states, transposed=True) if self.rotated else states)
        self.store.cut(whole)

    def select(self, rows: torch.Tensor) -> None:
        self.store.select(rows)
        self.window.select(rows)


class PackedLayer(CacheLayerMixin):
    """Keys and values of one layer in few bits.

    Args:
        scheme: what they become.
        clips: what calibration knows of keys and of values: largest magnitudes for stored scales, or their directions.
        sliding: the tokens that a query sees, itself included; None: all.
        lazily: give the states of a single new token to the attention function packed.
    """

    is_compileable = False

    def __init__(
        self,
        scheme: AnyCache,
        *,
        clips: tuple[Clip, Clip] | None = None,
        sliding: int | None = None,
        lazily: bool = False,
    ) -> None:
        super().__init__()
        self.scheme, self.clips = scheme, clips
        self.lazily = lazily
        self.sliding_window = sliding
        self.is_sliding = sliding is not None
        self.is_croppable = sliding is None
        self.length = 0
        self.sides: tuple[Side, ...] = ()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the sides for states like these.

        Raises:
            SchemeError: heads of this width cannot be rounded so.
        """
        scheme, states = self.scheme, (key_states, value_states)
        reason = next(filter(None, (scheme.refuse_width(s.shape[-1]) for s in states)), None)
        if reason:
            raise SchemeError(reason)
        self.dtype, self.device = key_states.dtype, key_states.device
        if isinstance(scheme, SpectralCache):
            self.sides = self._spectral(scheme, *states)
        else:
            self.sides = self._plain(scheme, *states)
        self.is_initialized = True

    def _plain(self, scheme: CacheScheme, keys: torch.Tensor, values: torch.Tensor) -> tuple[Side, Side]:
        if scheme.rotated:
            hadamard_matrix(keys.shape[-1])  # or the sentence that says which widths have one
        clips = [c if isinstance(c, float) else None for c in self.clips or (None, None)]
        of_keys = Store(scheme.keys, keys, keys=True, clip=clips[0])
        of_values = Store(scheme.values, values, keys=False, clip=clips[1])
        together = scheme.key_tokens > 0
        return (
            Side(of_keys, keys, window=scheme.window, together=together, rotated=scheme.rotated),
            Side(of_values, values, window=scheme.window),
        )

    def _spectral(self, scheme: SpectralCache, keys: torch.Tensor, values: torch.Tensor) -> tuple[Side, ...]:
        sides = []
        for states, basis in zip((keys, values), self.clips or (), strict=True):
            wanted = (states.shape[1], states.shape[3])
            if not isinstance(basis, Basis) or tuple(basis.mean.shape) != wanted:
                raise SchemeError(
                    f"The directions of this cache are of another model than one with {wanted[0]} heads of {wanted[1]}. Calibrate it on this one."
                )
            exact = 0 if self.is_sliding else scheme.first
            sides.append(Side(SpectralStore(basis, states, exact), states, window=scheme.window, lot=LOT))
        return tuple(sides)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep new states; all states that the new tokens may see, the new ones as they are.

        Args:
            key_states, value_states: (batch, heads, tokens, width).
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.settle()
        seen = self._seen(key_states.shape[2])
        self.length += key_states.shape[2]
        states = key_states, value_states
        for side, new in zip(self.sides, states, strict=True):
            side.window.append(new.detach())
        if seen == key_states.shape[2]:
            self.settle()
            return states
        if self.lazily and key_states.shape[2] == 1:
            return self._packed(key_states, value_states, seen)
        keys, values = (side.read(seen, new.dtype) for side, new in zip(self.sides, states, strict=True))
        self.settle()
        return keys, values

    def _packed(self, key: torch.Tensor, value: torch.Tensor, seen: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All states without unpacking them. What is due is rounded before the next ones come."""
        keys, values = self.sides
        return PackedStates.of(keys, key, seen), PackedStates.of(values, value, seen)

    def settle(self) -> None:
        """Round what is due and forget what no query will see."""
        for side in self.sides:
            side.settle()
            if self.sliding_window is not None:
                side.store.forget(self.length - self.sliding_window + 1)

    def _seen(self, new: int) -> int:
        """Tokens that the last of `new` tokens and those before it may see, before `length` counts them."""
        before = self.length if self.sliding_window is None else min(self.length, self.sliding_window - 1)
        return before + new

    def get_seq_length(self) -> int:
        """Tokens that were seen so far."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(states that `update` gives, position of the first of them)."""
        seen = self._seen(query_length)
        return seen, self.length + query_length - seen

    def get_max_length(self) -> int:
        """-1: there is none; or the sliding window."""
        return -1 if self.sliding_window is None else self.sliding_window

    def reset(self) -> None:
        """Forget everything."""
        self.sides, self.length, self.is_initialized = (), 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; a negative number of them, as transformers has it.

        Raises:
            SchemeError: tokens that a sliding window has forgotten would be needed again.
        """
        count = min(abs(tokens_to_remove), self.length)
        if not count or not self.is_initialized:
            return
        if self.sliding_window is not None and self.length >= self.sliding_window:
            raise SchemeError(
                "A rounded cache with a sliding window that is full cannot be cropped: what the window has forgotten is gone. Use another way of decoding."
            )
        self.settle()
        self.length -= count
        for side in self.sides:
            side.cut(self.length)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows of the batch in another order, packed as they are."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch: numbers of rows, or one truth value for each."""
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        for side in self.sides:
            side.select(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch so many times."""
        if self.sides:
            rows = len(self.sides[0].store.codes)
            self.batch_select_indices(torch.arange(rows, device=self.device).repeat_interleave(repeats))

    def offload(self) -> None:
        """Packed states stay where they are."""

    def prefetch(self) -> None:
        """Packed states stay where they are."""
