"""Where methods begin that learn codes of networks afterwards: nearest codes on ranges of least error.

Owns: `nearest_first`. What is learned from there is the repair that comes with the method `easyquant`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from arrondi.calibration import SecondMoment
from arrondi.rounding.options import Power
from arrondi.rounding.rtn import rtn
from arrondi.tensor.checks import SchemeLike
from arrondi.tensor.qtensor import QTensor


def nearest_first(
    weight: torch.Tensor,
    scheme: SchemeLike,
    moment: SecondMoment | None = None,
    *,
    range: Literal["absmax", "search"] = "search",
    power: Power = 2.4,
    name: str = "weight",
    facts: dict[str, Any] | None = None,
) -> QTensor:
    """The codes that a method begins with; alone it is rounding to nearest.

    Args:
        weight: (..., K), any float dtype, finite.
        scheme: integers with plain scales.
        moment: not used.
        range: "search" for ranges of least error, "absmax" for whole ranges.
        power: exponent of that error.
        name: for messages.
        facts: not used.

    Raises:
        DataError: NaN or infinity in the weight.
    """
    return rtn(weight, scheme, None, range=range, power=power, name=name)
