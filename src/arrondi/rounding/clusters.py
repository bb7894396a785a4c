"""Clusters of numbers on a line, for many sets at once.

Owns: `learn` (Lloyd's algorithm from a good start), `spread` (that start) and `exact` (the best clusters, by dynamic programming).

In one dimension the clusters of the least squared error are intervals, so numbers are sorted once, and every sum over a cluster is the
difference of two running sums: an iteration of Lloyd's algorithm is one binary search for each level.

Sources: Lloyd 1982, "Least squares quantization in PCM"; Fisher 1958, "On grouping for maximum homogeneity" (dynamic programming).
"""

from __future__ import annotations

import torch

_MOST = 64
"""Borders that the dynamic program of the start may choose from."""

_CHUNK = 1 << 22
"""Pairs of borders handled at a time."""


class Line:
    """Weighted numbers in ascending order, with their running sums.

    Args:
        x: (sets, n) float32.
        weights: like x, not negative; numbers that weigh nothing belong to no cluster.
    """

    def __init__(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        ordered, order = x.sort(dim=1)
        self.x = ordered.contiguous()  # sorting keeps strides
        # Running sums lose digits, and their differences with them.
        mass = weights.gather(1, order).double()
        self.mass = _running(mass)
        self.sums = _running(mass * self.x)

    def means(self, borders: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
        """Means between consecutive borders, (sets, borders - 1); those of nothing are as given."""
        mass, sums = (part.gather(1, borders).diff(dim=1) for part in (self.mass, self.sums))
        return torch.where(mass > 0, sums / mass, otherwise.double()).float()

    def borders(self, levels: torch.Tensor) -> torch.Tensor:
        """How many numbers are below each cluster, and below the end of the last: (sets, levels + 1). A tie goes down."""
        middles = (levels[:, 1:] + levels[:, :-1]) / 2
        inner = torch.searchsorted(self.x, middles, right=True)
        ends = inner.new_tensor([0, self.x.shape[1]]).expand(len(inner), -1)
        return torch.cat([ends[:, :1], inner, ends[:, 1:]], dim=1)


def learn(
    x: torch.Tensor, weights: torch.Tensor, levels: int, iterations: int, start: torch.Tensor | None = None
) -> torch.Tensor:
    """The levels of Lloyd's algorithm, ascending.

    Args:
        x: (sets, n) float32, finite; every set by itself.
        weights: like x, not negative: what a squared error costs.
        levels: how many are wanted.
        iterations: at most; it ends where no number changes its cluster.
        start: (sets, levels) ascending levels to start from; None: `spread`.

    Returns:
        (sets, levels) float32. A level of which no number is nearest stays where it started.
    """
    line = Line(x, weights)
    found = spread(line, levels) if start is None else start
    borders = line.borders(found)
    for _ in range(iterations):
        found = line.means(borders, found)
        after = line.borders(found)
        if torch.equal(after, borders):
            break
        borders = after
    return found


def spread(line: Line, levels: int) -> torch.Tensor:
    """Levels to start from: the best clusters whose borders are among a few, half of them equally far apart in rank, half in value."""
    sets, n = line.x.shape
    steps = torch.linspace(0, 1, _MOST // 2 + 1, device=line.x.device)
    ranks = (steps * n).round().long().expand(sets, -1)
    low, high = line.x[:, :1], line.x[:, -1:]
    values = torch.searchsorted(line.x, low + (high - low) * steps[1:-1], right=True)
    return exact(line, levels, torch.cat([ranks, values], dim=1).sort(dim=1).values)


def exact(line: Line, levels: int, borders: torch.Tensor | None = None) -> torch.Tensor:
    """Levels of the clusters with the least squared error among all that have these borders; (sets, levels) ascending.

    Args:
        line: the numbers.
        levels: how many are wanted.
        borders: (sets, candidates) int64, ascending from 0 to n; None: between all numbers, which takes n² a set.
    """
    sets, n = line.x.shape
    if borders is None:
        borders = torch.arange(n + 1, device=line.x.device).expand(sets, -1)
    step = max(_CHUNK // borders.shape[1] ** 2, 1)
    parts = [_best(line, levels, borders, slice(i, i + step)) for i in range(0, sets, step)]
    chosen = torch.cat(parts)
    # An empty cluster starts where its border is.
    beside = line.x.gather(1, chosen[:, :-1].clamp(max=n - 1))
    return line.means(chosen, beside).cummax(dim=1).values


def _best(line: Line, levels: int, borders: torch.Tensor, some: slice) -> torch.Tensor:
    """The borders (sets, levels + 1) that explain most: the sum over clusters of (Σ h u)² / Σ h is largest."""
    borders = borders[some]
    mass, sums = (part[some].gather(1, borders).float() for part in (line.mass, line.sums))
    width = mass[:, None, :] - mass[:, :, None]  # (sets, from, to)
    gain = (sums[:, None, :] - sums[:, :, None]).square_() / width
    gain.masked_fill_(width <= 0, -torch.inf)
    gain.diagonal(dim1=1, dim2=2).zero_()
    best, choices = gain[:, 0], []
    for _ in range(levels - 1):
        best, choice = (best[:, :, None] + gain).max(dim=1)
        choices.append(choice)
    at = torch.full((len(borders), 1), borders.shape[1] - 1, dtype=torch.int64, device=borders.device)
    found = [at]
    for choice in reversed(choices):
        at = choice.gather(1, at)
        found.append(at)
    found.append(torch.zeros_like(at))
    return borders.gather(1, torch.cat(found[::-1], dim=1))


def _running(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x.cumsum(dim=1), (1, 0))
