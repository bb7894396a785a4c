"""Learned tables: which values the codes of a group of rows should mean.

Owns: `kmeans`, `any4`, what schemes they make (`make_kmeans`, `make_any4`) and of which they cannot (`refuse_tables`).

A table is the set of levels t that minimises Σ h (u - t(u))² over the numbers u = w / scale of its rows, where h weighs each by
what its error costs: h = scale² · E[x²] of its input. The clusters are those of `arrondi.rounding.clusters`.

Sources: Kim et al. 2023, arXiv:2306.07629 (tables per output channel, weighted by sensitivity); Elhoushi and Johnson 2025,
arXiv:2507.04610 (any4: tables over group-normalised rows, weighted by activations). Ours beyond the papers: entries of 8 bits, scales
refitted to the table, tables shared by several rows, and codes that make up for each other's errors as GPTQ's do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch

from arrondi.arguments import Between, check_arguments
from arrondi.calibration import SecondMoment
from arrondi.errors import DataError, SchemeError, ShapeError
from arrondi.formats import PerChannel, PerGroup, Scheme, Table, look_up
from arrondi.formats.scheme import PLAIN
from arrondi.rounding.clusters import learn
from arrondi.rounding.gptaq import corrected
from arrondi.rounding.gptq_factor import root_factor
from arrondi.rounding.gptq_grids import LearnedGrids
from arrondi.rounding.gptq_sweep import sweep
from arrondi.rounding.options import Damping, Refine, Strength, Sweeps
from arrondi.rounding.refine import damped, refined
from arrondi.tensor.checks import SchemeLike, check_tensor, named, scheme_of
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import round_scale
from arrondi.tensor.tables import STEP, nearest, round_table, table_of_row

_CHUNK = 1 << 20
"""Weights handled at a time: sorting takes some forty bytes for each."""

_BLOCK = 128
"""Columns between two updates of the far columns; changes speed, not results."""

_SILENT = 1e-6
"""An input that was always zero weighs so much of the mean one, so that its weights are not rounded at random."""


def make_kmeans(scheme: Scheme, options: Mapping[str, Any]) -> Scheme:
    """The scheme that `kmeans` makes of the one asked for: its bits, one scale a row, learned tables."""
    return scheme if scheme.format.learned else _made(replace(scheme, granularity=PerChannel()), options)


def make_any4(scheme: Scheme, options: Mapping[str, Any]) -> Scheme:
    """The scheme that `any4` makes of the one asked for: its bits and groups, learned tables."""
    return scheme if scheme.format.learned else _made(scheme, options)


def _made(scheme: Scheme, options: Mapping[str, Any]) -> Scheme:
    table = Table(int(options.get("rows", 1)), options.get("entries", "int8"))
    return replace(scheme, format=look_up(scheme.format.bits), table=table, signed=None)


def refuse_tables(scheme: Scheme, options: Mapping[str, Any]) -> str | None:
    """Why no tables can be learned for a scheme; None if they can."""
    known = scheme.format.learned or (scheme.format.kind == "integer" and scheme.format.levels == 2**scheme.format.bits)
    rows = isinstance(scheme.granularity, PerGroup) or scheme.granularity == PerChannel()
    if known and rows and scheme.symmetric and scheme.scale in PLAIN and scheme.apart is None:
        return None
    return f"Tables are learned in place of symmetric integers with plain scales of rows or groups (W4A16, W3A16, W2A16), got {scheme}."


Rows = Annotated[int, Between(0, 1_000_000)]
Iterations = Annotated[int, Between(0, 1000)]


def kmeans(
    weight: torch.Tensor,
    scheme: SchemeLike,
    moment: SecondMoment | None = None,
    *,
    cross_moment: torch.Tensor | None = None,
    strength: Strength = 1.0,
    rows: Rows = 1,
    entries: Literal["int8", "float16", "bfloat16", "float32"] = "int8",
    iterations: Iterations = 100,
    feedback: bool = True,
    sweeps: Sweeps = 3,
    refine: Refine = 0,
    damping: Damping = 0.01,
    name: str = "weight",
    facts: dict[str, Any] | None = None,
) -> QTensor:
    """Round to values that are learned for each row, or for some rows together.

    Args:
        weight: (m, n), any float dtype, finite.
        scheme: symmetric integers, whose bits count and whose groups do not; or a look-up format.
        moment: second moment of the inputs (n,); its diagonal weighs the columns. None: all columns weigh the same.
        cross_moment: Σ x fᵀ (n, n), as of `gptaq`, whose correction goes with feedback; None: there is none.
        strength: share of that correction.
        rows: rows that share a table; 0: all of them.
        entries: type in which a table's entries are stored.
        iterations: of Lloyd's algorithm at most, for each table.
        feedback: with a moment, codes are chosen column by column, and later columns make up for the errors of earlier ones, as
            `gptq` does; False: the nearest entry (the published methods).
        sweeps: how often; in between, tables and scales are fitted to what had to be rounded.
        refine: with feedback, how often scales are then fitted to codes and codes to scales; see `arrondi.rounding.refine`.
        damping: of that, as in `gptq`.
        name: for messages.
        facts: receives `damping` where it had to be raised.

    Returns:
        the weight with one scale a row and tables of 2^bits entries.

    Raises:
        SchemeError: no tables can be learned for the scheme.
        ShapeError: the weight is no matrix, or the moment has another size.
        DataError: NaN or infinity in the weight.
    """
    with named(name):
        check_arguments(kmeans, {**locals(), "weight": check_tensor(weight, name), "scheme": scheme_of(scheme)})
    wanted = _checked(weight, scheme_of(scheme), moment, name)
    scheme = make_kmeans(wanted, {"rows": rows, "entries": entries})
    if feedback and moment is not None and cross_moment is not None:
        weight = corrected(weight, moment, cross_moment, damping, strength)
    return _round(weight, scheme, moment, (iterations, 0), damping if feedback else None, (sweeps, refine), facts)


def any4(
    weight: torch.Tensor,
    scheme: SchemeLike,
    moment: SecondMoment | None = None,
    *,
    cross_moment: torch.Tensor | None = None,
    strength: Strength = 1.0,
    rows: Rows = 1,
    entries: Literal["int8", "float16", "bfloat16", "float32"] = "int8",
    iterations: Iterations = 100,
    refits: Annotated[int, Between(0, 100)] = 1,
    feedback: bool = True,
    sweeps: Sweeps = 3,
    refine: Refine = 0,
    damping: Damping = 0.01,
    name: str = "weight",
    facts: dict[str, Any] | None = None,
) -> QTensor:
    """Round to values that are learned for each row, in units of the scale of each group.

    Args:
        weight, moment, cross_moment, strength, rows, entries, iterations, feedback, sweeps, refine, damping, name, facts: as `kmeans` has them.
        scheme: symmetric integers, whose bits and groups count; or a look-up format.
        refits: how often scales and tables are fitted to each other after the first table (0: the published method).

    Raises:
        SchemeError, ShapeError, DataError: as `kmeans`.
    """
    with named(name):
        check_arguments(any4, {**locals(), "weight": check_tensor(weight, name), "scheme": scheme_of(scheme)})
    wanted = _checked(weight, scheme_of(scheme), moment, name)
    scheme = make_any4(wanted, {"rows": rows, "entries": entries})
    if feedback and moment is not None and cross_moment is not None:
        weight = corrected(weight, moment, cross_moment, damping, strength)
    return _round(weight, scheme, moment, (iterations, refits), damping if feedback else None, (sweeps, refine), facts)


def _checked(weight: torch.Tensor, scheme: Scheme, moment: SecondMoment | None, name: str) -> Scheme:
    if (reason := refuse_tables(scheme, {})) is not None:
        raise SchemeError(f"{name}: {reason}")
    if weight.ndim != 2:
        raise ShapeError(
            f"{name}: tables belong to matrices, got shape {tuple(weight.shape)}. Pass each matrix of a stack."
        )
    if moment is not None and moment.n != weight.shape[1]:
        raise ShapeError(f"{name}: the second moment is for {moment.n} inputs, the weight has {weight.shape[1]}.")
    if weight.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(weight.detach()))).all()):
        raise DataError(f"{name}: the weights hold NaN or infinity. Repair or exclude the tensor.")
    return scheme


def _round(
    weight: torch.Tensor,
    scheme: Scheme,
    moment: SecondMoment | None,
    effort: tuple[int, int],
    damping: float | None,
    repeats: tuple[int, int],
    facts: dict[str, Any] | None,
) -> QTensor:
    """Tables and scales for some rows at a time, then codes; `damping` None: the nearest ones. `repeats`: sweeps, and refinements."""
    assert scheme.table is not None
    weight = weight.detach()
    m, n = weight.shape
    importance = _importance(moment, n).to(weight.device)
    size = min(scheme.granularity.size, n) if isinstance(scheme.granularity, PerGroup) else n
    tall = scheme.table.rows or m
    step = max(_CHUNK // max(n * tall, 1), 1) * tall
    parts = [_Part(weight[i : i + step].float(), importance, scheme, size) for i in range(0, m, step)]
    for part in parts:
        part.fit(*effort)
    if moment is None or damping is None or moment.trace == 0:
        codes, scale, table = _joined(parts)
        return QTensor(codes, scale, None, None, scheme, None, table)
    order = torch.argsort(importance, descending=True, stable=True)
    factor, needed = root_factor(moment.matrix().to(weight.device), damping, order)
    if facts is not None and needed != damping:
        facts["damping"] = needed
    sweeps, refine = repeats
    q = _with_feedback(weight.float(), parts, factor, order, effort, sweeps)
    return refined(q, weight.float(), damped(moment, needed).to(weight.device), refine)


def _with_feedback(
    weight: torch.Tensor,
    parts: list[_Part],
    factor: torch.Tensor,
    order: torch.Tensor,
    effort: tuple[int, int],
    sweeps: int,
) -> QTensor:
    """Codes by GPTQ's sweep, then tables for what it had to round, and so on; the sweep with the least loss counts.

    What a column has to make up for moves it away from the weights for which the tables were learned, and the loss of a sweep is
    Σ V[c,c]² (due - value)²: the same problem as before, with other numbers and other weights.
    """
    scheme, size = parts[0].scheme, parts[0].size
    assert scheme.table is not None
    shares = torch.empty(len(order), device=weight.device)
    shares[order] = factor.diagonal().square()
    tables_of = table_of_row(scheme.table, len(weight), weight.device)
    best, found = float("inf"), None
    for left in reversed(range(sweeps)):
        _, scale, table = _joined(parts)
        dues = torch.empty_like(weight) if left else None
        grids = LearnedGrids(scheme, scale, table[tables_of], size, dues)
        codes, loss = sweep(weight, factor, grids, _BLOCK, order)
        if found is None or loss < best:  # a loss that overflows is less than nothing
            best, found = loss, QTensor(codes, scale, None, None, scheme, None, table)
        if dues is not None:
            for part, rows in zip(parts, dues.split([len(p.rows) for p in parts]), strict=True):
                part.again(rows, shares / shares.mean(), *effort)
    assert found is not None
    return found


def _joined(parts: list[_Part]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and tables."""
    codes, scale, table = zip(*((p.codes, p.scale, p.table) for p in parts), strict=True)
    return torch.cat(codes), torch.cat(scale), torch.cat(table)


