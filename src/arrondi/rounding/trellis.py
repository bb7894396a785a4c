"""Trellis codes: rings of a column are searched as a whole, and the columns not yet rounded make up for each error.

Owns: `trellis`, `refuse_trellis`, `tiles_swept`. The weight is turned on both sides (`arrondi.tensor.turned`), so that it looks normal, which is what the values of
a trellis are made for; its inputs' moment is turned with it. Then columns are visited as `gptq` visits them, the codes of one being those
of whole rings with the least squared error (`arrondi.tensor.trellis`); of tiles, sixteen columns at once. At last the scale of each row is
fitted to its codes.

Where inputs of the original are known as well, what is rounded is the weight that makes up for earlier rounding (`gptaq.corrected`). Where
gradients of outputs are known too, rows that no ring joins make up for each other (`arrondi.rounding.row_feedback`): with tiles sixteen by sixteen.

Sources: Tseng, Sun, Hou, De Sa 2024, arXiv:2406.11235 (QTIP); Li et al. 2025, arXiv:2504.02692 (the asymmetric target); Tseng, Sun, De Sa 2025,
arXiv:2505.22988 (feedback on both sides).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Final

import torch

from arrondi.arguments import Between, check_arguments
from arrondi.calibration import SecondMoment
from arrondi.errors import DataError, SchemeError, ShapeError
from arrondi.formats import PerChannel, Scheme, Trellis
from arrondi.rounding.gptaq import check_moments, corrected
from arrondi.rounding.gptq_factor import root_factor
from arrondi.rounding.gptq_grids import RowScales
from arrondi.rounding.gptq_sweep import sweep
from arrondi.rounding.options import BlockSize, Damping, Strength
from arrondi.rounding.row_feedback import RowFeedback
from arrondi.tensor.checks import SchemeLike, check_tensor, named, scheme_of
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import round_scale
from arrondi.tensor.trellis import (
    TILE,
    check_shape,
    from_lines,
    ring_values,
    search,
    spread_of,
    to_lines,
)
from arrondi.tensor.turned import Sides, sides_of, turn, turn_columns

Widening = Annotated[float, Between(0, 10)]

_WIDER: Final = {1: 1.25, 2: 1.18, 3: 1.2, 4: 1.2}
"""Standard deviation of a row over that of the values at which its codes are searched, by bits. Columns that make up for others are wider than
the weight: on a language model these lose 5 to 9 % less than what is best for the weight alone (1.06 to 1.1)."""


def refuse_trellis(scheme: Scheme, options: Mapping[str, Any]) -> str | None:
    """Why no weight can be rounded so; None if it can."""
    found = scheme.format.trellis
    if found is None:
        return f"trellis searches codes along rings, got {scheme}. Use a trellis such as TCQ2, TCQ3 or TCQ4, or another method."
    stored = scheme.turned is not None and scheme.turned.seed is None
    if (scheme.granularity == PerChannel()) is stored:
        return f"trellis finds a scale for each row, or numbers for both sides, got {scheme}. Use TCQ2, TCQ3, TCQ4, or EXL3_3."
    return None


def trellis(
    weight: torch.Tensor,
    scheme: SchemeLike,
    moment: SecondMoment | None = None,
    *,
    cross_moment: torch.Tensor | None = None,
    output_moments: Sequence[torch.Tensor] | None = None,
    output_damping: Damping = 0.05,
    strength: Strength = 1.0,
    damping: Damping = 0.01,
    widening: Widening = 0.0,
    block_size: BlockSize = 128,
    name: str = "weight",
    facts: dict[str, Any] | None = None,
) -> QTensor:
    """Round a weight to codes of a trellis, so that the layer's output changes least on the calibration inputs.

    Args:
        weight: (m, n), any float dtype, finite.
        scheme: a trellis, one scale a row, turned or not, or numbers for both sides.
        moment: second moment of the layer's inputs, of size n; None: all inputs count alike.
        cross_moment: Σ x fᵀ (n, n), inputs of the quantized model times those of the original; None: as if these were the same.
        output_moments: Σ g gᵀ of gradients of the loss with respect to outputs, as the (k, k) blocks of its diagonal; None: all outputs
            count alike, and rows make up for nothing.
        output_damping: fraction of the mean diagonal of each of these that is added to it.
        strength: share of the correction for earlier rounding, where there is a cross moment.
        damping: fraction of the mean diagonal of the moment that is added to its diagonal.
        widening: standard deviation of a row over that of the values at which its codes are searched; 0: the usual one of its bits.
        block_size: columns between two updates of the far columns; changes speed, not results.
        name: for messages.
        facts: receives what a report should say: `damping` where it had to be raised.

    Raises:
        ShapeError: weight is not a matrix, has too few rows for a ring, or the moment has another size.
        SchemeError: the scheme is none of these, or an option is out of range.
        DataError: NaN or infinity.
    """
    with named(name):
        check_arguments(trellis, {**locals(), "weight": check_tensor(weight, name), "scheme": scheme_of(scheme)})
    scheme = scheme_of(scheme)
    found = scheme.format.trellis
    if found is None or refuse_trellis(scheme, {}) is not None:
        raise SchemeError(f"{name}: {refuse_trellis(scheme, {})}")
    if cross_moment is not None:
        moment, cross_moment = check_moments("trellis", weight, moment, cross_moment, name)
        weight = corrected(weight, moment, cross_moment, damping, strength)
    work = _finite(weight, scheme, moment, name)
    empty = (work == 0).all(1)
    if output_moments and (known := sum(map(len, output_moments))) != len(work):
        raise ShapeError(f"{name}: the gradients' moments are for {known} outputs, the weight has {len(work)}.")
    sides = _sides(work, scheme, widening)
    if sides is not None and scheme.turned is not None:
        work = turn(work, sides, scheme.turned)
    scale = _scales(work, scheme, widening)
    if moment is None:
        lines = [search(part, found) for part in to_lines(work / scale, found)]
        codes = from_lines(lines, tuple(work.shape), found)
    else:
        hessian = _hessian(moment, sides, scheme).to(work.device)
        factor, needed = root_factor(hessian.clone(), damping)
        if facts is not None and needed != damping:
            facts["damping"] = needed
        rows = None if not output_moments else RowFeedback.of(output_moments, sides, scheme, output_damping)

        def swept(some: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            if found.ring != "rows":
                return tiles_swept(some / scale, factor, found)
            return sweep(some, factor, RowScales(scheme, scale), block_size, None)[0]

        codes = swept(work, scale) if rows is None else rows.visited(work, scale, swept)
        hessian.diagonal().add_(needed * float(hessian.diagonal().mean()))
        scale, sides = _fitted(work, codes, scale, sides, hessian, scheme, rows)
    own = None
    if sides is not None and scheme.turned is not None and scheme.turned.seed is None:
        # Rows of a block share their errors in units of their scales; a row of zeros is to have none of them.
        own = Sides(torch.where(empty, 0.0, sides.rows), sides.columns)
    return QTensor(codes, scale, None, None, scheme, sides=own)


def _finite(weight: torch.Tensor, scheme: Scheme, moment: SecondMoment | None, name: str) -> torch.Tensor:
    """The weight as it is computed with, float32."""
    assert scheme.format.trellis is not None
    with named(name):
        check_shape(tuple(weight.shape), scheme.format.trellis)
    if moment is not None and moment.n != weight.shape[1]:
        raise ShapeError(f"{name}: the second moment is for {moment.n} inputs, the weight has {weight.shape[1]}.")
    work = weight.detach().float()
    if work.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(work))).all()):
        raise DataError(f"{name}: the weights hold NaN or infinity. Repair or exclude the tensor.")
    return work


def _wider(trellis: Trellis, widening: float) -> float:
    """Standard deviation of a row in units of the values."""
    rate = trellis.rate
    usual = _WIDER[int(rate)] + (rate % 1) * (_WIDER[int(rate + 0.5)] - _WIDER[int(rate)]) * 2
    return (widening or usual) / spread_of(trellis)


def _sides(work: torch.Tensor, scheme: Scheme, widening: float) -> Sides | None:
    """Signs; where sides are stored, those of rows have the scale of their row."""
    if scheme.turned is None or scheme.format.trellis is None:
        return None
    shape = tuple(work.shape)
    if scheme.turned.seed is not None:
        return sides_of(shape, scheme.turned, work.device)
    rows, columns = sides_of(shape, replace(scheme.turned, seed=0), work.device)
    size = work.square().mean(1).sqrt() * _wider(scheme.format.trellis, widening)
    return Sides(round_scale(size, "float16") * rows, columns)


def _scales(work: torch.Tensor, scheme: Scheme, widening: float) -> torch.Tensor:
    """(m, 1), from the root mean square of each row, as stored; (1, 1) of one where the sides have it."""
    assert scheme.format.trellis is not None
    if scheme.turned is not None and scheme.turned.seed is None:
        return work.new_ones(1, 1)
    size = work.square().mean(1, keepdim=True).sqrt() * _wider(scheme.format.trellis, widening)
    return round_scale(size, scheme.scale)


def _hessian(moment: SecondMoment, sides: Sides | None, scheme: Scheme) -> torch.Tensor:
    """H (n, n) as the columns of a turned weight see it; numbers of columns are signs here."""
    hessian = moment.matrix()
    if sides is None or scheme.turned is None:
        return hessian
    half = turn_columns(hessian, sides, scheme.turned)
    return turn_columns(half.T.contiguous(), sides, scheme.turned)


def tiles_swept(work: torch.Tensor, factor: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    """Codes of a weight in units of the values, tile by tile: sixteen columns are repaired for all before them, and searched at once.

    Args:
        work: (m, n) float32.
        factor: V (n, n), see `arrondi.rounding.gptq`.

    Returns:
        uint8 (m, n).
    """
    rows = work.T.contiguous()  # columns that were visited hold their differences
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=work.device)
    for start in range(0, len(rows), TILE):
        some = slice(start, start + TILE)
        owed = factor[:start, some].T @ rows[:start]
        due = rows[some] + torch.linalg.solve_triangular(factor[some, some].T, owed, upper=False)
        chosen = from_lines([search(line, trellis) for line in to_lines(due.T, trellis)], tuple(due.T.shape), trellis)
        rows[some] -= ring_values(chosen, trellis).T
        codes[some] = chosen.T
    return codes.T.contiguous()


def _fitted(
    work: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    sides: Sides | None,
    hessian: torch.Tensor,
    scheme: Scheme,
    rows: RowFeedback | None,
) -> tuple[torch.Tensor, Sides | None]:
    """The scale of each row with the least error d H dᵀ, d what it leaves of the weight with these codes, or of all rows together as their
    outputs count; or one for all, in the sides."""
    assert scheme.format.trellis is not None
    values = ring_values(codes, scheme.format.trellis)
    seen = values @ hessian
    if rows is not None and scale.numel() > 1:
        return round_scale(rows.best_scales(values, seen, work, scale), scheme.scale), sides
    power, wanted = (seen * values).sum(1, keepdim=True), (seen * work).sum(1, keepdim=True)
    if scheme.turned is not None and scheme.turned.seed is None and sides is not None:
        factor = wanted.sum() / power.sum() if float(power.sum()) > 0 else 1.0
        return scale, Sides(round_scale(sides.rows * factor, "float16"), sides.columns)
    fits = (power > 0) & (wanted > 0)
    return round_scale(torch.where(fits, wanted / power, scale), scheme.scale), sides
