"""AutoRound: where it begins. What is learned from there is the repair `signround`.

Owns: `autoround`. As published it begins with nearest codes on whole ranges; GPTAQ's codes, refined, are a better beginning, from which little
is left to be learned.

Source: Cheng et al. 2023, arXiv:2309.05516.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import torch

from arrondi.calibration import SecondMoment
from arrondi.formats import Scheme
from arrondi.rounding.gptaq import gptaq
from arrondi.rounding.gptq import refuse_gptq
from arrondi.rounding.rtn import rtn
from arrondi.tensor.checks import SchemeLike, scheme_of
from arrondi.tensor.qtensor import QTensor

_DAMPING: Final = 0.05
_REFINE: Final = 2
"""Of GPTAQ."""


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
    cross_moment: torch.Tensor | None = None,
    start: Literal["gptaq", "nearest"] = "gptaq",
    range: Literal["absmax", "search"] = "absmax",
    name: str = "weight",
    facts: dict[str, Any] | None = None,
) -> QTensor:
    """The codes that AutoRound begins with.

    Args:
        weight: (..., K), any float dtype, finite.
        scheme: integers with plain scales.
        moment: Σ x xᵀ of the layer's inputs in the quantized model.
        cross_moment: Σ x fᵀ (n, n), with the inputs f that the original has for the same tokens.
        start: "gptaq" for the codes of GPTAQ, refined; "nearest" as published, and wherever moments are missing.
        range: of nearest codes: "absmax" as published, "search" for ranges of least squared error.
        name: for messages.
        facts: see `gptaq`.

    Raises:
        DataError: NaN or infinity in the weight.
    """
    if (
        start == "gptaq"
        and moment is not None
        and cross_moment is not None
        and refuse_gptq(scheme_of(scheme), {}) is None
    ):
        return gptaq(
            weight, scheme, moment, cross_moment=cross_moment, damping=_DAMPING, refine=_REFINE, name=name, facts=facts
        )  # fmt: skip
    return rtn(weight, scheme, None, range=range, name=name)
