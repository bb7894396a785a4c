"""Round to nearest: the baseline that every other method must beat.

Owns: `rtn`. Source: Krishnamoorthi 2018, arXiv:1806.08342, section 2 (affine quantizer). Ties go to even, as in IEEE 754.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from arrondi.calibration import SecondMoment
from arrondi.errors import SchemeError
from arrondi.formats import Scheme
from arrondi.tensor.checks import named
from arrondi.tensor.qtensor import Parts, QTensor, quantize_tensor, quantize_with, store_grid
from arrondi.tensor.ranges.search import search_grid


def rtn(
    weight: torch.Tensor,
    scheme: Scheme,
    moment: SecondMoment | None = None,
    *,
    range: Literal["absmax", "search"] = "absmax",
    power: float = 2.5,
    name: str = "weight",
    facts: dict[str, Any] | None = None,
) -> QTensor:
    """The nearest code of every weight.

    Args:
        weight: (..., K), any float dtype, finite.
        scheme: what it becomes.
        moment: second moment of the inputs (n = K); with range="search" its diagonal weighs the columns.
        range: "absmax" spans the whole group; "search" tries narrower ranges and takes the one with the least error.
        power: exponent of the error that the search minimises.
        name: for messages.
        facts: not used; accepted so that every method is called alike.

    Raises:
        SchemeError: another `range`.
        DataError: NaN or infinity in the weight.
    """
    if range not in ("absmax", "search"):
        raise SchemeError(f"{name}: unknown range {range!r}. Known: absmax, search.")
    if range == "absmax" or weight.numel() == 0:
        return quantize_tensor(weight, scheme, name=name)
    with named(name):
        importance = None if moment is None else moment.diagonal().to(weight.device)
        grid = searched(weight.detach(), scheme, importance, power, name)
    return quantize_with(weight, scheme, grid, name=name)


def searched(weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None, power: float, name: str) -> Parts:
    """The searched grid as it is kept."""
    return store_grid(search_grid(weight, scheme, importance, power=power), scheme, tuple(weight.shape), name=name)
