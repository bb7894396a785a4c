"""LLM.int8(): input features with outliers are multiplied as they are, all others in few bits.

Owns: `llm_int8`, `size_llm_int8` (the scheme of one weight) and `refuse_llm_int8`.

A few features of the activations of a language model are far larger than all others, and a scale that covers them leaves nothing
for the rest. Dynamic outliers are found in every input: a feature that reaches the threshold in any position meets the dequantized
column of the weight. Static ones are the features that were largest in the calibration data: their columns of the weight keep 16 bits,
and where inputs are rounded, theirs are not.

Source: Dettmers, Lewis, Belkada, Zettlemoyer 2022, arXiv:2208.07339 (dynamic outliers, threshold 6).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch

from arrondi.arguments import Between, check_arguments
from arrondi.calibration import SecondMoment
from arrondi.errors import SchemeError, ShapeError
from arrondi.formats import Apart, LayerScheme, Scheme
from arrondi.rounding.rtn import rtn
from arrondi.tensor.apart import kept_of
from arrondi.tensor.checks import SchemeLike, check_tensor, named, scheme_of
from arrondi.tensor.qtensor import QTensor

Outliers = Literal["auto", "dynamic", "static"]

THRESHOLD = 6.0
SHARE = 0.01


def size_llm_int8(scheme: LayerScheme, weight: torch.Tensor, options: Mapping[str, Any]) -> LayerScheme:
    """The scheme of one weight (m, n): inputs that leave outliers alone, or some columns kept apart.

    Without rounded inputs, outliers are static; with them they are dynamic, unless the option says otherwise.
    """
    outliers = options.get("outliers", "auto")
    if scheme.inputs is not None and outliers != "static":
        return replace(scheme, inputs=replace(scheme.inputs, outliers=float(options.get("threshold", THRESHOLD))))
    count = _count(weight.shape[1], float(options.get("share", SHARE)))
    stored: Literal["bfloat16", "float16"] = "bfloat16" if weight.dtype == torch.bfloat16 else "float16"
    return replace(scheme, weights=replace(scheme.weights, apart=Apart("columns", count, stored) if count else None))


def refuse_llm_int8(scheme: Scheme, options: Mapping[str, Any]) -> str | None:
    """Why no weight can be rounded so; None if it can."""
    if scheme.format.learned or (scheme.apart is not None and scheme.apart.what != "columns"):
        return f"llm-int8 rounds to nearest beside the columns that it keeps apart, got {scheme}. Use a scheme such as W8A8 or W4A16."
    return None


def llm_int8(
    weight: torch.Tensor,
    scheme: SchemeLike,
    moment: SecondMoment | None = None,
    *,
    outliers: Outliers = "auto",
    threshold: Annotated[float, Between(0, 1e30)] = THRESHOLD,
    share: Annotated[float, Between(0, 1)] = SHARE,
    absmax: torch.Tensor | None = None,
    name: str = "weight",
    facts: dict[str, Any] | None = None,
) -> QTensor:
    """Round to nearest beside the columns that are kept apart, if the scheme says that some are.

    Args:
        weight: (m, n), any float dtype, finite.
        scheme: any that rounding to nearest makes. With `outliers="static"` some columns are added to it.
        moment: not used; accepted so that every method is called alike.
        outliers: "static" keeps columns apart; "dynamic" leaves the weight alone, for then the inputs' scheme says what an outlier is;
            "auto" is dynamic where inputs are rounded (which only the layer's scheme says: see `size_llm_int8`).
        threshold: size of a dynamic outlier; and of the features that a report counts.
        share: of the columns that are kept apart, at least one unless it is 0.
        absmax: (n,), the largest size of every input in the calibration data; the columns that have the largest are kept. None:
            those with the largest weights.
        name: for messages.
        facts: receives `outlier_features`, how many inputs reached the threshold, where `absmax` tells.

    Raises:
        SchemeError: the scheme has learned values, or keeps single elements apart.
        ShapeError: `absmax` has another size, or the weight is no matrix.
        DataError: NaN or infinity in the weight.
    """
    with named(name):
        check_arguments(llm_int8, {**locals(), "weight": check_tensor(weight, name), "scheme": scheme_of(scheme)})
    wanted = scheme_of(scheme)
    if (reason := refuse_llm_int8(wanted, {})) is not None:
        raise SchemeError(f"{name}: {reason}")
    if weight.ndim != 2 or (absmax is not None and tuple(absmax.shape) != weight.shape[1:]):
        got = f"{tuple(weight.shape)} and {None if absmax is None else tuple(absmax.shape)}"
        raise ShapeError(f"{name}: llm-int8 takes a matrix (m, n) and a size for each of its n inputs, got {got}.")
    if absmax is not None and facts is not None:
        facts["outlier_features"] = int((absmax >= threshold).sum())
    if outliers == "static" and wanted.apart is None:
        wanted = size_llm_int8(LayerScheme(wanted), weight, {"outliers": outliers, "share": share}).weights
    plain = replace(wanted, apart=None)
    if wanted.apart is None:
        return rtn(weight, plain, name=name)
    work = weight.detach()
    sizes = work.abs().amax(0).float() if absmax is None else absmax.to(work.device)
    index = sizes.sort(descending=True, stable=True).indices[: wanted.apart.count].sort().values
    kept = kept_of(work, index[None], wanted.apart)
    rest = rtn(work.index_fill(1, index, 0.0), plain, name=name)
    return QTensor(rest.codes, rest.scale, rest.zero_point, rest.offset, wanted, None, None, kept)


def _count(columns: int, share: float) -> int:
    return min(max(round(share * columns), 1), columns) if share else 0
