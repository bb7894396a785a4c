"""What a rounded cache costs: `compare_with_cache`, a model against its original with keys and values rounded.

A model that reads a whole text at once never reads a rounded key: what a call brings is seen as it is. So the text is read as it would
be written, `chunk` tokens at a time, each piece seeing the older ones through the cache. One token at a time is what decoding does;
more at a time is faster, and the newest `chunk - 1` tokens are then seen as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from arrondi.measure.comparison import Comparison


@torch.no_grad()
def logits_in_pieces(model: Any, ids: torch.Tensor, cache: Any, chunk: int) -> Iterator[torch.Tensor]:
    """The logits (batch, up to `chunk`, vocabulary) of a text (batch, tokens) that is read in pieces through a cache."""
    for piece in ids.split(chunk, dim=1):
        yield model(piece, past_key_values=cache, use_cache=True).logits.float()


@torch.no_grad()
def compare_caches(
    model: Any,
    reference: Any,
    batches: Sequence[torch.Tensor],
    caches: Callable[[], Any],
    *,
    chunk: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> Comparison:
    """A model that reads through caches against a reference that reads each text at once, with its own keys and values.

    Args:
        model, reference: language models of transformers; they may be the same.
        batches: token ids (batch, tokens) each.
        caches: makes an empty cache.
        chunk: tokens that are read at a time.
    """
    found = Comparison()
    for done, ids in enumerate(batches):
        if progress is not None:
            progress(done, len(batches), f"text {done + 1} of {len(batches)}")
        wanted = reference(ids, use_cache=False).logits.float()
        found.add(wanted, torch.cat(list(logits_in_pieces(model, ids, caches(), chunk)), dim=1), ids)
    return found
