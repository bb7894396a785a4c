"""Grids for what is badly spread over a uniform one: twin grids for softmax and GELU, and powers of two for softmax.

A value on such a grid is a QDQ node with the attribute `grid`; files say it in standard operators. Codes of b bits are b - 1 bits on one of two
uniform grids and one bit that says which, or the exponent of a power of two.

Sources: Yuan et al. 2022, arXiv:2111.12293 (twin uniform quantization); Lin et al. 2022, arXiv:2111.13824 (log2 attention).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch

from arrondi.errors import SchemeError
from arrondi.graph.ir import Graph, Node

Tensor = torch.Tensor

GRIDS: Final[Mapping[str, tuple[str, ...]]] = {"Softmax": ("twin", "log2"), "Gelu": ("twin",)}
"""Operator → grids that what it gives may have, beside the uniform one."""
_LOWEST: Final = 0.169971
"""Of GELU, below zero."""
_HALVINGS: Final = 20
"""Ends of the fine grid of a softmax that are looked at: 2⁻ᵏ for k below this."""
_USUAL: Final = 3
"""k where nothing is looked at."""


def check_grids(asked: Mapping[str, str], graph: Graph | None = None) -> dict[str, str]:
    """Operator → grid, spelled as in `GRIDS`; uniform ones are left out.

    Args:
        graph: whose operators they are, if it is known.

    Raises:
        SchemeError: names what there is; or the graph has no such operator.
    """
    ops = {op.lower(): op for op in GRIDS}
    for name, grid in asked.items():
        if name.lower() not in ops or grid not in ("uniform", *GRIDS[ops[name.lower()]]):
            there = ", ".join(f"{op.lower()}={g}" for op, grids in GRIDS.items() for g in grids)
            raise SchemeError(f"Uneven grids are {there}, got {name}={grid}.")
    found = {ops[name.lower()]: grid for name, grid in asked.items() if grid != "uniform"}
    held = {*found} if graph is None else {node.op for node in graph.nodes}
    for op, grid in found.items():
        if op not in held:
            raise SchemeError(f"The network has no operator {op} (one that is spelled in others is none), so {op.lower()}={grid} says nothing of it. Leave it out, or export with operator set 20 or later, which has Gelu.")  # fmt: skip
    return found


def uneven(op: str, grid: str, bits: int, high: float) -> tuple[dict[str, Any], np.ndarray]:
    """Attributes of the node and its scales.

    Args:
        op: what makes the value.
        high: the end of its range, of GELU.
    """
    kind = "log2" if grid == "log2" else ("size" if op == "Softmax" else "sign")
    top = 2 ** (bits - 1) - 1
    scales = {
        "log2": [1.0], "size": [2.0**-_USUAL / top, 1 / top], "sign": [_LOWEST / 2 ** (bits - 1), max(high, 1e-6) / top],
    }[kind]  # fmt: skip
    low, most = (0, 2**bits - 1) if kind == "log2" else (0 if kind == "size" else -top - 1, top)
    return {"codes": "int8", "grid": kind, "low": low, "high": most}, np.array(scales, np.float32)


def looked_at(attrs: Mapping[str, Any], scale: Tensor, whole: float, shares: list[float]) -> list[Tensor]:
    """Scales that a search tries, in place of `scale`.

    Args:
        whole: max of the values, of GELU.
    """
    top = attrs["high"]
    if attrs["grid"] == "size":
        return [torch.tensor([2.0**-k / top, 1 / top]) for k in range(_HALVINGS)]
    if attrs["grid"] == "sign":
        return [torch.stack([scale[0], torch.tensor(whole * share / top)]) for share in shares]
    return [scale]


def on_uneven(attrs: Mapping[str, Any], x: Tensor, scale: Tensor) -> Tensor:
    """x on its grid; the gradient passes where x lies within the range."""
    low, high = attrs["low"], attrs["high"]
    if attrs["grid"] == "log2":
        exponent = torch.round(-torch.log2(x))
        given = torch.where(exponent > high, torch.zeros_like(x), torch.exp2(-exponent.clamp(low, high)))
        return x + (given - x).detach() if x.requires_grad else given
    fine, coarse = scale.unbind()
    small = torch.round(x / fine).clamp(low, high) * fine
    large = torch.round(x / coarse).clamp(0, high) * coarse
    given = torch.where(_below(attrs, x, fine), small, large)
    if not x.requires_grad:
        return given
    inside = x.clamp(float(low * fine), float(high * coarse))
    return inside + (given - inside).detach()


def _below(attrs: Mapping[str, Any], x: Tensor, fine: Tensor) -> Tensor:
    """Where the first grid counts."""
    return x < (fine * attrs["high"] if attrs["grid"] == "size" else 0.0)


def spelled(node: Node, scale: np.ndarray) -> Iterator[tuple[Node, dict[str, np.ndarray]]]:
    """The node in standard operators, each with the constants that it is the first to read."""
    (x, *_), (output,), stem = node.inputs, node.outputs, node.name
    low, high = node.attrs["low"], node.attrs["high"]

    def one(suffix: str, value: float) -> tuple[str, dict[str, np.ndarray]]:
        return f"{stem}_{suffix}", {f"{stem}_{suffix}": np.array(value, np.float32)}

    if node.attrs["grid"] == "log2":
        base, known = one("base", -1 / np.log(2))
        yield Node(f"{stem}_log", "Log", (x,), (f"{stem}_logs",)), {}
        yield Node(f"{stem}_bits", "Mul", (f"{stem}_logs", base), (f"{stem}_exponents",)), known
        yield Node(f"{stem}_round", "Round", (f"{stem}_exponents",), (f"{stem}_codes",)), {}
        (least, a), (most, b), (two, c), (zero, d) = one("low", low), one("high", high), one("two", 2), one("zero", 0)
        yield Node(f"{stem}_clip", "Clip", (f"{stem}_codes", least, most), (f"{stem}_clipped",)), a | b
        yield Node(f"{stem}_neg", "Neg", (f"{stem}_clipped",), (f"{stem}_minus",)), {}
        yield Node(f"{stem}_power", "Pow", (two, f"{stem}_minus"), (f"{stem}_powers",)), c
        yield Node(f"{stem}_beyond", "Greater", (f"{stem}_codes", most), (f"{stem}_tiny",)), {}
        yield Node(f"{stem}_pick", "Where", (f"{stem}_tiny", zero, f"{stem}_powers"), (output,)), d
        return
    fine, coarse = (float(s) for s in scale)
    by_size = node.attrs["grid"] == "size"
    middle, known = one("middle", float(np.float32(fine) * np.float32(high)) if by_size else 0.0)
    yield Node(f"{stem}_less", "Less", (x, middle), (f"{stem}_below",)), known
    for part, step, least_code in (("fine", fine, low), ("coarse", coarse, 0)):
        (s, a), (least, b), (most, c) = one(part, step), one(f"{part}_low", least_code), one(f"{part}_high", high)
        yield Node(f"{stem}_{part}_steps", "Div", (x, s), (f"{stem}_{part}_divided",)), a
        yield Node(f"{stem}_{part}_round", "Round", (f"{stem}_{part}_divided",), (f"{stem}_{part}_codes",)), {}
        yield (
            Node(f"{stem}_{part}_clip", "Clip", (f"{stem}_{part}_codes", least, most), (f"{stem}_{part}_clipped",)),
            b | c,
        )
        yield Node(f"{stem}_{part}_value", "Mul", (f"{stem}_{part}_clipped", s), (f"{stem}_{part}_given",)), {}
    yield Node(f"{stem}_pick", "Where", (f"{stem}_below", f"{stem}_fine_given", f"{stem}_coarse_given"), (output,)), {}
