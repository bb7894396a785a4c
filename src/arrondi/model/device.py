"""Where units run, as a user names it: `device_named`."""

from __future__ import annotations

import torch

from arrondi.errors import SchemeError


def device_named(name: str) -> torch.device:
    """The device of that name.

    Raises:
        SchemeError: it is no name of one, or this machine has none of that name.
    """
    unknown = SchemeError(f"There is no device {name!r}: give cpu, cuda or cuda:0.")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise unknown from None
    if found.type not in ("cpu", "cuda"):
        raise unknown
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= count:
        has = f"{count} CUDA device{'s' if count > 1 else ''}" if count else "no CUDA device that PyTorch can use"
        raise SchemeError(f"There is no device {name}: this machine has {has}. Use cpu.")
    return found