def _importance(moment: SecondMoment | None, n: int) -> torch.Tensor:
    """What an error of each column weighs, mean 1."""
    if moment is None or moment.trace == 0:
        return torch.ones(n, device="cpu")
    diagonal = moment.diagonal().double()
    return (diagonal / diagonal.mean()).clamp(min=_SILENT).float()


class _Part:
    """Some rows with their scales, tables and codes."""

    def __init__(self, rows: torch.Tensor, importance: torch.Tensor, scheme: Scheme, size: int) -> None:
        assert scheme.table is not None
        self.rows, self.importance, self.scheme, self.size = rows, importance, scheme, size
        self.own = scheme.table
        self.tall = min(self.own.rows or len(rows), len(rows))
        self.missing = -rows.shape[1] % size
        self.table = self.codes = rows.new_empty(0)  # `fit` makes them
        # The least table entry is -1 and the greatest 127/128: the extremes of a group stay inside.
        reach = self._groups(rows).abs().amax(-1) / (1 - STEP)
        self.scale = round_scale(reach, scheme.scale)

    def again(self, rows: torch.Tensor, importance: torch.Tensor, iterations: int, refits: int) -> None:
        """Better tables and scales for other numbers than those that they were learned for."""
        self.rows, self.importance = rows, importance
        self.fit(iterations, refits, self.table)

    def fit(self, iterations: int, refits: int, start: torch.Tensor | None = None) -> None:
        """Tables for these scales, then scales for these tables, and so on while the error falls."""
        self._learn(start, iterations)
        best, kept = self._error(), (self.scale, self.table, self.codes)
        for _ in range(refits):
            self._rescale()
            self._learn(self.table, iterations)
            error = self._error()
            if not error < best:
                break
            best, kept = error, (self.scale, self.table, self.codes)
        self.scale, self.table, self.codes = kept

    def _learn(self, start: torch.Tensor | None, iterations: int) -> None:
        each = self._each(self.scale)
        units, weigh = self.rows / each, each.square() * self.importance
        flat, weights = self._tabled(units), self._tabled(weigh)
        levels = learn(flat, weights, 2**self.scheme.format.bits, iterations, start)
        self.table = round_table(levels, self.own).sort(dim=1).values
        self.codes = self._untabled(nearest(flat, self.table))

    def _rescale(self) -> None:
        """The scale of every group that fits its codes best; kept where that is not positive."""
        values = self._untabled(self.table.gather(1, self._tabled(self.codes).long()))
        weighed = values * self.importance
        top = self._groups(weighed * self.rows).sum(-1)
        bottom = self._groups(weighed * values).sum(-1)
        found = round_scale(top / bottom.clamp(min=torch.finfo(torch.float32).tiny), self.scheme.scale)
        self.scale = torch.where((top > 0) & (bottom > 0), found, self.scale)

    def _error(self) -> float:
        values = self._untabled(self.table.gather(1, self._tabled(self.codes).long()))
        return float(
            ((values * self._each(self.scale) - self.rows).square() * self.importance).sum(dtype=torch.float64)
        )

    def _groups(self, x: torch.Tensor) -> torch.Tensor:
        """(m, n) → (m, groups, size), a short last group filled with zeros."""
        return torch.nn.functional.pad(x, (0, self.missing)).reshape(len(x), -1, self.size)

    def _each(self, scale: torch.Tensor) -> torch.Tensor:
        return scale.repeat_interleave(self.size, dim=1)[:, : self.rows.shape[1]]

    def _tabled(self, x: torch.Tensor) -> torch.Tensor:
        """(m, n) → (tables, rows of a table · n); rows that are missing in the last one are filled with zeros."""
        return torch.nn.functional.pad(x, (0, 0, 0, -len(x) % self.tall)).reshape(-1, self.tall * x.shape[1])

    def _untabled(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, self.rows.shape[1])[: len(self.rows)]
