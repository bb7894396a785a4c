"""How long a model takes for a token on this machine: `pace`."""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path
from typing import Final

from arrondi.checkpoint import Checkpoint
from arrondi.runtime.decoding import refuse_decoding, tokens
from arrondi.runtime.generate import load_fast

_PROMPT: Final = 16
"""Tokens that are read before."""
_WARM: Final = 2
"""Tokens that are not counted: the prompt's, and the first alone."""


def pace(path: str | Path, ids: list[int], count: int = 24) -> float | None:
    """The median of the milliseconds that a model takes for a token, loaded as `generate` loads it.

    Args:
        path: model directory, quantized or plain; it has to fit in memory as it is stored.
        ids: token ids, of which the first few are the prompt.
        count: tokens that are counted.

    Returns:
        None for a model that does not generate text.

    Raises:
        SchemeError, FileFormatError: see `load`.
    """
    model = load_fast(Checkpoint.open(path), None)
    if refuse_decoding(model):
        return None
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    prompt = ids[:_PROMPT]
    wanted = min(count + _WARM, (context or len(prompt) + count + _WARM) - len(prompt))
    times = [time.perf_counter()]
    for _ in tokens(model, prompt, wanted, temperature=0.0, stop=set()):
        times.append(time.perf_counter())
    spent = [1e3 * (b - a) for a, b in itertools.pairwise(times)][_WARM:]
    return round(statistics.median(spent), 3) if spent else None
