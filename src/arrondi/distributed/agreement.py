"""Whether all ranks have the same model.

Owns: `check_agreement`. Compressed gradients of unlike models would be added without complaint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist

from arrondi.distributed.links import gather_single
from arrondi.errors import DataError


def check_agreement(named: Iterable[tuple[str, torch.Tensor]], group: dist.ProcessGroup, *, values: bool) -> None:
    """All ranks call it together; one hash travels.

    Args:
        named: parameters with their names.
        values: whether their numbers count (replicas), or only names, shapes, types and what is trained (shards).

    Raises:
        DataError: on all ranks, if one differs from rank 0.
    """
    digest = hashlib.blake2b(digest_size=32)
    device = torch.device("cpu")
    for name, parameter in named:
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {parameter.requires_grad};".encode())
        device = parameter.device
        if values:
            flat = parameter.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
            digest.update(flat.numpy().data)
    mine = torch.tensor(list(digest.digest()), dtype=torch.uint8, device=device)
    world = dist.get_world_size(group)
    everyone = mine.new_empty(world, len(mine))
    gather_single(everyone.view(-1), mine, group=group)
    unlike = (everyone != everyone[0]).any(dim=1).nonzero().flatten().tolist()
    if unlike:
        ranks = ", ".join(map(str, unlike[:8]))
        raise DataError(
            f"The parameters of rank {ranks} are not those of rank 0. Load the same checkpoint on every rank before this call."
        )
