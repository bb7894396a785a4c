"""Which precision products are computed in: `bfloat16_pays`."""

from __future__ import annotations

import torch

from arrondi.checkpoint import Checkpoint


def bfloat16_pays(checkpoint: Checkpoint) -> bool:
    """Whether bfloat16 products are worth it: the stored weights have no more digits, and this CPU multiplies them faster.

    Measuring never uses them: the differences that it looks for are as small as bfloat16's own error.
    """
    narrow = all(e.dtype != "F32" for e in checkpoint.folder.entries.values() if len(e.shape) > 1)
    return narrow and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
