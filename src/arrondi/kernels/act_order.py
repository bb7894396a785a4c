"""Groups that are not contiguous, made contiguous.

Owns: `contiguous_groups` and its inverse `scattered_groups`. GPTQ with dynamic act-order gives each column its own group number. Sorting the columns by
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


def scattered_groups(q: QTensor, order: torch.Tensor) -> QTensor:
    """The inverse of `contiguous_groups`: its sorted weight and order → the weight with a `group_index`."""
    assert isinstance(q.scheme.granularity, PerGroup)
    codes, index = torch.empty_like(q.codes), torch.empty_like(order, dtype=torch.int32)
    codes[:, order] = q.codes
    index[order] = torch.arange(order.numel(), device=order.device, dtype=torch.int32) // q.scheme.granularity.size
    return replace(q, codes=codes, group_index=index)
