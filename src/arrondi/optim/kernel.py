"""The compiled step of the optimizers: `step_adam`, `step_momentum`, and the tables by which it finds codes.

Owns: what is handed over, and when (`takes`). The reference is `arrondi.optim.update` on `Blocks`: states that are read, a step, states that are written. The
kernel does the same operations in the same order, up to how PyTorch itself fuses a multiplication with an addition.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch

from arrondi.formats import Format
from arrondi.native import native, operand, threads
from arrondi.optim.blocks import MAPS, Blocks
from arrondi.optim.update import Adam, Momentum
from arrondi.tensor.encoding import encode, value_table

_SMALLEST: Final = 2.0**-23
"""Below it everything is nearest to 0 in every map."""


class Cells(NamedTuple):
    """The nearest code by the upper 16 bits of a float32: cells of numbers from 0 up, then those of numbers below 0.

    Attributes:
        codes: (2 · cells,) int32, of the lowest number of a cell.
        thresholds: (2 · cells,) float32, the largest number of the cell with that code; infinity where all have it.
        first: the upper 16 bits of the first cell.
    """

    codes: torch.Tensor
    thresholds: torch.Tensor
    first: int


@functools.lru_cache(maxsize=4)
def cells_of(format: Format) -> Cells:
    """The cells of a map of values in -1 … 1.

    >>> from arrondi.optim.blocks import MAPS
    >>> cells_of(MAPS["dynamic8"]).codes.numel()
    5890
    """
    first, last = (int(torch.tensor(v).view(torch.int32)) >> 16 for v in (_SMALLEST, 1.0))
    start = torch.arange(first, last + 1, dtype=torch.int32) << 16
    end = (start | 0xFFFF).view(torch.float32).clamp(max=1.0)
    start = start.view(torch.float32)
    start[0] = 0.0
    low, high = torch.cat([start, -end]), torch.cat([end, -start])
    at_low, at_high = encode(low, format).int(), encode(high, format).int()
    assert int((at_high - at_low).max()) <= 1, "a cell has one threshold at most"
    levels = value_table(format, torch.device("cpu"), torch.float64)
    upper = (at_low.long() + 1).clamp(max=len(levels) - 1)
    middle = (levels[at_low.long()] + levels[upper]) / 2
    limit = middle.float()
    limit = torch.where(limit.double() > middle, torch.nextafter(limit, torch.tensor(-torch.inf)), limit)
    return Cells(at_low, torch.where(at_high > at_low, limit, torch.inf), first)


def takes(p: torch.Tensor, states: list[Blocks]) -> bool:
    """Whether the kernel can do it: float32 in the CPU's memory."""
    return (
        native is not None
        and hasattr(native, "step_adam")
        and p.device.type == "cpu"
        and all(s.codes.is_cpu for s in states)
    )


def step_of(rule: object) -> Callable[..., None] | None:
    """The compiled step for these numbers; None if there is none."""
    return step_adam if isinstance(rule, Adam) else step_momentum if isinstance(rule, Momentum) else None


def step_adam(rule: Adam, p: torch.Tensor, g: torch.Tensor, m: Blocks, v: Blocks) -> None:
    """One step on flat float32 numbers, all in place."""
    keep = 1 - rule.lr * rule.decay if rule.decoupled else 1.0
    _module().step_adam(
        *_numbers(p, g, m), _state(m), _state(v), keep, 0.0 if rule.decoupled else rule.decay, 1 - rule.beta1, rule.beta2,
        1 - rule.beta2, rule.root, rule.eps, -rule.size, threads(),
    )  # fmt: skip


def step_momentum(rule: Momentum, p: torch.Tensor, g: torch.Tensor, m: Blocks) -> None:
    """One step on flat float32 numbers, all in place."""
    _module().step_momentum(
        *_numbers(p, g, m), _state(m), rule.decay, rule.momentum, 1 - rule.dampening, -rule.lr, rule.step == 1, rule.nesterov,
        threads(),
    )  # fmt: skip


def _numbers(p: torch.Tensor, g: torch.Tensor, state: Blocks) -> tuple[int, int, int, int]:
    shape = (p.numel(),)
    return shape[0], state.block, operand("p", p, shape, torch.float32), operand("g", g, shape, torch.float32)


def _state(state: Blocks) -> tuple[int, ...]:
    count = state.codes.numel()
    cells, values = cells_of(MAPS[state.map]), value_table(MAPS[state.map], torch.device("cpu"))
    return (
        operand("codes", state.codes, (count,), torch.uint8),
        operand("scale", state.scale, (-(-count // state.block),), torch.float32),
        operand("values", values, (256,), torch.float32),
        operand("cells", cells.codes, cells.codes.shape, torch.int32),
        operand("thresholds", cells.thresholds, cells.codes.shape, torch.float32),
        cells.first,
        cells.codes.numel() // 2,
    )


def _module() -> Any:
    return native
