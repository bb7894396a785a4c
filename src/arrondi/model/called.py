"""A module called on data that it may refuse: `called`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from arrondi.errors import ArrondiError, SchemeError
from arrondi.model.chain import REFUSALS, copied, said


def called(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], device: str, bfloat16: bool) -> Any:
    """What a module returns for copies of some arguments, so that what it changes in place stays with it.

    Args:
        device: type of the device that it runs on.
        bfloat16: products in bfloat16.

    Raises:
        SchemeError: it does not run on this data.
    """
    try:
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            return module(*copied(tuple(args)), **copied(dict(kwargs)))
    except ArrondiError:
        raise
    except REFUSALS as error:
        raise SchemeError(f"The model does not run on this data ({said(error)}).") from error
