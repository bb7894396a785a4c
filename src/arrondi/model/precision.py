"""Which precision products are computed in: `DTYPES`, `bfloat16_pays`, `stored_in_16_bits`."""

from __future__ import annotations

from typing import Final

import torch

from arrondi.checkpoint import Checkpoint
from arrondi.native import multiplies_bfloat16

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The types that models are loaded and restored in."""


def bfloat16_pays(checkpoint: Checkpoint) -> bool:
    """Whether bfloat16 products are worth it: the stored weights have no more digits, and this CPU multiplies them faster.

    Measuring never uses them: the differences that it looks for are as small as bfloat16's own error.
    """
    return stored_in_16_bits(checkpoint) and multiplies_bfloat16()


def stored_in_16_bits(checkpoint: Checkpoint) -> bool:
    """Whether no matrix is stored in float32."""
    return all(e.dtype != "F32" for e in checkpoint.folder.entries.values() if len(e.shape) > 1)
