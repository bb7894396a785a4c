"""What a rounded cache costs: `compare_with_cache`, a model against its original with keys and values rounded.

A model that reads a whole text at once never reads a rounded key: what a call brings is seen as it is. So the text is read as it would
be written, `chunk` tokens at a time, each piece seeing the older ones through the cache. One token at a time is what decoding does;
more at a time is faster, and the newest `chunk - 1` tokens are then seen as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from arrondi.arguments import check_arguments
from arrondi.checkpoint import Checkpoint
from arrondi.errors import FileFormatError, SchemeError
from arrondi.measure.compare import batch_size, is_causal
from arrondi.measure.comparison import Comparison
from arrondi.measure.data import Data, check_windows, read_windows, reads_text
from arrondi.measure.limits import Limits, check_limits
from arrondi.measure.text import fit_length, load_tokenizer, positions_of, protocol
from arrondi.runtime.kv.cache import Clips, kv_cache
from arrondi.runtime.load import load


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


def compare_with_cache(
    quantized: str | Path,
    reference: str | Path,
    text: Data,
    kv: str,
    *,
    seq_len: int = 256,
    samples: int | None = None,
    chunk: int = 16,
    activations: str | None = None,
    clips: Clips | None = None,
    limits: Limits | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Measure a model whose keys and values are rounded against its original; both are in memory.

    Args:
        quantized: directory of the model in question, quantized or plain; may be the original itself.
        reference: directory of the original; its tokenizer is used.
        text: data that calibration has not seen.
        kv: what keys and values become, see `QuantizedCache`.
        seq_len, samples, activations, limits, progress: see `arrondi.measure.compare.compare_models`.
        chunk: tokens that are read at a time; 1 is what decoding does.
        clips: for stored scales.

    Returns:
        what `compare_models` does for language models, and the kind of cache; the protocol says how the text was read.

    Raises:
        SchemeError: there is no such cache, or it does not go with the model.
        FileFormatError: a directory is no model, or the two are different ones.
        DataError: the text is shorter than one window.
    """
    check_arguments(compare_with_cache, locals())
    if chunk < 1:
        raise SchemeError(f"A text is read one or more tokens at a time, got chunk={chunk}.")
    original = load(reference, fuse=False)
    if not is_causal(original) or getattr(original.config, "is_encoder_decoder", False):
        raise SchemeError(
            f"{reference}: a {type(original).__name__} does not continue texts, so it keeps no keys and values. Leave kv out."
        )
    model = load(quantized, activations=activations)
    if (
        type(model.config) is not type(original.config)
        or model.get_input_embeddings().weight.shape != original.get_input_embeddings().weight.shape
    ):
        raise FileFormatError(f"{quantized} is another model than {reference}. Compare a model with its own original.")
    if limits:
        check_limits(Comparison.kind, limits.kl, limits.ppl_increase)
    kv_cache(model, kv, clips=clips)  # or the sentence that says why not, before the work
    seq_len, note = fit_length(seq_len, positions_of(original))
    tokenizer = load_tokenizer(Checkpoint.open(reference).folder.home) if reads_text(text) else None
    windows = read_windows(text, tokenizer, seq_len, "evaluation text")
    check_windows(windows, original)
    batches = list(windows.ids[:samples].split(batch_size(original, windows.seq_len)))
    found = compare_caches(
        model, original, batches, lambda: kv_cache(model, kv, clips=clips), chunk=chunk, progress=progress
    )
    pace = "one token" if chunk == 1 else f"{chunk} tokens"
    return {
        **found.summary().to_dict(),
        "text": windows.source,
        "windows": sum(len(b) for b in batches),
        "protocol": f"{protocol(tokenizer, windows.seq_len)}, read {pace} at a time through a cache of the kind {kv}; the original reads each window at once",
        "notes": [note] if note and tokenizer is not None else [],
        "activations": activations,
        "kv": kv,
    }
