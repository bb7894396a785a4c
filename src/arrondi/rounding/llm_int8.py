"""LLM.int8(): input features with outliers are multiplied as they are, all others in few bits.

Owns: `llm_int8`, `size_llm_int8` (the scheme of one weight), `foresees_llm_int8` and `refuse_llm_int8`.

A few features of the activations of a language model are far larger than all others, and a scale that covers them leaves nothing
for the rest. Dynamic outliers are found in every input: a feature that reaches the threshold in any position meets the dequantized
column of the weight. Static ones are the features that reached it anywhere in the calibration data: their columns of the weight keep 16 bits,
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
_UNKNOWN = 0.01
"""Share of the columns that are kept where nothing is known of the inputs."""


def foresees_llm_int8(scheme: LayerScheme, options: Mapping[str, Any]) -> bool:
    """Whether outliers are static and found by the threshold, so that inputs decide how many there are."""
    return not _dynamic(scheme, options) and not options.get("share")


def size_llm_int8(
    scheme: LayerScheme, weight: torch.Tensor, options: Mapping[str, Any], absmax: torch.Tensor | None = None
) -> LayerScheme:
    """The scheme of one weight (m, n): inputs that leave outliers alone, or some columns kept apart.

    Without rounded inputs, outliers are static; with them they are dynamic, unless the option says otherwise.

    Args:
        weight: (m, n); the matrices of a stack below each other.
        options: of `llm_int8`.
        absmax: (n,) or (matrices, n), the largest |x| of every input. None: a hundredth of the columns stands for those above the threshold.
    """
    if scheme.inputs is not None and _dynamic(scheme, options):
        return replace(scheme, inputs=replace(scheme.inputs, outliers=float(options.get("threshold", THRESHOLD))))
    columns, share = weight.shape[1], float(options.get("share", 0.0))
    if share or absmax is None:
        count = min(max(round((share or _UNKNOWN) * columns), 1), columns)
    else:
        count = int((absmax >= float(options.get("threshold", THRESHOLD))).sum(-1).max())
    stored: Literal["bfloat16", "float16"] = "bfloat16" if weight.dtype == torch.bfloat16 else "float16"
    return replace(scheme, weights=replace(scheme.weights, apart=Apart("columns", count, stored) if count else None))


def refuse_llm_int8(scheme: Scheme, options: Mapping[str, Any]) -> str | None:
    """Why no weight can be rounded so; None if it can."""
    if (
        scheme.format.learned
        or scheme.format.trellis is not None
        or (scheme.apart is not None and scheme.apart.what != "columns")
    ):
        return f"llm-int8 rounds to nearest beside the columns that it keeps apart, got {scheme}. Use a scheme such as W8A8 or W4A16."
    return None


def llm_int8(
    weight: torch.Tensor,
    scheme: SchemeLike,
    moment: SecondMoment | None = None,
    *,
    outliers: Outliers = "auto",
    threshold: Annotated[float, Between(0, 1e30)] = THRESHOLD,
    share: Annotated[float, Between(0, 1)] = 0.0,
    absmax: torch.Tensor | None = None,
    name: str = "weight",
    facts: dict[str, Any] | None = None,
) -> QTensor:
    """Round to nearest beside the columns that are kept apart, if the scheme says that some are.

    Args:
        weight: (m, n), any float dtype, finite.
        scheme: any that rounding to nearest makes, with the columns that `size_llm_int8` adds to it.
        moment: not used; accepted so that every method is called alike.
        outliers: "static" keeps columns apart; "dynamic" leaves the weight alone, for then the inputs' scheme says what an outlier is;
            "auto" is dynamic where inputs are rounded (which only the layer's scheme says: see `size_llm_int8`).
        threshold: |x| from which on an input is an outlier: in this token's batch if they are dynamic, anywhere in the calibration data if
            they are static. A plan counts static ones in the original; where nothing is known of the inputs, they are a hundredth of all.
        share: of the columns, at least one, that are kept apart in place of those above the threshold; 0: the threshold decides.
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
    plain = replace(wanted, apart=None)
    if wanted.apart is None:
        return rtn(weight, plain, name=name)
    work = weight.detach()
    sizes = work.abs().amax(0).float() if absmax is None else absmax.to(work.device)
    index = sizes.sort(descending=True, stable=True).indices[: wanted.apart.count].sort().values
    kept = kept_of(work, index[None], wanted.apart)
    rest = rtn(work.index_fill(1, index, 0.0), plain, name=name)
    return QTensor(rest.codes, rest.scale, rest.zero_point, rest.offset, wanted, None, None, kept)


def _dynamic(scheme: LayerScheme, options: Mapping[str, Any]) -> bool:
    return scheme.inputs is not None and options.get("outliers", "auto") != "static"
