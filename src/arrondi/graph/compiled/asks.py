"""What emitters ask of a node: its constants, grids of eight bits, values of codes, and the limits of what follows."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import torch

from arrondi.graph.compiled.builder import Builder
from arrondi.graph.compiled.room import Held
from arrondi.graph.ir import ARITHMETIC, Node
from arrondi.graph.requantize import shift_of

Array = np.ndarray


_HOW: Final = {"float": 0, "single": 1, "double": 2}


class Ending(NamedTuple):
    """How sums become codes.

    Attributes:
        multiplier: float32, or (…, 2) int32 of fixed-point ones: m and e of m · 2^(e − 31).
        how: the arithmetic as the kernels number it.
    """

    multiplier: Array
    how: int


def ending(node: Node, multiplier: torch.Tensor, lanes: int) -> Ending | None:
    """What multiplies the sums of a node, once for each lane; None where a fixed-point multiplier is too large or too small."""
    whole = np.broadcast_to(multiplier.reshape(-1).numpy(), (lanes,))
    how = _HOW[node.attrs.get(ARITHMETIC, "float")]
    if not how:
        return Ending(whole.astype(np.float32), how)
    found = fixed(*(float(v) for v in whole))
    return None if found is None else Ending(found, how)


def fixed(*multipliers: float) -> Array | None:
    """Each as (m, e), int32; None where one is too large or too small for the kernels."""
    pairs = [shift_of(v) for v in multipliers]
    return np.array(pairs, np.int32) if all(-31 <= e <= 30 for _, e in pairs) else None


def numbers(b: Builder, *names: str) -> list[Array] | None:
    """Constants, None where one is none."""
    found = [b.constants.get(n) for n in names]
    return None if any(v is None for v in found) else [v for v in found if v is not None]


def raised(zero: Array) -> int:
    """A zero point as it lies in memory."""
    return int(zero.reshape(())) + (128 if zero.dtype == np.int8 else 0)


def eight(*zeros: Array) -> bool:
    return all(z.size == 1 and z.dtype in (np.uint8, np.int8) for z in zeros)


def codes_of(b: Builder, name: str, zero: Array) -> Held | None:
    """A value of codes of the type that its zero point has."""
    held = b.value(name)
    fine = held is not None and held.codes and held.signed == (zero.dtype == np.int8) and held.numel
    return held if fine else None


def limits(b: Builder, name: str, zero: Array) -> tuple[str, int, int]:
    """The output of a layer: its name, lowest and highest code, those of a Clip that alone follows it."""
    ends = np.iinfo(zero.dtype)
    low, high = int(ends.min), int(ends.max)
    after = b.graph.only_reader(name)
    if after is not None and after.op == "Clip" and after.inputs[0] == name:
        found = [b.constants.get(n) if n else None for n in after.inputs[1:3]]
        if all(v is not None or not n for v, n in zip(found, after.inputs[1:3], strict=True)):
            low = low if not found or found[0] is None else max(low, int(found[0]))
            high = high if len(found) < 2 or found[1] is None else min(high, int(found[1]))
            if low <= high:
                b.skipped = {after.name}
                name = after.outputs[0]
    up = 128 if zero.dtype == np.int8 else 0
    return name, low + up, high + up


def plane(sizes: Any, one: int = 1) -> tuple[int, int]:
    """Numbers for two axes of space, of which the first may be missing."""
    whole = [int(v) for v in sizes]
    return (one, whole[0]) if len(whole) == 1 else (whole[0], whole[1])
