"""GPTQ: round column by column and let the columns not yet rounded make up for each error.

Owns: `gptq`. For a layer with inputs x, H = Σ x xᵀ is the curvature of its output error. With H = V Vᵀ, V upper triangular,
that error is Σ_c (V[c,c] d[c] + Σ_{j<c} V[j,c] d[j])² for the differences d = w - ŵ of all columns: column c cancels what the
columns before it left, as well as its grid can, by rounding w[c] + Σ_{j<c} d[j] V[j,c] / V[c,c]. This is the published method
without the inverse of H: V⁻¹ is its Cholesky factor of H⁻¹.

The grid may be any format: integers, fp4, codebooks, power-of-two or quantized scales.

Source: Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv:2210.17323, algorithm 1; static act-order (scales from the
contiguous groups of the unrounded weight, columns visited by falling diagonal) is the variant that its users settled on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch

from arrondi.arguments import check_arguments
from arrondi.calibration import SecondMoment
from arrondi.errors import DataError, SchemeError, ShapeError
from arrondi.formats import PerGroup, Scheme
from arrondi.rounding.gptq_factor import root_factor
from arrondi.rounding.gptq_grids import ColumnGrids
from arrondi.rounding.gptq_sweep import sweep
from arrondi.rounding.options import BlockSize, Damping, Power, Refine, Sweeps
from arrondi.rounding.refine import damped, refined
from arrondi.rounding.resweep import resweeps, reswept
from arrondi.tensor.checks import SchemeLike, check_tensor, named, scheme_of
from arrondi.tensor.nearest import own_numbers
from arrondi.tensor.qtensor import QTensor

Order = Literal["static", "dynamic", "none"]
Range = Literal["search", "absmax", "importance"]
First = Callable[[int, float], torch.Tensor]


def refuse_gptq(scheme: Scheme, options: Mapping[str, Any]) -> str | None:
    """Why no weight can be rounded so; None if it can."""
    if not scheme.nearest:
        return own_numbers(scheme)
    if options.get("order") == "dynamic" and not isinstance(scheme.granularity, PerGroup):
        return f"Dynamic act-order forms groups of columns, got {scheme}. Use the option order=static."
    if options.get("range") == "importance" and options.get("order", "static") != "static":
        return f"Grids by importance are known before the sweep, got order={options['order']}. Use the option order=static."
    return None


def gptq(
    weight: torch.Tensor,
    scheme: SchemeLike,
    moment: SecondMoment | None = None,
    *,
    damping: Damping = 0.01,
    block_size: BlockSize = 128,
    order: Order = "static",
    range: Range = "search",
    power: Power = 4.0,
    refine: Refine = 0,
    sweeps: Sweeps = 1,
    name: str = "weight",
    facts: dict[str, Any] | None = None,
) -> QTensor:
    """Round a weight so that the layer's output changes least on the calibration inputs.

    Args:
        weight: (m, n), any float dtype, finite. float64 is computed in float64, all else in float32.
        scheme: what it becomes; any granularity.
        moment: second moment of the layer's inputs, of size n; columns whose input was always zero are set to zero.
        damping: fraction of the mean diagonal that is added to the diagonal.
        block_size: columns between two updates of the far columns; changes speed, not results.
        order: "static" visits columns by falling input power with scales fixed beforehand; "dynamic" forms groups in
            the visiting order (`group_index` is set); "none" goes left to right, scales from the compensated columns.
        range: "search" tries narrower ranges for each group (for NVFP4 the largest magnitude on 6 or on 4), "absmax" spans it,
            "importance" takes the grids of `imatrix`; with order="static" only.
        power: exponent of the error that the search minimises; see `search_grid`.
        sweeps: how often the columns are visited; in between, grids are fitted to what had to be rounded, see
            `arrondi.rounding.resweep`; with order="static" only.
        refine: how often scales are fitted to codes and codes to scales again; see `arrondi.rounding.refine`.
        name: for messages.
        facts: receives what a report should say: `damping` where it had to be raised, `inputs_always_zero` where there
            were some.

    Raises:
        ShapeError: weight is not a matrix or the moment has another size.
        SchemeError: `order` does not fit the granularity, or an option is out of range.
        DataError: no moment, or NaN.
    """
    with named(name):
        check_arguments(gptq, {**locals(), "weight": check_tensor(weight, name), "scheme": scheme_of(scheme)})
    scheme = scheme_of(scheme)
    work, moment = checked("gptq", weight, scheme, moment, name)
    return swept(
        work, scheme, moment, damping=damping, block_size=block_size, order=order, range=range, power=power, refine=refine,
        sweeps=sweeps, name=name, facts=facts,
    )  # fmt: skip


def checked(
    method: str, weight: torch.Tensor, scheme: Scheme, moment: SecondMoment | None, name: str
) -> tuple[torch.Tensor, SecondMoment]:
    """The weight as it is computed with, float32 or float64, and the moment that is there.

    Raises:
        ShapeError, SchemeError, DataError: as `gptq`.
    """
    if not scheme.nearest:
        raise SchemeError(f"{name}: {own_numbers(scheme)}")
    if weight.ndim != 2:
        raise ShapeError(
            f"{name}: {method} rounds matrices, got shape {tuple(weight.shape)}. Pass each matrix of a stack."
        )
    if moment is None:
        raise DataError(
            f"{name}: {method} needs the second moment of the layer's inputs. Give calibration text, or use rtn or hqq."
        )
    if moment.n != weight.shape[1]:
        raise ShapeError(f"{name}: the second moment is for {moment.n} inputs, the weight has {weight.shape[1]}.")
    work = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    # The extremes of a NaN are NaN; a mask of the whole weight would cost ten times as much.
    if work.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(work))).all()):
        raise DataError(f"{name}: the weights hold NaN or infinity. Repair or exclude the tensor.")
    return work, moment


def swept(
    work: torch.Tensor,
    scheme: Scheme,
    moment: SecondMoment,
    *,
    damping: float,
    block_size: int,
    order: Order,
    range: Range,
    power: float,
    refine: int,
    sweeps: int = 1,
    name: str,
    facts: dict[str, Any] | None,
    first: First | None = None,
) -> QTensor:
    """What `gptq` does once its arguments are known to make sense.

    Args:
        work: (m, n) finite, float32 or float64.
        first: (column that is visited first, λ) → (m,), what its codes are chosen for; None: for the weight itself.
    """
    seen = Curvature.of(moment, work, damping, order, refine > 0)
    chosen = None
    if first is not None:
        column = 0 if seen.visit is None else int(seen.visit[0])
        chosen = first(column, seen.damping * float(seen.diagonal.mean()))
    q = swept_rows(
        work, scheme, seen, block_size=block_size, order=order, range=range, power=power, refine=refine, sweeps=sweeps,
        name=name, first=chosen,
    )  # fmt: skip
    if facts is not None:
        facts |= seen.facts(damping)
    return q


class Curvature(NamedTuple):
    """What the sweep knows of the inputs, the same for all rows.

    Attributes:
        diagonal: (n,) of H.
        visit: (n,), the columns in the order of the visit; None: from left to right.
        factor: V (n, n) of H + λI in that order.
        damping: what λ needed, as a fraction of the mean diagonal.
        hessian: H + λI, float32 (n, n), where results are refined.
    """

    diagonal: torch.Tensor
    visit: torch.Tensor | None
    factor: torch.Tensor
    damping: float
    hessian: torch.Tensor | None

    @classmethod
    def of(cls, moment: SecondMoment, work: torch.Tensor, damping: float, order: Order, refines: bool) -> Curvature:
        """For weights of the type and on the device of `work`."""
        diagonal = moment.diagonal().to(work.device)
        visit = None if order == "none" else torch.argsort(diagonal, descending=True, stable=True)
        factor, needed = root_factor(moment.matrix(work.dtype).to(work.device), damping, visit)
        return cls(diagonal, visit, factor, needed, damped(moment, needed).to(work.device) if refines else None)

    def facts(self, damping: float) -> dict[str, Any]:
        """What a report should say."""
        silent = int((self.diagonal == 0).sum())
        return ({"damping": self.damping} if self.damping != damping else {}) | (
            {"inputs_always_zero": silent} if silent else {}
        )


def swept_rows(
    work: torch.Tensor,
    scheme: Scheme,
    seen: Curvature,
    *,
    block_size: int,
    order: Order,
    range: Range,
    power: float,
    refine: int,
    sweeps: int,
    name: str,
    first: torch.Tensor | None = None,
) -> QTensor:
    """Sweep, and sweep again, and refine; `first` (m,) is what the codes of the column that is visited first are chosen for."""
    work = work * (seen.diagonal > 0)
    grids = ColumnGrids(work, scheme, range, power, order, seen.visit, name, seen.diagonal)
    codes, _ = sweep(work, seen.factor, grids, block_size, seen.visit, first)
    q = grids.assemble(codes)
    if sweeps > 1 and resweeps(scheme) and grids.fitted_first and seen.visit is not None:
        q = reswept(q, work, seen.factor, seen.visit, block_size, sweeps - 1, name)
    return q if seen.hessian is None else refined(q, work.float(), seen.hessian, refine)
