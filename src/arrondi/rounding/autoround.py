"""AutoRound: where it begins, nearest codes on whole ranges. What is learned from there is the repair `signround`.

Owns: `autoround`.

Source: Cheng et al. 2023, arXiv:2309.05516.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from arrondi.calibration import SecondMoment
from arrondi.formats import Scheme
from arrondi.rounding.rtn import rtn
from arrondi.tensor.checks import SchemeLike
from arrondi.tensor.qtensor import QTensor


def refuse_autoround(scheme: Scheme, options: Mapping[str, Any]) -> str | None:
    """Why rounding cannot be learned in a scheme; None if it can."""
    if (
        scheme.apart is not None
        or scheme.format.kind != "integer"
        or scheme.zero_point == "float"
        or isinstance(scheme.scale, Scheme)
    ):
        return f"AutoRound learns integer codes with plain scales, got {scheme}. Use gptq, or a scheme such as W4A16."
    return None


def autoround(
    weight: torch.Tensor,
    scheme: SchemeLike,
    moment: SecondMoment | None = None,
    *,
    range: Literal["absmax", "search"] = "absmax",
    name: str = "weight",
    facts: dict[str, Any] | None = None,
) -> QTensor:
    """The codes that AutoRound begins with; alone it is rounding to nearest.

    Args:
        weight: (..., K), any float dtype, finite.
        scheme: integers with plain scales.
        moment: not used.
        range: "absmax" as published, "search" begins with ranges of least squared error.
        name: for messages.
        facts: not used.

    Raises:
        DataError: NaN or infinity in the weight.
    """
    return rtn(weight, scheme, None, range=range, name=name)
