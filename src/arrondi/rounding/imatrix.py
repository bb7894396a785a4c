"""Round to nearest on grids that spend their precision where inputs are large.

Owns: `imatrix`, `refuse_imatrix`. The importance of a column is the mean square of its input, the diagonal of the second moment: with it
Σ_j a[j] (w[j] - ŵ[j])² is the error of a row's output as if the inputs did not depend on each other.

Source: the importance matrix of llama.cpp (documentation of its quantizers); the objective is the diagonal of GPTQ's
(Frantar et al. 2022, arXiv:2210.17323).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from arrondi.arguments import check_arguments
from arrondi.calibration import SecondMoment
from arrondi.errors import DataError, ShapeError
from arrondi.formats import Scheme
from arrondi.tensor.checks import SchemeLike, check_tensor, named, scheme_of
from arrondi.tensor.nearest import own_numbers, quantize_tensor, quantize_with
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.weighted import weighted_parts


def refuse_imatrix(scheme: Scheme, options: Mapping[str, Any]) -> str | None:
    """Why no weight can be rounded so, number by number; None if it can."""
    return None if scheme.nearest else own_numbers(scheme)


def imatrix(
    weight: torch.Tensor,
    scheme: SchemeLike,
    moment: SecondMoment | None = None,
    *,
    magnitude: bool = True,
    importance: torch.Tensor | None = None,
    name: str = "weight",
    facts: dict[str, Any] | None = None,
) -> QTensor:
    """The nearest code of every weight, on the grid with the least importance-weighted squared error.

    Args:
        weight: (..., n), any float dtype, finite.
        scheme: what it becomes; any format, granularity and storage of scales.
        moment: second moment of the layer's inputs, of size n; its diagonal is the importance.
        magnitude: weigh an element by √(σ² + w²) of its group too, as llama.cpp does; false: by the importance alone.
        importance: (n,) mean squares of the inputs, from a file for example; used instead of `moment`.
        name: for messages.
        facts: not used; accepted so that every method is called alike.

    Raises:
        DataError: neither a moment nor an importance, a negative or infinite importance, or NaN in the weight.
        ShapeError: the importance is of another number of columns.
    """
    with named(name):
        check_arguments(imatrix, {**locals(), "weight": check_tensor(weight, name), "scheme": scheme_of(scheme)})
    scheme = scheme_of(scheme)
    if importance is None and moment is None:
        raise DataError(
            f"{name}: imatrix needs the second moment of the layer's inputs, or its diagonal. Give calibration text, or use rtn or hqq."
        )
    if weight.numel() == 0:
        return quantize_tensor(weight, scheme, name=name)
    if importance is None:
        assert moment is not None
        if moment.n != weight.shape[-1]:
            raise ShapeError(f"{name}: the second moment is for {moment.n} inputs, the weight has {weight.shape[-1]}.")
        importance = moment.diagonal()
    with named(name):
        parts = weighted_parts(weight.detach(), scheme, importance.to(weight.device), magnitude=magnitude, name=name)
    return quantize_with(weight, scheme, parts, name=name)
