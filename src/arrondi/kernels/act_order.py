"""Groups that are not contiguous, made contiguous.

Owns: `contiguous_groups`. GPTQ with dynamic act-order gives each column its own group number. Sorting the columns by
group, of the weight once and of the activations at every call, leaves an ordinary group-wise weight for any kernel.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from arrondi.formats import PerGroup
from arrondi.tensor.qtensor import QTensor


def contiguous_groups(q: QTensor) -> tuple[QTensor, torch.Tensor] | None:
    """The same weight with its columns sorted by group.

    Args:
        q: (out, in) with a `group_index`.

    Returns:
        (sorted weight without a group index, order (in,) int64): `x @ q.T == x[..., order] @ sorted.T`. None when the
        groups do not have the scheme's size each, so that sorting cannot help.
    """
    assert q.group_index is not None
    if not isinstance(q.scheme.granularity, PerGroup):
        return None
    order = torch.argsort(q.group_index, stable=True)
    wanted = torch.arange(order.numel(), device=order.device) // q.scheme.granularity.size
    if not torch.equal(q.group_index[order].long(), wanted):
        return None
    return replace(q, codes=q.codes[:, order], group_index=None), order
